"""Masks of pictures: a class for each pixel, and how well scores of patches agree with them."""

from __future__ import annotations

import dataclasses
import functools
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clipjax.data import EvalSet, Resize
from clipjax.data.fields import entry
from clipjax.data.folder import stays_inside
from clipjax.errors import ClipjaxError, did_you_mean
from clipjax.evals.figure import Figure
from clipjax.predictor import Predictor

IGNORED = -1
BATCH = 32
"""Pictures whose patches are in memory at once."""


@dataclasses.dataclass(frozen=True)
class Masks:
    """Where masks are and what their numbers mean.

    Attributes:
      data: the pictures.
      folder: of mask files named as the pictures, whatever their ends; None: in the records.
      key: the records' entry, where there is no folder.
      ignore: the number of pixels that do not count.
      zero_is_ignored: whether 0 does not count either, and the classes begin at 1.
    """

    data: EvalSet
    folder: str | None
    key: str
    ignore: int
    zero_is_ignored: bool

    def __call__(self, row: int, size: int, resize: Resize) -> np.ndarray:
        """int32 [size, size] of a picture, as the model sees it: classes, and `IGNORED`.

        Raises:
          ClipjaxError: there is no such mask, or it is none.
        """
        from PIL import Image

        found = self._find(row)
        name = f"the mask of {self.data.keys[row]}"
        try:
            with Image.open(io.BytesIO(found) if isinstance(found, bytes) else found) as picture:
                if picture.mode not in ("1", "L", "P", "I", "I;16"):
                    raise ClipjaxError(
                        f"{name} has the mode {picture.mode}: a mask has one number a pixel (gray or a "
                        "palette)"
                    )
                mask = np.asarray(picture).astype(np.int32)
        except OSError as error:
            raise ClipjaxError(f"{name} cannot be read ({error})") from error
        mask = nearest(mask, size, resize)
        mask = np.where(mask == self.ignore, IGNORED, mask)
        return np.maximum(mask - 1, IGNORED) if self.zero_is_ignored else mask

    def _find(self, row: int) -> Any:
        key = self.data.keys[row]
        if self.folder is not None:
            # Of a picture in a tar, the name behind that of the tar.
            stem = os.path.splitext(key.rsplit(".tar:", 1)[-1])[0]
            there = Path(self.folder).expanduser()
            for end in (".png", ".tif", ".tiff", ".bmp", ".gif", ".pgm"):
                if (path := there / f"{stem}{end}").is_file():
                    return path
            near = [p.name for p in list(there.iterdir())[:2000]] if there.is_dir() else []
            raise ClipjaxError(
                f"{str(there)!r} has no mask {stem + '.png'!r}{did_you_mean(stem + '.png', near)}"
            )
        record = self.data.images.facts(row)
        value = entry(record, self.key)
        if isinstance(value, dict):  # as Hugging Face's Image feature
            value = value.get("bytes") or value.get("path")
        if isinstance(value, np.ndarray) and value.dtype != object:
            return _file(value)
        if isinstance(value, bytes):
            return value
        if not isinstance(value, str):
            raise ClipjaxError(f"{key}: {self.key!r} is {type(value).__name__}, and no mask")
        # A path, as a table has it: relative to what the picture's is relative to.
        image = os.fspath(record["image"]) if hasattr(record["image"], "__fspath__") else ""
        root = image[: -len(key)] if image.endswith(key) else ""
        if root and not stays_inside(os.path.realpath(root), value):
            raise ClipjaxError(f"{key}: the mask {value!r} leads out of the folder {root!r}")
        return os.path.join(root, value)


def _file(mask: np.ndarray) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(np.squeeze(mask).astype(np.int32)).save(file, "TIFF")
    return file.getvalue()


