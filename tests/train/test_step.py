"""The step: the same loss and gradients on every mesh and with any accumulation; bad steps change nothing.

Gradients are read off a plain SGD step with a learning rate so large that the old parameters drown in it.
"""

import dataclasses
import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from clipjax.bench.program import work
from clipjax.data.placement import to_global
from clipjax.errors import ClipjaxError
from clipjax.mesh import MeshShape, batch_sharding
from clipjax.models import DualEncoder
from clipjax.objectives import AllGather, Hierarchical, PairEngine, Ring, Sigmoid, Softmax
from clipjax.optim import SGD, Constant, Ema, Group, Scale
from clipjax.params import merge, paths, split
from clipjax.sharding import Sharding, per_device_bytes
from clipjax.towers import TextTransformer, ViT
from clipjax.train.state import Blueprint
from clipjax.train.step import check_batch, jit_step, make_step

sys.path.insert(0, str(Path(__file__).parent))
from drawn import begin

LR = 1e4
SHAPE = {"width": 36, "depth": 2, "heads": 4}  # 36 does not divide over 8 devices in one dimension
MODEL = DualEncoder(
    image=ViT(image_size=16, patch_size=8, pool="class", **SHAPE),
    text=TextTransformer(vocab_size=64, context_length=8, eos_id=2, **SHAPE),
    embed_dim=16,
    logit_scale_init=5.0,
    logit_bias_init=-2.0,
)
PLAIN = SGD(lr=LR, momentum=0.0, weight_decay=0.0, clip_norm=None, schedule=Constant())


def make_batch(n=16):
    rng = np.random.default_rng(0)
    text = rng.integers(3, 64, (n, 8)).astype(np.int32)
    text[:, 6], text[:, 7] = 2, 0
    image = rng.integers(0, 256, (n, 16, 16, 3)).astype(np.uint8)
    return {"image": image, "text": text, "id": np.arange(n, dtype=np.int32)}


@functools.cache
def one_step(
    model=MODEL,
    objective=Sigmoid(),  # noqa: B008
    mesh_shape=MeshShape(),  # noqa: B008
    devices=1,
    fsdp=False,
    accumulate=1,
    exchange=AllGather(),  # noqa: B008
    **sharding,
):
    """(loss, gradients by path, state) of one step from the same initial parameters."""
    mesh = mesh_shape.build(jax.devices()[:devices])
    sharding = Sharding(fsdp=fsdp, min_size=64, **sharding)
    blueprint = Blueprint.draw(
        model, objective, PLAIN, None, mesh, sharding, 10, Scale(16, 64), seed=0
    )
    engine = PairEngine(mesh, exchange)
    step = make_step(blueprint, objective, engine, mesh, accumulate, sharding=sharding)
    step = jit_step(step, blueprint)
    before = begin(blueprint)
    start = {name: np.array(leaf) for name, leaf in paths(before.params)}
    after, metrics = step(before, to_global(make_batch(), mesh))
    grads = {name: (start[name] - np.array(leaf)) / LR for name, leaf in paths(after.params)}
    return float(metrics["loss"]), grads, after


def assert_close(got, expected, tolerance=1e-5):
    assert got[0] == pytest.approx(expected[0], rel=tolerance)
    for name, reference in expected[1].items():
        if name.endswith("k/bias") or (name == "logit_bias" and not reference.any()):
            continue  # 0 in theory: a softmax does not see what shifts all of its scores
        worst = np.abs(got[1][name] - reference).max() / np.abs(reference).max()
        assert worst < tolerance, f"{name}: {worst:.1e}"


@pytest.mark.parametrize(
    ("mesh_shape", "fsdp", "exchange"),
    [
        (MeshShape(), False, AllGather()),
        (MeshShape(), True, Ring()),
        (MeshShape(tensor=4), False, AllGather()),
        (MeshShape(group=2, tensor=2), True, Hierarchical()),
    ],
    ids=["data", "fsdp", "tensor", "all-three"],
)
def test_eight_devices_agree_with_one(mesh_shape, fsdp, exchange):
    got = one_step(mesh_shape=mesh_shape, devices=8, fsdp=fsdp, exchange=exchange)
    assert_close(got, one_step())
    assert {"logit_scale", "logit_bias"} <= set(got[1])


