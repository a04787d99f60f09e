"""How column embeddings reach the rows of other devices: a choice apart from any objective.

Each exchange names the mesh axes over which a block of columns is gathered, and those over which
blocks travel in a ring. b = rows per device, P = devices that hold rows, E = embedding width; one
unit is an all-gather of one modality, (P-1)/P * N * E numbers sent per device.

| exchange | gathered over | ring over | resident columns | units sent | result |
|---|---|---|---|---|---|
| `AllGather` | group, data | - | N | 2 | exact |
| `Ring` | - | group, data | b | 3 | exact |
| `Hierarchical` | data | group | N / groups | 3, of which 3/data cross groups | exact |
| `Grouped` | data | - | N / groups | 2 (g-1)/(P-1), g = P / groups | negatives of one group |
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from jax.sharding import Mesh

from clipjax.component import Component
from clipjax.errors import ClipjaxError
from clipjax.mesh import BATCH_AXES


class Route(NamedTuple):
    """Mesh axes over which column blocks are gathered, and over which they travel in a ring."""

    gather: tuple[str, ...]
    ring: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Exchange(Component):
    """How a device meets the columns of the others."""

    def route(self, mesh: Mesh) -> Route:
        """The mesh axes this exchange uses."""
        raise NotImplementedError

    def resolve(self, mesh: Mesh, numbers: int) -> Exchange:
        """The exchange for columns of so many float32 numbers in all; `Auto` chooses here."""
        return self


@dataclasses.dataclass(frozen=True)
class AllGather(Exchange):
    """Every device holds all columns at once: least traffic, N x E numbers resident."""

    def route(self, mesh):
        return Route(BATCH_AXES, ())


@dataclasses.dataclass(frozen=True)
class Ring(Exchange):
    """Column blocks travel from neighbor to neighbor: N / P x E resident, also backward."""

    def route(self, mesh):
        return Route((), BATCH_AXES)


@dataclasses.dataclass(frozen=True)
class Hierarchical(Exchange):
    """Gathers inside a group, rings across groups: a slow link carries one block a hop."""

    def route(self, mesh):
        return Route(("data",), ("group",))


@dataclasses.dataclass(frozen=True)
class Auto(Exchange):
    """The exact exchange with the least traffic whose columns and their gradient fit in memory."""

    memory_gb: float = 2.0
    """Memory, in GB per device, that gathered columns and their gradient may take."""

    def __post_init__(self):
        if self.memory_gb <= 0:
            raise ClipjaxError(f"Auto: memory_gb={self.memory_gb} must be positive")

    def route(self, mesh):
        return Route(BATCH_AXES, ())  # for what no size decides: every choice is exact

    def resolve(self, mesh, numbers):
        needed = 2 * 4 * numbers / 1e9
        if needed <= self.memory_gb:
            return AllGather()
        groups = mesh.shape["group"]
        return Hierarchical() if groups > 1 and needed / groups <= self.memory_gb else Ring()


@dataclasses.dataclass(frozen=True)
class Grouped(Exchange):
    """Negatives of the same mesh group only: M2-Encoder's grouped aggregation (arXiv 2401.15896).

    The one exchange that changes the mathematics: the loss is the mean over groups of the objective
    on each group alone. A global shuffle deals every step's examples to the groups anew, since a
    group is a range of positions in the batch.
    """

    def route(self, mesh):
        return Route(("data",), ())
