"""The mesh and the path rules."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from clipjax.errors import ClipjaxError
from clipjax.mesh import AXES, MeshShape, arrange, batch_sharding, batch_shards
from clipjax.models import DualEncoder
from clipjax.params import abstract
from clipjax.sharding import Rule, Sharding, finer, per_device_bytes, prime_factors
from clipjax.towers import TextTransformer, ViT


def leaf(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


TREE = {
    "params": {
        "blocks": {
            "attn": {
                "q": {"kernel": leaf(8, 64, 64), "bias": leaf(8, 64)},
                "out": {"kernel": leaf(8, 64, 64)},
            },
            "mlp": {"fc1": {"kernel": leaf(8, 64, 256)}, "fc2": {"kernel": leaf(8, 256, 64)}},
        },
        "embedding": leaf(1000, 64),
        "scale": leaf(64),
    },
    "step": leaf(),
}


def specs(sharding, mesh_shape):
    return jax.tree.map(lambda s: s.spec, sharding.apply(TREE, mesh_shape.build()))


def test_replicated_unless_asked():
    flat = jax.tree.leaves(specs(Sharding(), MeshShape()), is_leaf=lambda x: isinstance(x, P))
    assert all(all(axis is None for axis in spec) for spec in flat)


def test_tensor_rules_split_in_and_out_of_the_hidden_layer():
    got = specs(Sharding(), MeshShape(data=2, tensor=4))["params"]["blocks"]
    assert got["attn"]["q"]["kernel"] == P(None, None, "tensor")
    assert got["attn"]["q"]["bias"] == P(None, "tensor")
    assert got["attn"]["out"]["kernel"] == P(None, "tensor", None)
    assert got["mlp"]["fc1"]["kernel"] == P(None, None, "tensor")
    assert got["mlp"]["fc2"]["kernel"] == P(None, "tensor", None)


def test_fsdp_takes_the_largest_dimension_but_never_the_layer_axis():
    got = specs(Sharding(fsdp=True, min_size=100), MeshShape(data=4, tensor=2))["params"]
    assert got["blocks"]["attn"]["q"]["kernel"] == P(None, "data", "tensor")
    assert got["blocks"]["mlp"]["fc2"]["kernel"] == P(None, "tensor", "data")
    assert got["blocks"]["attn"]["q"]["bias"] == P(None, "tensor")  # only the layer axis is left
    assert got["embedding"] == P("data", None)
    assert got["scale"] == P(None)  # too small to be worth it


def test_what_is_small_in_one_layer_stays_whole():
    got = specs(Sharding(fsdp=True, min_size=4096), MeshShape())["params"]["blocks"]["attn"]
    assert got["q"]["kernel"] == P(None, None, "data")  # 64 * 64 a layer
    assert specs(Sharding(fsdp=True, min_size=4097), MeshShape())["params"]["blocks"]["attn"]["q"][
        "kernel"
    ] == P(None, None, None)


def on_paper(data, tensor=1):
    """A mesh of devices that are not there."""
    return AbstractMesh((1, data, tensor), AXES, axis_types=(AxisType.Auto,) * 3)


@pytest.mark.parametrize("name", ["So400m/14", "g/14"])
def test_fsdp_over_256_devices_comes_near_the_ideal(name):
    """Widths of 1152 and 1408, a hidden layer of 4304: none divides by 256, all do by 16 at least."""
    tower = ViT.preset(name)
    _, params, _ = abstract(lambda: tower.build(nnx.Rngs(0)))
    tree, mesh = {"params": params}, on_paper(256)
    sharding = Sharding(fsdp=True)
    shardings = sharding.apply(tree, mesh)
    local, total = per_device_bytes(tree, shardings)
    assert local <= 1.2 * total / 256
    assert f"{local * 256 / total:.2f}x the ideal" in sharding.describe(tree, shardings, mesh)


def test_fsdp_splits_in_two_dimensions_what_divides_in_none():
    tree = {"a": leaf(12, 40), "b": leaf(9, 5), "c": leaf(48, 5), "blocks": {"d": leaf(24, 12, 10)}}
    got = Sharding(fsdp=True, min_size=1).apply(tree, on_paper(24, tensor=2))
    # 24 = 2 * 2 * 2 * 3; the larger dimension takes what it can, the other one the rest
    assert got["a"].spec == P("data_3", ("data_0", "data_1", "data_2"))
    assert got["a"].shard_shape((12, 40)) == (4, 5)
    assert got["b"].spec == P("data_3", None)  # over 3 of 24
    assert got["c"].spec == P("data", None)  # as ever, where one dimension is enough
    assert got["blocks"]["d"].spec == P(None, ("data_0", "data_1", "data_3"), "data_2")


def test_a_finer_mesh_has_the_same_devices_in_the_same_order():
    mesh = MeshShape(group=2).build(jax.devices()[:8])
    fine = finer(mesh)
    assert dict(fine.shape) == {"group": 2, "data_0": 2, "data_1": 2, "tensor": 1}
    assert list(fine.devices.ravel()) == list(mesh.devices.ravel())
    assert prime_factors(360) == [2, 2, 2, 3, 3, 5]


def test_what_is_split_in_two_dimensions_computes_the_same():
    mesh = MeshShape().build()
    layout = Sharding(fsdp=True, min_size=1).apply({"w": leaf(12, 6)}, mesh)["w"]
    assert layout.shard_shape((12, 6)) == (6, 3) or layout.shard_shape((12, 6)) == (3, 3)
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((16, 12)), rng.standard_normal((12, 6))
    split = jax.device_put(x, batch_sharding(mesh)), jax.device_put(w, layout)
    step = jax.jit(
        lambda x, w: w - jax.grad(lambda w: ((x @ w) ** 2).sum())(w), out_shardings=layout
    )
    got = step(*split)
    assert got.sharding == layout
    np.testing.assert_allclose(got, w - 2 * x.T @ (x @ w), rtol=1e-4, atol=1e-4)


def test_fsdp_that_wastes_memory_says_so_once():
    """81 = 3 * 3 * 3 * 3 shares nothing with 256: every device holds all of it."""
    tree = {"params": {"odd": leaf(81, 2187, 729), "even": leaf(256, 256)}}
    sharding = Sharding(fsdp=True)
    text = sharding.describe(tree, sharding.apply(tree, on_paper(256)), on_paper(256))
    assert "255.87x the ideal" in text
    assert "params/odd (81, 2187, 729)" in text
    assert "mesh.data" in text
    assert "\n" not in text


def test_heads_must_divide_over_tensor_devices(tmp_path):
    text = TextTransformer(vocab_size=64, context_length=8, eos_id=2, width=32, heads=8, depth=1)
    model = DualEncoder(ViT(image_size=16, patch_size=8, width=48, heads=12, depth=1), text, 16)
    with pytest.raises(
        ClipjaxError, match=r"model.image.heads=12 .*mesh.tensor=8.*\[1, 2, 3, 4, 6"
    ):
        Sharding().check_heads(model, on_paper(1, tensor=8))
    Sharding().check_heads(model, on_paper(1, tensor=4))
    Sharding(rules=(Rule(".*"),)).check_heads(model, on_paper(1, tensor=8))  # attention stays whole
    Sharding().check_heads(model, on_paper(8))


def test_fsdp_stays_inside_a_group():
    sharding = Sharding(fsdp=True).apply(TREE, MeshShape(group=2, data=4).build())
    local, total = per_device_bytes(TREE, sharding)
    assert 0.25 <= local / total < 0.27


def test_uncovered_leaf_is_named():
    rules = (Rule("blocks/"), Rule("embedding"), Rule("step"))
    with pytest.raises(ClipjaxError, match="'params/scale' with shape \\(64,\\)"):
        Sharding(rules=rules).apply(TREE, MeshShape().build())


def test_indivisible_tensor_split_is_reported_not_forced(caplog):
    tree = {"q": {"kernel": leaf(7, 9)}}
    sharding = Sharding(rules=(Rule(r"q/kernel", tensor=-1),)).apply(
        tree, MeshShape(tensor=2).build()
    )
    assert sharding["q"]["kernel"].spec == P(None, None)
    assert "q/kernel (7, 9)" in caplog.text


@pytest.mark.parametrize(
    "shape", [MeshShape(group=3), MeshShape(data=5), MeshShape(tensor=16), MeshShape(group=0)]
)
def test_meshes_that_do_not_fit_are_refused(shape):
    with pytest.raises(ClipjaxError, match="mesh"):
        shape.build()


def test_mesh_counts():
    mesh = MeshShape(group=2, tensor=2).build()
    assert dict(mesh.shape) == {"group": 2, "data": 2, "tensor": 2}
    assert batch_shards(mesh) == 4


@dataclasses.dataclass(frozen=True)
class Chip:
    """What `arrange` and mesh_utils read of a device."""

    id: int
    process_index: int
    coords: tuple[int, ...] = ()
    slice_index: int | None = None
    platform: str = "cpu"
    device_kind: str = "cpu"
    core_on_chip: int = 0


def slices(number, order=None):
    """TPU v5e slices of 4 x 4 chips, four on a host, as jax numbers them."""
    chips = []
    for index in range(number):
        for host in range(4):
            for chip in range(4):
                x, y = host % 2 * 2 + chip % 2, host // 2 * 2 + chip // 2
                chips.append(
                    Chip(100_000 * index + x + 4 * y, 4 * index + host, (x, y, 0), index, "tpu", "TPU v5 lite")
                )  # fmt: skip
    return chips if order is None else [chips[i] for i in order]


def hosts(number, devices):
    return [Chip(h * devices + d, h) for h in range(number) for d in range(devices)]


def spans(grid, key="slice_index"):
    """Per group: which slices (or hosts) it has devices of."""
    return [sorted({getattr(d, key) for d in group.ravel()}) for group in grid]


def test_groups_are_slices_whatever_the_order_of_the_devices(caplog):
    interleaved = [i // 2 + 16 * (i % 2) for i in range(32)]
    grid = arrange(slices(2, interleaved), (2, 16, 1))
    assert spans(grid) == [[0], [1]]
    assert spans(arrange(slices(2, interleaved), (4, 8, 1))) == [[0], [0], [1], [1]]
    assert spans(arrange(slices(4), (4, 4, 4))) == [[0], [1], [2], [3]]
    assert len({d.id for d in grid.ravel()}) == 32
    assert not caplog.records


def test_neighbors_in_a_slice_are_neighbors_on_its_torus():
    for shape in ((1, 16, 1), (4, 4, 1), (2, 4, 2)):
        grid = arrange(slices(1), shape)
        for line in grid.transpose(0, 2, 1).reshape(-1, shape[1]):  # along `data`
            steps = [
                sum(abs(a - b) for a, b in zip(one.coords, other.coords, strict=True))
                for one, other in itertools.pairwise(line)
            ]
            assert steps == [1] * len(steps), shape


def test_a_group_over_several_slices_is_named(caplog):
    grid = arrange(slices(2), (1, 32, 1))
    assert spans(grid) == [[0, 1]]
    assert [d.slice_index for d in grid.ravel()] == [0] * 16 + [1] * 16
    assert "the data axis goes over the slow links between 2 slices; --mesh.group 2" in caplog.text
    grid = arrange(slices(4), (2, 32, 1))
    assert spans(grid) == [[0, 1], [2, 3]]
    assert "each of the 2 groups goes over the slow links between 2 slices" in caplog.text


@pytest.mark.parametrize("shape", [(2, 24, 1), (1, 1, 48), (1, 16, 3)])
def test_axes_that_cut_across_slices_are_refused(shape):
    with pytest.raises(ClipjaxError, match="cuts across the slow links between 3 slices"):
        arrange(slices(3), shape)


def test_groups_are_hosts_where_there_are_no_slices(caplog):
    shuffled = [hosts(4, 2)[i] for i in (0, 2, 4, 6, 1, 3, 5, 7)]
    assert spans(arrange(shuffled, (4, 2, 1)), "process_index") == [[0], [1], [2], [3]]
    assert spans(arrange(shuffled, (2, 4, 1)), "process_index") == [[0, 1], [2, 3]]
    # One device a process says nothing about hosts: the order is jax's.
    alone = [Chip(i, i) for i in range(8)]
    assert [d.id for d in arrange(alone, (2, 4, 1)).ravel()] == list(range(8))
    arrange(hosts(2, 2), (1, 1, 4))
    assert "cuts across the slow links between 2 hosts" in caplog.text
