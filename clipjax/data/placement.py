"""From the rows of one process to arrays over the whole mesh, and back to who makes which rows."""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from clipjax.batch import Batch
from clipjax.errors import ClipjaxError

BATCH_AXES = ("group", "data")
"""The mesh axes a batch is split over; along any other axis it is replicated."""


def process_rows(mesh: Mesh) -> tuple[int, int]:
    """Which rows of a global batch this process must make: part `index` of `count` equal ones.

    Processes whose devices differ only along other axes (`tensor`) hold the same rows, so the count
    may be smaller than the number of processes.

    Raises:
      ClipjaxError: this process' devices hold rows that are no such part.
    """
    shards = mesh.shape[BATCH_AXES[0]] * mesh.shape[BATCH_AXES[1]]
    owned = NamedSharding(mesh, P(BATCH_AXES)).addressable_devices_indices_map((shards,))
    rows = sorted({index[0].indices(shards)[0] for index in owned.values() if index is not None})
    count = shards // len(rows)
    if (
        rows != list(range(rows[0], rows[0] + len(rows)))
        or shards % len(rows)
        or rows[0] % len(rows)
    ):
        raise ClipjaxError(
            f"the devices of process {jax.process_index()} hold the parts {rows} of {shards} of a "
            "batch, which are not one contiguous run: make the mesh in the order of the processes"
        )
    return rows[0] // len(rows), count


def to_global(batch: dict[str, np.ndarray], mesh: Mesh) -> Batch:
    """This process's rows as global arrays, split over the mesh axes (group, data).

    Args:
      batch: arrays [b, ...], part `process_rows(mesh)` of the global batch.
      mesh: with the axes `group` and `data`.

    Returns:
      The same keys with arrays [b * count, ...].

    Raises:
      ClipjaxError: the global batch is not divisible by the devices it is split over.
    """
    _, count = process_rows(mesh)
    shards = mesh.shape[BATCH_AXES[0]] * mesh.shape[BATCH_AXES[1]]
    sharding = NamedSharding(mesh, P(BATCH_AXES))
    arrays = {}
    for key, rows in batch.items():
        total = len(rows) * count
        if total % shards:
            raise ClipjaxError(
                f"a batch of {total} cannot be split over group x data = {shards} devices; make "
                "batch_size a multiple of that"
            )
        shape = (total, *rows.shape[1:])
        arrays[key] = jax.make_array_from_process_local_data(sharding, rows, shape)
    return arrays
