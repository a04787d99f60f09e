"""CLIP's ResNet against OpenCLIP's stored outputs, and batch normalization on meshes and in micro-batches."""

import ast
import functools
import importlib.util
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from clipjax.params import abstract, count, map_with_path, merge, paths, split
from clipjax.towers import ResNet

GOLDENS = Path(__file__).parent / "goldens"


def load_maker():
    spec = importlib.util.spec_from_file_location("make_resnet", GOLDENS / "make_resnet.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MAKER = load_maker()
CONFIG = ResNet(
    blocks=MAKER.BLOCKS, width=MAKER.WIDTH, heads=MAKER.HEADS, output_dim=MAKER.OUTPUT,
    image_size=MAKER.SIZE, mean=(0, 0, 0), std=(1, 1, 1),
)  # fmt: skip
KEY = jax.random.key(0)


def from_openai(name, state):
    """The leaf `name` of ours, from a state dict in OpenAI's names."""
    *place, layer, leaf = name.split("/")
    if place[:1] == ["pool"] or layer == "pool":
        if leaf == "positions":
            return state["attnpool.positional_embedding"]
        value = state[
            f"attnpool.{ {'out': 'c'}.get(layer, layer) }_proj.{leaf.replace('kernel', 'weight')}"
        ]
        return value.T if leaf == "kernel" else value
    leaf = {
        "kernel": "weight",
        "scale": "weight",
        "mean": "running_mean",
        "var": "running_var",
    }.get(leaf, leaf)
    layer = {"downsample_conv": "downsample.0", "downsample_bn": "downsample.1"}.get(layer, layer)

    def one(prefix):
        value = state[f"{prefix}{layer}.{leaf}"]
        return value.transpose(2, 3, 1, 0) if value.ndim == 4 else value

    if place == ["stem"]:
        return one("")
    stage, part = place
    if part == "first":
        return one(f"{stage}.0.")
    last = max(int(m[1]) for n in state if (m := re.match(rf"{stage}\.(\d+)\.", n)))
    return np.stack([one(f"{stage}.{i}.") for i in range(1, last + 1)])


@functools.cache
def golden():
    with np.load(GOLDENS / "resnet.npz") as file:
        stored = dict(file)
    shapes = {
        n: ast.literal_eval(s) for n, s in zip(stored["names"], stored["shapes"], strict=True)
    }
    return stored, MAKER.weights(shapes)


@functools.cache
def imported(config=CONFIG):
    """(graphdef, params, model_state) with the golden's weights."""
    graphdef, params, stats = abstract(lambda: config.build(nnx.Rngs(0)))
    _, state = golden()

    def fill(name, leaf):
        value = from_openai(name, state)
        assert value.shape == leaf.shape, name
        return jnp.asarray(value)

    assert count(params) + count(stats) == sum(v.size for v in state.values())  # nothing left over
    return graphdef, map_with_path(fill, params), map_with_path(fill, stats)


def images():
    return jnp.asarray(MAKER.inputs()[0].transpose(0, 2, 3, 1))


def run(config, training):
    """(tokens, pooled, new statistics, gradients of sum(pooled * cotangent))."""
    graphdef, params, stats = imported(config)

    @jax.jit
    def f(params, stats, x, cotangent):
        def value(params):
            module = merge(graphdef, params, stats)
            tokens, pooled = module(x, key=KEY if training else None)
            return (pooled * cotangent).sum(), (tokens, pooled, split(module)[2])

        grads, out = jax.grad(value, has_aux=True)(params)
        return *out, grads

    return f(params, stats, images(), jnp.asarray(MAKER.inputs()[1]))


@functools.cache
def trained():
    return run(CONFIG, training=True)


def close(got, expected, tolerance=1e-4):
    expected = np.asarray(expected)
    assert np.abs(np.asarray(got) - expected).max() <= tolerance * np.abs(expected).max()


def test_inference_agrees_with_openclip():
    stored, state = golden()
    tokens, pooled, stats, _ = run(CONFIG, training=False)
    np.testing.assert_allclose(pooled, stored["eval"], atol=1e-4)
    assert np.abs(stored["eval"]).max() > 0.3
    for name, leaf in paths(stats):
        np.testing.assert_array_equal(leaf, from_openai(name, state), err_msg=name)
    assert tokens.shape == (MAKER.BATCH, 4, MAKER.OUTPUT)


def test_training_agrees_with_openclip():
    """Outputs normalized by the batch's own statistics, and the running ones afterwards."""
    stored, _ = golden()
    _, pooled, stats, _ = trained()
    close(pooled, stored["train"])
    assert np.abs(stored["train"] - stored["eval"]).max() > 0.1
    state = {n.removeprefix("stats/"): v for n, v in stored.items() if n.startswith("stats/")}
    for name, leaf in paths(stats):
        close(leaf, from_openai(name, state))


def test_gradients_through_batch_statistics_agree_with_openclip():
    stored, _ = golden()
    grads = dict(paths(trained()[3]))
    for theirs, ours, index in [
        ("conv1.weight", "stem/conv1/kernel", None),
        ("layer1.1.conv2.weight", "layer1/blocks/conv2/kernel", 0),
        ("layer3.2.bn1.weight", "layer3/blocks/bn1/scale", 1),
        ("layer3.2.conv3.weight", "layer3/blocks/conv3/kernel", 1),
        ("attnpool.q_proj.weight", "pool/q/kernel", None),
    ]:
        got = grads[ours] if index is None else grads[ours][index]
        expected = stored["grad/" + theirs]
        close(got, expected.transpose(2, 3, 1, 0) if expected.ndim == 4 else expected.T)
