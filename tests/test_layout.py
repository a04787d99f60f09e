"""Hints about layout change no value, mean nothing without a mesh, and are heard with one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipjax.layout import batch_first, gathered, on_mesh
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
