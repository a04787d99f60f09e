"""The loader: a source's records as batches, in an order that the seed and the step alone decide.

There is one global order of positions 0, 1, 2, ...: the epochs' shuffles one after another. Batch k
is positions [k * B, (k + 1) * B), and process p of n makes the p-th of n equal runs of rows of it.
What happens at a position (augmentation, choice of caption) is a function of the seed, the position
and the field's name. So the whole state is the step: a run resumes exactly, on any number of processes.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import logging
import os
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from clipjax.component import Component
from clipjax.data.augment import Augmentation, CaptionChoice, Resize
from clipjax.data.fields import Draws, Example, Field, Image, Spec, Text, entry
from clipjax.data.order import Order, Plan, Runs, Shuffled, Stream, Streamed, edges_of
from clipjax.data.reading import Unreachable, retried
from clipjax.data.sources import RandomAccess, Source, UnreadableRecord
from clipjax.data.tokenizers import BPE, Tokenizer, TokenizerModel
from clipjax.data.workers import Rows, made_by_workers
from clipjax.errors import ClipjaxError, RunFailed

logger = logging.getLogger(__name__)

MIN_SEEN = 1000
"""Least number of records the error rate is taken over: one early failure is no verdict."""
MAX_REPLACEMENTS = 100
"""Positions tried in place of one whose record cannot be used."""
CHUNK = 32
"""Examples read before their rows are written: texts are encoded together, pictures soon let go."""
READERS = 8
"""Threads that read runs of a stream."""
NAMED = 20
"""Records that cannot be used and are named one by one; after that they are counted."""
SPREAD = 1_000_000
"""Records whose texts a tokenizer is trained on, at most: every so-manyth of a larger source."""
PROBED = 8
"""Records looked at, when a loader is made, for the entries that fields ask for."""
OWN = {"id": Spec((), "int32"), "sample": Spec((), "int32")}
"""What the loader itself puts into a batch."""


@dataclasses.dataclass(frozen=True)
class Data(Component):
    """What a run trains on, and how it is fed."""

    source: Source
    """Records of pictures with captions."""
    tokenizer: Tokenizer = dataclasses.field(default_factory=BPE)
    """How captions become tokens."""
    image_size: int = 224
    """Height and width of pictures, in pixels."""
    batch_size: int = 256
    """Pairs per step, over all processes."""
    context_length: int = 64
    """Tokens per caption, special tokens counted; a longer caption is cut."""
    augment: tuple[Augmentation, ...] = ()
    """Changes of the picture, in order."""
    fields: tuple[Field, ...] = (Image(), Text())
    """What a batch holds besides `id` and `sample`."""
    resize: Resize = dataclasses.field(default_factory=Resize)
    """How pictures come to `image_size` where no augmentation has done it, and in evaluation."""
    captions: CaptionChoice = dataclasses.field(default_factory=CaptionChoice)
    """Which of a picture's captions is shown."""
    shuffle: bool = True
    """Whether each epoch has a new random order."""
    stream: Stream | None = None
    """Read runs of neighboring records from end to end, in place of single ones from all over."""
    plan: Plan | None = None
    """Which records make up a batch; None: any."""
    cache: bool = False
    """Keep decoded pictures in memory, at full size; for small data sets. Without, a JPEG whose first
    augmentation crops it is decoded only as large as the crop needs."""
    num_threads: int | None = None
    """Threads that decode and augment, per process; default: one per core, or one in each worker. One
    is best for pictures below 100 pixels, where Python's own share of the work dominates."""
    num_workers: int = 0
    """Processes that decode and augment, beside each one that trains; 0 is threads alone. They win where
    Python's own share of the work dominates: pictures below 100 pixels, or many cores."""
    prefetch: int = 2
    """Batches made while the step before them runs."""
    max_error_rate: float = 0.01
    """Share of records that may be unreadable before the run fails."""

    def __post_init__(self):
        for name in ("image_size", "batch_size", "context_length", "num_threads", "prefetch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ClipjaxError(f"Data: {name}={value} must be >= 1")
        if self.num_workers < 0:
            raise ClipjaxError(f"Data: num_workers={self.num_workers} must be >= 0")
        if self.num_workers and self.cache:
            raise ClipjaxError(
                "Data: each of num_workers would keep its own cache; drop one of them"
            )
        if not 0 <= self.max_error_rate <= 1:
            raise ClipjaxError(f"Data: max_error_rate={self.max_error_rate} must be in [0, 1]")
        if self.cache and self.stream is not None:
            raise ClipjaxError("Data: cache keeps what a stream reads once; drop one of them")
        if self.plan is not None and self.stream is not None:
            raise ClipjaxError(
                "Data: plan and stream both say which record comes; drop one of them"
            )
        names = [field.name for field in self.fields]
        for name in names:
            if not name.isidentifier() or name in OWN or names.count(name) > 1:
                raise ClipjaxError(
                    f"Data: a field is called {name!r}, which "
                    + ("is no name" if not name.isidentifier() else "is taken")
                )

    def spec(self) -> dict[str, Spec]:
        """One row of each array of a batch, by its key.

        Raises:
          ClipjaxError: two fields give arrays of one name, or a field's file cannot be read.
        """
        arrays = dict(OWN)
        for field in self.fields:
            for key, spec in field.spec(self).items():
                if key in arrays:
                    raise ClipjaxError(f"Data: two fields give an array called {key!r}")
                arrays[key] = spec
        return arrays

    def build(
        self,
        tokenizer: TokenizerModel,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
    ) -> Loader:
        """Opens the source and makes the loader of one process.

        Args:
          tokenizer: what `self.tokenizer` built, or what a checkpoint holds.
          seed: decides order, augmentation and choice of captions; >= 0.
          process_index: which of the equal runs of rows of each batch this process makes.
          process_count: how many there are; see `process_rows`.

        Raises:
          ClipjaxError: the source cannot be opened or is empty, or the batch size is not divisible
            by the number of processes.
        """
        return Loader(self, tokenizer, seed, process_index, process_count)

    def iter_captions(self) -> Iterator[str]:
        """The texts that training may show, in the order of the records; of at most `SPREAD` records,
        which are spread over the source."""
        texts = [field for field in self.fields if isinstance(field, Text)]
        # Fields that choose from the same texts count once.
        chosen = list({(field.key, field.choice(self)): field for field in texts}.values())
        records = self.source.open()
        read = getattr(records, "facts", records.__getitem__)
        for i in range(0, len(records), max(1, len(records) // SPREAD)):
            try:
                record = retried(functools.partial(read, i), f"record {i}")
                found = [field.choice(self).candidates(field.texts(record)) for field in chosen]
            except UnreadableRecord:
                continue  # the loader counts and names it
            for caption in itertools.chain.from_iterable(found):
                yield caption.text


class Loader:
    """Batches of one process. `batch(step)` is random access, `iterate(step)` works ahead.

    Attributes:
      num_examples: records in the source.
      seen: records asked for so far by this process, since it started.
      skipped: how many of these could not be used and were replaced.
      unreachable: how many of the skipped ones are due to reading, not to what was read.
    """

    def __init__(
        self,
        data: Data,
        tokenizer: TokenizerModel,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
    ):
        if data.batch_size % process_count:
            raise ClipjaxError(
                f"batch_size={data.batch_size} is not divisible by the {process_count} processes "
                "that feed it; change batch_size"
            )
        if data.num_workers and data.batch_size % (process_count * data.num_workers):
            raise ClipjaxError(
                f"batch_size={data.batch_size} is not divisible by {process_count} processes with "
                f"num_workers={data.num_workers} each; change num_workers"
            )
        if seed < 0:
            raise ClipjaxError(f"seed={seed} must be >= 0")
        self._data, self._tokenizer, self._seed = data, tokenizer, seed
        self._process = (process_index, process_count)
        self._num_threads = data.num_threads or _cores()
        self._rows = data.batch_size // process_count
        self._first_row = process_index * self._rows
        self._spec = data.spec()
        self._records: RandomAccess = data.source.open()
        self.num_examples = len(self._records)
        if self.num_examples == 0:
            raise ClipjaxError(f"the source has no records: {data.source}")
        if self.num_examples < data.batch_size:
            logger.warning(
                "%d records and batches of %d: a batch holds a pair more than once, as its own negative",
                self.num_examples,
                data.batch_size,
            )
        _check_entries(data, self._records)
        # What fails early is read first, and pictures before what follows them.
        order = sorted(data.fields, key=lambda f: (bool(f.follows), isinstance(f, Image)))
        self._fields = [(field, field.open(data, tokenizer, self._records)) for field in order]
        self._order, self._runs = self._ordered(process_count)
        self._cached: dict[int, Any] = {}
        self._named: set[str] = set()
        self.seen = self.skipped = self.unreachable = 0

    def fingerprint(self) -> str | None:
        """What tells these data from others that are as many: of the keys and captions of a few records.

        A source whose opened records have a `fingerprint` (of all its files, say) is believed. None where a
        record cannot be read just now.
        """
        if known := getattr(self._records, "fingerprint", None):
            return str(known)
        digest = hashlib.sha256(str(self.num_examples).encode())
        for index in sorted({i * (self.num_examples - 1) // 7 for i in range(8)}):
            try:
                record = self._records[index]
            except (OSError, UnreadableRecord):
                return None
            digest.update(repr((record.get("key"), record.get("captions"))).encode())
        return digest.hexdigest()[:16]

    def _ordered(self, process_count: int) -> tuple[Order, Runs | None]:
        data, stream = self._data, self._data.stream
        if data.plan is not None:
            order = data.plan.open(self._records, data.batch_size, self._seed, data.shuffle)
            return order, None
        if stream is None:
            return Shuffled(self.num_examples, self._seed, data.shuffle), None
        if stream.lanes % process_count:
            raise ClipjaxError(
                f"the {stream.lanes} lanes of Stream cannot be shared out evenly among the "
                f"{process_count} processes that feed a batch; change lanes"
            )
        edges = edges_of(self._records, stream.run)
        order = Streamed(stream, edges, data.batch_size, self._seed, data.shuffle)
        return order, Runs(self._records, edges, data.prefetch + 2)

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """This process's rows of the batch of one step.

        Returns:
          By key, what `Data.spec` says with a leading axis b; by default `image` uint8 [b, H, W, 3],
          `text` int32 [b, L], `id` and `sample` int32 [b].

        Raises:
          RunFailed: too many records cannot be used.
        """
        rows = self._empty_rows()
        self._read_ahead(step, None)
        failures = self._fill(rows, self._positions(step))
        self._account(failures)
        return rows

    def iterate(self, start_step: int = 0, shift: int = 0) -> Generator[Rows]:
        """The batches of `start_step`, `start_step + 1`, ... without end, made ahead by threads or workers.

        Batch k begins at position k * B + `shift` (`Scale.shift`).

        Close the iterator (or let it be collected) to stop them. An error that `batch` would
        raise is raised at the batch it belongs to.
        """
        if self._data.num_workers:
            made = made_by_workers(
                self._data, self._tokenizer, self._seed, *self._process, start_step, shift
            )
        else:
            made = self.made(start_step, shift)
        with contextlib.closing(made):
            for rows, failures in made:
                self._account(failures)
                yield rows

    def made(
        self, start_step: int, shift: int = 0, rows_of: Callable[[], Rows] | None = None
    ) -> Generator[tuple[Rows, list[UnreadableRecord]]]:
        """As `iterate`, by threads, and beside each batch why records in it were replaced; these are not
        counted.

        Args:
          start_step: the first batch.
          shift: as in `iterate`.
          rows_of: gives the arrays that a batch is made in; default: new ones.
        """
        if isinstance(self._order, Streamed):
            self._order.go_on(shift)
        pool = ThreadPoolExecutor(self._num_threads, thread_name_prefix="clipjax-data")
        readers = (
            ThreadPoolExecutor(READERS, thread_name_prefix="clipjax-data-read")
            if self._data.stream
            else None
        )
        ahead: collections.deque[tuple[dict, list[Future]]] = collections.deque()
        step = start_step
        try:
            while True:
                # The one that is asked for, and `prefetch` that are made while it is used.
                while len(ahead) < self._data.prefetch + 1:
                    self._read_ahead(step, readers)
                    rows = rows_of() if rows_of else self._empty_rows()
                    ahead.append((rows, self._submit(pool, rows, step, shift)))
                    step += 1
                rows, parts = ahead.popleft()
                yield rows, [failure for part in parts for failure in part.result()]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            if readers is not None and self._runs is not None:
                self._runs.close(readers)
            pool.shutdown(wait=True)

    def _read_ahead(self, step: int, readers: ThreadPoolExecutor | None) -> None:
        if self._runs is not None:
            assert isinstance(self._order, Streamed)
            self._runs.want(self._order.runs(step, self._first_row, self._rows), readers)

    def _submit(self, pool: ThreadPoolExecutor, rows: Rows, step: int, shift: int) -> list[Future]:
        positions = self._positions(step, shift)
        edges = np.linspace(0, self._rows, min(self._num_threads, self._rows) + 1, dtype=int)
        parts = [slice(*ends) for ends in itertools.pairwise(edges)]
        return [
            pool.submit(self._fill, {k: v[part] for k, v in rows.items()}, positions[part])
            for part in parts
        ]

    def _positions(self, step: int, shift: int = 0) -> list[int]:
        if step < 0:
            raise ClipjaxError(f"step={step} must be >= 0")
        first = step * self._data.batch_size + shift + self._first_row
        return list(range(first, first + self._rows))

    def _empty_rows(self) -> dict[str, np.ndarray]:
        return {k: np.empty((self._rows, *s.shape), s.dtype) for k, s in self._spec.items()}

    def _fill(self, rows: dict[str, np.ndarray], positions: list[int]) -> list[UnreadableRecord]:
        """Makes the examples at some positions; returns why records were replaced, if any were."""
        failures: list[UnreadableRecord] = []
        for start in range(0, len(positions), CHUNK):
            part = slice(start, start + CHUNK)
            examples = [self._example(position, failures) for position in positions[part]]
            chunk = {key: array[part] for key, array in rows.items()}
            for key in OWN:
                chunk[key][:] = [example[key] for example in examples]
            for field, reader in self._fields:
                reader.write([example[field.name] for example in examples], chunk)
        return failures

    def _example(self, position: int, failures: list[UnreadableRecord]) -> dict[str, Any]:
        """The example at a position, or its replacement if the record there cannot be used."""
        for attempt in range(MAX_REPLACEMENTS):
            try:
                return self._example_at(*self._order.at(position, attempt))
            except UnreadableRecord as failure:
                failures.append(failure)
        raise RunFailed(f"{MAX_REPLACEMENTS} records in a row cannot be used; last: {failures[-1]}")

    def _example_at(self, index: int, position: int) -> dict[str, Any]:
        """What each field has read of a record, by its name, and what the loader adds.

        Args:
          index: of the record.
          position: decides the draws.
        """
        record: Any = self._cached.get(index)
        if record is None:
            records = self._records if self._runs is None else self._runs
            read = functools.partial(records.__getitem__, index)
            record = retried(read, f"record {index}")
        draws = Draws(self._seed, position, record, self._data.captions)
        # The low 31 bits: ids may be hashes of 64 bits, and equal ones must stay equal.
        made: dict[str, Any] = {"id": record["id"] & 0x7FFFFFFF, "sample": index}
        decoded: dict[str, np.ndarray] = {}
        for field, reader in self._fields:
            made[field.name] = reader.read(Example(field.name, record, made, draws, decoded))
        if self._data.cache and index not in self._cached:
            self._cached[index] = record | decoded
        return made

    def _account(self, failures: list[UnreadableRecord]) -> None:
        self.seen += self._rows + len(failures)
        self.skipped += len(failures)
        self.unreachable += sum(isinstance(failure, Unreachable) for failure in failures)
        for failure in map(str, failures):
            if len(self._named) < NAMED and failure not in self._named:
                self._named.add(failure)
                logger.warning("skipped a record: %s", failure)
                if len(self._named) == NAMED:
                    logger.warning("skipped %d records so far; no more of them are named", NAMED)
        allowed = self._data.max_error_rate * max(self.seen, MIN_SEEN)
        if failures and self.skipped > allowed:
            raise RunFailed(
                f"{self.skipped} of {self.seen} records cannot be used, more than "
                f"max_error_rate={self._data.max_error_rate} allows; last: {failures[-1]}"
            )


def _cores() -> int:
    """Cores this process may use, which may be fewer than there are; not every system can tell."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _check_entries(data: Data, records: RandomAccess) -> None:
    """Refuses fields that ask for an entry which none of the first records has."""
    wanted = [(field, key) for field in data.fields for key in field.entries]
    found = []
    for index in range(min(PROBED, len(records)) if wanted else 0):
        with contextlib.suppress(UnreadableRecord):  # the loader counts and names it
            found.append(records[index])
    for field, key in wanted:
        failures = []
        for record in found:
            try:
                entry(record, key)
            except UnreadableRecord as failure:
                failures.append(failure)
        if failures and len(failures) == len(found):
            raise ClipjaxError(
                f"{type(field).__name__}({field.name!r}) asks for what none of the first "
                f"{len(found)} records has; {failures[0]}"
            )
