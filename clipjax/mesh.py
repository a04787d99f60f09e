"""The device mesh ("group", "data", "tensor") and multi-process start-up.

The batch is split over `group` x `data`. Parameters are replicated, or sharded over `data` (FSDP, and
so replicated across groups), or split over `tensor`. `group` is meant for the slow links: negatives and
parameter shards can stay inside one group.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from clipjax.component import Component
from clipjax.errors import ClipjaxError

AXES = ("group", "data", "tensor")
BATCH_AXES = ("group", "data")


@dataclasses.dataclass(frozen=True)
class MeshShape(Component):
    """How the devices are arranged."""

    group: int = 1
    """Device groups; consecutive devices (so: hosts) share a group."""
    data: int = -1
    """Devices along the data axis of one group; -1 takes all that remain."""
    tensor: int = 1
    """Devices that share one tensor-parallel layer."""

    def build(self, devices: Sequence[jax.Device] | None = None) -> Mesh:
        """The mesh over `devices` (default: all of them).

        Raises:
          ClipjaxError: the axes do not multiply to the number of devices.
        """
        devices = list(jax.devices() if devices is None else devices)
        for axis in ("group", "tensor"):
            if getattr(self, axis) < 1:
                raise ClipjaxError(f"mesh.{axis}={getattr(self, axis)}: must be at least 1")
        fixed = self.group * self.tensor
        data = len(devices) // fixed if self.data == -1 else self.data
        if data < 1 or data * fixed != len(devices):
            raise ClipjaxError(
                f"mesh group={self.group} x data={self.data} x tensor={self.tensor} does not cover "
                f"{len(devices)} devices: choose axes whose product is {len(devices)} (data=-1 takes the rest)"
            )
        shape = (self.group, data, self.tensor)
        return Mesh(np.asarray(devices).reshape(shape), AXES, axis_types=(AxisType.Auto,) * 3)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Leading axis split over group x data, everything else replicated."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same value on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_shards(mesh: Mesh) -> int:
    """Number of pieces the global batch is cut into."""
    return mesh.shape["group"] * mesh.shape["data"]


def start_processes() -> None:
    """Joins the other processes of a multi-process run; does nothing in a single process.

    Explicit: JAX_COORDINATOR_ADDRESS (host:port), JAX_NUM_PROCESSES and JAX_PROCESS_ID. Otherwise the
    cluster's own variables decide (SLURM and Open MPI with several tasks, a TPU pod slice), and jax
    finds the rest by itself. Must run before anything touches a device.

    Raises:
      ClipjaxError: the explicit variables are incomplete.
    """
    env = os.environ
    if address := env.get("JAX_COORDINATOR_ADDRESS"):
        try:
            count, index = int(env["JAX_NUM_PROCESSES"]), int(env["JAX_PROCESS_ID"])
        except (KeyError, ValueError) as error:
            raise ClipjaxError(
                f"JAX_COORDINATOR_ADDRESS={address} needs JAX_NUM_PROCESSES and JAX_PROCESS_ID beside "
                f"it, both integers ({error})"
            ) from error
        if count > 1:
            jax.distributed.initialize(address, num_processes=count, process_id=index)
    elif (
        int(env.get("SLURM_NTASKS", 1)) > 1
        or int(env.get("OMPI_COMM_WORLD_SIZE", 1)) > 1
        or "," in env.get("TPU_WORKER_HOSTNAMES", "")
    ):
        jax.distributed.initialize()
