"""Rows read and written by index, on one device and on eight; what travels for them."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipjax.bench.program import temporary_bytes, work
from clipjax.errors import ClipjaxError
from clipjax.mesh import MeshShape, batch_sharding
from clipjax.objectives import PairEngine

sys.path.insert(0, str(Path(__file__).parent))
from jax import jit

N = 32
# More than once, out of range at both ends, the first and the last.
INDEX = np.int32([3, 31, 3, -1, 40, 0, 7, -32, 3, 31, 5, 32, 2**31 - 1, 0, 9, 7])
ENGINES = [
    PairEngine(),
    PairEngine(MeshShape(group=2).build()),
    PairEngine(MeshShape(tensor=2).build()),
]


@pytest.mark.parametrize("engine", ENGINES, ids=["one", "eight", "tensor"])
@pytest.mark.parametrize("count", [16, 40], ids=["few", "more than there are"])
def test_rows_and_their_gradient(engine, count):
    rng = np.random.default_rng(0)
    arrays = {
        "tokens": rng.normal(size=(N, 2, 3)).astype(np.float32),
        "mask": rng.random((N, 2)) < 0.5,
        "id": np.arange(100, 100 + N, dtype=np.int32),
        "narrow": jnp.asarray(rng.normal(size=(N, 3)), jnp.bfloat16),
    }
    index = np.resize(INDEX, count)
    weights = rng.normal(size=(count, 2, 3)).astype(np.float32)

    def loss(tokens, narrow):
        got = engine.rows_at(arrays | {"tokens": tokens, "narrow": narrow}, index)
        return jnp.sum(weights * got["tokens"]) + jnp.sum(got["narrow"]), got

    (_, got), (d_tokens, d_narrow) = jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(
        arrays["tokens"], arrays["narrow"]
    )
    held = (index >= 0) & (index < N)
    for name, array in arrays.items():
        expected = np.array(array)[np.where(held, index, 0)]
        expected[~held] = 0
        np.testing.assert_array_equal(got[name], expected)
        assert got[name].dtype == array.dtype
    gradient = np.zeros((N, 2, 3))
    np.add.at(gradient, index[held], weights[held])
    np.testing.assert_allclose(d_tokens, gradient, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(d_narrow[:, 0], np.bincount(index[held], minlength=N))


@pytest.mark.parametrize("engine", ENGINES, ids=["one", "eight", "tensor"])
def test_the_last_one_written_stands(engine):
    table = np.full((N, 2), 0.5, np.float32)
    values = np.random.default_rng(1).normal(size=(len(INDEX), 2)).astype(np.float32)
    expected = table.copy()
    for i, value in zip(INDEX, values, strict=True):
        if 0 <= i < N:
            expected[i] = value
    np.testing.assert_array_equal(jit(engine.set_rows)(table, INDEX, values), expected)


def test_what_travels_are_the_rows_asked_for():
    """16 of 65536 rows of 64 numbers; a table of 2^26 numbers, written in place, never held twice."""
    engine = ENGINES[1]
    split = batch_sharding(engine.mesh)

    def shape(*sizes, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=split)

    index = shape(16, dtype=jnp.int32)
    read = jax.jit(lambda a, i: jax.grad(lambda a: engine.rows_at(a, i).sum())(a))
    moved = sum(work(read.lower(shape(2**16, 64), index).compile()).sent.values())
    assert moved < 2 * 16 * (64 + 1) * 4
    write = jax.jit(engine.set_rows, donate_argnums=0)
    compiled = write.lower(shape(2**26), index, shape(16)).compile()
    assert sum(work(compiled).sent.values()) < 16 * 8
    assert temporary_bytes(compiled) < 2**16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.zeros(30), INDEX), r"arrays\[0\] \(30,\) cannot be split over 8 devices"),
        ((np.zeros(32), INDEX[:9]), r"index \(9,\) cannot be split"),
        ((np.zeros(32), INDEX * 1.0), r"index float64\[16\] must be whole numbers"),
        ((np.zeros(32), INDEX.reshape(8, 2)), r"index int32\[8, 2\] must be whole numbers"),
        ((np.zeros((32, 3)), INDEX, np.zeros((16, 2))), r"values \(16, 2\) must be \(16, 3\)"),
    ],
)
def test_refusals(arguments, message):
    engine = ENGINES[1]
    with pytest.raises(ClipjaxError, match=message):
        (engine.rows_at if len(arguments) == 2 else engine.set_rows)(*arguments)
