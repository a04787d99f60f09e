"""EvalSet: a split for evaluation, without augmentation: texts in memory, pictures when asked for."""

from __future__ import annotations

import concurrent.futures
import copy
import dataclasses
import functools
import logging
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from clipjax.data.augment import Resize
from clipjax.data.images import decode
from clipjax.data.sources import RandomAccess, Source, UnreadableRecord
from clipjax.errors import ClipjaxError

logger = logging.getLogger(__name__)

KEEP_BYTES = 2**30
"""Pixels that an `EvalSet` keeps in memory at most: 7,000 pictures of 224 x 224. A larger split is
decoded anew at each evaluation."""


KEPT = ("captions", "languages", "id", "key", "label")
"""Entries of a record that stay in memory."""


class Pictures:
    """The pictures of a split, decoded when asked for: `pictures[rows]` is uint8 [k, S, S, 3].

    A picture that turns out not to decode comes as black, is named in the log, and is marked in
    `unreadable`; whoever evaluates leaves it out.

    Attributes:
      unreadable: bool [n], what was found not to decode so far, by this process.
    """

    def __init__(self, opened: RandomAccess, index: np.ndarray, size: int, resize: Resize):
        """Reads nothing yet.

        Args:
          opened: the records.
          index: [n] int, which records.
          size: height and width, in pixels.
          resize: how pictures are brought to that size.
        """
        self._opened, self._index, self._size, self._resize = opened, index, size, resize
        self._kept: np.ndarray | None = None
        self.unreadable = np.zeros(len(index), bool)

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, rows: Any) -> np.ndarray:
        """uint8 [S, S, 3] of a row; [k, S, S, 3] of a slice or of an array of rows."""
        if self._kept is not None:
            return self._kept[rows]
        wanted = np.arange(len(self))[rows]
        if wanted.ndim == 0:
            return self._read(int(wanted))
        if not len(wanted):
            return np.zeros((0, self._size, self._size, 3), np.uint8)
        return np.stack(list(_threads().map(self._read, wanted.tolist())))

    def facts(self, row: int) -> dict[str, Any]:
        """The record of a row, without its picture where that is less to read."""
        read = getattr(self._opened, "facts", self._opened.__getitem__)
        return dict(read(int(self._index[row])))

    def first(self, count: int) -> Pictures:
        """The first `count` rows; what is found not to decode is marked in both."""
        part = copy.copy(self)
        part._index, part.unreadable = self._index[:count], self.unreadable[:count]  # views
        part._kept = None if self._kept is None else self._kept[:count]
        return part

    def keep(self, pixels: np.ndarray) -> None:
        """Takes all pictures, uint8 [n, S, S, 3], and reads no record any more."""
        self._kept = pixels

    def _read(self, row: int) -> np.ndarray:
        try:
            record = self._opened[int(self._index[row])]
            return self._resize(decode(record["image"], record["key"]), self._size)
        except UnreadableRecord as failure:
            if not self.unreadable[row]:
                logger.warning("left out of the evaluation: %s", failure)
            self.unreadable[row] = True
            return np.zeros((self._size, self._size, 3), np.uint8)


@dataclasses.dataclass(frozen=True)
class EvalSet:
    """Pictures with all their captions.

    Attributes:
      images: [n] pictures, of which only a small split's stay in memory.
      captions: by picture, its captions; empty captions are left out.
      languages: by picture, one code per caption, or empty where unknown.
      ids: int64 [n]; pictures with equal ids are the same picture.
      keys: by picture, its name.
      labels: int32 [n], -1 where unknown; None for a source without labels.
      class_names: the names behind `labels`, where the source knows them.
      skipped: how many records could not be read and are missing here.
    """

    images: Pictures
    captions: tuple[tuple[str, ...], ...]
    languages: tuple[tuple[str, ...], ...]
    ids: np.ndarray
    keys: tuple[str, ...]
    labels: np.ndarray | None
    class_names: tuple[str, ...] | None
    skipped: int = 0

    def __len__(self) -> int:
        return len(self.images)

    @property
    def tried(self) -> int:
        """How many records were read, those that could not be counted."""
        return len(self) + self.skipped

    def first(self, limit: int) -> EvalSet:
        """What `load_eval` gives of the first `limit` records, nothing read again.

        Raises:
          ClipjaxError: none of them could be read.
        """
        count = int((self.images._index < limit).sum())
        if not count:
            raise ClipjaxError(f"none of the first {limit} records can be read")
        labels = None if self.labels is None else self.labels[:count]
        return dataclasses.replace(
            self,
            images=self.images.first(count),
            captions=self.captions[:count],
            languages=self.languages[:count],
            ids=self.ids[:count],
            keys=self.keys[:count],
            labels=labels if labels is not None and (labels >= 0).any() else None,
            skipped=min(limit, self.tried) - count,
        )

    def entries(self, key: str) -> list[Any]:
        """What each record has under a name (see `fields.entry`), None where it has nothing.

        Raises:
          ClipjaxError: no record has it.
        """
        from clipjax.data.fields import entry

        found = [entry(self.images.facts(i), key, None) for i in range(len(self))]
        if all(value is None for value in found):
            known = ", ".join(map(str, self.images.facts(0)))
            raise ClipjaxError(f"no record has {key!r}; the first one has {known}")
        return found


