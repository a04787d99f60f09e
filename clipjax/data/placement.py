"""From the rows of one process to arrays over the whole mesh, and back to who makes which rows."""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import Mesh

from clipjax.batch import Batch
from clipjax.errors import ClipjaxError
from clipjax.mesh import batch_sharding, batch_shards


def process_rows(mesh: Mesh) -> tuple[int, int]:
    """Which rows of a global batch this process must make: part `index` of `count` equal ones.

    Processes whose devices differ only along `tensor` hold the same rows, so the count may be smaller than the
    number of processes.

    Raises:
      ClipjaxError: the processes' devices hold parts of different sizes, or parts that overlap.
    """
    pieces = _pieces(mesh)
    parts = sorted(set(pieces.values()))
    return parts.index(pieces[jax.process_index()]), len(parts)


def to_global(batch: dict[str, np.ndarray], mesh: Mesh) -> Batch:
    """This process's rows as global arrays, split over the mesh axes (group, data).

    Where a mesh follows the links of a torus, the devices of a process need not be neighbors in it: then the rows of
    a process are no contiguous run of the global arrays either.

    Args:
      batch: arrays [b, ...], part `process_rows(mesh)` of the global batch.
      mesh: with the axes `group` and `data`.

    Returns:
      The same keys with arrays [b * count, ...].

    Raises:
      ClipjaxError: the global batch is not divisible by the devices it is split over.
    """
    shards, sharding = batch_shards(mesh), batch_sharding(mesh)
    mine = _pieces(mesh)[jax.process_index()]
    arrays = {}
    for key, rows in batch.items():
        total = len(rows) * (shards // len(mine))
        if total % shards:
            raise ClipjaxError(
                f"a batch of {total} cannot be split over group x data = {shards} devices; make "
                "batch_size a multiple of that"
            )
        size = total // shards

        def piece(where, rows=rows, size=size):
            start = mine.index((where[0].start or 0) // size) * size
            return rows[start : start + size]

        shape = (total, *rows.shape[1:])
        arrays[key] = jax.make_array_from_callback(shape, sharding, piece)
    return arrays


def _pieces(mesh: Mesh) -> dict[int, tuple[int, ...]]:
    """Process -> which of the `batch_shards` pieces of a batch its devices hold, ascending."""
    grid = mesh.devices.reshape(batch_shards(mesh), -1)
    held: dict[int, set[int]] = {}
    for number, devices in enumerate(grid):
        for device in devices:
            held.setdefault(device.process_index, set()).add(number)
    pieces = {process: tuple(sorted(numbers)) for process, numbers in held.items()}
    parts = set(pieces.values())
    if len({len(part) for part in parts}) > 1 or sum(map(len, parts)) != len(grid):
        raise ClipjaxError(
            f"the processes hold the parts {sorted(parts)} of {len(grid)} of a batch, which overlap or are of "
            "different sizes: give every process as many devices, and let mesh.tensor divide them or be a multiple"
        )
    return pieces
