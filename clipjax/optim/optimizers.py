"""Optimizers: optax's update rules with one way of treating learning rate, weight decay and freezing by path.

    update = -lr * schedule(step) * group.lr * (rule(clip(grads)) + weight_decay * params)

Weight decay is decoupled (AdamW, arXiv:1711.05101) and applies to weight matrices and embeddings only.
Frozen parameters are no part of the differentiated tree: they cost no gradient and no optimizer state.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from clipjax.component import Component
from clipjax.errors import ClipjaxError, did_you_mean
from clipjax.optim.duration import Duration, Scale
from clipjax.optim.schedules import Cosine, Schedule
from clipjax.params import map_with_path, paths

Dtype = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True)
class Group(Component):
    """What is special about the parameters whose path matches; the first group that matches decides."""

    pattern: str
    """Regular expression, searched in the path: `^image/`."""
    lr: float = 1.0
    """Multiplies the learning rate."""
    weight_decay: float | None = None
    """Replaces the optimizer's weight decay, biases and norms included; None keeps the usual rule."""
    starts: Duration = Duration(0)
    """Staged unfreezing: nothing moves before so much of the run has passed. Until then the gradient is
    taken all the same, and the optimizer's moments follow it."""
    frozen: bool = False
    """Not trained at all. Locking the image tower (LiT, arXiv:2111.07991) is `Group("^image/", frozen=True)`."""


@dataclasses.dataclass(frozen=True)
class Optimizer(Component):
    """Base: clipping, schedule, groups and decay around the subclass's `rule`."""

    lr: float = 1e-3
    """Peak learning rate."""
    schedule: Schedule = Cosine()
    weight_decay: float = 0.1
    """Decoupled, multiplied by the learning rate."""
    decayed: str = r"(kernel|embedding)$"
    """Regular expression for the paths that weight decay applies to."""
    clip_norm: float | None = 1.0
    """Global norm to which gradients are clipped; None: not clipped."""
    groups: tuple[Group, ...] = ()
    """Per-path learning rate, weight decay and freezing."""

    def __post_init__(self) -> None:
        if self.lr < 0 or self.weight_decay < 0:
            raise ClipjaxError(
                f"optimizer lr={self.lr}, weight_decay={self.weight_decay}: must not be negative"
            )
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise ClipjaxError(
                f"optimizer clip_norm={self.clip_norm}: must be positive, or None for no clipping"
            )

    def rule(self, params: Any) -> optax.GradientTransformation:
        """Gradients -> direction of descent, before learning rate and decay."""
        raise NotImplementedError

    def trainable(self, params: Any) -> Any:
        """A tree of bools like `params`: False where a group freezes the leaf.

        Raises:
          ClipjaxError: a group matches no parameter, or everything is frozen.
        """
        names = [name for name, _ in paths(params)]
        for group in self.groups:
            if not any(_regex(group.pattern).search(name) for name in names):
                raise ClipjaxError(
                    f"optimizer group {group.pattern!r} matches no parameter"
                    + did_you_mean(group.pattern, names)
                )
        mask = map_with_path(lambda name, _: not self._group(name).frozen, params)
        if not any(jax.tree.leaves(mask)):
            raise ClipjaxError(
                "the optimizer's groups freeze every parameter: there is nothing to train"
            )
        return mask

    def build(
        self, params: Any, total_steps: int, scale: Scale
    ) -> tuple[optax.GradientTransformation, optax.Schedule]:
        """The transformation for the trainable part of the parameters, and the learning rate by step.

        Args:
          params: nested dict of the trainable leaves (arrays or ShapeDtypeStructs).
          total_steps: length of the run.
          scale: what a step means.
        """
        # Steps of this size that the run would have taken so far, less those that it took.
        ahead = scale.shift / scale.batch_size
        factor = self.schedule.build(total_steps + round(ahead), scale)

        def learning_rate(step):
            return self.lr * factor(step + ahead if ahead else step)

        decay = map_with_path(lambda name, _: self._decay(name), params)
        multiplier = map_with_path(lambda name, _: self._group(name).lr, params)
        starts = map_with_path(lambda name, _: self._group(name).starts.steps(scale), params)
        clip = optax.clip_by_global_norm(self.clip_norm) if self.clip_norm else optax.identity()
        # Every stage is there, in use or not, and its state goes by its name: so that a run can go
        # on with a stage switched on or off.
        transform = optax.named_chain(
            ("clip", clip),
            ("rule", self.rule(params)),
            (
                "decay",
                optax.stateless(
                    lambda updates, p: jax.tree.map(
                        lambda u, w, d: u + d * w if d else u, updates, p, decay
                    )
                ),
            ),
            (
                "scale",
                optax.stateless(
                    lambda updates, _: jax.tree.map(lambda u, m: u * m, updates, multiplier)
                ),
            ),
            ("hold", _hold_until(starts, ahead)),
            ("lr", optax.scale_by_learning_rate(learning_rate)),
        )
        return transform, learning_rate

    def _group(self, name: str) -> Group:
        return next((g for g in self.groups if _regex(g.pattern).search(name)), Group(".*"))

    def _decay(self, name: str) -> float:
        special = self._group(name).weight_decay
        if special is not None:
            return special
        return self.weight_decay if _regex(self.decayed).search(name) else 0.0