def load_eval(
    source: Source,
    image_size: int,
    limit: int | None = None,
    resize: Resize = Resize(),  # noqa: B008 (frozen)
    keep_bytes: int = KEEP_BYTES,
) -> EvalSet:
    """Reads the first `limit` records of a source (None: all), in its order.

    Texts and labels stay in memory. Pictures do too where all of them take at most `keep_bytes`;
    otherwise they are decoded whenever they are asked for, and only the first is decoded here. Several
    threads read and decode.

    Args:
      source: what to read.
      image_size: height and width, in pixels.
      limit: most records to read.
      resize: how pictures are brought to that size.
      keep_bytes: most memory for pixels.

    Raises:
      ClipjaxError: the source cannot be opened, or none of its records can be read.
    """
    opened = source.open()
    count = len(opened) if limit is None else min(limit, len(opened))
    keep = count * image_size * image_size * 3 <= keep_bytes
    images: list[np.ndarray] = []
    index: list[int] = []
    records: list[dict[str, Any]] = []
    skipped = 0
    facts = getattr(opened, "facts", opened.__getitem__)

    def load(i: int, whole: bool) -> tuple[dict[str, Any], np.ndarray | None] | UnreadableRecord:
        try:
            record: Any = opened[i] if whole else facts(i)
            image = None
            if whole:
                image = resize(decode(record["image"], record["key"]), image_size)
            return {key: record[key] for key in KEPT if key in record}, image
        except UnreadableRecord as failure:
            return failure

    def all_of_them() -> Iterator[Any]:
        ahead = iter(range(count))
        for i in ahead:  # one by one up to the first that can be used, which is read as a whole
            found = load(i, True)
            yield found
            if not isinstance(found, UnreadableRecord):
                break
        yield from _threads().map(functools.partial(load, whole=keep), ahead)

    for found in all_of_them():
        if isinstance(found, UnreadableRecord):
            logger.warning("left out of the evaluation: %s", found)
            skipped += 1
            continue
        index.append(skipped + len(records))
        records.append(found[0])
        if found[1] is not None and keep:
            images.append(found[1])
    if not records:
        raise ClipjaxError(f"no record of {source} can be read ({skipped} tried)")
    spoken = [_nonempty(r["captions"], r.get("languages", ())) for r in records]
    labels = np.array([r.get("label", -1) for r in records], np.int32)
    pictures = Pictures(opened, np.array(index), image_size, resize)
    if keep:
        pictures.keep(np.stack(images))
    return EvalSet(
        images=pictures,
        captions=tuple(captions for captions, _ in spoken),
        languages=tuple(languages for _, languages in spoken),
        ids=np.array([r["id"] for r in records], np.int64),
        keys=tuple(r["key"] for r in records),
        labels=labels if (labels >= 0).any() else None,
        class_names=getattr(opened, "class_names", None),
        skipped=skipped,
    )


@functools.cache
def _threads() -> concurrent.futures.ThreadPoolExecutor:
    return concurrent.futures.ThreadPoolExecutor(min(32, os.cpu_count() or 1), "decode")


def _nonempty(captions, languages) -> tuple[tuple[str, ...], tuple[str, ...]]:
    kept = [i for i, caption in enumerate(captions) if caption.strip()]
    return (
        tuple(captions[i].strip() for i in kept),
        tuple(languages[i] for i in kept) if languages else (),
    )
