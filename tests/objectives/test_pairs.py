"""The engine itself: any reduction, any side, broken input, numerics at large scales."""

import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from clipjax.batch import Encoded
from clipjax.errors import ClipjaxError
from clipjax.mesh import MeshShape
from clipjax.objectives import (
    AllGather,
    Auto,
    Context,
    Grouped,
    Hierarchical,
    PairEngine,
    Ring,
    Sigmoid,
    Softmax,
)
from clipjax.objectives.pairs import Expectation, LogSumExp, Max, Reduction
from clipjax.objectives.pairs import Sum as PairSum

sys.path.insert(0, str(Path(__file__).parent))
import oracles
from jax import jit


def embeddings(n=12, width=8):
    c = oracles.case(n, width)
    return jnp.float32(c["x"]), jnp.float32(c["y"])


@struct.dataclass
class SumOfSquares(Reduction):
    """A user's reduction: sum of squares."""

    values: jax.Array

    def sums(self, axis, shift):
        return (jnp.sum(self.values**2, axis),)

    @staticmethod
    def value(state):
        return state.sums[0]


def statistics(dot, row, col, shared):
    """Differentiable row and column sides, shared arrays and every reduction at once."""
    logits = shared["scale"] * dot(row["image"], col["text"]) / row["tau"][:, None] + col["prior"]
    other = row["index"][:, None] != col["index"]
    return (
        {
            "log": LogSumExp(logits, other),
            "mean": Expectation(logits, jnp.sin(logits), other),
            "top": Max(logits),
        },
        {"squares": SumOfSquares(logits), "sum": PairSum(jnp.exp(0.1 * logits), other)},
    )


@pytest.mark.parametrize(
    "engine",
    [
        PairEngine(chunk=5),
        PairEngine(MeshShape(group=2, tensor=2).build(), Hierarchical(), chunk=5),
        PairEngine(MeshShape().build(jax.devices()[:4]), Ring(), chunk=2),
    ],
    ids=lambda e: type(e.exchange).__name__,
)
def test_any_statistic_of_any_side(engine):
    x, y = embeddings()
    key = jax.random.key(0)
    arguments = {
        "image": x,
        "text": y,
        "tau": 0.5 + jax.random.uniform(key, (12,)),
        "prior": jax.random.normal(key, (12,)),
        "scale": jnp.float32(2.0),
    }
    cotangents = jax.random.normal(key, (5, 12))

    def total(rows, cols):
        values = [rows["log"], rows["mean"], rows["top"], cols["squares"], cols["sum"]]
        return jnp.sum(cotangents * jnp.stack(values))

    def ours(a):
        rows = {"image": a["image"], "tau": a["tau"]}
        cols = {"text": a["text"], "prior": a["prior"]}

        def tile(row, col, shared):
            return statistics(engine.dot, row, col, shared)

        return total(*engine.reduce(tile, rows, cols, {"scale": a["scale"]}))

    def dense(a):
        logits = a["scale"] * a["image"] @ a["text"].T / a["tau"][:, None] + a["prior"]
        masked = jnp.where(jnp.eye(12, dtype=bool), -jnp.inf, logits)
        rows = {
            "log": jax.nn.logsumexp(masked, 1),
            "mean": jnp.sum(jax.nn.softmax(masked, 1) * jnp.sin(logits), 1),
            "top": jax.lax.stop_gradient(logits.max(1)),
        }
        growth = jnp.where(jnp.eye(12, dtype=bool), 0, jnp.exp(0.1 * logits))
        return total(rows, {"squares": jnp.sum(logits**2, 0), "sum": growth.sum(0)})

    value, grads = jit(jax.value_and_grad(ours))(arguments)
    expected, reference = jax.value_and_grad(dense)(arguments)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for name, grad in reference.items():
        np.testing.assert_allclose(grads[name], grad, atol=1e-5 * float(jnp.abs(grad).max()))