def test_layouts_are_what_the_test_above_thinks():
    _, _, state = one_step(
        mesh_shape=MeshShape(group=2, tensor=2), devices=8, fsdp=True, exchange=Hierarchical()
    )
    kernel = state.params["image"]["blocks"]["mlp"]["fc1"]["kernel"]
    assert tuple(kernel.sharding.spec) == (None, "data", "tensor")
    _, _, state = one_step(mesh_shape=MeshShape(), devices=8, fsdp=True, exchange=Ring())
    kernel = state.params["image"]["blocks"]["attn"]["q"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (2, 18, 9)


@pytest.mark.parametrize(
    ("objective", "accumulate", "devices"),
    [(Softmax(), 2, 1), (Sigmoid(), 4, 4), (Softmax(), 8, 2)],
    ids=["softmax-2-1", "sigmoid-4-4", "softmax-8-2"],
)
def test_accumulation_equals_the_big_batch(objective, accumulate, devices):
    got = one_step(objective=objective, accumulate=accumulate, devices=devices)
    assert_close(got, one_step(objective=objective))


@pytest.mark.parametrize(
    ("sharding", "tolerance"),
    # In bfloat16, two halves are rounded, to 2^-9 of each, before they cancel in part.
    [({"gather_gb": 4.0}, 1e-5), ({"gather_gb": 1e-9}, 1e-5), ({"reduce_dtype": "bfloat16"}, 2**-6)],
    ids=["once", "each", "bfloat16"],
)  # fmt: skip
def test_accumulation_of_split_weights(sharding, tolerance):
    got = one_step(objective=Softmax(), accumulate=2, devices=2, fsdp=True, **sharding)
    assert_close(got, one_step(objective=Softmax()), tolerance)


@pytest.mark.parametrize(
    "sharding", [Sharding(), Sharding(fsdp=True, min_size=64)], ids=["data", "fsdp"]
)
def test_gradients_and_weights_travel_once_a_step(sharding):
    """Four micro-batches on two devices, read from the compiled program: each gradient and split weight once."""
    mesh = MeshShape().build(jax.devices()[:2])
    blueprint = Blueprint.draw(MODEL, Softmax(), PLAIN, None, mesh, sharding, 10, Scale(16, 64), 0)
    step = make_step(blueprint, Softmax(), PairEngine(mesh), mesh, 4, sharding=sharding)
    batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=batch_sharding(mesh)),
        make_batch(),
    )
    compiled = jit_step(step, blueprint).lower(blueprint.target(), batch).compile()
    held, whole = per_device_bytes(blueprint.abstract.params, blueprint.shardings.params)
    sent = work(compiled, 2).sent
    # On a ring of two a device sends as many bytes as it reduces, and gathers what it has not.
    embeddings = 2 * 4 * 16 * MODEL.embed_dim
    assert 0.95 * whole <= sent["all-reduce"] + sent["reduce-scatter"] <= 1.05 * whole + embeddings
    assert sent["all-gather"] <= 1.05 * (whole - held) + embeddings


def test_accumulation_replays_dropout():
    """Against plain differentiation through all micro-batches at once, with the keys the step uses."""
    k = 2
    model = dataclasses.replace(
        MODEL,
        image=dataclasses.replace(MODEL.image, dropout=0.3, patch_dropout=0.5),
        text=dataclasses.replace(MODEL.text, dropout=0.3),
    )
    got = one_step(model=model, objective=Softmax(), accumulate=k)
    blueprint = Blueprint.draw(
        model,
        Softmax(),
        PLAIN,
        None,
        MeshShape().build(jax.devices()[:1]),
        Sharding(),
        10,
        Scale(16, 64),
        seed=0,
    )
    state = begin(blueprint)
    keys = jax.random.split(jax.random.fold_in(jax.random.wrap_key_data(state.key), 0), k)
    batch = jax.tree.map(jnp.asarray, make_batch())

    def loss(params):
        module = merge(blueprint.graphdef, params, {})
        parts = [
            module({n: v[i * 8 : i * 8 + 8] for n, v in batch.items()}, key=keys[i])
            for i in range(k)
        ]
        image, text = (jnp.concatenate([p[n] for p in parts]) for n in ("image", "text"))
        logits = parts[0].logit_scale * image @ text.T
        rows, cols = jax.nn.log_softmax(logits, 1), jax.nn.log_softmax(logits, 0)
        return -0.5 * (jnp.diagonal(rows) + jnp.diagonal(cols)).mean()

    value, grads = jax.jit(jax.value_and_grad(loss))(state.params)
    reference = {n: np.array(g) for n, g in paths(grads) if n != "logit_bias"}
    assert_close(got, (float(value), reference))
    assert abs(got[0] - one_step(objective=Softmax())[0]) > 1e-3  # dropout was on


