"""Rows by their index, wherever they are: read from arrays that devices share, written into them.

An array [N, ...] is split over the devices that split the batch, and so are the indexes [M] that ask
for its rows. No device ever holds more of the array than its own part: indexes are gathered (4
bytes each), every device answers for the rows that it has, and the answers are summed where they
were asked for: O(M) rows travel, whatever N. An index outside 0 .. N - 1, -1 above all, is no row: it
reads as zeros, and nothing is written for it.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from clipjax.errors import ClipjaxError
from clipjax.mesh import BATCH_AXES, batch_shards


def rows_at(mesh: Mesh | None, arrays: Any, index: jax.Array) -> Any:
    """Chosen rows [M, ...] of arrays [N, ...]; see `PairEngine.rows_at`."""
    leaves = jax.tree.leaves(arrays)
    _check(mesh, "rows_at", {"index": index} | {f"arrays[{i}]": a for i, a in enumerate(leaves)})

    def answer(arrays, index):
        wanted = _everyones(mesh, index)

        def one(array):
            if mesh is None:
                return _rows(array, index)
            if len(wanted) > len(array) * batch_shards(mesh):  # less to send the array itself
                return _rows(_everyones(mesh, array), index)
            answers = _rows(array, _local(array, wanted))
            summed = answers.astype(jnp.uint8) if array.dtype == bool else answers
            return lax.psum_scatter(summed, BATCH_AXES, tiled=True).astype(array.dtype)

        return jax.tree.map(one, arrays)

    return _map(mesh, answer, 2)(arrays, index)


def set_rows(mesh: Mesh | None, array: jax.Array, index: jax.Array, values: jax.Array) -> jax.Array:
    """The array [N, ...] with rows replaced; see `PairEngine.set_rows`."""
    _check(mesh, "set_rows", {"array": array, "index": index, "values": values})
    if values.shape != (index.shape[0], *array.shape[1:]):
        raise ClipjaxError(
            f"set_rows: values {values.shape} must be {(index.shape[0], *array.shape[1:])}: a row of the "
            f"array {array.shape} for each of {index.shape[0]} indexes"
        )

    def write(array, index, values):
        index, values = _everyones(mesh, index), _everyones(mesh, values.astype(array.dtype))
        # Of equal indexes, brought together in batch order, the last one stands.
        order = jnp.argsort(index, stable=True)
        index, values = index[order], values[order]
        last = jnp.append(index[1:] != index[:-1], True)
        at = index if mesh is None else _local(array, index)
        at = jnp.where(last & (at >= 0) & (at < len(array)), at, len(array))
        return array.at[at].set(values, mode="drop")

    return _map(mesh, write, 3)(array, index, values)


def _rows(array, at):
    """Rows of an array at hand, zeros where it has none; their gradient adds up in float32."""
    floating = jnp.issubdtype(array.dtype, jnp.inexact)
    wide = array.astype(jnp.promote_types(array.dtype, jnp.float32)) if floating else array
    outside = (at < 0) | (at >= len(array))
    rows = wide.at[jnp.where(outside, len(array), at)].get(mode="fill", fill_value=0)
    return rows.astype(array.dtype)


def _local(array, index):
    """Positions in this device's part of an array."""
    return index - lax.axis_index(BATCH_AXES) * len(array)


def _everyones(mesh, array):
    return array if mesh is None else lax.all_gather(array, BATCH_AXES, tiled=True)


def _map(mesh, function, arguments):
    if mesh is None:
        return lambda *a: function(*jax.tree.map(jnp.asarray, a))
    split = P(BATCH_AXES)
    return jax.shard_map(
        function, mesh=mesh, in_specs=(split,) * arguments, out_specs=split, check_vma=False
    )


def _check(mesh, name, arrays):
    shards = 1 if mesh is None else batch_shards(mesh)
    for what, array in arrays.items():
        if array.ndim == 0 or array.shape[0] % shards:
            raise ClipjaxError(
                f"{name}: {what} {array.shape} cannot be split over {shards} devices (mesh group x data): "
                "its first axis must be a multiple; pad it"
            )
    index = arrays["index"]
    if index.ndim != 1 or not jnp.issubdtype(index.dtype, jnp.integer):
        raise ClipjaxError(
            f"{name}: index {index.dtype}{list(index.shape)} must be whole numbers [M], one for each row"
        )