def nearest(mask: np.ndarray, size: int, resize: Resize) -> np.ndarray:
    """[size, size]: a mask [H, W] brought to the model's size as its picture is, without interpolation."""
    height, width = mask.shape
    moved = resize.mapped(np.zeros((height, width, 3), np.uint8), size)[1]
    back = np.linalg.inv(moved)
    centers = np.arange(size) + 0.5
    columns = np.clip(np.floor(back[0, 0] * centers + back[0, 2]), 0, width - 1).astype(int)
    rows = np.clip(np.floor(back[1, 1] * centers + back[1, 2]), 0, height - 1).astype(int)
    return mask[rows[:, None], columns[None]]


def patches(
    predictor: Predictor, data: EvalSet, output: str
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(rows [b], float32 [b, g, g, D]) of a few pictures after the other: their patches, row by row.

    Pictures that cannot be read are left out.

    Args:
      predictor: the model.
      data: the pictures.
      output: "tokens", or "token_embeddings".

    Raises:
      ClipjaxError: the model has no patches in a square.
    """
    for start in range(0, len(data), BATCH):
        rows = np.arange(start, min(start + BATCH, len(data)))
        taken = functools.partial(_rows, data, rows)
        made: Any = predictor.encode_image_rows(taken, len(rows), output=output)
        whole = made["places"][0] >= 0
        side = int(np.sqrt(whole.sum()))
        if side * side != whole.sum() or (np.diff(made["places"][0][whole]) != 1).any():
            raise ClipjaxError(
                f"segmentation needs patches in a square, and the image tower makes {whole.sum()} tokens"
            )
        values = np.asarray(made["values"], np.float32)[:, whole]
        seen = ~data.images.unreadable[rows]
        yield rows[seen], values.reshape(len(rows), side, side, -1)[seen]


def _rows(data: EvalSet, rows: np.ndarray, index: np.ndarray) -> np.ndarray:
    return data.images[rows[index]]


@jax.jit
def _counts(scores: jax.Array, mask: jax.Array) -> jax.Array:
    """Of scores [g, g, C] and a mask [S, S], int32 [3, C]: pixels right, taken, and of each class."""
    classes = scores.shape[-1]
    fine = jax.image.resize(scores, (*mask.shape, classes), "bilinear")
    counted = mask >= 0
    taken = jnp.where(counted, fine.argmax(-1), classes)
    true = jnp.where(counted, mask, classes)
    right = jnp.where(taken == true, true, classes)
    return jnp.stack(
        [jnp.bincount(x.ravel(), length=classes + 1)[:-1] for x in (right, taken, true)]
    )


def agreement(scores: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """int64 [3, C]: by class, pixels that are right, that were taken for it, and that are of it.

    Args:
      scores: [g, g, C], of patches; made as fine as the mask by bilinear interpolation.
      mask: int32 [S, S], `IGNORED` where a pixel does not count.
    """
    return np.asarray(_counts(jnp.asarray(scores, jnp.float32), jnp.asarray(mask)), np.int64)


def figures(counts: np.ndarray) -> dict[str, float]:
    """`mIoU`, `pixel_accuracy` and `mean_accuracy` of the `agreement` [n, 3, C] of pictures."""
    return {
        "mIoU": Figure(counts, _miou),
        "pixel_accuracy": Figure(counts, _pixel_accuracy),
        "mean_accuracy": Figure(counts, _mean_accuracy),
    }


def _summed(counts: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
    return counts.sum(axis=0) if weights is None else np.einsum("n,nkc->kc", weights, counts)


def _miou(counts: np.ndarray, weights: np.ndarray | None) -> float:
    right, taken, true = _summed(counts, weights)
    union = taken + true - right
    return float((right[union > 0] / union[union > 0]).mean())


def _pixel_accuracy(counts: np.ndarray, weights: np.ndarray | None) -> float:
    right, _, true = _summed(counts, weights)
    return float(right.sum() / true.sum())


def _mean_accuracy(counts: np.ndarray, weights: np.ndarray | None) -> float:
    right, _, true = _summed(counts, weights)
    return float((right[true > 0] / true[true > 0]).mean())
