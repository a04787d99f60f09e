"""Learning-rate schedules: a factor in [0, 1] that multiplies the optimizer's peak `lr`.

Every schedule starts with a linear warm-up from 0 (the first step already moves: factor 1/warmup).
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import optax

from clipjax.component import Component
from clipjax.errors import ClipjaxError
from clipjax.optim.duration import Duration, Scale


@dataclasses.dataclass(frozen=True)
class Schedule(Component):
    """Base: warm-up, then `_after(step, total)` of the subclass."""

    warmup: Duration = Duration()
    """Length of the linear warm-up."""

    def build(self, total_steps: int, scale: Scale) -> optax.Schedule:
        """The factor as a function of the step (0-based) of a run of `total_steps`.

        Raises:
          ClipjaxError: the warm-up (and cool-down) do not fit into the run.
        """
        warmup = self.warmup.steps(scale)
        if warmup > total_steps:
            raise ClipjaxError(
                f"a warm-up of {warmup} steps does not fit into a run of {total_steps}: shorten "
                "optimizer.schedule.warmup or train longer"
            )
        after = self._after(warmup, total_steps, scale)

        def factor(step):
            step = jnp.asarray(step, jnp.float32)
            ramp = jnp.minimum(1.0, (step + 1.0) / max(warmup, 1))
            return jnp.where(step < warmup, ramp, after(step))

        return factor

    def _after(self, warmup: int, total: int, scale: Scale) -> optax.Schedule:
        raise NotImplementedError


def _progress(step, start: int, end: int):
    """0 at `start`, 1 at `end`, clipped."""
    return jnp.clip((step - start) / max(end - start, 1), 0.0, 1.0)


@dataclasses.dataclass(frozen=True)
class Constant(Schedule):
    """1 after the warm-up."""

    def _after(self, warmup, total, scale):
        return lambda step: jnp.ones_like(step)


@dataclasses.dataclass(frozen=True)
class Cosine(Schedule):
    """Half a cosine from 1 to `final` at the end of the run (SGDR without restarts, arXiv:1608.03983)."""

    final: float = 0.0
    """Factor at the end."""

    def _after(self, warmup, total, scale):
        def factor(step):
            cosine = 0.5 * (1 + jnp.cos(jnp.pi * _progress(step, warmup, total)))
            return self.final + (1 - self.final) * cosine

        return factor


@dataclasses.dataclass(frozen=True)
class Linear(Schedule):
    """A straight line from 1 to `final` at the end of the run."""

    final: float = 0.0
    """Factor at the end."""

    def _after(self, warmup, total, scale):
        return lambda step: 1 - (1 - self.final) * _progress(step, warmup, total)


@dataclasses.dataclass(frozen=True)
class ReciprocalSqrt(Schedule):
    """`sqrt(timescale / (timescale + step - warmup))`, then a linear cool-down to 0 (arXiv:2106.04560).

    The run can be stretched: nothing before the cool-down depends on its length.
    """

    timescale: Duration = Duration(10_000)
    """After this long, the factor is 1/sqrt(2)."""
    cooldown: Duration = Duration()
    """Length of the linear descent to 0 at the end."""

    def _after(self, warmup, total, scale):
        timescale = max(self.timescale.steps(scale), 1)
        start = _cooldown_start(self.cooldown, warmup, total, scale)

        def factor(step):
            decay = jnp.sqrt(timescale / (timescale + jnp.maximum(step - warmup, 0.0)))
            return decay * (1 - _progress(step, start, total) if start < total else 1.0)

        return factor


@dataclasses.dataclass(frozen=True)
class WarmupStableDecay(Schedule):
    """1 until the cool-down, then `1 - sqrt(progress)` or a line down to 0 (arXiv:2404.06395, 2405.18392)."""

    cooldown: Duration = Duration()
    """Length of the descent to 0 at the end."""
    sqrt: bool = True
    """Shape of the descent: 1 - sqrt(progress), or linear."""

    def _after(self, warmup, total, scale):
        start = _cooldown_start(self.cooldown, warmup, total, scale)

        def factor(step):
            progress = _progress(step, start, total) if start < total else jnp.zeros_like(step)
            return 1 - (jnp.sqrt(progress) if self.sqrt else progress)

        return factor


def _cooldown_start(cooldown: Duration, warmup: int, total: int, scale: Scale) -> int:
    start = total - cooldown.steps(scale)
    if start < warmup:
        raise ClipjaxError(
            f"a warm-up of {warmup} and a cool-down of {total - start} steps do not fit into a run of {total}"
        )
    return start
