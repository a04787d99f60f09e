"""Several sources as one: in proportion, by weights, by weights that change on the way."""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from clipjax.component import Component
from clipjax.data.order import Key, Shuffled, Streamed
from clipjax.data.sources import RandomAccess, Record, Source
from clipjax.errors import ClipjaxError

PERIOD = 1 << 14
"""Examples after which the order of the sources begins anew: weights hold to within one in so many."""


@dataclasses.dataclass(frozen=True)
class Stage(Component):
    """Weights of a `Mixture` from some example on."""

    examples: float
    """How many examples of the run come before."""
    weights: tuple[float, ...]
    """Share of each source, in any unit; 0 leaves one out."""

    def __post_init__(self):
        if not self.examples >= 0:
            raise ClipjaxError(f"Stage: examples={self.examples} must be >= 0")
        if any(not 0 <= w < math.inf for w in self.weights) or not sum(self.weights) > 0:
            raise ClipjaxError(f"Stage: weights={self.weights} must be >= 0, and one of them above")


class Shares:
    """Which source each example of a lane comes from, spread as evenly as whole numbers can."""

    def __init__(self, stages: Sequence[Stage], lanes: int):
        """Args:
        stages: the first begins at 0; a later one that does so, too, takes its place.
        lanes: an example of each of them in turn.

        Raises:
          ClipjaxError: a weight is so small that its source would never be seen.
        """
        self._lanes = lanes
        self._starts = [math.ceil(stage.examples / lanes) for stage in stages]
        patterns = [_pattern(stage.weights) for stage in stages]
        self._orders = [order for order, _ in patterns]
        self._counts = [counts for _, counts in patterns]

    def at(self, lane: int, place: int) -> tuple[int, int]:
        """(source, how many of it came before in this lane) of a lane's example."""
        stage = bisect.bisect_right(self._starts, place) - 1
        source = int(
            self._orders[stage][(self._phase(lane) + place - self._starts[stage]) % PERIOD]
        )
        return source, int(self.before(lane, place)[source])

    def before(self, lane: int, place: int) -> np.ndarray:
        """How many of each source are among a lane's first examples, int64 [sources]."""
        total = np.zeros(len(self._counts[0]), np.int64)
        for number, start in enumerate(self._starts):
            if start >= place:
                break
            stop = min([place, *self._starts[number + 1 : number + 2]])
            counts, phase = self._counts[number], self._phase(lane)
            total += _until(counts, phase + max(stop - start, 0)) - _until(counts, phase)
        return total

    def _phase(self, lane: int) -> int:
        return lane * PERIOD // self._lanes


def _until(counts: np.ndarray, place: int) -> np.ndarray:
    whole, rest = divmod(place, PERIOD)
    return counts[:, -1] * whole + counts[:, rest]


