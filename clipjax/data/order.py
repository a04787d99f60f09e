"""The order of a run: which record stands at a position. A function of the seed, so the step is all there is to resume.

`Shuffled` draws single records from all over the source, anew each epoch. `Streamed` reads runs of
neighboring records from end to end, for sources that are slow to seek in. A `Plan` is an order of one's own.
"""

from __future__ import annotations

import bisect
import collections
import concurrent.futures
import dataclasses
import functools
import hashlib
import itertools
import threading
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from clipjax.component import Component
from clipjax.data.reading import Unreachable, retried
from clipjax.data.sources import RandomAccess, Record, UnreadableRecord
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

    def __post_init__(self):
        for name in ("lanes", "run", "block"):
            if getattr(self, name) < 1:
                raise ClipjaxError(f"Stream: {name}={getattr(self, name)} must be >= 1")


class _Lane(NamedTuple):
    """A lane in one epoch: its runs in order, and where its blocks end, counted in records."""

    runs: np.ndarray
    block_ends: np.ndarray


class Streamed:
    """The order of a `Stream`."""

    def __init__(
        self, config: Stream, edges: np.ndarray, batch_size: int, seed: int, shuffle: bool
    ):
        """Args:
        config: how to read.
        edges: int64 [runs + 1]; run i is records edges[i] to edges[i + 1].
        batch_size: over all processes.
        seed: decides the order.
        shuffle: False deals the runs in their order, and leaves their records in theirs.

        Raises:
          ClipjaxError: the lanes do not fit the batch or the source.
        """
        if batch_size % config.lanes:
            raise ClipjaxError(
                f"batch_size={batch_size} is not divisible by the {config.lanes} lanes of Stream; "
                "change one of them"
            )
        if len(edges) - 1 < config.lanes:
            raise ClipjaxError(
                f"the source has {len(edges) - 1} runs of records for the {config.lanes} lanes of "
                "Stream: lower lanes or run"
            )
        self._config, self._edges, self._seed, self._shuffle = config, edges, seed, shuffle
        self._batch_size, self._share = batch_size, batch_size // config.lanes
        self._shift = 0
        self._counts = np.diff(edges)
        self._epochs: list[list[int]] = [[0] for _ in range(config.lanes)]
        self._lock = threading.Lock()
        # Lanes are in one epoch or the next, and in one block or the next two.
        self._dealt = functools.lru_cache(maxsize=3)(self._deal)
        self._lane = functools.lru_cache(maxsize=3 * config.lanes)(self._make_lane)
        self._block = functools.lru_cache(maxsize=8 * config.lanes)(self._make_block)

    def at(self, position: int, attempt: int) -> tuple[int, int]:
        """The replacement is what stands a batch later in the same block, which is in memory."""
        step, row = divmod(position - self._shift, self._batch_size)
        lane, place = divmod(row, self._share)
        epoch, block, offset = self._locate(lane, self._begin(step) + place)
        indices = self._block(lane, epoch, block)
        return int(indices[(offset + attempt * self._share) % len(indices)]), position

    def runs(self, step: int, first_row: int, rows: int) -> set[int]:
        """The runs that some rows of a step's batch are in, and those of the blocks after them."""
        found: set[int] = set()
        for lane in range(first_row // self._share, -(-(first_row + rows) // self._share)):
            begin = self._begin(step)
            epoch, block, offset = self._locate(lane, begin)
            # As many blocks as the batch touches, and one more.
            end = begin - offset
            while True:
                blocks = self._lane(lane, epoch)
                found.update(self._of_block(blocks, block).tolist())
                if end >= begin + self._share:
                    break
                end += int(np.diff(blocks.block_ends, prepend=0)[block])
                block += 1
                if block == len(blocks.block_ends):
                    epoch, block = epoch + 1, 0
        return found

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

    def _begin(self, step: int) -> int:
        """How many records of each lane come before a step's."""
        return step * self._share + self._shift // self._config.lanes

    def _locate(self, lane: int, place: int) -> tuple[int, int, int]:
        """(epoch, block, offset in the block) of a lane's `place`-th record since the run began."""
        ends = self._epochs[lane]
        with self._lock:
            while ends[-1] <= place:
                length = int(self._lane(lane, len(ends) - 1).block_ends[-1])
                ends.append(ends[-1] + length)
        epoch = bisect.bisect_right(ends, place) - 1
        place -= ends[epoch]
        block_ends = self._lane(lane, epoch).block_ends
        block = int(np.searchsorted(block_ends, place, side="right"))
        return epoch, block, place - (int(block_ends[block - 1]) if block else 0)

    def _deal(self, epoch: int) -> np.ndarray:
        runs = np.arange(len(self._counts))
        return self._rng(epoch, "runs").permutation(runs) if self._shuffle else runs

    def _make_lane(self, lane: int, epoch: int) -> _Lane:
        runs = self._dealt(epoch)[lane :: self._config.lanes]
        ends = np.cumsum(self._counts[runs])
        last = np.arange(self._config.block, len(runs) + self._config.block, self._config.block)
        return _Lane(runs, ends[np.minimum(last, len(runs)) - 1])

    def _make_block(self, lane: int, epoch: int, block: int) -> np.ndarray:
        """Indices of a block's records in the order they are shown."""
        runs = self._of_block(self._lane(lane, epoch), block)
        parts = [np.arange(self._edges[run], self._edges[run + 1]) for run in runs]
        indices = np.concatenate(parts)
        if self._shuffle:
            indices = self._rng(epoch, "block", lane, block).permutation(indices)
        return indices

    def _of_block(self, lane: _Lane, block: int) -> np.ndarray:
        return lane.runs[block * self._config.block : (block + 1) * self._config.block]

    def _rng(self, epoch: int, purpose: str, lane: int = 0, block: int = 0) -> np.random.Generator:
        mark = hashlib.blake2b(f"stream {purpose}".encode(), digest_size=8).digest()
        counter = [0, lane, block, int.from_bytes(mark, "little")]
        return np.random.Generator(np.random.Philox(key=[self._seed, epoch], counter=counter))


class Runs:
    """Runs of records in memory: read ahead by threads, let go when no step needs them."""

    def __init__(self, records: RandomAccess, edges: np.ndarray, steps: int):
        """Args:
        records: an opened source.
        edges: of the runs, as in `Streamed`.
        steps: how many steps' runs are kept at a time.
        """
        self._records, self._edges = records, edges
        self._wanted: collections.deque[set[int]] = collections.deque(maxlen=steps)
        self._held: dict[int, concurrent.futures.Future] = {}
        self._closed = False
        self._lock = threading.Lock()

    def want(self, runs: set[int], executor: concurrent.futures.Executor | None = None) -> None:
        """Says which runs the next step needs, and begins to read them."""
        with self._lock:
            self._wanted.append(runs)
            kept = set().union(*self._wanted)
            for run in [run for run in self._held if run not in kept]:
                self._held.pop(run).cancel()
        if executor is not None:
            for run in sorted(runs):
                self._future(run, executor)

    def close(self, executor: concurrent.futures.Executor) -> None:
        """Ends the reading ahead: what is being read is finished, the rest is given up."""
        self._closed = True
        executor.shutdown(wait=True)
        self._closed = False
        self._wanted.clear()
        self._held.clear()

    def __getitem__(self, index: int) -> Record:
        """A record.

        Raises:
          UnreadableRecord: it cannot be used.
        """
        run = int(np.searchsorted(self._edges, index, side="right")) - 1
        found = self._future(run, None).result()[index - int(self._edges[run])]
        if isinstance(found, UnreadableRecord):
            raise found
        return found

    def _future(
        self, run: int, executor: concurrent.futures.Executor | None
    ) -> concurrent.futures.Future:
        with self._lock:
            future = self._held.get(run)
            if future is not None:
                return future
            future = self._held[run] = concurrent.futures.Future()
        if executor is None:
            self._read(run, future)
        else:
            executor.submit(self._read, run, future)
        return future

    def _read(self, run: int, future: concurrent.futures.Future) -> None:
        if not future.set_running_or_notify_cancel():
            return
        first, stop = int(self._edges[run]), int(self._edges[run + 1])
        try:
            if self._closed:
                raise RuntimeError("the reading of runs has ended")
            future.set_result(read_run(self._records, first, stop))
        except BaseException as error:
            future.set_exception(error)


def edges_of(records: RandomAccess, size: int) -> np.ndarray:
    """Where runs of at most `size` neighboring records begin and end, int64 [runs + 1]."""
    own = getattr(records, "runs", None)
    if callable(own):
        return np.asarray(own(size), np.int64)
    return np.append(np.arange(0, len(records), size, dtype=np.int64), len(records))


def read_run(records: RandomAccess, first: int, stop: int) -> Sequence[Record | UnreadableRecord]:
    """The records from `first` to `stop`, and in the place of any that cannot be used, why not."""
    own = getattr(records, "read_run", None)
    if callable(own):
        try:
            return retried(functools.partial(own, first, stop), f"records {first:,} to {stop:,}")
        except Unreachable as failure:
            return [failure] * (stop - first)
    return [_one(records, index) for index in range(first, stop)]


def _one(records: RandomAccess, index: int) -> Record | UnreadableRecord:
    try:
        return retried(functools.partial(records.__getitem__, index), f"record {index}")
    except UnreadableRecord as failure:
        return failure


def edges_within(starts: Iterable[int], end: int, size: int) -> np.ndarray:
    """Edges of runs of at most `size` records that do not reach across any of `starts`."""
    pieces = []
    bounds = [*starts, end]
    for first, stop in itertools.pairwise(bounds):
        pieces.append(np.arange(first, stop, size, dtype=np.int64))
    return np.append(np.concatenate(pieces) if pieces else np.zeros(0, np.int64), end)
