"""CLIP's ResNet against OpenCLIP's stored outputs, and batch normalization on meshes and in micro-batches."""

import ast
import dataclasses
import functools
import importlib.util
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from clipjax.data.placement import to_global
from clipjax.errors import ClipjaxError
from clipjax.layout import on_mesh
from clipjax.mesh import MeshShape, batch_sharding, replicated
from clipjax.models import DualEncoder
from clipjax.objectives import PairEngine, Softmax
from clipjax.optim import SGD, Scale
from clipjax.params import abstract, count, map_with_path, merge, paths, split
from clipjax.sharding import Sharding
from clipjax.towers import ResNet, Tower
from clipjax.towers.layers import normal
from clipjax.towers.pixels import normalize
from clipjax.towers.resnet import BatchNorm, Conv, GridAttentionPool, Stage
from clipjax.train.state import Blueprint
from clipjax.train.step import make_step

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
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""Machine code that is quick to make: a run takes no time here, compiling it does."""


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

    @functools.partial(jax.jit, compiler_options=QUICK)
    def f(params, stats, x, cotangent):
        def value(params):
            module = merge(graphdef, params, stats)
            tokens, pooled = module(x, key=KEY if training else None)
            return (pooled * cotangent).sum(), (tokens, pooled, split(module)[2])

        if not training:
            return *value(params)[1], None
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


@pytest.mark.parametrize(
    ("name", "published"),
    [
        # OpenCLIP's ModifiedResNet, counted without allocating it
        ("RN50", 38_316_896),
        ("RN101", 56_259_936),
        ("RN50x4", 87_137_080),
        ("RN50x16", 167_328_912),
        ("RN50x64", 420_380_352),
    ],
)
def test_presets_have_the_published_number_of_parameters(name, published):
    assert count(abstract(lambda: ResNet.preset(name).build(nnx.Rngs(0)))[1]) == published


TINY = ResNet(
    blocks=(1, 1, 2, 1), width=2, heads=2, output_dim=4, image_size=(32, 64), momentum=0.25
)


def tiny_images(n=8):
    return np.random.default_rng(5).integers(0, 256, (n, 32, 64, 3)).astype(np.uint8)


def drawn_like(shapes):
    """Every leaf random: a new block's last scale would be zero and hide the block."""
    rng = np.random.default_rng(6)

    def draw(name, leaf):
        noise = rng.standard_normal(leaf.shape)
        if name.endswith(("scale", "var")):
            return jnp.asarray(np.exp(0.2 * noise), jnp.float32)
        fan_in = np.prod(leaf.shape[-4:-1] if "conv" in name else leaf.shape[-2:-1])
        return jnp.asarray(noise * (fan_in**-0.5 if name.endswith("kernel") else 0.3), jnp.float32)

    return map_with_path(draw, shapes)


@functools.cache
def tiny_weights():
    _, params, stats = abstract(lambda: TINY.build(nnx.Rngs(0)))
    return drawn_like(params), drawn_like(stats)


@functools.cache
def tiny_run(devices=1, training=True, **fields):
    """(pooled, new statistics) on a mesh of so many devices."""
    config = dataclasses.replace(TINY, **fields)
    graphdef, _, _ = abstract(lambda: config.build(nnx.Rngs(0)))
    mesh = MeshShape().build(jax.devices()[:devices])

    def f(params, stats, images):
        with on_mesh(mesh):
            module = merge(graphdef, params, stats)
            pooled = module(images, key=KEY if training else None)[1]
        return pooled, split(module)[2]

    whole, rows = replicated(mesh), batch_sharding(mesh)
    run = jax.jit(f, in_shardings=(whole, whole, rows), compiler_options=QUICK)
    return run(*tiny_weights(), tiny_images())


