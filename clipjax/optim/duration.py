"""Durations in steps, examples or epochs."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from clipjax.component import Component
from clipjax.errors import ClipjaxError


@dataclasses.dataclass(frozen=True)
class Scale:
    """What one step means in a run: turns examples and epochs into steps."""

    batch_size: int
    """Global batch, in examples."""
    num_examples: int
    """Examples in one epoch."""


@dataclasses.dataclass(frozen=True)
class Duration(Component):
    """A length of training: `Duration(5000)`, `Duration(3, "epochs")`, `Duration(400e6, "examples")`."""

    amount: float = 0.0
    """How many of `unit`."""
    unit: Literal["steps", "examples", "epochs"] = "steps"

    def __post_init__(self) -> None:
        if not 0 <= self.amount < math.inf:
            raise ClipjaxError(
                f"a duration of {self.amount} {self.unit}: must be finite and not negative"
            )
        if self.unit not in ("steps", "examples", "epochs"):
            raise ClipjaxError(f"duration unit {self.unit!r}: use 'steps', 'examples' or 'epochs'")

    def steps(self, scale: Scale) -> int:
        """The nearest whole number of steps; at least 1 for any amount above 0."""
        examples = {"examples": 1, "epochs": scale.num_examples, "steps": scale.batch_size}[
            self.unit
        ]
        if self.amount == 0:
            return 0
        return max(1, round(self.amount * examples / scale.batch_size))