def test_no_worse_than_dense_jax_in_float32():
    """Nearly solved batches at scale 100, where float32 itself is the limit: root mean squares over eight."""
    n, scale = 64, 100.0

    def dense(x, y, s):
        logits = s * x @ y.T
        rows, cols = (jax.nn.logsumexp(logits, a) - jnp.diagonal(logits) for a in (1, 0))
        return 0.5 * (rows.mean() + cols.mean())

    def ours(x, y, s):
        return Softmax()(Encoded.pair(x, y, s), Context(PairEngine(chunk=24)))[0]

    squares = {}
    runs = {f.__name__: jax.jit(jax.value_and_grad(f, (0, 1, 2))) for f in (dense, ours)}
    for seed in range(8):
        c = oracles.case(n, 32, spread=0.3, scale=scale, seed=seed)
        reference, exact = oracles.softmax(c)
        expected = [reference, *(exact[key] for key in ("image", "text", "logit_scale"))]
        for name, run in runs.items():
            value, grads = run(jnp.float32(c["x"]), jnp.float32(c["y"]), jnp.float32(scale))
            for i, (got, right) in enumerate(zip((value, *grads), expected, strict=True)):
                error = (np.float64(got) - right) / np.abs(right).max()
                squares.setdefault((name, i), []).append(np.mean(error**2))
    for i in range(4):
        dense_error, our_error = (np.sqrt(np.mean(squares[name, i])) for name in runs)
        assert our_error <= max(1.5 * dense_error, 5e-7)


def test_bfloat16_operands_accumulate_in_float32():
    c = oracles.case(64, 32)
    loss, exact = oracles.softmax(c)
    x, y = jnp.float32(c["x"]), jnp.float32(c["y"])

    def f(x, y):
        return Softmax()(
            Encoded.pair(x, y, jnp.float32(c["s"])), Context(PairEngine(chunk=16, dtype="bfloat16"))
        )[0]

    value, grads = jit(jax.value_and_grad(f, (0, 1)))(x, y)
    assert value.dtype == jnp.float32 and grads[0].dtype == jnp.float32
    assert float(value) == pytest.approx(loss, rel=2e-2)
    for grad, key in zip(grads, ("image", "text"), strict=True):
        assert np.abs(grad - exact[key]).max() < 2e-2 * np.abs(exact[key]).max()


@pytest.mark.parametrize("objective", [Softmax(), Sigmoid()], ids=["softmax", "sigmoid"])
@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_broken_embeddings_show_in_the_loss(objective, broken):
    x, y = embeddings()
    bias = jnp.float32(-1.0)
    for encoded in (
        Encoded.pair(x.at[3, 0].set(broken), y, jnp.float32(5.0), bias),
        Encoded.pair(x, y.at[3, 0].set(broken), jnp.float32(5.0), bias),
    ):
        loss = jit(lambda e: objective(e, Context(PairEngine(chunk=5)))[0])(encoded)
        assert not np.isfinite(float(loss))


def test_a_batch_of_one_has_no_negatives_and_no_gradient():
    def f(x):
        return Softmax()(Encoded.pair(x, x, jnp.float32(5.0)), Context(PairEngine()))[0]

    value, grad = jit(jax.value_and_grad(f))(jnp.eye(1, 4))
    assert float(value) == 0
    np.testing.assert_array_equal(grad, np.zeros((1, 4)))


def test_sides_that_differ_in_length_are_refused():
    x, y = embeddings()
    for kind, rows, cols in (
        ("row", {"a": x, "b": y[:11]}, {"c": y}),
        ("column", {"c": y}, {"a": x, "b": y[:11]}),
        (r"column \(block 1\)", {"c": y}, ({"c": y}, {"a": x, "b": y[:11]})),
    ):
        with pytest.raises(ClipjaxError, match=f"{kind} side 'b' has 11 entries, 'a' has 12"):
            PairEngine().reduce(lambda row, col, shared: ({}, {}), rows, cols)


