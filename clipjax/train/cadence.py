"""When a run logs, evaluates and saves: every cadence of its configuration at work."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from clipjax.optim import Every, Scale


class Cadence:
    """One `Every` in a running run. Each step is asked about once, in order."""

    def __init__(
        self, every: Every, scale: Scale, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.timed = every.unit == "minutes"
        self._every, self._scale, self._clock = every, scale, clock
        self._last = clock()
        self._told = False

    def is_late(self) -> bool:
        """Whether this process's clock says it is time; only the first process's word counts."""
        return self.timed and self._clock() - self._last >= self._every.amount * 60

    def tell(self, late: bool) -> None:
        """The first process's word, heard by all at the same step."""
        self._told = self._told or late

    def due(self, step: int) -> bool:
        """Whether it is time after `step` finished steps (0: before the first)."""
        if not self.timed or step == 0:
            return self._every.due(step, self._scale)
        if self._told:
            self._told, self._last = False, self._clock()
            return True
        return False


class Cadences:
    """All of a run's cadences by name; the timed ones share the run's votes."""

    def __init__(self, scale: Scale, every: Mapping[str, tuple[Every, ...]]):
        self._by_name = {
            name: [Cadence(one, scale) for one in several] for name, several in every.items()
        }
        self._timed = [c for several in self._by_name.values() for c in several if c.timed]

    def late(self) -> list[int]:
        """What this process votes: 1 for each timed cadence that is over."""
        return [int(cadence.is_late()) for cadence in self._timed]

    def tell(self, late: list[int]) -> None:
        """The outcome of the vote."""
        for cadence, one in zip(self._timed, late, strict=True):
            cadence.tell(bool(one))

    def due(self, name: str, step: int) -> bool:
        """Whether any cadence of this name is due after `step`."""
        due = [cadence.due(step) for cadence in self._by_name[name]]  # all: a timed one starts anew
        return any(due)