def _hold_until(starts: Any, ahead: float) -> optax.GradientTransformation:
    """Zero updates for each leaf until its number of steps in the tree `starts` has passed."""

    def update(updates, state, params=None):
        held = jax.tree.map(
            lambda u, s: jnp.where(state.count + ahead >= s, u, 0) if s else u, updates, starts
        )
        return held, optax.ScaleByScheduleState(count=optax.safe_increment(state.count))

    def init(params):
        return optax.ScaleByScheduleState(count=jnp.zeros((), jnp.int32))

    return optax.GradientTransformation(init, update)


def _regex(pattern: str) -> re.Pattern:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ClipjaxError(f"optimizer: {pattern!r} is no regular expression: {error}") from error


@dataclasses.dataclass(frozen=True)
class AdamW(Optimizer):
    """Adam with decoupled weight decay (arXiv:1711.05101)."""

    b1: float = 0.9
    b2: float = 0.98
    """CLIP's 0.98 for ViTs; 0.95 is steadier at large batches (SigLIP)."""
    eps: float = 1e-6
    mu_dtype: Dtype = "float32"
    """Storage of the first moment."""

    def rule(self, params):
        return optax.scale_by_adam(self.b1, self.b2, self.eps, mu_dtype=self.mu_dtype)


@dataclasses.dataclass(frozen=True)
class Lion(Optimizer):
    """Lion (arXiv:2302.06675): the sign of an interpolated momentum; one moment, half of AdamW's state.

    Wants a 3 to 10 times smaller `lr` and a correspondingly larger `weight_decay` than AdamW.
    """

    lr: float = 1e-4
    weight_decay: float = 1.0
    b1: float = 0.9
    b2: float = 0.99
    mu_dtype: Dtype = "float32"
    """Storage of the momentum; bfloat16 halves it."""

    def rule(self, params):
        return optax.scale_by_lion(self.b1, self.b2, mu_dtype=self.mu_dtype)


@dataclasses.dataclass(frozen=True)
class SGD(Optimizer):
    """Stochastic gradient descent with momentum."""

    lr: float = 0.1
    weight_decay: float = 0.0
    momentum: float = 0.9
    nesterov: bool = False

    def rule(self, params):
        return optax.trace(self.momentum, self.nesterov) if self.momentum else optax.identity()


@dataclasses.dataclass(frozen=True)
class Adafactor(Optimizer):
    """Adafactor (arXiv:1804.04235) as large vision models use it (arXiv:2106.04560): factored second moment,
    updates clipped per block, first moment kept, no relative step sizes."""

    b1: float = 0.9
    decay_rate: float = 0.8
    """The second moment's decay at step t is 1 - t^-decay_rate."""
    clip_update: float = 1.0
    """Root mean square to which each leaf's update is clipped."""
    mu_dtype: Dtype = "bfloat16"
    """Storage of the first moment."""

    def rule(self, params):
        return optax.chain(
            optax.scale_by_factored_rms(decay_rate=self.decay_rate),
            optax.clip_by_block_rms(self.clip_update),
            optax.ema(self.b1, debias=False, accumulator_dtype=self.mu_dtype),
        )


@dataclasses.dataclass(frozen=True)
class Muon(Optimizer):
    """Muon (arXiv:2502.16982): orthogonalized momentum for weight matrices, AdamW for the rest.

    The update of an [m, n] matrix is scaled by `0.2 * sqrt(max(m, n))`, so that AdamW's `lr` carries over.
    """

    momentum: float = 0.95
    nesterov: bool = True
    matrices: str = r"blocks/.*kernel$"
    """Regular expression for the leaves that Muon takes; the last two dimensions are the matrix."""
    b1: float = 0.9
    b2: float = 0.98
    eps: float = 1e-6

    def rule(self, params):
        def is_matrix(name, leaf):
            return leaf.ndim >= 2 and bool(_regex(self.matrices).search(name))

        labels = map_with_path(lambda n, p: "muon" if is_matrix(n, p) else "adam", params)

        def dimensions(tree):
            return jax.tree.map(
                lambda p: contrib.MuonDimensionNumbers(
                    reduction_axis=p.ndim - 2, output_axis=p.ndim - 1
                ),
                tree,
            )

        def match_adam(updates, _):
            return jax.tree.map(lambda u: 0.2 * max(u.shape[-2:]) ** 0.5 * u, updates)

        muon = optax.chain(
            contrib.scale_by_muon(
                beta=self.momentum, nesterov=self.nesterov, weight_dimension_numbers=dimensions
            ),
            optax.stateless(match_adam),
        )
        return optax.partition(
            {"muon": muon, "adam": optax.scale_by_adam(self.b1, self.b2, self.eps)}, labels
        )
