"""Teachers: encoders beside the model that is trained.

An objective has them as fields, names them in `teachers`, and asks `context.encode(teacher, needs)` in
`prepare`. Equal teachers are one: two objectives that name `MovingAverage(0.995)` share its weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from clipjax.batch import Batch, field
from clipjax.component import Component
from clipjax.errors import ClipjaxError


@dataclasses.dataclass(frozen=True)
class Teacher(Component):
    """An encoder that embeds the batch in inference mode, without gradient."""

    def view(self, batch: Batch) -> Batch:
        """The batch as this encoder sees it."""
        return batch


@dataclasses.dataclass(frozen=True)
class Itself(Teacher):
    """The model with its present weights, without dropout."""


@dataclasses.dataclass(frozen=True)
class MovingAverage(Teacher):
    """A moving average of the model's weights, kept in the train state (MoCo, arXiv:1911.05722).

    It begins as the model and follows it after every step: `decay * average + (1 - decay) * weights`.
    """

    decay: float = 0.995
    """Share of the average that stays, per step."""

    def __post_init__(self):
        if not 0 <= self.decay <= 1:
            raise ClipjaxError(f"MovingAverage: decay={self.decay} must lie in [0, 1]")

    def follow(self, average: Any, weights: Any) -> Any:
        """The average after a step."""
        m = self.decay
        return jax.tree.map(lambda a, w: (m * a + (1 - m) * w).astype(a.dtype), average, weights)


@dataclasses.dataclass(frozen=True)
class Frozen(Teacher):
    """Another model with its own weights, of any architecture: a run's folder or a model's.

    Its weights are loaded at the start and are no part of the checkpoints. What it is given must be made as it
    expects: pictures of its size (a field such as `Image("image_teacher", size=336)`), and the run's tokens must be
    those of its own tokenizer. Where they are not, let it embed the pictures alone, or read its vectors of texts from
    the file that `clipjax embed` writes.
    """

    path: str = ""
    """The folder, as `clipjax.load` takes it."""
    image: str = "image"
    """The field of the batch that it takes as `image`."""
    text: str = "text"
    """The field of the batch that it takes as `text`."""

    def __post_init__(self):
        if not self.path:
            raise ClipjaxError("Frozen: path is empty; name a run's folder or a model's")

    def view(self, batch: Batch) -> Batch:
        names = {"image": self.image, "text": self.text}
        given = {k: v for k, v in names.items() if k != v or k in batch}
        return batch | {k: field(batch, v, f"Frozen({self.path!r})") for k, v in given.items()}

    def open(self, open_pretrained: Callable[[Any], Any]) -> Any:
        """The model with its weights, as `open_pretrained(path)` gives it."""
        return open_pretrained(self.path)
