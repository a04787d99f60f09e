"""What layers say about the layout of arrays: hints to the compiler that no result depends on.

Under FSDP the batch and the weights are split over the same devices. A layer's output could then be
laid out like either, and the compiler, asked nothing, may send activations of the whole batch around
where it should gather the weights of one layer. Layers settle it with the functions here. They
name no mesh: the step and the predictor put one around the model while it is traced (`on_mesh`), and
without one the functions return what they are given.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import jax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import Mesh, PartitionSpec

from clipjax.mesh import BATCH_AXES, batch_shards


def on_mesh(mesh: Mesh | None) -> AbstractContextManager[Any]:
    """The context in which the hints mean this mesh; None: they mean nothing, nor where devices run apart."""
    if mesh is None or jax.sharding.get_abstract_mesh().manual_axes:
        return contextlib.nullcontext()
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def batch_first(x: jax.Array) -> jax.Array:
    """Splits the leading axis, the batch, over group x data, and leaves the others to the compiler.

    Called on what a layer makes of its input and its weights. An axis that does not divide is left
    alone.
    """
    mesh = _mesh()
    if mesh is None or mesh.manual_axes or x.ndim == 0 or x.shape[0] % batch_shards(mesh):
        return x
    free = [PartitionSpec.UNCONSTRAINED] * (x.ndim - 1)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(BATCH_AXES, *free))


def gathered(weight: jax.Array) -> jax.Array:
    """Gathers a weight on every device.

    Called on a table before rows are taken from it: looking up the tokens of the whole batch in a
    split table would make every device hold the embeddings of the whole batch.
    """
    mesh = _mesh()
    if mesh is None or mesh.manual_axes:
        return weight
    return jax.lax.with_sharding_constraint(weight, PartitionSpec())


def platform() -> str | None:
    """Of the devices that the program is traced for: cpu, gpu or tpu; None where no mesh says."""
    device = getattr(_mesh(), "abstract_device", None)
    return None if device is None else device.platform


def per_shard(f: Callable[..., jax.Array], rows: int, heads: int) -> Callable[..., jax.Array]:
    """`f`, from arrays [B, N, D] to one of them, as each device runs it on its own rows and heads.

    For kernels that the compiler cannot split. An axis that does not divide is left whole.
    """
    mesh = _mesh()
    free = set() if mesh is None else set(mesh.axis_names) - set(mesh.manual_axes)
    if not free:
        return f
    batch = tuple(axis for axis in BATCH_AXES if axis in free)
    shards = math.prod(mesh.shape[axis] for axis in batch)
    tensor = "tensor" in free and heads % mesh.shape["tensor"] == 0
    spec = PartitionSpec(batch if rows % shards == 0 else None, None, "tensor" if tensor else None)
    return jax.shard_map(f, in_specs=spec, out_specs=spec, axis_names=free, check_vma=False)


def row_major(x: jax.Array, heads: int = 1) -> jax.Array:
    """Stores [B, N, D] with channels side by side, where GPUs' and TPUs' compilers may choose otherwise.

    Nothing on a CPU, without a mesh, and where an axis does not divide.

    Args:
      x: [B, N, D].
      heads: how many of them share D, which "tensor" splits by the head.
    """
    mesh = _mesh()
    if mesh is None or platform() not in ("gpu", "tpu"):
        return x
    sizes = {axis: mesh.shape[axis] for axis in mesh.axis_names if axis not in mesh.manual_axes}
    shards = math.prod(sizes.get(axis, 1) for axis in BATCH_AXES)
    if len(x) % shards or heads % sizes.get("tensor", 1):
        return x  # it would be gathered for this, and its gradient added up over devices that have the same
    row_by_row = functools.partial(with_layout_constraint, layouts=Layout((0, 1, 2)))
    # The partitioner does not know the constraint, and would gather what it is put on.
    return per_shard(row_by_row, len(x), heads)(x)


def _mesh() -> Any:
    mesh = jax.sharding.get_abstract_mesh()
    return mesh if set(BATCH_AXES) <= set(mesh.axis_names) else None
