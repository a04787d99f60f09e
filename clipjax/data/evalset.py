"""EvalSet: a split read once, whole, without augmentation. What evaluators work on."""

from __future__ import annotations

import dataclasses
import logging

import numpy as np

from clipjax.data.augment import Resize
from clipjax.data.images import decode
from clipjax.data.sources import Source, UnreadableRecord
from clipjax.errors import ClipjaxError

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class EvalSet:
    """Pictures with all their captions.

    Attributes:
      images: uint8 [n, size, size, 3].
      captions: by picture, its captions; empty captions are left out.
      languages: by picture, one code per caption, or empty where unknown.
      ids: int64 [n]; pictures with equal ids are the same picture.
      keys: by picture, its name.
      labels: int32 [n], -1 where unknown; None for a source without labels.
      class_names: the names behind `labels`, where the source knows them.
      skipped: how many records could not be read and are missing here.
    """

    images: np.ndarray
    captions: tuple[tuple[str, ...], ...]
    languages: tuple[tuple[str, ...], ...]
    ids: np.ndarray
    keys: tuple[str, ...]
    labels: np.ndarray | None
    class_names: tuple[str, ...] | None
    skipped: int = 0

    def __len__(self) -> int:
        return len(self.images)


def load_eval(
    source: Source,
    image_size: int,
    limit: int | None = None,
    resize: Resize = Resize(),  # noqa: B008 (frozen)
) -> EvalSet:
    """Reads the first `limit` records of a source (None: all), in its order, into memory.

    Args:
      source: what to read.
      image_size: height and width, in pixels.
      limit: most records to read.
      resize: how pictures are brought to that size.

    Raises:
      ClipjaxError: the source cannot be opened, or none of its records can be read.
    """
    opened = source.open()
    images, records, skipped = [], [], 0
    for i in range(len(opened) if limit is None else min(limit, len(opened))):
        try:
            record = opened[i]
            images.append(resize(decode(record["image"], record["key"]), image_size))
        except UnreadableRecord as failure:
            logger.warning("left out of the evaluation: %s", failure)
            skipped += 1
            continue
        records.append(record)
    if not records:
        raise ClipjaxError(f"no record of {source} can be read ({skipped} tried)")
    spoken = [_nonempty(r["captions"], r.get("languages", ())) for r in records]
    labels = np.array([r.get("label", -1) for r in records], np.int32)
    return EvalSet(
        images=np.stack(images),
        captions=tuple(captions for captions, _ in spoken),
        languages=tuple(languages for _, languages in spoken),
        ids=np.array([r["id"] for r in records], np.int64),
        keys=tuple(r["key"] for r in records),
        labels=labels if (labels >= 0).any() else None,
        class_names=getattr(opened, "class_names", None),
        skipped=skipped,
    )


def _nonempty(captions, languages) -> tuple[tuple[str, ...], tuple[str, ...]]:
    kept = [i for i, caption in enumerate(captions) if caption.strip()]
    return (
        tuple(captions[i].strip() for i in kept),
        tuple(languages[i] for i in kept) if languages else (),
    )
