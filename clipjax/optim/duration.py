"""Lengths of training (`Duration`) and how often something happens in it (`Every`)."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

from clipjax.component import Component
from clipjax.errors import ClipjaxError


@dataclasses.dataclass(frozen=True)
class Scale:
    """What one step means in a run: turns examples and epochs into steps."""

    batch_size: int
    """Global batch, in examples."""
    num_examples: int | None
    """Examples in one epoch; None where nobody knows before they are read."""
    shift: int = 0
    """Examples seen beyond `step * batch_size`: not 0 once the batch size has changed on the way."""

    def examples(self, step: int) -> int:
        """Examples seen after so many finished steps."""
        return step * self.batch_size + self.shift

    @property
    def epoch(self) -> int:
        """Examples in one epoch.

        Raises:
          ClipjaxError: nobody knows.
        """
        if self.num_examples is None:
            raise ClipjaxError(
                "an epoch is asked for, and it is not known how many records the stream has: say it in steps "
                "or examples, or let `clipjax data sizes` count them into a sizes.json beside the files"
            )
        return self.num_examples


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
        """The nearest whole number of steps, a half counting as one; at least 1 for any amount above 0."""
        if self.amount == 0:
            return 0
        return max(1, math.floor(self._examples(scale) / scale.batch_size + 0.5))

    def last_step(self, scale: Scale) -> int:
        """The step at which a run of this length ends: what earlier steps of another size saw counts.

        A length in steps is that many steps, whatever their size.
        """
        if self.unit == "steps" or not scale.shift:
            return self.steps(scale)
        return math.floor((self._examples(scale) - scale.shift) / scale.batch_size + 0.5)

    def _examples(self, scale: Scale) -> float:
        if self.unit == "epochs":
            return self.amount * scale.epoch
        return self.amount * (scale.batch_size if self.unit == "steps" else 1)


@dataclasses.dataclass(frozen=True)
class Every(Component):
    """How often something happens: `Every(500)`, `Every(0.1, "epochs")`, `Every(10, "minutes")`.

    Steps, examples and epochs are counted from the run's beginning, so a run that was stopped and
    continued does the same things at the same steps. Minutes go by the first process's clock.
    """

    amount: float
    """How many of `unit` from one time to the next."""
    unit: Literal["steps", "examples", "epochs", "minutes"] = "steps"
    at_start: bool = False
    """Also before the first step; for evaluations, a curve that starts at chance."""

    def __post_init__(self) -> None:
        if self.unit not in ("steps", "examples", "epochs", "minutes"):
            raise ClipjaxError(
                f"Every: unit={self.unit!r}: use 'steps', 'examples', 'epochs' or 'minutes'"
            )
        least = 1 if self.unit in ("steps", "examples") else 0
        if not least <= self.amount < math.inf or self.amount == 0:
            bound = "at least 1" if least else "above 0"
            raise ClipjaxError(f"Every: amount={self.amount:g} {self.unit} must be {bound}")
        if self.unit == "steps" and self.amount != int(self.amount):
            raise ClipjaxError(f"Every: amount={self.amount:g} steps must be a whole number")

    @classmethod
    def upgraded(cls, fields: dict[str, Any]) -> dict[str, Any]:
        if "steps" in fields:  # an evaluator's cadence before there were other units
            fields["amount"] = fields.pop("steps")
        return fields

    def due(self, step: int, scale: Scale | None = None) -> bool:
        """Whether it is time after `step` finished steps (0: before the first); never by the clock.

        Args:
          step: number of finished steps.
          scale: what a step means; only examples and epochs ask for it.
        """
        if step == 0:
            return self.at_start
        if self.unit == "steps":
            return step % int(self.amount) == 0
        if self.unit == "minutes":
            return False
        if scale is None:
            raise ValueError(f"Every: {self.unit} cannot be counted without a scale")
        each = self.amount * (scale.epoch if self.unit == "epochs" else 1)
        # A step that crosses a multiple, not one that meets it: batches need not divide it.
        return scale.examples(step) // each > scale.examples(step - 1) // each


def as_every(value: Any, field: str) -> Every:
    """A cadence from what a configuration may say: an `Every`, a `Duration`, or a number of steps.

    Raises:
      ClipjaxError: it is none of these, or not above 0; `field` is named.
    """
    if isinstance(value, Every):
        return value
    try:
        if isinstance(value, Duration):
            return Every(value.amount, value.unit)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return Every(value)
    except ClipjaxError as error:
        raise ClipjaxError(f"{field}={getattr(value, 'amount', value):g}: {error}") from error
    raise ClipjaxError(
        f"{field}={value!r}: give an Every, such as Every(100) or Every(5, 'minutes')"
    )
