"""Files as the units of a stream: opened when their turn comes, and how many records they have learned on the way.

What is known beforehand is used: a `sizes.json` beside the files ({"00000.tar": 9987, ...}), img2dataset's
`00000_stats.json`, and what earlier runs learned (`Stream.cache_dir`).
"""

from __future__ import annotations

import bisect
import collections
import concurrent.futures
import hashlib
import json
import logging
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np

from clipjax.data.copies import Copies
from clipjax.data.order import Stream
from clipjax.data.pieces import Piece, Readable, edges_of, read_run
from clipjax.data.reading import read_whole
from clipjax.data.sources import (
    Place,
    RandomAccess,
    Record,
    Shard,
    Source,
    UnreadableRecord,
)
from clipjax.errors import ClipjaxError

logger = logging.getLogger(__name__)

SIZES = "sizes.json"
"""File beside the files of a stream that says how many records each has."""
FOLDERS = 64
"""Folders in which `SIZES` is looked for, at most."""
COUNTERS = 16
"""Threads that count the records of files, or look for what says how many there are."""
OPEN = 4
"""Files that are kept open, as a multiple of what the lanes read side by side."""


class ShardsOf(Readable):
    """The files of a source.

    Attributes:
      files: as `Source.listed` has them.
      failed: those that could not be read, or not to their end.
      total: all records, where a `sizes.json` says how many each file has; else None. It also decides how
        records are counted: from the first file's first on, or else in turns, the first of each, the second ...
    """

    def __init__(self, source: Source, files: list[str], stream: Stream, known: bool = True):
        """Args:
        source: what opens files.
        files: what it has listed.
        stream: how they are read.
        known: whether to look for a `sizes.json`.

        Raises:
          ClipjaxError: that file cannot be read.
        """
        self.files = files
        self._source, self._stream = source, stream
        self._sizes = _sizes_beside(files) if known else None
        self._starts: np.ndarray | None = None
        self.total: int | None = None
        if self._sizes is not None:
            ends = np.cumsum(self._sizes)
            self._starts, self.total = ends - self._sizes, int(ends[-1])
        self._copies = Copies(stream.cache_dir, stream.cache_gb, source.on_disk)
        self._kept = _Kept(stream.cache_dir, files)
        self._lock = threading.Lock()
        self._shards: collections.OrderedDict[int, _Opened] = collections.OrderedDict()
        self._edges: dict[int, list[int]] = {}
        self.failed: list[str] = []

    def __len__(self) -> int:
        return len(self.files)

    def fingerprint(self) -> str:
        """What tells these files from others."""
        names = "\n".join(self.files)
        return hashlib.sha256(f"{self.total} {names}".encode(errors="replace")).hexdigest()[:16]

    def counts(self, units: np.ndarray, ask: bool) -> np.ndarray | None:
        if self._sizes is not None:
            return self._sizes[units]
        found = {unit: self._kept.counts.get(unit) for unit in units.tolist()}
        missing = [unit for unit, count in found.items() if count is None]
        if missing and not ask:
            return None
        if missing:
            with concurrent.futures.ThreadPoolExecutor(min(COUNTERS, len(missing))) as pool:
                found.update(zip(missing, pool.map(self._count, missing), strict=True))
        return np.array([found[unit] for unit in units.tolist()], np.int64)

    def known(self, unit: int, piece: int) -> int | None:
        edges = self._edges.get(unit, [0])
        if piece + 1 < len(edges):
            return edges[piece + 1] - edges[piece]
        return 0 if edges[-1:] == edges[-2:-1] else None

    def indices(self, unit: int, piece: int) -> np.ndarray:
        if not self.known(unit, piece):
            return np.zeros(0, np.int64)
        first, stop = self._edges[unit][piece : piece + 2]
        places = np.arange(first, stop, dtype=np.int64)
        if self._starts is not None:
            return places + int(self._starts[unit])
        return places * len(self.files) + unit

    def find(self, index: int) -> tuple[int, int, int]:
        if self._starts is not None:
            unit = int(np.searchsorted(self._starts, index, side="right")) - 1
            place = index - int(self._starts[unit])
        else:
            place, unit = divmod(index, len(self.files))
        piece = bisect.bisect_right(self._edges[unit], place) - 1
        return unit, piece, place - self._edges[unit][piece]

    def read(self, unit: int, piece: int) -> Piece:
        opened = self._opened(unit)
        with opened.lock:
            if not self._copies.there(self.files[unit]):  # another process has made room
                opened.shard = self._open(unit)
            found = opened.shard.read(piece)
            self._learn(unit, opened)
        lacking = (self.known(unit, piece) or 0) - len(found)
        if lacking > 0:  # it was read before, and cannot be now
            last = found[-1] if found else None
            if not isinstance(last, UnreadableRecord):
                last = UnreadableRecord(f"{self.files[unit]} has fewer records than before")
            return [*found, *[last] * lacking]
        return found

    def ahead(self, unit: int) -> None:
        if self._copies.copies(self.files[unit]):
            self._opened(unit)

    def first(self, count: int) -> Piece:
        """The first records of the first file; read anew."""
        place = Place(self.files[0], count, lambda i: i)
        try:
            return _open(self._source, place, self._copies, self.files[0]).read(0)[:count]
        except UnreadableRecord as failure:
            return [failure]

    def _opened(self, unit: int) -> _Opened:
        with self._lock:
            opened = self._shards.get(unit)
            if opened is None:
                opened = self._shards[unit] = _Opened()
            self._shards.move_to_end(unit)
            most = OPEN * self._stream.lanes * self._stream.block
            while len(self._shards) > most:
                self._shards.popitem(last=False)
        with opened.lock:
            if opened.shard is None:
                opened.shard = self._open(unit)
        return opened

    def _open(self, unit: int) -> Shard:
        total = None if self._sizes is None else int(self._sizes[unit])
        if self._starts is not None:
            start = int(self._starts[unit])
            number = lambda i: start + i  # noqa: E731
        else:
            number = lambda i: i * len(self.files) + unit  # noqa: E731
        place = Place(self.files[unit], self._stream.run, number, total)
        try:
            return _open(self._source, place, self._copies, self.files[unit])
        except ClipjaxError as error:
            failure = error if isinstance(error, UnreadableRecord) else UnreadableRecord(str(error))
            return Lost(failure, self._stream.run, 1 if total is None else total)

    def _learn(self, unit: int, opened: _Opened) -> None:
        """Keeps what a shard knows of its pieces. The last edge comes twice once they are all."""
        shard = opened.shard
        edges = [*shard.edges, shard.edges[-1]] if shard.whole else list(shard.edges)
        known = self._edges.get(unit, [0])
        if len(edges) > len(known):
            self._edges[unit] = edges
        if shard.failed and self.files[unit] not in self.failed:
            self.failed.append(self.files[unit])
        if shard.whole and not shard.failed:
            self._kept.add(unit, shard.edges[-1])

    def _count(self, unit: int) -> int:
        count = _from_stats(self.files[unit])
        if count is not None:
            self._kept.counts[unit] = count
            return count
        with self._lock:
            opened = self._shards.get(unit)
        if opened is None:  # not among those that are being read
            opened = _Opened()
            opened.shard = self._open(unit)
        with opened.lock:
            count = opened.shard.count()
            self._learn(unit, opened)
        return count


