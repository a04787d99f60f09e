"""The device mesh ("group", "data", "tensor"), laid along the links between the devices.

The batch is split over `group` x `data`. Parameters are replicated, or sharded over `data` (FSDP, and
so replicated across groups), or split over `tensor`. `group` is meant for the slow links: negatives and
parameter shards can stay inside one group.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from clipjax.component import Component
from clipjax.errors import ClipjaxError

log = logging.getLogger(__name__)
AXES = ("group", "data", "tensor")
BATCH_AXES = ("group", "data")


@dataclasses.dataclass(frozen=True)
class MeshShape(Component):
    """How the devices are arranged."""

    group: int = 1
    """Device groups: whole slices or hosts where there are several, else consecutive devices."""
    data: int = -1
    """Devices along the data axis of one group; -1 takes all that remain."""
    tensor: int = 1
    """Devices that share one tensor-parallel layer."""

    def build(self, devices: Sequence[jax.Device] | None = None) -> Mesh:
        """The mesh over `devices` (default: all of them).

        Raises:
          ClipjaxError: the axes do not multiply to the number of devices, or cut across slices.
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
        return Mesh(arrange(devices, shape), AXES, axis_types=(AxisType.Auto,) * 3)


def arrange(devices: Sequence[Any], shape: tuple[int, int, int]) -> np.ndarray:
    """Devices as an array of this shape (group, data, tensor) whose axes follow the links between them.

    What shares fast links is an island: a TPU slice, a GPU fabric, else a host. Groups are made of whole islands
    or lie inside one; inside a TPU slice the axes follow its torus.

    Raises:
      ClipjaxError: the axes cut across slices in another way.
    """
    group, data, tensor = shape
    islands: dict[tuple[str, int], list[Any]] = {}
    for device in devices:
        islands.setdefault(island(device), []).append(device)
    kind = next(iter(islands))[0]
    parts = [sorted(islands[key], key=_host) for key in sorted(islands)]
    number, size = len(parts), len(parts[0])
    if number == 1 or size == 1 or any(len(part) != size for part in parts):
        return _inside([device for part in parts for device in part], shape)
    if group % number == 0:
        return np.concatenate([_inside(part, (group // number, data, tensor)) for part in parts])
    spanned = number // group
    if number % group == 0 and data % spanned == 0:
        log.log(
            logging.WARNING if kind == "slice" else logging.INFO,
            "mesh: %s over the slow links between %d %s; --mesh.group %d keeps what a group shares inside one",
            "the data axis goes" if group == 1 else f"each of the {group} groups goes",
            spanned, _PLURAL[kind], number,
        )  # fmt: skip
        rows = [_inside(part, (1, data // spanned, tensor)) for part in parts]
        groups = [rows[i : i + spanned] for i in range(0, number, spanned)]
        return np.concatenate([np.concatenate(group, axis=1) for group in groups])
    text = (
        f"mesh group={group} x data={data} x tensor={tensor} cuts across the slow links between {number} "
        f"{_PLURAL[kind]} of {size} devices: let group be a multiple of {number}, and tensor divide {size}"
    )
    if kind == "slice":
        raise ClipjaxError(text)
    log.warning("%s", text)
    return np.asarray([device for part in parts for device in part]).reshape(shape)


_PLURAL = {"slice": "slices", "host": "hosts"}


def island(device: Any) -> tuple[str, int]:
    """What the device shares fast links with."""
    index = getattr(device, "slice_index", None)
    if index is None and device.platform == "tpu":
        index = 0
    return ("host", device.process_index) if index is None else ("slice", index)


def _host(device: Any) -> int:
    return device.process_index


def _inside(devices: list[Any], shape: tuple[int, ...]) -> np.ndarray:
    """Devices that share fast links, as an array of this shape."""
    if devices[0].platform == "tpu" and len(devices) > 1:
        try:
            return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        except Exception as error:  # part of a slice, or a chip that mesh_utils does not know
            log.info("mesh: in the order of the devices, not of their links (%s)", error)
    return np.asarray(devices).reshape(shape)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Leading axis split over group x data, everything else replicated."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same value on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_shards(mesh: Mesh) -> int:
    """Number of pieces the global batch is cut into."""
    return mesh.shape["group"] * mesh.shape["data"]
