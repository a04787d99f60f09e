"""Boxes that stay with the picture they are in."""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np

from clipjax.data.fields import Field, Image, Spec, View, as_numbers, entry
from clipjax.data.sources import UnreadableRecord
from clipjax.errors import ClipjaxError, did_you_mean


@dataclasses.dataclass(frozen=True)
class Boxes(Field):
    """Boxes in a picture, float32 [count, 4], that follow its crops and flips.

    A box is (left, top, right, bottom) in shares of the width and height of the picture shown,
    clipped to it. `{name}_mask`, bool [count], says which are there: the first `count` of the
    record, as long as enough of them is visible; the others are zero.
    """

    name: str = "boxes"
    key: str | None = None
    """Entry of the record with a list of boxes; None is `name`."""
    count: int = 16
    """Most boxes of a picture."""
    image: str = "image"
    """The field whose picture they are shown in."""
    form: Literal["xyxy", "xywh", "yxyx"] = "xyxy"
    """Order of a box's numbers: corners, corner and size (COCO), or corners with y first (TFDS)."""
    unit: Literal["share", "pixel"] = "share"
    """Of the record's numbers: shares of width and height, or pixels of the upright picture."""
    min_visible: float = 0.25
    """Least share of a box's area that must be in view."""
    label_key: str | None = None
    """Entry with an integer for each box: gives `{name}_label`, int32 [count], -1 where none is."""

    def __post_init__(self):
        if self.count < 1:
            raise ClipjaxError(f"Boxes({self.name!r}): count={self.count} must be >= 1")
        if self.form not in ("xyxy", "xywh", "yxyx"):
            raise ClipjaxError(f"Boxes({self.name!r}): form={self.form!r} is no order of numbers")
        if self.unit not in ("share", "pixel"):
            raise ClipjaxError(f"Boxes({self.name!r}): unit={self.unit!r} is no unit")
        if not 0 <= self.min_visible <= 1:
            raise ClipjaxError(
                f"Boxes({self.name!r}): min_visible={self.min_visible} must be in [0, 1]"
            )

    @property
    def follows(self):
        return (self.image,)

    @property
    def entries(self):
        return (self.key or self.name, *([self.label_key] if self.label_key else []))

    def spec(self, data):
        arrays = {
            self.name: Spec((self.count, 4), "float32"),
            f"{self.name}_mask": Spec((self.count,), "bool"),
        }
        if self.label_key:
            arrays[f"{self.name}_label"] = Spec((self.count,), "int32")
        return arrays

    def open(self, data, tokenizer, records):
        picture = next((f for f in data.fields if f.name == self.image), None)
        if not isinstance(picture, Image):
            raise ClipjaxError(
                f"Boxes({self.name!r}): image={self.image!r} is no Image in Data.fields"
                + did_you_mean(self.image, [f.name for f in data.fields if isinstance(f, Image)])
            )
        for step in data.augment if picture.augment is None else picture.augment:
            pixels, rng = np.zeros((8, 8, 3), np.uint8), np.random.default_rng(0)
            if step.mapped(pixels, picture.spec(data)[self.image].shape[0], rng)[1] is None:
                raise ClipjaxError(
                    f"Boxes({self.name!r}) cannot follow {type(step).__name__}: it does not say "
                    "where it moves things to; give it `mapped`"
                )
        return self

    def read(self, example):
        view: View = example.made[self.image]
        key = self.key or self.name
        what = f"{example.key}: the entry {key!r}"
        boxes = as_numbers(entry(example.record, key), "float32", what).astype(np.float64)
        if boxes.size == 0:
            boxes = boxes.reshape(0, 4)
        if boxes.ndim != 2 or boxes.shape[1] != 4:
            raise UnreadableRecord(f"{what} has the shape {list(boxes.shape)}, not [n, 4]")
        shown, visible = self._shown(boxes[: self.count], view)
        n = len(shown)
        boxes_row, mask = np.zeros((self.count, 4), np.float32), np.zeros(self.count, bool)
        boxes_row[:n], mask[:n] = np.where(visible[:, None], shown, 0), visible
        rows = {self.name: boxes_row, f"{self.name}_mask": mask}
        if self.label_key:
            what = f"{example.key}: the entry {self.label_key!r}"
            labels = as_numbers(entry(example.record, self.label_key), "int32", what)
            if labels.shape != (len(boxes),):
                raise UnreadableRecord(
                    f"{what} has the shape {list(labels.shape)} for {len(boxes)} boxes"
                )
            row = np.full(self.count, -1, np.int32)
            row[:n] = np.where(visible, labels[: self.count], -1)
            rows[f"{self.name}_label"] = row
        return rows

    def _shown(self, boxes: np.ndarray, view: View) -> tuple[np.ndarray, np.ndarray]:
        """(boxes [n, 4] in shares of the picture shown, which of them are visible [n])."""
        left, top, right, bottom = boxes[:, {"yxyx": [1, 0, 3, 2]}.get(self.form, slice(None))].T
        if self.form == "xywh":
            right, bottom = left + right, top + bottom
        height, width = view.source_size if self.unit == "share" else (1, 1)
        x = np.stack([left, right, left, right], 1) * width
        y = np.stack([top, top, bottom, bottom], 1) * height
        corners = np.stack([x, y, np.ones_like(x)])  # [3, n, 4]
        assert view.map is not None, "checked in open"
        x, y, _ = np.tensordot(view.map, corners, 1)
        low = np.stack([x.min(1), y.min(1)], 1)
        high = np.stack([x.max(1), y.max(1)], 1)
        size = np.array(view.image.shape[1::-1])
        shown_low, shown_high = np.clip(low, 0, size), np.clip(high, 0, size)
        area, shown_area = (high - low).prod(1), (shown_high - shown_low).prod(1)
        visible = (shown_area > 0) & (shown_area >= self.min_visible * area)
        return np.concatenate([shown_low / size, shown_high / size], 1), visible
