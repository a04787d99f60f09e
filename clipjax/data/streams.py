"""A source opened as a stream: what is dealt of it, in which order, and what of that is in memory."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import Executor

from clipjax.data.mixed import MixedStreams, Mixture
from clipjax.data.order import Stream, Streamed
from clipjax.data.pieces import Held, Piece, Readable, RunsOf
from clipjax.data.reading import retried
from clipjax.data.shards import ShardsOf
from clipjax.data.sources import RandomAccess, Record, Source, UnreadableRecord
from clipjax.errors import ClipjaxError

PROBED = 8
"""Records that are read when a stream is opened, for those who want to see some."""
SPREAD_FILES = 64
"""Files of which records are read where some of all will do."""


class OpenStream:
    """A stream of one source, or of those of a `Mixture`.

    Attributes:
      order: where the records of positions are.
      pieces: the records, by their indices.
      probe: a few records.
      num_examples: records of an epoch, where known.
    """

    order: Streamed | MixedStreams

    def __init__(
        self, source: Source, stream: Stream, batch_size: int, seed: int, shuffle: bool, steps: int
    ):
        """Nothing of files is read but what says how many records they have.

        Raises:
          ClipjaxError: the source cannot be opened, or does not fit the stream.
        """
        sources = source.sources if isinstance(source, Mixture) else (source,)
        opened = [_units(one, stream) for one in sources]
        self._units = [units for units, _ in opened]
        sizes = [units.total for units in self._units]
        for one, size in zip(sources, sizes, strict=True):
            if size == 0:
                raise ClipjaxError(f"the source has no records: {one}")
        self.pieces = Held(self._units, steps)

        def streamed(number: int, units: Readable) -> Streamed:
            prefix = (number,) if len(opened) > 1 else ()
            fetch = lambda key: self.pieces.fetch((*prefix, *key))  # noqa: E731
            return Streamed(stream, units, batch_size, seed, shuffle, fetch)

        streams = [streamed(*pair) for pair in enumerate(self._units)]
        self.num_examples = sizes[0]
        self.order = streams[0]
        if isinstance(source, Mixture):
            self.num_examples = source.epoch(sizes)
            if len(streams) > 1:
                shares = source.shares(sizes, stream.lanes)
                self.order = MixedStreams(streams, shares, stream.lanes, batch_size)
        self.probe: RandomAccess = (opened[0][1] if len(opened) == 1 else None) or Probe(
            [functools.partial(_first, *pair) for pair in opened]
        )

    def want(self, step: int, first_row: int, rows: int, executor: Executor | None) -> None:
        """Says that some rows of a step's batch will be asked for, and begins to read what they need."""
        self.pieces.begin(self.order.first(step, first_row, rows), executor)
        self.pieces.want(self.order.runs(step, first_row, rows), executor)

    def fingerprint(self) -> str | None:
        """What tells the files from others; None where none are dealt."""
        marks = [units.fingerprint() for units in self._units if isinstance(units, ShardsOf)]
        if len(marks) < len(self._units):
            return None
        return marks[0] if len(marks) == 1 else hashlib.sha256(str(marks).encode()).hexdigest()[:16]


class Probe:
    """The first records of some sources, read when they are asked for."""

    def __init__(self, first: list[Callable[[], Piece]]):
        self._first, self._found = first, list[Record | UnreadableRecord]()

    def __len__(self) -> int:
        if not self._found:
            self._found = [record for first in self._first for record in first()]
        return len(self._found)

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(index)
        found = self._found[index]
        if isinstance(found, UnreadableRecord):
            raise found
        return found


def spread(
    source: Source, stream: Stream | None, count: int
) -> Iterator[Record | UnreadableRecord]:
    """About `count` records from all over a source, in its order, without pictures where that is less to read."""
    files = None
    if stream is not None:
        if isinstance(source, Mixture):
            for one in source.sources:
                yield from spread(one, stream, count // len(source.sources))
            return
        files = source.listed(stream.lanes)
    if files is None:
        records = source.open()
        read = getattr(records, "facts", records.__getitem__)
        for index in range(0, len(records), max(1, len(records) // count)):
            try:
                yield retried(functools.partial(read, index), f"record {index}")
            except UnreadableRecord as failure:
                yield failure
        return
    assert stream is not None
    units = ShardsOf(source, files, stream)
    chosen = sorted({i * len(files) // SPREAD_FILES for i in range(SPREAD_FILES)})
    each = -(-count // len(chosen))
    for unit in chosen:
        shown, piece = 0, 0
        while shown < each and (found := units.read(unit, piece)):
            yield from found[: each - shown]
            shown, piece = shown + len(found), piece + 1


def _units(source: Source, stream: Stream) -> tuple[ShardsOf | RunsOf, RandomAccess | None]:
    files = source.listed(stream.lanes)
    if files is not None:
        return ShardsOf(source, files, stream), None
    records = source.open()
    if not len(records):
        raise ClipjaxError(f"the source has no records: {source}")
    return RunsOf(records, stream.run), records


def _first(units: ShardsOf | RunsOf, records: RandomAccess | None) -> Piece:
    if isinstance(units, ShardsOf):
        return units.first(PROBED)
    assert records is not None
    found: list[Record | UnreadableRecord] = []
    for index in range(min(PROBED, len(records))):
        try:
            found.append(records[index])
        except UnreadableRecord as failure:
            found.append(failure)
    return found
