"""What one process knows alone (a signal, the clock), told to all of them without a halt.

Each process casts a few small numbers beside a step; the devices take the greatest of each while they work, and
the loop reads the outcome when it retires that step. All processes retire the same steps in the same order, so
all of them act on the same outcome at the same place.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


class Votes:
    """Casts and counts; a single process hears itself."""

    def __init__(self, mesh: Mesh):
        self._several = jax.process_count() > 1
        self._devices = mesh.devices.size
        self._layout = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._greatest = jax.jit(
            lambda rows: jnp.max(rows, 0), out_shardings=NamedSharding(mesh, PartitionSpec())
        )

    def cast(self, numbers: Sequence[int]) -> jax.Array | np.ndarray:
        """Starts a vote; `np.asarray` of what it returns is the outcome, int32, as long as `numbers`.

        Args:
          numbers: of this process; as many in every one.
        """
        mine = np.asarray(numbers, np.int32)
        if not self._several:
            return mine
        rows = np.tile(mine, (len(self._layout.addressable_devices), 1))
        shape = (self._devices, len(mine))
        return self._greatest(jax.make_array_from_process_local_data(self._layout, rows, shape))

    def settle(self, numbers: Sequence[int]) -> np.ndarray:
        """A vote whose outcome is waited for."""
        return np.asarray(self.cast(numbers))
