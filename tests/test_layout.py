"""Hints about layout change no value, mean nothing without a mesh, and are heard with one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipjax import layout
from clipjax.layout import batch_first, gathered, on_mesh, row_major
from clipjax.mesh import MeshShape, replicated

MESH = MeshShape(group=2, tensor=2).build()
X = jnp.arange(32.0).reshape(8, 4)


def placed(hint, x):
    """(result, layout) of a hint on an array that is whole on every device."""

    def f(x):
        with on_mesh(MESH):
            return hint(x)

    y = jax.jit(f, in_shardings=replicated(MESH))(x)
    np.testing.assert_array_equal(y, x)
    return y


def test_without_a_mesh_they_do_nothing():
    assert batch_first(X) is X
    assert gathered(X) is X
    with on_mesh(None):
        assert batch_first(X) is X


def test_batches_are_split_over_group_and_data():
    y = placed(batch_first, X)
    assert {shard.data.shape for shard in y.addressable_shards} == {(2, 4)}


@pytest.mark.parametrize("shape", [(7, 4), ()], ids=str)
def test_what_does_not_divide_is_left_alone(shape):
    y = placed(batch_first, jnp.ones(shape))
    assert {shard.data.shape for shard in y.addressable_shards} == {shape}


def test_gathered_weights_are_whole():
    split = jax.sharding.NamedSharding(MESH, jax.P("data", "tensor"))

    def f(x):
        with on_mesh(MESH):
            return gathered(x)

    y = jax.jit(f, in_shardings=split)(X)
    np.testing.assert_array_equal(y, X)
    assert {shard.data.shape for shard in y.addressable_shards} == {(8, 4)}


def test_rows_that_are_laid_out_stay_on_their_devices(monkeypatch):
    """Of every batch and head where it is: no value changes, and neither way is anything sent."""
    monkeypatch.setattr(layout, "platform", lambda: "gpu")
    split = jax.sharding.NamedSharding(MESH, jax.P(("group", "data"), None, "tensor"))
    x = jnp.arange(8 * 3 * 4.0).reshape(8, 3, 4)

    def f(x):
        with on_mesh(MESH):
            return jnp.sin(row_major(x, heads=2)).sum()

    program = jax.jit(jax.grad(f), in_shardings=split, out_shardings=split).lower(x).compile()
    np.testing.assert_allclose(program(jax.device_put(x, split)), np.cos(x), rtol=1e-6)
    assert "LayoutConstraint" in jax.jit(f, in_shardings=split).lower(x).as_text()
    for sent in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
        assert f" {sent}" not in program.as_text()


@pytest.mark.parametrize(("rows", "heads"), [(8, 3), (6, 2)], ids=["heads", "rows"])
def test_rows_that_do_not_divide_are_not_laid_out(monkeypatch, rows, heads):
    monkeypatch.setattr(layout, "platform", lambda: "gpu")
    x = jnp.ones((rows, 3, 12))

    @jax.jit
    def left_alone(x):
        with on_mesh(MESH):
            assert row_major(x, heads) is x
        return x

    left_alone(x)
