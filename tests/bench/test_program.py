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


class Text:
    """A compiled program of which only the text is known."""

    def __init__(self, text):
        self.as_text = lambda: text


TPU = """
%gather.1 (p: bf16[1,64,256]) -> bf16[1,256,256] {
  %p = bf16[1,64,256] parameter(0)
  ROOT %g = bf16[1,256,256] all-gather(%p), channel_id=8, replica_groups=[1,4]<=[4], dimensions={1}
}

%gather.2 (p: bf16[1,64,256]) -> bf16[1,256,256] {
  %p = bf16[1,64,256] parameter(0)
  ROOT %g = bf16[1,256,256] all-gather(%p), channel_id=8, replica_groups=[1,4]<=[4], dimensions={1}
}

%body (p: (s32[], bf16[1,64,256])) -> (s32[], bf16[1,64,256]) {
  %p = (s32[], bf16[1,64,256]) parameter(0)
  %x = bf16[1,64,256] get-tuple-element(%p), index=1
  %start = bf16[1,256,256] fusion(%x), kind=kCustom, calls=%gather.1
  %done = bf16[1,256,256] fusion(%start), kind=kCustom, calls=%gather.2
  ROOT %t = (s32[], bf16[1,64,256]) tuple(%i, %x)
}

%condition (p: (s32[], bf16[1,64,256])) -> pred[] {
  %c = s32[]{:T(128)} constant(7)
  %p = (s32[], bf16[1,64,256]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %c), direction=LT
}

ENTRY %main (x: (s32[], bf16[1,64,256])) -> (s32[], bf16[1,64,256]) {
  %x = (s32[], bf16[1,64,256]) parameter(0)
  ROOT %w = (s32[], bf16[1,64,256]) while(%x), condition=%condition, body=%body
}
"""


def test_tpu_loops_are_as_long_as_their_condition_says_and_a_transfer_in_two_parts_is_one():
    assert work(Text(TPU), 4).sent == {"all-gather": 7 * 3 / 4 * 256 * 256 * 2}


GPU = """
ENTRY %main (x: bf16[1024,64], y: bf16[128,64]) -> bf16[128,64] {
  %x = bf16[1024,64] parameter(0)
  %y = bf16[128,64] parameter(1)
  %a = (bf16[128,64]{1,0}, bf16[1024,64]{1,0}) all-gather-start(%y), replica_groups=[1,8]<=[8], dimensions={0}
  %b = ((bf16[1024,64]{1,0}), bf16[128,64]{1,0}) reduce-scatter-start(%x), replica_groups=[1,8]<=[8]
  ROOT %r = bf16[128,64] reduce-scatter-done(%b)
}
"""


def test_what_gpus_start_counts_by_its_result():
    whole = 7 / 8 * 1024 * 64 * 2
    assert work(Text(GPU), 8).sent == {"all-gather": whole, "reduce-scatter": whole}


@pytest.mark.parametrize(
    ("groups", "edges"),
    [
        ("replica_groups={{0,1},{2,3}}", 0),  # each group inside an island
        ("replica_groups={{0,2},{1,3}}", 1),  # every edge between the two
        ("replica_groups=[1,4]<=[4]", 1 / 2),  # a ring of four crosses there and back
        ("replica_groups=[2,2]<=[2,2]T(1,0)", 1),  # 0 and 2, 1 and 3
        ("replica_groups=[2,2]<=[4]", 0),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}", 1),
        ("replica_groups=mesh['a'=2,'b'=2] {'b'}", 0),
        ("replica_groups={}", 1 / 2),
    ],
)
def test_what_leaves_an_island_is_counted_apart(groups, edges):
    """Devices 0 and 1 share fast links, and so do 2 and 3."""
    text = f"""
ENTRY %main (x: f32[64]) -> f32[64] {{
  %x = f32[64] parameter(0)
  ROOT %r = f32[64] all-reduce(%x), channel_id=1, {groups}, to_apply=%sum
}}

%sum (a: f32[], b: f32[]) -> f32[] {{
  %a = f32[] parameter(0)
}}
"""
    got = work(Text(text), 4, [0, 0, 1, 1])
    assert got.network["all-reduce"] == edges * got.sent["all-reduce"] > -1


def test_a_transfer_that_waits_for_the_slow_link_is_slow():
    text = """
ENTRY %main (x: f32[64]) -> f32[64] {
  %x = f32[64] parameter(0)
  %a = f32[64] collective-permute(%x), source_target_pairs={{0,1},{1,0},{2,3},{3,2}}
  ROOT %b = f32[64] collective-permute(%a), source_target_pairs={{0,1},{1,2},{2,3},{3,0}}
}
"""
    got = work(Text(text), 4, [0, 0, 1, 1])
    assert got.sent["collective-permute"] == 2 * 64 * 4
    assert got.network["collective-permute"] == 64 * 4
