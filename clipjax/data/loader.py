"""The loader: a source's records as batches, in an order that the seed and the step alone decide.

There is one global order of positions 0, 1, 2, ...: the epochs' shuffles one after another. Batch k
is positions [k * B, (k + 1) * B), and process p of n makes the p-th of n equal runs of rows of it.
What happens at a position (augmentation, choice of caption) is a function of the seed and the
position. So the whole state is the step: a run resumes exactly, on any number of processes.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import itertools
import logging
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from clipjax.component import Component
from clipjax.data.augment import Augmentation, CaptionChoice, Resize
from clipjax.data.images import decode
from clipjax.data.sources import RandomAccess, Source, UnreadableRecord
from clipjax.data.tokenizers import BPE, Tokenizer, TokenizerModel
from clipjax.errors import ClipjaxError, RunFailed

logger = logging.getLogger(__name__)

MIN_SEEN = 1000
"""Least number of records the error rate is taken over: one early failure is no verdict."""
MAX_REPLACEMENTS = 100
"""Positions tried in place of one whose record cannot be used."""


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
    resize: Resize = dataclasses.field(default_factory=Resize)
    """How pictures come to `image_size` where no augmentation has done it, and in evaluation."""
    captions: CaptionChoice = dataclasses.field(default_factory=CaptionChoice)
    """Which of a picture's captions is shown."""
    shuffle: bool = True
    """Whether each epoch has a new random order."""
    cache: bool = False
    """Keep decoded pictures in memory; for small data sets."""
    num_threads: int | None = None
    """Threads that decode and augment, per process; default: one per core. One is best for pictures
    below 100 pixels, where Python's own share of the work dominates."""
    prefetch: int = 2
    """Batches made ahead of the step that needs them."""
    max_error_rate: float = 0.01
    """Share of records that may be unreadable before the run fails."""

    def __post_init__(self):
        for name in ("image_size", "batch_size", "context_length", "num_threads", "prefetch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ClipjaxError(f"Data: {name}={value} must be >= 1")
        if not 0 <= self.max_error_rate <= 1:
            raise ClipjaxError(f"Data: max_error_rate={self.max_error_rate} must be in [0, 1]")

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
        """Every caption that training may show, in the order of the records."""
        records = self.source.open()
        for i in range(len(records)):
            try:
                record = records[i]
            except UnreadableRecord:
                continue  # the loader counts and names it
            for caption, _ in self.captions.candidates(record):
                yield caption


class Loader:
    """Batches of one process. `batch(step)` is random access, `iterate(step)` works ahead.

    Attributes:
      num_examples: records in the source.
      seen: records asked for so far by this process, since it started.
      skipped: how many of these could not be used and were replaced.
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
        if seed < 0:
            raise ClipjaxError(f"seed={seed} must be >= 0")
        self._data, self._tokenizer, self._seed = data, tokenizer, seed
        self._num_threads = data.num_threads or _cores()
        self._rows = data.batch_size // process_count
        self._first_row = process_index * self._rows
        self._augment(np.zeros((data.image_size,) * 2 + (3,), np.uint8), np.random.default_rng(0))
        self._records: RandomAccess = data.source.open()
        self.num_examples = len(self._records)
        if self.num_examples == 0:
            raise ClipjaxError(f"the source has no records: {data.source}")
        self._order = _global_order(self.num_examples, seed, data.shuffle)
        self._cached: dict[int, Any] = {}
        self._named: set[str] = set()
        self.seen = 0
        self.skipped = 0

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

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """This process's rows of the batch of one step.

        Returns:
          `image` uint8 [b, H, W, 3], `text` int32 [b, L], `id` int32 [b].

        Raises:
          RunFailed: too many records cannot be used.
        """
        rows = self._empty_rows()
        failures = self._fill(rows, self._positions(step))
        self._account(failures)
        return rows

    def iterate(self, start_step: int = 0, shift: int = 0) -> Iterator[dict[str, np.ndarray]]:
        """The batches of `start_step`, `start_step + 1`, ... without end, made ahead by threads.

        Batch k begins at position k * B + `shift` (`Scale.shift`).

        Close the iterator (or let it be collected) to stop the threads. An error that `batch` would
        raise is raised at the batch it belongs to.
        """
        pool = ThreadPoolExecutor(self._num_threads, thread_name_prefix="clipjax-data")
        ahead: collections.deque[tuple[dict, list[Future]]] = collections.deque()
        step = start_step
        try:
            while True:
                while len(ahead) < self._data.prefetch:
                    ahead.append(self._submit(pool, step, shift))
                    step += 1
                rows, parts = ahead.popleft()
                self._account([failure for part in parts for failure in part.result()])
                yield rows
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _submit(self, pool: ThreadPoolExecutor, step: int, shift: int) -> tuple[dict, list[Future]]:
        rows, positions = self._empty_rows(), self._positions(step, shift)
        edges = np.linspace(0, self._rows, min(self._num_threads, self._rows) + 1, dtype=int)
        parts = [slice(*ends) for ends in itertools.pairwise(edges)]
        return rows, [
            pool.submit(self._fill, {k: v[part] for k, v in rows.items()}, positions[part])
            for part in parts
        ]

    def _positions(self, step: int, shift: int = 0) -> list[int]:
        if step < 0:
            raise ClipjaxError(f"step={step} must be >= 0")
        first = step * self._data.batch_size + shift + self._first_row
        return list(range(first, first + self._rows))

    def _empty_rows(self) -> dict[str, np.ndarray]:
        rows, size = self._rows, self._data.image_size
        return {
            "image": np.empty((rows, size, size, 3), np.uint8),
            "text": np.empty((rows, self._data.context_length), np.int32),
            "id": np.empty(rows, np.int32),
        }

    def _fill(self, rows: dict[str, np.ndarray], positions: list[int]) -> list[str]:
        """Makes the examples at some positions; returns why records were replaced, if any were."""
        captions: list[str] = []
        failures: list[str] = []
        for row, position in enumerate(positions):
            rows["image"][row], caption, rows["id"][row] = self._example(position, failures)
            captions.append(caption)
        rows["text"][:] = self._tokenizer.encode(captions, self._data.context_length)
        return failures

    def _example(self, position: int, failures: list[str]) -> tuple[np.ndarray, str, int]:
        """The example at a position, or its replacement if the record there cannot be used.

        The replacement is what stands at the same place of the next epoch. Its neighbor would do as
        well, but is in the same batch already, and two equal pairs are each other's negatives.
        """
        for epoch in range(MAX_REPLACEMENTS):
            try:
                return self._example_at(position + epoch * self.num_examples)
            except UnreadableRecord as failure:
                failures.append(str(failure))
        raise RunFailed(f"{MAX_REPLACEMENTS} records in a row cannot be used; last: {failures[-1]}")

    def _example_at(self, position: int) -> tuple[np.ndarray, str, int]:
        index = int(self._order[position])
        record = self._cached.get(index) or self._records[index]
        rng = np.random.Generator(np.random.Philox(key=[self._seed, position]))
        caption = self._data.captions(record, rng)
        if caption is None:
            raise UnreadableRecord(_no_caption(record, self._data.captions.languages))
        image = decode(record["image"], record["key"])
        if self._data.cache:
            self._cached[index] = record | {"image": image}
        # The low 31 bits: ids may be hashes of 64 bits, and equal ones must stay equal.
        return self._augment(image, rng), caption, record["id"] & 0x7FFFFFFF

    def _augment(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        for augmentation in self._data.augment:
            image = augmentation(image, self._data.image_size, rng)
        return self._data.resize(image, self._data.image_size)

    def _account(self, failures: list[str]) -> None:
        self.seen += self._rows + len(failures)
        self.skipped += len(failures)
        for failure in failures:
            if failure not in self._named:
                self._named.add(failure)
                logger.warning("skipped a record: %s", failure)
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


def _global_order(num_examples: int, seed: int, shuffle: bool) -> Any:
    """Grain's random access from a position to a record's index; a new shuffle each epoch."""
    import grain

    order = grain.MapDataset.range(num_examples)
    if shuffle:
        order = order.seed(seed).shuffle()
    return order.repeat()


def _no_caption(record: Any, languages: tuple[str, ...]) -> str:
    if not record["captions"]:
        return f"{record['key']}: the record has no caption"
    if any(c.strip() for c in record["captions"]):
        return f"{record['key']}: no caption in any of the languages {', '.join(languages)}"
    return f"{record['key']}: the caption is empty"