def _pattern(weights: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """(source of each place of a period; how many of each come before each place, [sources, PERIOD + 1])."""
    wanted = np.array(weights, np.float64) / sum(weights) * PERIOD
    numbers = np.floor(wanted).astype(np.int64)
    numbers[np.argsort(numbers - wanted, kind="stable")[: PERIOD - numbers.sum()]] += 1
    for weight, number in zip(weights, numbers, strict=True):
        if weight and not number:
            raise ClipjaxError(
                f"Mixture: the weight {weight:g} is less than one in {PERIOD:,} of all {tuple(weights)}"
            )
    # The k-th of n is due in the middle of the k-th of n equal parts.
    due = np.concatenate([(np.arange(n) + 0.5) / max(n, 1) for n in numbers])
    order = np.repeat(np.arange(len(numbers)), numbers)[np.argsort(due, kind="stable")]
    counts = np.zeros((len(numbers), PERIOD + 1), np.int64)
    counts[:, 1:] = np.cumsum(order == np.arange(len(numbers))[:, None], axis=1)
    return order.astype(np.uint16), counts


class MixedStreams:
    """The order of a stream of several sources: every lane has one of each, and draws from them by weight."""

    def __init__(self, streams: Sequence[Streamed], shares: Shares, lanes: int, batch_size: int):
        """Args:
        streams: of the sources, all alike.
        shares: which source each example comes from.
        lanes: of each stream.
        batch_size: over all processes.
        """
        self._streams, self._shares, self._count = streams, shares, lanes
        self._batch_size, self._share, self._shift = batch_size, batch_size // lanes, 0

    def at(self, position: int, attempt: int) -> tuple[int, int]:
        """Record i of source s of n has the index i * n + s."""
        step, row = divmod(position - self._shift, self._batch_size)
        lane, place = divmod(row, self._share)
        source, own = self._shares.at(lane, self._begin(step) + place)
        index = self._streams[source].in_lane(lane, own, attempt)
        return index * len(self._streams) + source, position

    def runs(self, step: int, first_row: int, rows: int) -> set[Key]:
        """As `Streamed.runs`; the keys begin with the source."""
        found: set[Key] = set()
        begin = self._begin(step)
        for lane in self._streams[0].lanes(first_row, rows):
            firsts = self._shares.before(lane, begin).tolist()
            stops = self._shares.before(lane, begin + self._share).tolist()
            for source, (first, stop) in enumerate(zip(firsts, stops, strict=True)):
                if stop:  # one that has not begun yet may never do so
                    keys = self._streams[source].wanted(lane, first, max(stop, first + 1))
                    found.update((source, *key) for key in keys)
        return found

    def first(self, step: int, first_row: int, rows: int) -> set[Key]:
        """As `Streamed.first`."""
        found: set[Key] = set()
        begin = self._begin(step)
        for lane in self._streams[0].lanes(first_row, rows):
            for source, place in enumerate(self._shares.before(lane, begin).tolist()):
                keys = self._streams[source].hinted(lane, place)
                found.update((source, *key) for key in keys)
        return found

    def go_on(self, shift: int) -> None:
        """As `Streamed.go_on`."""
        self._streams[0].go_on(shift)
        self._shift = shift

    def _begin(self, step: int) -> int:
        return step * self._share + self._shift // self._count


class MixedRecords:
    """The order of single records of several sources, each shuffled anew in epochs of its own."""

    def __init__(self, records: _OpenMixture, shares: Shares, seed: int, shuffle: bool):
        self._records, self._shares = records, shares
        self._orders = [
            Shuffled(size, seed + source, shuffle) for source, size in enumerate(records.sizes)
        ]

    def at(self, position: int, attempt: int) -> tuple[int, int]:
        source, place = self._shares.at(0, position)
        index, _ = self._orders[source].at(place, attempt)
        return self._records.index(source, index), position


@dataclasses.dataclass(frozen=True)
class Mixture(Source):
    """Several sources as one, in given proportions.

    One epoch shows every record of every source at least once; a source that the weights favor is
    repeated within the epoch. Ids stay distinct across sources. With `stages`, and in a stream, each source has
    epochs of its own, and any share of a batch has the proportions to within a record.
    """

    sources: tuple[Source, ...]
    """What to mix."""
    weights: tuple[float, ...] = ()
    """Share of each source, in any unit; () is in proportion to their sizes."""
    stages: tuple[Stage, ...] = ()
    """Other weights from some example of the run on."""

    def __post_init__(self):
        if not self.sources:
            raise ClipjaxError("Mixture: sources is empty; name at least one")
        if self.weights and len(self.weights) != len(self.sources):
            raise ClipjaxError(
                f"Mixture: {len(self.weights)} weights for {len(self.sources)} sources; "
                "give one each"
            )
        if any(not w > 0 for w in self.weights):
            raise ClipjaxError(f"Mixture: weights={self.weights} must all be > 0")
        starts = [stage.examples for stage in self.stages]
        if starts != sorted(set(starts)):
            raise ClipjaxError(f"Mixture: the stages begin at {starts}; put them in order")
        for stage in self.stages:
            if len(stage.weights) != len(self.sources):
                raise ClipjaxError(
                    f"Mixture: the stage from {stage.examples:,.0f} on has {len(stage.weights)} weights for "
                    f"{len(self.sources)} sources; give one each"
                )

    def shares(self, sizes: Sequence[int | None], lanes: int) -> Shares:
        """Which source each example comes from.

        Args:
          sizes: records of each source, where known.
          lanes: of the stream.

        Raises:
          ClipjaxError: the weights are to follow sizes that are not known, or one is too small.
        """
        weights = self.weights or tuple(float(size or 0) for size in sizes)
        if not self.weights and None in sizes:
            source = self.sources[list(sizes).index(None)]
            raise ClipjaxError(
                f"Mixture: it is not known how many records {type(source).__name__} has: give weights"
            )
        first = Stage(0.0, weights)
        return Shares([first, *self.stages], lanes)

    def epoch(self, sizes: Sequence[int | None]) -> int | None:
        """Examples of an epoch that shows every record of every source; None where sizes are not known."""
        if None in sizes:
            return None
        return int(_ends([size or 0 for size in sizes], self.weights)[-1])

    def open(self) -> RandomAccess:
        opened = [source.open() for source in self.sources]
        for source, records in zip(self.sources, opened, strict=True):
            if len(records) == 0:
                raise ClipjaxError(f"Mixture: {source} has no records")
        return _OpenMixture(opened, _ends([len(records) for records in opened], self.weights))


def _ends(sizes: list[int], weights: tuple[float, ...]) -> np.ndarray:
    """Where the sources end in the shortest epoch that truncates none, int64 [sources]."""
    weights = weights or tuple(map(float, sizes))
    # Rounded before the ceiling, so that a ratio such as 3 / (1/3) does not gain a record from float error.
    scale = max(size / weight for size, weight in zip(sizes, weights, strict=True))
    return np.cumsum([math.ceil(round(scale * weight, 6)) for weight in weights])


class _OpenMixture:
    def __init__(self, opened: list[RandomAccess], ends: np.ndarray):
        self._opened, self._ends = opened, ends

    @property
    def sizes(self) -> list[int]:
        """Records of each source."""
        return [len(records) for records in self._opened]

    def index(self, source: int, place: int) -> int:
        """The index of a source's record."""
        return (int(self._ends[source - 1]) if source else 0) + place

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Record:
        which = int(np.searchsorted(self._ends, index, side="right"))
        start = int(self._ends[which - 1]) if which else 0
        records = self._opened[which]
        record = records[(index - start) % len(records)]
        return record | {"id": record["id"] * len(self._opened) + which}  # type: ignore[return-value]
