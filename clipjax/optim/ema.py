"""Exponential moving average of the weights."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from clipjax.component import Component
from clipjax.errors import ClipjaxError


@dataclasses.dataclass(frozen=True)
class Ema(Component):
    """A running average of the parameters, kept in the train state."""

    decay: float = 0.9999
    """Share of the old average that survives a step, once warmed up."""
    evaluate: bool = True
    """Evaluators and the report use the average instead of the latest weights."""

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ClipjaxError(f"ema.decay={self.decay}: must lie in [0, 1)")

    def update(self, average: Any, params: Any, step: jax.Array) -> Any:
        """`d * average + (1 - d) * params`, d = min(decay, (1 + step) / (10 + step)): short runs average too.

        Integers and bools have no mean: the newest are taken.
        """
        d = jnp.minimum(self.decay, (1.0 + step) / (10.0 + step))

        def mean(a, p):
            return a + (1 - d) * (p - a) if jnp.issubdtype(a.dtype, jnp.floating) else p

        return jax.tree.map(mean, average, params)
