"""Objectives that remember: queues, tables by record, and rows chosen for a fusion encoder."""

import dataclasses
import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipjax.batch import Encoded
from clipjax.checkpoint import Checkpoints
from clipjax.data.placement import to_global
from clipjax.errors import ClipjaxError
from clipjax.mesh import MeshShape
from clipjax.meta import Meta
from clipjax.methods.albef import QueueContrast
from clipjax.methods.clip_distillation import RelationalDistillation
from clipjax.methods.defsent_plus import Entries
from clipjax.methods.isogclr import ISogCLR, SogCLR
from clipjax.models import FusionEncoder, Headed
from clipjax.objectives import (
    AllGather,
    Context,
    Matching,
    MovingAverage,
    PairEngine,
    Queue,
    Ring,
    Setting,
    Softmax,
)
from clipjax.optim import SGD, Constant, Scale
from clipjax.params import merge, paths
from clipjax.sharding import Sharding
from clipjax.towers.transformer import Transformer
from clipjax.train.state import Blueprint
from clipjax.train.step import make_step

sys.path.insert(0, str(Path(__file__).parents[1] / "objectives"))
import oracles
from alone import evaluate
from jax import jit
from linear import MODEL, ROWS, WIDTH, make_batch

FUSED = Headed(
    MODEL, heads=(FusionEncoder(blocks=Transformer(width=WIDTH, depth=1, heads=2, scan=False)),)
)
OBJECTIVE = (
    Softmax()
    + 0.5 * QueueContrast(queue=Queue(2 * ROWS))
    + 2.0 * ISogCLR(temperature=0.2, rate=0.05)
    + 0.3 * Entries()
    + RelationalDistillation(teacher=MovingAverage(0.9))
    + Matching()
)
EXAMPLES = 40
OPTIMIZER = SGD(lr=0.05, momentum=0.0, weight_decay=0.0, clip_norm=None, schedule=Constant())


def batches(count):
    """Batches whose records come again: 16 of 40, in steps of 12."""
    made = []
    for step in range(count):
        sample = (12 * step + np.arange(ROWS)) % EXAMPLES
        pixels = np.random.default_rng(step).integers(0, 256, (ROWS, 4, 4, 3))
        made.append(
            make_batch()
            | {
                "image": pixels.astype(np.uint8),
                "sample": sample.astype(np.int32),
                "id": sample.astype(np.int32) // 2,
            }
        )
    return made


def draw(objective, optimizer, mesh):
    inputs = {k: jax.ShapeDtypeStruct(v.shape[1:], v.dtype) for k, v in batches(1)[0].items()}
    scale = Scale(ROWS, EXAMPLES)
    return Blueprint.draw(FUSED, objective, optimizer, None, mesh, Sharding(), 10, scale, 0, inputs)


@functools.cache
def compiled(devices, accumulate, exchange=AllGather()):  # noqa: B008 (frozen)
    mesh = MeshShape().build(jax.devices()[:devices])
    blueprint = draw(OBJECTIVE, OPTIMIZER, mesh)
    step = make_step(blueprint, OBJECTIVE, PairEngine(mesh, exchange), mesh, accumulate)
    layout = blueprint.shardings
    return mesh, blueprint, jit(step, in_shardings=(layout, None), out_shardings=(layout, None))


def steps(state, mesh, step, some):
    losses = []
    for batch in some:
        state, metrics = step(state, to_global(batch, mesh))
        losses.append(float(metrics["loss"]))
    return state, losses


@functools.cache
def alone():
    mesh, blueprint, step = compiled(1, 1)
    return steps(blueprint.init(), mesh, step, batches(5))


def assert_same(state, reference, tolerance=1e-4):
    """Parameters, averages and all that is remembered."""
    for (name, got), (_, expected) in zip(paths(state), paths(reference), strict=True):
        got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
        finite = np.isfinite(expected)
        np.testing.assert_array_equal(np.isfinite(got), finite, err_msg=name)
        scale = np.abs(expected[finite]).max(initial=1e-3)
        worst = np.abs(got[finite] - expected[finite]).max(initial=0)
        assert worst <= tolerance * scale, (name, worst, scale)