def assert_same(got, expected, tolerance):
    for (name, a), (_, b) in zip(paths(got), paths(expected), strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert np.abs(a - b).max() <= tolerance * max(np.abs(b).max(), 1e-2), name


@functools.cache
def stage_run(**fields):
    """(output, new statistics, gradients) of one stage of three blocks in training."""
    config = dataclasses.replace(TINY, **fields)
    graphdef, params, stats = abstract(lambda: Stage(config, 8, 2, 3, 2, nnx.Rngs(0)))
    x = np.random.default_rng(9).standard_normal((4, 4, 4, 8)).astype(np.float32)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def f(params, stats):
        def value(params):
            module = merge(graphdef, params, stats)
            y = module(jnp.asarray(x), True)
            return jnp.sin(y).sum(), (y, split(module)[2])

        grads, out = jax.grad(value, has_aux=True)(params)
        return *out, grads

    return f(drawn_like(params), drawn_like(stats))


@pytest.mark.parametrize("fields", [{"scan": False}, {"remat": "full"}], ids=["unrolled", "remat"])
def test_settings_of_the_program_change_no_output_no_statistics_and_no_gradient(fields):
    assert_same(stage_run(**fields), stage_run(), 1e-4)


def test_statistics_are_those_of_the_global_batch_on_any_mesh():
    """Of one image a device alone they would differ by far more than rounding."""
    assert_same(tiny_run(devices=8), tiny_run(), 1e-4)


def test_bfloat16_keeps_statistics_in_float32():
    pooled, stats = tiny_run(dtype="bfloat16")
    assert pooled.dtype == jnp.bfloat16
    assert {leaf.dtype for _, leaf in paths(stats)} == {jnp.dtype("float32")}
    assert_same(stats, tiny_run()[1], 0.05)


def first_convolution(kernel):
    """What the stem's first layer makes of the tiny images, float64 [B, 16, 32, 1]."""
    pixels = np.pad((tiny_images() / 255.0 - 0.5) / 0.5, ((0, 0), (1, 1), (1, 1), (0, 0)))
    kernel = np.asarray(kernel, np.float64)
    return sum(
        pixels[:, i : i + 32 : 2, j : j + 64 : 2] @ kernel[i, j] for i in range(3) for j in range(3)
    )


def test_running_statistics_move_by_the_momentum_and_only_in_training():
    """Of the first layer, whose input is known, in float64."""
    params, before = tiny_weights()
    y = first_convolution(params["stem"]["conv1"]["kernel"]).reshape(-1, 1)
    after = tiny_run()[1]["stem"]["bn1"]
    for name, newest in (("mean", y.mean(0)), ("var", y.var(0, ddof=1))):
        expected = 0.75 * np.asarray(before["stem"]["bn1"][name]) + 0.25 * newest
        np.testing.assert_allclose(after[name], expected, rtol=1e-4, atol=1e-5)
    inference, frozen = tiny_run(training=False), tiny_run(freeze_stats=True)
    for same in (inference, frozen):
        assert_same(same[1], before, 0)
    np.testing.assert_allclose(frozen[0], inference[0], atol=1e-5)


def test_tokens_are_what_attention_to_one_place_alone_would_return():
    """With one place, half of the attention's keys are it and half their mean, which is it again."""
    pool = GridAttentionPool(dataclasses.replace(TINY, image_size=32), nnx.Rngs(1))
    pool.positions[...] = jnp.zeros_like(pool.positions[...])
    features = np.random.default_rng(7).standard_normal((8, 1, 1, 64)).astype(np.float32)
    tokens, pooled = pool(jnp.asarray(features))
    assert tokens.shape == (8, 1, 4)
    np.testing.assert_allclose(tokens[:, 0], pooled, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"blocks": (1, 1, 1)}, r"blocks=\(1, 1, 1\) must be four"),
        ({"width": 3}, "width=3 must be even"),
        ({"heads": 5}, r"heads=5 does not divide the 64 channels"),
        ({"image_size": 48}, "image_size=48 is no multiple of 32"),
        ({"momentum": 0.0}, r"momentum=0.0 must be in \(0, 1\]"),
        ({"eps": 0.0}, "eps=0.0 must be above 0"),
        ({"remat": "dots"}, "remat='dots' is unknown"),
        ({"dtype": "half"}, "dtype='half' is unknown"),
        ({"output_dim": 0}, "output_dim=0"),
    ],
)
def test_bad_fields_are_refused_by_name(fields, words):
    with pytest.raises(ClipjaxError, match=words):
        dataclasses.replace(TINY, **fields)


def test_an_unknown_preset_is_refused():
    with pytest.raises(ClipjaxError, match="unknown ResNet preset 'RN5'.*RN50"):
        ResNet.preset("RN5")


def test_images_of_another_size_are_refused():
    with pytest.raises(ClipjaxError, match=r"images \[B, 32, 64, 3\], got \[2, 64, 64, 3\]"):
        jax.eval_shape(
            lambda x: TINY.build(nnx.Rngs(0))(x), jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.uint8)
        )


@dataclasses.dataclass(frozen=True)
class Mini(Tower):
    """One convolution and its norm, which compile sooner than a ResNet."""

    def build(self, rngs):
        return MiniModule(rngs)


class MiniModule(nnx.Module):
    def __init__(self, rngs):
        self.width = 1
        self.conv, self.bn = Conv(3, 3, 1, rngs, stride=2), BatchNorm(TINY, 1)

    def __call__(self, image, *, key=None):
        x = self.bn(self.conv(normalize(image, TINY)), key is not None)
        return x.reshape(x.shape[0], -1, 1), x.mean((1, 2))


@dataclasses.dataclass(frozen=True)
class Table(Tower):
    """A text is the mean of its words."""

    def build(self, rngs):
        return TableModule(rngs)


class TableModule(nnx.Module):
    def __init__(self, rngs):
        self.width, self.embedding = 4, normal(rngs, (9, 4), 1.0)

    def __call__(self, text, *, key=None):
        x = self.embedding[...][text]
        return x, x.mean(1)


def test_an_accumulating_step_averages_the_statistics_of_its_micro_batches():
    model = DualEncoder(image=Mini(), text=Table(), embed_dim=4)
    mesh = MeshShape().build(jax.devices()[:1])
    blueprint = Blueprint.draw(
        model, Softmax(), SGD(), None, mesh, Sharding(), 10, Scale(8, 8), seed=0
    )
    step = make_step(blueprint, Softmax(), PairEngine(mesh), mesh, accumulate=2)
    tokens = np.random.default_rng(8).integers(3, 9, (8, 4)).astype(np.int32)
    batch = {"image": tiny_images(), "text": tokens, "id": np.arange(8, dtype=np.int32)}
    before = blueprint.init()
    after, _ = jax.jit(step, compiler_options=QUICK)(before, to_global(batch, mesh))
    y = first_convolution(before.params["image"]["conv"]["kernel"])
    halves = y[:4].reshape(-1, 1), y[4:].reshape(-1, 1)
    stats = after.model_state["image"]["bn"]
    mean = sum(half.mean(0) for half in halves) / 2
    var = sum(half.var(0, ddof=1) for half in halves) / 2
    np.testing.assert_allclose(stats["mean"], 0.25 * mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(stats["var"], 0.75 + 0.25 * var, rtol=1e-4)
