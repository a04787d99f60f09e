"""Rows through a compiled function in batches of few shapes, on one device or a mesh."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from clipjax.errors import ClipjaxError
from clipjax.mesh import batch_sharding, batch_shards

PER_SHARD = 64
"""Default rows a device embeds at once. On a CPU, 256 take twice the time a row that 64 do."""
FEW_PER_SHARD = 4
"""Rows a device embeds at once where all of a call's rows are fewer than a batch. On a CPU, a
ViT-B/32 takes about the same time a row from 4 rows to 64, and more with 1."""
_FEW_BATCHES = 8  # full batches after which the last one is padded
_IN_FLIGHT = 2  # batches dispatched ahead of the device; simulated devices deadlock without a bound

Read = Callable[[np.ndarray], np.ndarray]
"""Gives the rows [k, ...] at ascending indices [k]."""


@dataclasses.dataclass(frozen=True)
class Batching:
    """How rows are cut into batches, of two sizes at most, and laid on the devices.

    Attributes:
      size: rows of a batch, a multiple of the mesh's batch shards.
      few: rows of a small batch, likewise.
      mesh: what a batch is split over; None: the default device.
    """

    size: int
    few: int
    mesh: Mesh | None

    @classmethod
    def of(cls, mesh: Mesh | None, size: int | None) -> Batching:
        """With batches of at least `size` rows, or of 64 a device.

        Raises:
          ClipjaxError: `size` is below 1.
        """
        shards = 1 if mesh is None else batch_shards(mesh)
        size = PER_SHARD * shards if size is None else size
        if size < 1:
            raise ClipjaxError(f"Predictor: batch_size={size} must be at least 1")
        size = -(-size // shards) * shards
        return cls(size, min(FEW_PER_SHARD * shards, size), mesh)

    def indices(self, count: int) -> Iterator[np.ndarray]:
        """The rows of each batch: beyond the end the last one again, as zeros need not be valid."""
        whole = count // self.size * self.size
        for start in range(0, whole, self.size):
            yield np.arange(start, start + self.size)
        size = self.few if self._few_pay(whole, count - whole) else self.size
        for start in range(whole, count, size):
            yield np.minimum(np.arange(start, start + size), count - 1)

    def _few_pay(self, whole: int, rest: int) -> bool:
        """Whether `rest` rows after `whole` ones in full batches go by a few at a time.

        On a CPU a row takes the same time in both programs, and a padded batch costs its padding. An
        accelerator is no faster with a few rows than with a batch. Beyond some batches the padding of
        one no longer matters, and a second program would have to be compiled.
        """
        if whole >= _FEW_BATCHES * self.size:
            return False
        device = jax.devices()[0] if self.mesh is None else self.mesh.devices.flat[0]
        if device.platform != "cpu":
            return rest <= self.few
        return not whole or rest <= self.size // 2

    def place(self, read: Read, index: np.ndarray, shape: tuple[int, ...]) -> Any:
        """The rows [k, *shape] at these indices, split over the mesh if there is one.

        Of several processes each reads the rows of its own devices, each of them once.
        """
        if self.mesh is None:
            return _read_once(read, index)
        pieces: dict[tuple[int, int], np.ndarray] = {}

        def piece(where: Any) -> np.ndarray:
            rows = slice(*where[0].indices(len(index)))
            key = (rows.start, rows.stop)
            if key not in pieces:  # devices along the tensor axis share their rows
                pieces[key] = _read_once(read, index[rows])
            return pieces[key]

        return jax.make_array_from_callback((len(index), *shape), batch_sharding(self.mesh), piece)

    def stream(
        self,
        function: Callable[[Any], Any],
        read: Read,
        count: int,
        shape: tuple[int, ...],
        between: Callable[[], None] | None = None,
    ) -> Any:
        """Applies a function to all rows, batch by batch, reading ahead of the device.

        Args:
          function: of a batch; it only dispatches.
          read: gives rows.
          count: number of rows, at least 1.
          shape: of one row.
          between: called before each batch.

        Returns:
          What it makes of them, on the host: floats as float32, without the padding.
        """
        done: list[Any] = []
        running: collections.deque[Any] = collections.deque()
        for index in self.indices(count):
            if between is not None:
                between()
            running.append(function(self.place(read, index, shape)))
            if len(running) >= _IN_FLIGHT:
                done.append(on_host(running.popleft()))
        done.extend(map(on_host, running))
        return jax.tree.map(lambda *parts: np.concatenate(parts)[:count], *done)


def on_host(output: Any) -> Any:
    """Arrays of the host; whatever is floating as float32."""
    return jax.tree.map(lambda x: np.asarray(x, host_type(x)), output)


def host_type(x: Any) -> Any:
    """float32 for whatever is floating; what is not stays."""
    return np.float32 if jnp.issubdtype(x.dtype, jnp.floating) else x.dtype


def by_length(
    used: Sequence[int] | np.ndarray, longest: int, least: int
) -> Iterator[tuple[int, np.ndarray]]:
    """(length, rows) of groups of rows that are cut to one length: a power of two from 16, or `longest`.

    A group of fewer than `least` rows joins the next longer one, as a program has to be compiled for each
    length. All rows are in one group or another.

    Args:
      used: [n], how much of each row is needed.
      longest: of a row.
      least: rows of a group.
    """
    sizes = [2**i for i in range(4, longest.bit_length()) if 2**i < longest] + [longest]
    place = np.searchsorted(sizes, used)
    for i, size in enumerate(sizes):
        rows = np.flatnonzero(place == i)
        if len(rows) < least and size < longest:
            place[rows] = i + 1
        elif len(rows):
            yield size, rows


def _read_once(read: Read, index: np.ndarray) -> np.ndarray:
    """The rows at ascending indices; one that is repeated at the end is read once."""
    distinct = int(np.searchsorted(index, index[-1])) + 1
    rows = read(index[:distinct])
    if distinct == len(index):
        return rows
    return np.concatenate([rows, np.repeat(rows[-1:], len(index) - distinct, axis=0)])