@pytest.mark.parametrize(
    ("devices", "accumulate", "exchange"),
    [(8, 1, AllGather()), (4, 4, AllGather()), (8, 1, Ring())],
)
def test_five_steps_are_the_same_on_any_mesh(devices, accumulate, exchange):
    reference, losses = alone()
    mesh, blueprint, step = compiled(devices, accumulate, exchange)
    state, got = steps(blueprint.init(), mesh, step, batches(5))
    np.testing.assert_allclose(got, losses, rtol=1e-5)
    assert_same(state, reference)
    table = state.objective_state["isogclr"]["image"]["rows"]["average"]
    assert table.addressable_shards[0].data.shape == (len(table) // devices,)
    visited = np.unique(np.concatenate([b["sample"] for b in batches(5)]))
    np.testing.assert_array_equal(np.flatnonzero(np.isfinite(np.asarray(table))), visited)
    ids = np.asarray(state.objective_state["queuecontrast"]["rows"]["id"])
    newest, before = batches(5)[4]["id"], batches(5)[3]["id"]
    np.testing.assert_array_equal(ids, np.concatenate([newest, before]))


def test_what_is_remembered_goes_on_on_another_mesh(tmp_path):
    reference, losses = alone()
    mesh, blueprint, step = compiled(8, 1)
    state, _ = steps(blueprint.init(), mesh, step, batches(5)[:3])
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, state, Meta(run={}, tokenizer={}))
    checkpoints.wait()
    mesh, blueprint, step = compiled(4, 4)
    state, got = steps(checkpoints.restore(3, blueprint.target()), mesh, step, batches(5)[3:])
    checkpoints.close()
    np.testing.assert_allclose(got, losses[3:], rtol=1e-5)
    assert_same(state, reference)


@pytest.mark.parametrize(("devices", "accumulate"), [(1, 1), (8, 1), (4, 4)])
def test_matching_equals_a_dense_reference_for_the_same_draws(devices, accumulate):
    """The loss and all gradients, against whole arrays on one device, indexed plainly."""
    objective, rate = Matching(), 1e4
    mesh = MeshShape().build(jax.devices()[:devices])
    blueprint = draw(objective, dataclasses.replace(OPTIMIZER, lr=rate), mesh)
    state, batch = blueprint.init(), batches(1)[0]
    start = jax.tree.map(np.asarray, state.params)
    key = jax.random.fold_in(jax.random.wrap_key_data(np.asarray(state.key)), 0)
    step = jit(make_step(blueprint, objective, PairEngine(mesh), mesh, accumulate))
    after, metrics = step(state, to_global(batch, mesh))

    context = Context(PairEngine(), batch, key=jax.random.fold_in(key, 1))
    drawn = objective.choose(merge(blueprint.graphdef, start, {})(batch), context)
    assert all((batch["id"][np.asarray(d)] != batch["id"]).all() for d in drawn.values())

    def dense(params):
        module = merge(blueprint.graphdef, params, {})
        seen = module(batch, needs=frozenset({"image_tokens", "text_tokens"}))
        image, text = seen["image_tokens"], seen["text_tokens"]
        other_text = jax.tree.map(lambda x: x[drawn["text"]], text)
        other_image = jax.tree.map(lambda x: x[drawn["image"]], image)
        pairs = ((text, image, 1), (other_text, image, 0), (text, other_image, 0))
        judged = [jax.nn.log_softmax(module.head("fusion", t, i))[:, y].mean() for t, i, y in pairs]
        return -sum(judged) / 3

    loss, grads = jit(jax.value_and_grad(dense))(start)
    assert float(metrics["loss"]) == pytest.approx(float(loss), rel=1e-5)
    largest = max(np.abs(grad).max() for grad in jax.tree.leaves(grads))
    for (name, leaf), (_, grad) in zip(paths(after.params), paths(grads), strict=True):
        got = (np.asarray(dict(paths(start))[name]) - np.asarray(leaf)) / rate
        # Tokens that are nearly alike: what goes into the scores alone has next to no gradient but rounding.
        worst = np.abs(got - grad).max() / max(np.abs(grad).max(), 1e-3 * largest)
        assert worst < 1e-5, (name, worst)


def case(n=6):
    c = oracles.case(n, 8, seed=2)
    return c, Encoded.pair(jnp.float32(c["x"]), jnp.float32(c["y"]), jnp.float32(c["s"]))


def remembered(objective, examples=8):
    return objective.init_state(Setting(examples, 6, lambda name: 8))


