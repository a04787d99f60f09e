"""The counter of bytes and products, on programs whose counts are known."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from clipjax.bench.program import work
from clipjax.mesh import BATCH_AXES, MeshShape

MESH = MeshShape(group=2).build() if len(jax.devices()) == 8 else None


def compiled(f, *shapes):
    return jax.jit(f).lower(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)).compile()


def sharded(f):
    split = P(BATCH_AXES)
    return jax.shard_map(f, mesh=MESH, in_specs=split, out_specs=split, check_vma=False)


def test_products_in_loops_count_every_time():
    def f(a, b):
        def body(_, carry):
            return lax.fori_loop(0, 3, lambda _, c: jnp.sin(c @ b), carry)

        return lax.fori_loop(0, 5, body, a)

    assert work(compiled(f, (8, 16), (16, 16))).matmul_flops == 15 * 2 * 8 * 16 * 16


def test_products_outside_loops():
    flops = work(compiled(lambda a, b: jnp.sin(a @ b) @ b.T, (4, 6), (6, 10))).matmul_flops
    assert flops == 2 * 2 * 4 * 6 * 10


@pytest.mark.parametrize(
    "f,kind,sent",
    [
        (lambda a: lax.all_gather(a, BATCH_AXES, tiled=True).sum(0)[None], "all-gather", 7 / 8),
        (
            lambda a: lax.psum_scatter(jnp.tile(a, (8, 1)), BATCH_AXES, tiled=True),
            "reduce-scatter",
            7 / 8,
        ),
        (lambda a: lax.psum(a, "data"), "all-reduce", 2 * 3 / 4 / 8),
        (lambda a: lax.ppermute(a, "data", [(i, (i + 1) % 4) for i in range(4)]), None, 1 / 8),
    ],
)
def test_bytes_on_a_ring(f, kind, sent):
    """In units of a global [64, 32] float32 array, 8 rows of which each of 8 devices holds."""
    counted = work(compiled(sharded(f), (64, 32)), 8).sent
    assert list(counted) == [kind or "collective-permute"]
    assert sum(counted.values()) == pytest.approx(sent * 64 * 32 * 4)


def test_a_loop_of_unknown_length_is_no_silent_zero():
    def f(a):
        return lax.while_loop(lambda c: c.sum() < 100, lambda c: c @ c, a)

    with pytest.raises(ValueError, match="unknown length"):
        work(compiled(f, (4, 4)))
