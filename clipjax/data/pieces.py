"""Pieces of a stream in memory: read ahead by threads, let go when no step needs them."""

from __future__ import annotations

import collections
import concurrent.futures
import functools
import itertools
import threading
from collections.abc import Iterable, Sequence

import numpy as np

from clipjax.data.order import AHEAD, Key, Units
from clipjax.data.reading import Unreachable, retried
from clipjax.data.sources import RandomAccess, Record, UnreadableRecord

Piece = Sequence[Record | UnreadableRecord]
"""Records, and in the place of any that cannot be used, why not."""


class Readable(Units):
    """Units, and how they are read."""

    total: int | None
    """Records of all of them, where known."""

    def read(self, unit: int, piece: int) -> Piece:
        """A piece; nothing after the last. Its size is known from then on."""
        raise NotImplementedError

    def find(self, index: int) -> tuple[int, int, int]:
        """(unit, piece, place in it) of a record by its index, whose piece has been read."""
        raise NotImplementedError

    def ahead(self, unit: int) -> None:
        """Fetches what a unit's first piece will need, where that is worth it."""


class RunsOf(Readable):
    """Runs of neighboring records of a source with random access, each of one piece."""

    def __init__(self, records: RandomAccess, size: int):
        """Runs of at most `size` records, or those that the source says."""
        self._records = records
        self._edges = edges_of(records, size)
        self._counts = np.diff(self._edges)
        self.total: int | None = int(self._edges[-1])

    def __len__(self) -> int:
        return len(self._counts)

    def counts(self, units: np.ndarray, ask: bool) -> np.ndarray:
        return self._counts[units]

    def known(self, unit: int, piece: int) -> int:
        return int(self._counts[unit]) if piece == 0 else 0

    def indices(self, unit: int, piece: int) -> np.ndarray:
        return np.arange(self._edges[unit], self._edges[unit + 1])

    def find(self, index: int) -> tuple[int, int, int]:
        unit = int(np.searchsorted(self._edges, index, side="right")) - 1
        return unit, 0, index - int(self._edges[unit])

    def read(self, unit: int, piece: int) -> Piece:
        if piece:
            return []
        return read_run(self._records, int(self._edges[unit]), int(self._edges[unit + 1]))


class Held:
    """Pieces of the units of one or several sources, of which the steps to come need some."""

    def __init__(self, sources: Sequence[Readable], steps: int):
        """Args:
        sources: what is read. With several, a key begins with the source, and index i of source s of n is
          i * n + s.
        steps: how many steps' pieces are kept at a time.
        """
        self._sources = sources
        self._wanted: collections.deque[set[Key]] = collections.deque(maxlen=steps)
        self._held: dict[Key, _Held] = {}
        self._stopped = False
        self._lock = threading.Lock()

    def want(self, keys: set[Key], executor: concurrent.futures.Executor | None = None) -> None:
        """Says which pieces the next step needs, and begins to read them."""
        with self._lock:
            self._wanted.append(keys)
            kept = set().union(*self._wanted)
            for key in [key for key in self._held if key not in kept]:
                del self._held[key]
        self.begin(keys, executor)

    def begin(self, keys: Iterable[Key], executor: concurrent.futures.Executor | None) -> None:
        """Begins to read."""
        if executor is not None:
            for key in sorted(keys):
                held, new = self._at(key)
                if new:
                    executor.submit(self._read_ahead, key, held)

    def stop(self) -> None:
        """Lets nothing more be read: whoever asks gets an error."""
        self._stopped = True

    def clear(self) -> None:
        """Lets go of all, so that reading may begin anew."""
        with self._lock:
            self._wanted.clear()
            self._held.clear()
        self._stopped = False

    def fetch(self, key: Key) -> Piece:
        """A piece: from memory, or read now."""
        if self._stopped:
            raise RuntimeError("the reading of pieces has ended")
        held, _ = self._at(key)
        self._read(key, held)
        return held.future.result()

    def __getitem__(self, index: int) -> Record:
        """A record.

        Raises:
          UnreadableRecord: it cannot be used.
        """
        index, source = divmod(index, len(self._sources))
        unit, piece, place = self._sources[source].find(index)
        key = (unit, piece) if len(self._sources) == 1 else (source, unit, piece)
        found = self.fetch(key)[place]
        if isinstance(found, UnreadableRecord):
            raise found
        if len(self._sources) == 1:
            return found
        # Distinct across sources.
        return found | {"id": found["id"] * len(self._sources) + source}  # type: ignore[return-value]

    def _at(self, key: Key) -> tuple[_Held, bool]:
        with self._lock:
            new = key not in self._held
            return self._held.setdefault(key, _Held()), new

    def _read_ahead(self, key: Key, held: _Held) -> None:
        with self._lock:
            wanted = self._held.get(key) is held and not self._stopped
        if wanted:
            self._read(key, held)

    def _read(self, key: Key, held: _Held) -> None:
        """Reads a piece, unless another thread is at it."""
        if not held.begun.acquire(blocking=False):
            return
        source = self._sources[key[0] if len(key) == 3 else 0]
        unit, piece = key[-2:]
        try:
            if piece == AHEAD:
                source.ahead(unit)
                held.future.set_result([])
            else:
                held.future.set_result(source.read(unit, piece))
        except BaseException as error:
            held.future.set_exception(error)


class _Held:
    """A piece that is read once, by whoever comes first: nobody waits for what is only queued."""

    __slots__ = ("begun", "future")

    def __init__(self) -> None:
        self.begun = threading.Lock()
        self.future: concurrent.futures.Future[Piece] = concurrent.futures.Future()


def edges_of(records: RandomAccess, size: int) -> np.ndarray:
    """Where runs of at most `size` neighboring records begin and end, int64 [runs + 1]."""
    own = getattr(records, "runs", None)
    if callable(own):
        return np.asarray(own(size), np.int64)
    return np.append(np.arange(0, len(records), size, dtype=np.int64), len(records))


def read_run(records: RandomAccess, first: int, stop: int) -> Piece:
    """The records from `first` to `stop`."""
    own = getattr(records, "read_run", None)
    if callable(own):
        try:
            return retried(functools.partial(own, first, stop), f"records {first:,} to {stop:,}")
        except Unreachable as failure:
            return [failure] * (stop - first)
    return [_one(records, index) for index in range(first, stop)]


def attempt(records: RandomAccess, index: int) -> Record | UnreadableRecord:
    """A record, or why it cannot be used."""
    try:
        return records[index]
    except UnreadableRecord as failure:
        return failure


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
