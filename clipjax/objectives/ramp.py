"""Numbers that follow the step: weights of terms."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp

from clipjax.component import Component
from clipjax.errors import ClipjaxError


@dataclasses.dataclass(frozen=True)
class Ramp(Component):
    """From one value to another over some steps: `Softmax() + Ramp(0.0, 1.0, 5000) * Caption()`."""

    begin: float = 0.0
    """The value up to `start`."""
    end: float = 1.0
    """The value from `start + steps` on."""
    steps: int = 1000
    """How long it takes."""
    start: int = 0
    """The step at which it leaves `begin`."""
    shape: Literal["linear", "cosine"] = "linear"
    """The way between them; a cosine leaves and arrives level."""

    def __post_init__(self):
        for name in ("steps", "start"):
            value = getattr(self, name)
            if isinstance(value, float) and value.is_integer():  # 5e3
                object.__setattr__(self, name, int(value))
            elif not isinstance(value, int):
                raise ClipjaxError(f"Ramp: {name}={value!r} must be a whole number")
        if self.steps < 1 or self.start < 0:
            raise ClipjaxError(
                f"Ramp: steps={self.steps} must be at least 1 and start={self.start} not negative"
            )
        if self.shape not in ("linear", "cosine"):
            raise ClipjaxError(f"Ramp: shape={self.shape!r} is neither 'linear' nor 'cosine'")

    def __mul__(self, factor: Any) -> Any:
        if not isinstance(factor, (int, float)):
            return NotImplemented
        return dataclasses.replace(self, begin=factor * self.begin, end=factor * self.end)

    __rmul__ = __mul__

    def at(self, step: Any) -> Any:
        """float32 []: the value after `step` finished steps."""
        done = jnp.clip((jnp.asarray(step, jnp.float32) - self.start) / self.steps, 0.0, 1.0)
        if self.shape == "cosine":
            done = 0.5 - 0.5 * jnp.cos(jnp.pi * done)
        return self.begin + (self.end - self.begin) * done