class _Opened:
    """A file and the lock of who reads it."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.shard: Any = None


def _open(source: Source, place: Place, copies: Copies, address: str) -> Shard:
    path = copies.path(address)
    return source.open_shard(
        place if path == place.path else Place(path, place.run, place.number, place.total)
    )


class Lost:
    """A file that cannot be opened: one record that says why, or as many as it is known to have."""

    failed = True

    def __init__(self, failure: UnreadableRecord, run: int, count: int):
        self._failure = failure
        self.edges = [*range(0, count, run), count]
        self.whole = True

    def read(self, piece: int) -> list[Record | UnreadableRecord]:
        if piece + 1 >= len(self.edges):
            return []
        return [self._failure] * (self.edges[piece + 1] - self.edges[piece])

    def count(self) -> int:
        return self.edges[-1]


class Opened:
    """A file with random access, as a shard: its pieces are the runs it says."""

    def __init__(self, records: RandomAccess, place: Place):
        self._records = records
        self.edges = edges_of(records, place.run).tolist()
        self.whole, self.failed = True, False
        if place.total is not None and place.total != len(records):
            raise ClipjaxError(
                f"{place.path}: {SIZES} says {place.total:,} records, and it has {len(records):,}: mend "
                "or remove that file"
            )

    def read(self, piece: int) -> list[Record | UnreadableRecord]:
        if piece + 1 >= len(self.edges):
            return []
        return list(read_run(self._records, self.edges[piece], self.edges[piece + 1]))

    def count(self) -> int:
        return self.edges[-1]


class Sequential:
    """A file that is read from its beginning on: where a piece begins is known once those before it were read."""

    def __init__(self, place: Place):
        self.place = place
        total = place.total
        self.edges = [0] if total is None else [*range(0, total, place.run), total]
        self.whole = total is not None
        self.failed = False
        self._offsets = [0]
        self._ended = False

    def take(self, offset: int, first: int, keep: bool) -> tuple[list[Any], int | None]:
        """Up to `place.run` records from a byte on, and the byte after them; None where the file ends.

        Where it cannot be read further, the last of them is why not.

        Args:
          offset: of the first.
          first: its number in the file.
          keep: False where only their number matters.
        """
        raise NotImplementedError

    def read(self, piece: int) -> list[Record | UnreadableRecord]:
        while len(self._offsets) <= piece and not self._ended:
            self._advance(len(self._offsets) - 1, keep=False)
        found = self._advance(piece, keep=True) if piece < len(self._offsets) else []
        if self.place.total is None:
            return found
        if piece + 1 >= len(self.edges):
            return []
        wanted = self.edges[piece + 1] - self.edges[piece]
        lacking = UnreadableRecord(
            f"{self.place.name}: {SIZES} says {self.place.total:,} records, and it has fewer"
        )
        if found and isinstance(found[-1], UnreadableRecord) and self.failed:
            lacking = found[-1]
        return [*found[:wanted], *[lacking] * (wanted - len(found))]

    def lost(self, error: ClipjaxError, place: int) -> UnreadableRecord:
        """What stands for all records from `place` on, which cannot be read."""
        logger.warning("%s: what follows its record %d is lost: %s", self.place.path, place, error)
        return error if isinstance(error, UnreadableRecord) else UnreadableRecord(str(error))

    def count(self) -> int:
        while not self.whole:
            self._advance(len(self._offsets) - 1, keep=False)
        return self.edges[-1]

    def _advance(self, piece: int, keep: bool) -> list[Any]:
        run = self.place.run
        found, after = self.take(self._offsets[piece], piece * run, keep)
        if piece < len(self._offsets) - 1 or self._ended:
            return found
        if after is None:
            self._ended = True
            self._check(piece * run + len(found))
        else:
            self._offsets.append(after)
        if self.place.total is None:
            if found:
                self.edges.append(self.edges[-1] + len(found))
            self.whole = self._ended
        return found

    def _check(self, count: int) -> None:
        total = self.place.total
        if total is not None and count > total:
            logger.warning(
                "%s: %s says %d records, and it has %d: the last ones are never shown",
                *(self.place.path, SIZES, total, count),
            )


class _Kept:
    """How many records files have, as earlier runs found it: a line a file, added by any process."""

    def __init__(self, folder: str | None, files: list[str]):
        self.counts: dict[int, int] = {}
        self._files, self._path = files, None
        if folder is None:
            return
        mark = hashlib.sha256("\n".join(files).encode(errors="replace")).hexdigest()[:16]
        self._path = Path(folder).expanduser() / f"counts-{mark}.jsonl"
        numbers = {file: i for i, file in enumerate(files)}
        try:
            lines = self._path.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return
        for line in lines:
            try:
                file, count = json.loads(line)
                self.counts[numbers[file]] = int(count)
            except (ValueError, KeyError, TypeError):
                continue  # cut short by a kill

    def add(self, unit: int, count: int) -> None:
        old = self.counts.get(unit)
        if old == count:
            return
        if old is not None:
            logger.warning("%s has %d records, and %d were known of", self._files[unit], count, old)
        self.counts[unit] = count
        if self._path is None:
            return
        line = json.dumps([self._files[unit], count]) + "\n"
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                os.write(handle, line.encode())  # one call: lines of several processes stay whole
            finally:
                os.close(handle)
        except OSError as error:
            logger.warning("%s cannot be written (%s)", self._path, error)
            self._path = None


def sizes_of(files: list[str], sizes: dict[str, Any]) -> list[int] | None:
    """The records of each file, by its name in a `sizes.json`; None where one is not in it."""
    found = [sizes.get(os.path.basename(file)) for file in files]
    return None if any(not isinstance(n, int) or n < 0 for n in found) else found  # type: ignore[return-value]


def _sizes_beside(files: list[str]) -> np.ndarray | None:
    """What the `sizes.json` beside files say; None where they do not say it of all."""
    folders: dict[str, list[int]] = {}
    for i, file in enumerate(files):
        folders.setdefault(file.rpartition("/")[0], []).append(i)
    if len(folders) > FOLDERS:
        return None
    counts = np.zeros(len(files), np.int64)
    for folder, members in folders.items():
        path = f"{folder}/{SIZES}" if folder else SIZES
        content = read_whole(path)
        try:
            sizes = json.loads(content) if content is not None else {}
        except ValueError as error:
            raise ClipjaxError(f"{path} is not JSON ({error})") from error
        found = sizes_of([files[i] for i in members], sizes if isinstance(sizes, dict) else {})
        if found is None:
            if sizes:
                logger.warning("%s does not say how many records each file has", path)
            return None
        counts[members] = found
    return counts


def _from_stats(file: str) -> int | None:
    """What img2dataset wrote beside a file: how many pictures it could get."""
    stem, end = os.path.splitext(file)
    if end not in (".tar", ".tfrecord"):
        return None
    content = read_whole(f"{stem}_stats.json")
    try:
        return None if content is None else int(json.loads(content)["successes"])
    except (ValueError, KeyError, TypeError):
        return None
