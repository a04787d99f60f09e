"""The order of a run: which record stands at a position. A function of the seed, so the step is all there is to resume.

`Shuffled` draws single records from all over the source, anew each epoch. `Streamed` reads runs of
neighboring records from end to end, for sources that are slow to seek in. A `Plan` is an order of one's own.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import hashlib
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from clipjax.component import Component
from clipjax.data.sources import RandomAccess
from clipjax.errors import ClipjaxError


class Order(Protocol):
    """Where the records of positions 0, 1, 2, ... are."""

    def at(self, position: int, attempt: int) -> tuple[int, int]:
        """(the record's index, the position whose draws it is shown with).

        Args:
          position: in the run.
          attempt: how many records in its place could not be used.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Plan(Component):
    """Role: which records make up a batch. `Data(source, plan=Mine())`."""

    def open(self, records: RandomAccess, batch_size: int, seed: int, shuffle: bool) -> Order:
        """The order of a run, a function of the arguments alone, the same in every process.

        Args:
          records: an opened source.
          batch_size: over all processes; step k is positions k * batch_size and on.
          seed: decides the order.
          shuffle: `Data.shuffle`.

        Raises:
          ClipjaxError: it does not fit the records.
        """
        raise NotImplementedError


class Shuffled:
    """Single records in a new random order each epoch (Grain's), or in the source's own.

    As `grain.MapDataset.range(count).seed(seed).shuffle().repeat()`, at a fifth of the time a record.
    """

    def __init__(self, count: int, seed: int, shuffle: bool):
        import grain

        self._count, self._shuffled = count, shuffle
        self._index_shuffle = grain.experimental.index_shuffle
        self._seed = int(np.random.SeedSequence([seed, 1]).generate_state(1)[0])

    def at(self, position: int, attempt: int) -> tuple[int, int]:
        """The replacement is what stands at the same place of a later epoch. Its neighbor would do as
        well, but is in the same batch already, and two equal pairs are each other's negatives."""
        position += attempt * self._count
        epoch, place = divmod(position, self._count)
        if self._shuffled:
            seed = (self._seed + epoch) % 2**32
            place = self._index_shuffle(place, max_index=self._count - 1, seed=seed, rounds=4)
        return place, position


@dataclasses.dataclass(frozen=True)
class Stream(Component):
    """Reading from end to end: runs of neighboring records are dealt to lanes, anew each epoch.

    Where a source is dealt by its files (tars without an index, TFRecord, ArrayRecord and Parquet files), a lane
    has files in place of runs, and reads `block` of them side by side, a run of each at a time.

    A lane reads its runs one after another and shuffles the records of `block` of them together. Each
    batch has an equal share of every lane, and a process the lanes of its rows: the batches are the
    same on any number of processes. Every record comes once an epoch. The lanes do not wait for each
    other at its end, so some are a little ahead.
    """

    lanes: int = 16
    """How many; the number of processes must divide it, and it the batch size."""
    run: int = 1024
    """Records that are read in one go, at most."""
    block: int = 4
    """Runs whose records are shuffled together. A process holds two blocks of each of its lanes."""
    cache_dir: str | None = None
    """Folder on disk to keep what is learned of files (how many records) and copies of those at an address."""
    cache_gb: float = 100.0
    """Size of these copies at most, in GB, for all processes that share the folder; 0 keeps none."""

    def __post_init__(self):
        for name in ("lanes", "run", "block"):
            if getattr(self, name) < 1:
                raise ClipjaxError(f"Stream: {name}={getattr(self, name)} must be >= 1")
        if not self.cache_gb >= 0:
            raise ClipjaxError(f"Stream: cache_gb={self.cache_gb} must be >= 0")


class Units(Protocol):
    """What is dealt to the lanes: runs of records, or files, each in pieces that are read in one go."""

    def __len__(self) -> int: ...

    def counts(self, units: np.ndarray, ask: bool) -> np.ndarray | None:
        """int64, the records of some; where `ask` is False, None if that would take reading."""
        ...

    def known(self, unit: int, piece: int) -> int | None:
        """Records of a piece, 0 after the last; None where that would take reading."""
        ...

    def indices(self, unit: int, piece: int) -> np.ndarray:
        """int64, what tells the records of a piece, of known size, from all others."""
        ...


KEPT_GROUPS = 4
"""Groups of a lane of whose blocks it is known where they end."""
Key = tuple[int, ...]
"""(unit, piece); in a mixture (source, unit, piece)."""
AHEAD = -1
"""In place of a piece: the unit is wanted soon, and may be fetched."""


class Streamed:
    """The order of a `Stream`.

    The units of a lane are taken in groups of `Stream.block`. Block j of a group is the j-th piece of each.
    """

    def __init__(
        self,
        config: Stream,
        units: Units,
        batch_size: int,
        seed: int,
        shuffle: bool,
        fetch: Callable[[Key], Sequence],
    ):
        """Args:
        config: how to read.
        units: what is dealt.
        batch_size: over all processes.
        seed: decides the order.
        shuffle: False deals the units in their order, and leaves their records in theirs.
        fetch: reads a piece, after which its size is known.

        Raises:
          ClipjaxError: the lanes do not fit the batch or the source.
        """
        if batch_size % config.lanes:
            raise ClipjaxError(
                f"batch_size={batch_size} is not divisible by the {config.lanes} lanes of Stream; "
                "change one of them"
            )
        if len(units) < config.lanes:
            raise ClipjaxError(
                f"the source has {len(units)} runs of records for the {config.lanes} lanes of "
                "Stream: lower lanes or run"
            )
        self._config, self._units, self._seed, self._shuffle = config, units, seed, shuffle
        self._fetch = fetch
        self._batch_size, self._share = batch_size, batch_size // config.lanes
        self._shift = 0
        self._lanes = [_Lane() for _ in range(config.lanes)]
        # Lanes are in one epoch or the next, and in one block or the next two.
        self._dealt = functools.lru_cache(maxsize=3)(self._deal)
        self._block = functools.lru_cache(maxsize=8 * config.lanes)(self._make_block)

    def at(self, position: int, attempt: int) -> tuple[int, int]:
        """The replacement is what stands a batch later in the same block, which is in memory; where there
        is none left, a record of the blocks after it."""
        step, row = divmod(position - self._shift, self._batch_size)
        lane, place = divmod(row, self._share)
        return self.in_lane(lane, self._begin(step) + place, attempt), position

    def in_lane(self, lane: int, place: int, attempt: int) -> int:
        """The index of a lane's `place`-th record since the run began, or of its replacement."""
        group, piece, begin, end = self.locate(lane, place)
        offset, tried = place - begin + attempt * self._share, attempt * self._share
        if attempt and tried >= end - begin:  # all around the block and nothing to be had
            return self.in_lane(lane, end + (tried - (end - begin)) // self._share, 0)
        return int(self._block(lane, group, piece)[offset % (end - begin)])

    def runs(self, step: int, first_row: int, rows: int) -> set[Key]:
        """The pieces that some rows of a step's batch are in, and those of the blocks after them."""
        begin = self._begin(step)
        lanes = self.lanes(first_row, rows)
        return set().union(*(self.wanted(lane, begin, begin + self._share) for lane in lanes))

    def first(self, step: int, first_row: int, rows: int) -> set[Key]:
        """What can be asked for before `runs` has read what it takes to know where blocks end."""
        lanes, begin = self.lanes(first_row, rows), self._begin(step)
        return set().union(*(self.hinted(lane, begin) for lane in lanes))

    def lanes(self, first_row: int, rows: int) -> range:
        """The lanes of some rows of a batch."""
        return range(first_row // self._share, -(-(first_row + rows) // self._share))

    def hinted(self, lane: int, place: int) -> set[Key]:
        """The first pieces of a lane, where nothing of it has been read and a record of the first block is wanted."""
        begun = self._lanes[lane].found[3] or place >= self._config.block * self._config.run
        return set() if begun else {(unit, 0) for unit in self.members(lane, 0)}

    def wanted(self, lane: int, place: int, stop: int) -> set[Key]:
        """The pieces that a lane's records from `place` to `stop` are in, and those after them."""
        found: set[Key] = set()
        while True:
            group, piece, _, place = self.locate(lane, place)
            found.update((unit, piece) for unit in self.members(lane, group))
            if place >= stop:
                return found | self._next(lane, group, piece)

    def go_on(self, shift: int) -> None:
        """Goes on after batches of other sizes, which saw `shift` examples beyond those of as many of this size.

        Raises:
          ClipjaxError: the lanes have not all seen as many.
        """
        if shift % self._config.lanes:
            raise ClipjaxError(
                f"the {self._config.lanes} lanes of Stream cannot go on after batches that were not divided "
                "into as many: change lanes back"
            )
        self._shift = shift

    def locate(self, lane: int, place: int) -> tuple[int, int, int, int]:
        """(group, piece, place of the block's first record, place after its last) of a lane's record.

        Groups are counted through all epochs. Reads what it takes to know where blocks end.
        """
        state = self._lanes[lane]
        with state.lock:
            while not state.found[2] <= place < state.found[3]:
                self._walk(lane, state, place)
                self._find(lane, state, place)
            return state.found

    def _find(self, lane: int, state: _Lane, place: int) -> None:
        """Goes through the blocks of a group up to a place; else learns that the group ends before it."""
        group = bisect.bisect_right(state.ends, place)
        first = state.ends[group - 1] if group else 0
        ends = state.blocks.setdefault(group, [first])
        while ends[-1] <= place:
            size = self._block_size(lane, group, len(ends) - 1)
            if not size:
                if group < len(state.ends):
                    raise ClipjaxError(
                        "files of the stream hold fewer records than is known of them: put them back as "
                        "they were, or remove what is kept in Stream.cache_dir"
                    )
                self._close(state, ends[-1], lane)
                return
            ends.append(ends[-1] + size)
        while len(state.blocks) > KEPT_GROUPS:
            del state.blocks[next(iter(state.blocks))]
        piece = bisect.bisect_right(ends, place) - 1
        state.found = (group, piece, ends[piece], ends[piece + 1])

    def members(self, lane: int, group: int) -> list[int]:
        """The units of a group."""
        epoch, number = divmod(group, self._groups(lane))
        units = self._dealt(epoch)[lane :: self._config.lanes]
        return units[number * self._config.block : (number + 1) * self._config.block].tolist()

    def _begin(self, step: int) -> int:
        """How many records of each lane come before a step's."""
        return step * self._share + self._shift // self._config.lanes

    def _walk(self, lane: int, state: _Lane, place: int) -> None:
        """Learns where groups end, as far as `place` is beyond what has been read."""
        while True:
            group, begin = len(state.ends), state.ends[-1] if state.ends else 0
            if place < begin:
                return
            epoch, number = divmod(group, self._groups(lane))
            if number == 0:  # an epoch at once, where all is known
                units = self._dealt(epoch)[lane :: self._config.lanes]
                counts = self._units.counts(units, ask=False)
                if counts is not None:
                    sums = np.add.reduceat(counts, np.arange(0, len(units), self._config.block))
                    if not sums.any():
                        raise ClipjaxError(f"lane {lane} of Stream has no records in an epoch")
                    state.ends.extend((begin + np.cumsum(sums)).tolist())
                    continue
            units = np.array(self.members(lane, group))
            read = self._units.known(int(units[0]), 0) is not None
            far = place - begin >= self._config.block * self._config.run
            counts = self._units.counts(units, ask=far and not read)
            if counts is None:
                return
            self._close(state, begin + int(counts.sum()), lane)

    def _close(self, state: _Lane, end: int, lane: int) -> None:
        """Says that a lane's next group ends there."""
        state.ends.append(end)
        epoch = self._groups(lane)
        before = state.ends[-epoch - 1] if len(state.ends) > epoch else 0
        if len(state.ends) >= epoch and end == before:
            raise ClipjaxError(f"lane {lane} of Stream has no records in an epoch")

    def _block_size(self, lane: int, group: int, piece: int) -> int:
        sizes = []
        for unit in self.members(lane, group):
            size = self._units.known(unit, piece)
            if size is None:
                self._fetch((unit, piece))
                size = self._units.known(unit, piece)
                assert size is not None
            sizes.append(size)
        return sum(sizes)

    def _next(self, lane: int, group: int, piece: int) -> set[Key]:
        """The pieces of the block after one, as far as is known, and the units of the group after it."""
        after = set()
        if any(self._units.known(unit, piece + 1) != 0 for unit in self.members(lane, group)):
            after = {
                (unit, piece + 1)
                for unit in self.members(lane, group)
                if self._units.known(unit, piece + 1) != 0
            }
        coming = self.members(lane, group + 1)
        return after | {(unit, AHEAD if after else 0) for unit in coming}

    def _groups(self, lane: int) -> int:
        """Groups of a lane in an epoch."""
        units = len(range(lane, len(self._units), self._config.lanes))
        return -(-units // self._config.block)

    def _deal(self, epoch: int) -> np.ndarray:
        units = np.arange(len(self._units))
        return self._rng(epoch, "runs").permutation(units) if self._shuffle else units

    def _make_block(self, lane: int, group: int, piece: int) -> np.ndarray:
        """Indices of a block's records in the order they are shown."""
        parts = [self._units.indices(unit, piece) for unit in self.members(lane, group)]
        indices = np.concatenate(parts)
        if self._shuffle:
            epoch, number = divmod(group, self._groups(lane))
            indices = self._rng(epoch, "block", lane, number, piece).permutation(indices)
        return indices

    def _rng(
        self, epoch: int, purpose: str, lane: int = 0, number: int = 0, piece: int = 0
    ) -> np.random.Generator:
        mark = hashlib.blake2b(f"stream {purpose}".encode(), digest_size=8).digest()
        # The generator counts in the low bits of the first word.
        counter = [piece << 40, lane, number, int.from_bytes(mark, "little")]
        return np.random.Generator(np.random.Philox(key=[self._seed, epoch], counter=counter))


class _Lane:
    """What is known of a lane, in records: where its groups end, the edges of the blocks of a few of them, and
    the (group, piece, begin, end) that was found last."""

    def __init__(self) -> None:
        self.ends: list[int] = []
        self.blocks: dict[int, list[int]] = {}
        self.found = (0, 0, 0, 0)
        self.lock = threading.RLock()