def test_a_batch_that_the_devices_do_not_divide_is_refused():
    x, y = embeddings(12)
    engine = PairEngine(MeshShape().build())
    with pytest.raises(ClipjaxError, match="12 rows cannot be split over 8 devices"):
        Softmax()(Encoded.pair(x, y, jnp.float32(5.0)), Context(engine))


def test_a_group_size_that_does_not_divide_the_devices_is_refused():
    with pytest.raises(ClipjaxError, match="group=3"):
        PairEngine(MeshShape(group=3).build(), Grouped())


@pytest.mark.parametrize(
    ("platform", "fields", "tile"),
    [
        ("cpu", {}, 1024),
        ("gpu", {}, 8192),
        ("tpu", {}, 4096),
        ("tpu", {"tile_mb": 1.0}, 512),  # 512 x 512 x 4 bytes
        ("gpu", {"tile_mb": 1.0, "chunk": 300}, 300),
    ],
)
def test_tiles_by_the_devices_of_the_mesh(platform, fields, tile):
    """Not by those of the host, which may compile for others."""
    mesh = SimpleNamespace(
        shape={"group": 1, "data": 8, "tensor": 1},
        devices=np.array([SimpleNamespace(platform=platform)]),
    )
    engine = PairEngine(mesh, **fields)
    assert engine.platform == platform
    assert f"tiles of {tile}," in engine.describe(2**16, 512)


def test_a_tile_of_tokens_is_as_small_as_they_are_many():
    """Tokens of 16 x 32 pairs a pair of rows: 2 kB of float32, in 0.5 MB: 16 x 16 rows, not 256."""
    seen = []

    def tile(row, col, shared):
        seen.append((len(row["a"]), len(col["b"])))
        tokens = jnp.einsum("rne,cme->rcnm", row["a"], col["b"])
        return {"late": PairSum(tokens.max(3).mean(2))}, {}

    sides = {"a": jnp.zeros((96, 16, 4))}, {"b": jnp.zeros((96, 32, 4))}
    jax.make_jaxpr(lambda a, b: PairEngine(tile_mb=0.5).reduce(tile, a, b))(*sides)
    assert seen[0] == (61, 67)  # how it is found out: two primes
    assert set(seen[1:]) == {(1, 1), (16, 16)}


@pytest.mark.parametrize("bad", [{"chunk": 0}, {"dtype": "float16"}, {"tile_mb": 0}])
def test_bad_engine_fields_are_refused(bad):
    with pytest.raises(ClipjaxError, match=next(iter(bad))):
        PairEngine(**bad)


def test_auto_picks_by_size_and_says_so():
    mesh = MeshShape(group=2).build()
    engine = PairEngine(mesh, Auto(memory_gb=1.0))
    # 2 x 4 bytes x N x 512: 0.27 GB, 1.07 GB (0.54 a group), 4.3 GB (2.1 a group)
    for n, choice in ((2**16, "AllGather"), (2**18, "Hierarchical"), (2**20, "Ring")):
        assert f"Auto chose {choice}" in engine.describe(n, 512)
    flat = PairEngine(MeshShape().build(), Auto(memory_gb=1.0))
    assert "Auto chose Ring" in flat.describe(2**18, 512)
    assert "32768 columns a row" in PairEngine(mesh, Grouped()).describe(2**16, 512)


def test_auto_equals_what_it_picks():
    x, y = embeddings(16)
    mesh = MeshShape(group=2).build()

    def loss(exchange):
        engine = PairEngine(mesh, exchange)
        return float(
            jit(lambda *e: Softmax()(Encoded.pair(*e), Context(engine))[0])(x, y, jnp.float32(5.0))
        )

    losses = [loss(exchange) for exchange in (Auto(), Auto(memory_gb=1e-9), AllGather())]
    np.testing.assert_allclose(losses, losses[-1:] * 3, rtol=1e-6)
    with pytest.raises(ClipjaxError, match="memory_gb"):
        Auto(memory_gb=0)