@pytest.mark.parametrize("gamma", [1.0, 0.3])
def test_sogclr_is_its_formula(gamma):
    """Weights exp(D / tau) / s by NumPy, twice in a row; with gamma = 1, tau x the gradient of InfoNCE."""
    c, encoded = case()
    objective, tau = SogCLR(gamma=gamma, temperature=0.2), 0.2
    batch = {"sample": jnp.array([5, 0, 7, 1, 2, 3])}
    state = {"sogclr": remembered(objective)}
    averages = {"image": None, "text": None}
    for turn in (1, -1):  # the same records with other embeddings
        x, y = c["x"][::turn], c["y"][::turn]
        encoded = Encoded.pair(jnp.float32(x), jnp.float32(y), jnp.float32(1))
        loss, _, results = evaluate(objective, encoded, batch, states=state)
        cosine, expected = x @ y.T, 0.0
        for side, table in (("image", cosine), ("text", cosine.T)):
            d = table - np.diag(cosine)[:, None]
            now = np.exp(d / tau).sum(1) / 5
            s = averages[side]
            averages[side] = now if s is None else (1 - gamma) * s + gamma * now
            expected += (np.exp(d / tau) / averages[side][:, None] * d).sum(1).mean() / 5
        assert float(loss) == pytest.approx(expected, rel=1e-5)
        advanced = objective.advance(state["sogclr"], results["sogclr"], Context(batch=batch))
        kept = np.asarray(advanced["image"]["rows"]["average"])[np.asarray(batch["sample"])]
        np.testing.assert_allclose(kept, np.log(averages["image"]), rtol=1e-5, atol=1e-6)
        state = {"sogclr": advanced}
    if gamma == 1.0:
        y = jnp.float32(c["y"])

        def gradient(objective, scale):
            def loss(x):
                return evaluate(objective, Encoded.pair(x, y, scale), batch, states=state)[0]

            return jax.grad(loss)(jnp.float32(c["x"]))

        plain = gradient(Softmax(), jnp.float32(1 / tau))
        # Softmax takes the mean of the two directions, and B of B - 1 rows in the mean.
        np.testing.assert_allclose(gradient(objective, 1.0), 2 * tau * plain, atol=3e-6)


def test_isogclr_s_temperatures_follow_their_own_gradient():
    """The slope in tau is the derivative of tau log mean exp(D / tau) + tau rho, by finite differences."""
    c, encoded = case()
    objective = ISogCLR(gamma=1.0, temperature=0.3, cost=2.0, momentum=1.0, rate=0.01)
    batch = {"sample": jnp.arange(6)}
    *_, results = evaluate(objective, encoded, batch, states={"isogclr": remembered(objective)})
    d = c["x"] @ c["y"].T - np.sum(c["x"] * c["y"], 1)[:, None]

    def value(tau):
        return tau * np.log(np.exp(d / tau).sum(1) / 5) + 2.0 * tau

    slope = (value(0.3 + 1e-5) - value(0.3 - 1e-5)) / 2e-5
    got = results["isogclr"]["image"]
    np.testing.assert_allclose(got["slope"], slope, rtol=1e-4)
    np.testing.assert_allclose(got["temperature"], np.clip(0.3 - 0.01 * slope, 0.005, 1), rtol=1e-5)


def test_a_queue_s_columns_are_keys_like_those_of_the_batch():
    """ALBEF's contrast by NumPy, with a queue of which half is filled and one row has the id of a pair."""
    c, encoded = case()
    rng = np.random.default_rng(5)

    def unit(shape):
        v = rng.normal(size=shape)
        return v / np.linalg.norm(v, axis=-1, keepdims=True)

    keys = {"image": unit((6, 8)), "text": unit((6, 8))}
    bank = {"image": unit((12, 8)), "text": unit((12, 8))}
    ids, bank_ids = np.arange(6), np.array([20, 21, 3, 23, 24, 25] + [-1] * 6)
    objective = QueueContrast(queue=Queue(12), alpha=0.4)
    state = {"rows": {k: jnp.float32(v) for k, v in bank.items()} | {"id": jnp.int32(bank_ids)}}
    loss, *_ = evaluate(
        objective,
        encoded,
        {"id": jnp.int32(ids)},
        states={"queuecontrast": state},
        encode=lambda teacher, needs: Encoded({k: jnp.float32(v) for k, v in keys.items()}),
    )
    expected = 0.0
    met = (ids[:, None] != bank_ids) & (bank_ids >= 0)
    seen = np.concatenate([np.ones((6, 6), bool), met], 1)
    for side, other, query in (("image", "text", c["x"]), ("text", "image", c["y"])):
        columns = np.concatenate([keys[other], bank[other]])
        logits = np.where(seen, c["s"] * query @ columns.T, -np.inf)
        teacher = np.where(seen, c["s"] * keys[side] @ columns.T, -np.inf)
        target = 0.6 * np.eye(6, 18) + 0.4 * oracles.probabilities(teacher, 1)
        log_p = np.where(seen, logits - oracles.log_sum_exp(logits, 1), 0)
        expected -= 0.5 * (target * log_p).sum() / 6
    assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_what_cannot_be_remembered_is_refused():
    with pytest.raises(ClipjaxError, match="size=4 is smaller than the batch of 6"):
        Queue(4).push(PairEngine(), Queue(4).init(a=2), jnp.arange(6), a=jnp.zeros((6, 2)))
    with pytest.raises(ClipjaxError, match="20 rows, which 8 devices"):
        draw(QueueContrast(queue=Queue(20)), OPTIMIZER, MeshShape().build())
    with pytest.raises(ClipjaxError, match="has no `sample`"):
        evaluate(SogCLR(), case()[1], {}, states={"sogclr": remembered(SogCLR())})
