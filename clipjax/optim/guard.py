"""Skipping steps whose loss or gradient is out of all proportion to those before."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from clipjax.component import Component
from clipjax.errors import ClipjaxError

NORMAL = 1.4826
"""Median absolute deviation -> standard deviation, for normal values."""


@dataclasses.dataclass(frozen=True)
class SpikeGuard(Component):
    """A step is skipped where its gradient norm or its loss stands far above the running median.

    The medians are of the last `window` steps, skipped ones included: a single spike does not move them, and a
    lasting change is followed within half a window.
    """

    window: int = 128
    """Steps whose medians are taken."""
    least: int = 32
    """Steps before the first that may be skipped."""
    norm_factor: float | None = 5.0
    """How many times the median of the gradient norms is too much; None: the norm is not looked at."""
    loss_deviations: float | None = 10.0
    """How many robust standard deviations (1.4826 times the median absolute deviation) above the median a loss is too
    much; None: the loss is not looked at."""
    rollback: bool = False
    """After `max_bad_steps` skipped steps in a row, go back to the weights of the last milestone (or, without
    milestones, of the last checkpoint), and on with the data that come next. Otherwise the run ends."""

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.window:
            raise ClipjaxError(
                f"spikes: least={self.least} must lie between 1 and window={self.window}"
            )
        for name, bound in (("norm_factor", 1), ("loss_deviations", 0)):
            value = getattr(self, name)
            if value is not None and not value > bound:
                raise ClipjaxError(f"spikes: {name}={value:g} must be above {bound}, or None")

    def init(self) -> dict[str, jax.Array]:
        """The state of a fresh run: the last `window` values of each, and how many spikes there were."""
        return {
            "loss": jnp.zeros(self.window, jnp.float32),
            "grad_norm": jnp.zeros(self.window, jnp.float32),
            "seen": jnp.zeros((), jnp.int32),
            "spikes": jnp.zeros((), jnp.int32),
        }

    def check(
        self, state: Any, loss: jax.Array, grad_norm: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Whether this step is a spike, and the state after it.

        Args:
          state: what `init` or the step before gave.
          loss: [] float.
          grad_norm: [] float.

        Returns:
          ([] bool, state). A step that is not finite is no spike and leaves the state as it was.
        """
        seen = state["seen"]
        known = jnp.arange(self.window) < seen
        spike = jnp.zeros((), bool)
        if self.norm_factor is not None:
            spike |= grad_norm > self.norm_factor * _median(state["grad_norm"], known)
        if self.loss_deviations is not None:
            middle = _median(state["loss"], known)
            deviation = NORMAL * _median(jnp.abs(state["loss"] - middle), known)
            # Not below a thousandth of the loss: equal losses would make anything a spike.
            deviation = jnp.maximum(deviation, 1e-3 * jnp.abs(middle))
            spike |= loss > middle + self.loss_deviations * deviation
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        spike &= finite & (seen >= self.least)
        place = seen % self.window
        after = {
            "loss": state["loss"].at[place].set(loss),
            "grad_norm": state["grad_norm"].at[place].set(grad_norm),
            "seen": seen + 1,
            "spikes": state["spikes"] + spike,
        }
        return spike, {name: jnp.where(finite, after[name], state[name]) for name in after}


def _median(values: jax.Array, known: jax.Array) -> jax.Array:
    """Of those that are known; NaN, which nothing is above, if none is."""
    return jnp.nanmedian(jnp.where(known, values, jnp.nan))