@dataclasses.dataclass(frozen=True)
class Poisoned(Softmax):
    """Not a number whenever the batch holds the id 99."""

    def __call__(self, encoded, context):
        loss, metrics = super().__call__(encoded, context)
        return loss * jnp.where((context.batch["id"] == 99).any(), jnp.nan, 1.0), metrics


def test_a_bad_step_changes_nothing_but_the_counters():
    mesh = MeshShape().build(jax.devices()[:1])
    optimizer, ema = SGD(lr=0.1, schedule=Constant()), Ema(0.5)
    blueprint = Blueprint.draw(
        MODEL, Poisoned(), optimizer, ema, mesh, Sharding(), 10, Scale(16, 64), seed=0
    )
    step = jit_step(make_step(blueprint, Poisoned(), PairEngine(mesh), mesh, ema=ema), blueprint)
    good = to_global(make_batch(), mesh)
    bad = good | {"id": good["id"].at[3].set(99)}
    state, _ = step(begin(blueprint), good)
    before = jax.tree.map(np.array, state)
    for streak in (1, 2):
        state, metrics = step(state, bad)
        assert np.isnan(metrics["loss"])
        assert int(metrics["bad_streak"]) == streak
    kept = dataclasses.replace(
        state, step=before.step, bad_steps=before.bad_steps, bad_streak=before.bad_streak
    )
    jax.tree.map(np.testing.assert_array_equal, kept, before)
    assert (int(state.step), int(state.bad_steps)) == (3, 2)
    state, metrics = step(state, good)
    assert int(metrics["bad_streak"]) == 0
    assert int(metrics["bad_steps"]) == 2
    assert not np.array_equal(state.params["logit_scale"], before.params["logit_scale"])


def test_frozen_towers_get_no_gradient_and_no_state():
    """LiT: one line locks the image tower; its parameters stay, and the optimizer keeps nothing for them."""
    mesh = MeshShape().build(jax.devices()[:1])
    optimizer = dataclasses.replace(PLAIN, momentum=0.9, groups=(Group("^image/", frozen=True),))
    blueprint = Blueprint.draw(
        MODEL, Softmax(), optimizer, None, mesh, Sharding(), 10, Scale(16, 64), seed=0
    )
    assert not any("image/" in name for name, _ in paths(blueprint.abstract.opt_state))
    step = jit_step(make_step(blueprint, Softmax(), PairEngine(mesh), mesh), blueprint)
    state = begin(blueprint)
    before = jax.tree.map(np.array, state.params)
    state, _ = step(state, to_global(make_batch(), mesh))
    jax.tree.map(np.testing.assert_array_equal, state.params["image"], before["image"])
    assert not np.array_equal(state.params["text"]["blocks"]["mlp"]["fc1"]["kernel"],
                              before["text"]["blocks"]["mlp"]["fc1"]["kernel"])  # fmt: skip


@pytest.mark.parametrize(("size", "devices", "accumulate"), [(12, 8, 1), (16, 8, 4), (16, 1, 0)])
def test_batches_that_do_not_divide_are_refused(size, devices, accumulate):
    with pytest.raises(ClipjaxError, match=r"batch_size=\d+ does not divide|accumulate=0"):
        check_batch(size, MeshShape().build(jax.devices()[:devices]), accumulate)


def test_split_and_merge_are_the_model():
    graphdef, params, rest = split(MODEL.build(nnx.Rngs(1)))
    encoded = merge(graphdef, params, rest)(jax.tree.map(jnp.asarray, make_batch()))
    np.testing.assert_allclose(np.linalg.norm(encoded["image"], axis=1), 1.0, rtol=1e-6)
