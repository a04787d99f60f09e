"""Pictures of a collection through the image encoder: read ahead in threads, bad ones set aside."""

from __future__ import annotations

import collections
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from clipjax.data.sources import RandomAccess, Record, UnreadableRecord
from clipjax.errors import RunFailed
from clipjax.predictor import Predictor

READERS = min(16, os.cpu_count() or 1)


def embed_pictures(
    predictor: Predictor,
    records: RandomAccess,
    indices: Iterable[int],
    skip: Callable[[UnreadableRecord], None],
) -> Iterator[tuple[list[int], list[Record], np.ndarray]]:
    """Embeds the pictures of some records, in their order, a batch at a time.

    Args:
      predictor: the model.
      records: an opened source.
      indices: which records.
      skip: told of each record that cannot be read, and is left out.

    Yields:
      (indices, records, embeddings float32 [b, E]), b at most the predictor's batch size.
    """
    batch: list[tuple[int, Record, np.ndarray]] = []
    for index, record, pixels in _read_ahead(predictor, records, indices):
        if isinstance(pixels, UnreadableRecord):
            skip(pixels)
            continue
        assert record is not None
        batch.append((index, record, pixels))
        if len(batch) == predictor.batch_size:
            yield _embedded(predictor, batch)
            batch = []
    if batch:
        yield _embedded(predictor, batch)


def _embedded(
    predictor: Predictor, batch: list[tuple[int, Record, np.ndarray]]
) -> tuple[list[int], list[Record], np.ndarray]:
    numbers, records, pixels = (list(column) for column in zip(*batch, strict=True))
    return numbers, records, require_finite(predictor.encode_image(np.stack(pixels)))


def require_finite(embeddings: np.ndarray) -> np.ndarray:
    """The embeddings, unless the model that made them is broken.

    Raises:
      RunFailed: one is not finite.
    """
    if not np.isfinite(embeddings).all():
        raise RunFailed(
            "the model's embeddings are not finite: its weights are damaged, or its training diverged"
        )
    return embeddings


def _read_ahead(
    predictor: Predictor, records: RandomAccess, indices: Iterable[int]
) -> Iterator[tuple[int, Record | None, Any]]:
    """(index, record, pixels or why there are none), at most two batches ahead of the consumer."""

    def read(index: int) -> tuple[int, Record | None, Any]:
        try:
            record = records[index]
            pixels = predictor.read(record["image"], record["key"])
        except UnreadableRecord as failure:
            return index, None, failure
        record["image"] = b""  # not needed any more, and large
        return index, record, pixels

    with ThreadPoolExecutor(READERS) as readers:
        waiting: collections.deque[Future] = collections.deque()
        try:
            for index in indices:
                waiting.append(readers.submit(read, index))
                if len(waiting) > 2 * predictor.batch_size:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
