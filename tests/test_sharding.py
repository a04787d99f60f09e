"""The mesh and the path rules."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from clipjax.errors import ClipjaxError
from clipjax.mesh import MeshShape, batch_shards, start_processes
from clipjax.sharding import Rule, Sharding, per_device_bytes


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


def test_fsdp_that_cannot_split_a_large_leaf_says_so(caplog):
    tree = {"params": {"odd": leaf(81, 83)}}
    Sharding(fsdp=True).apply(tree, MeshShape().build())
    assert "params/odd (81, 83): no dimension divides over 8 data devices" in caplog.text


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
    assert "q/kernel" in caplog.text


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


def test_start_up_does_nothing_alone_and_wants_complete_variables(monkeypatch):
    start_processes()
    assert jax.process_count() == 1
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "localhost:1")
    with pytest.raises(ClipjaxError, match="JAX_NUM_PROCESSES"):
        start_processes()
