"""Decoupled contrastive learning: InfoNCE without the positive in the denominator."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from clipjax.errors import ClipjaxError
from clipjax.objectives.base import Pairwise
from clipjax.objectives.contrast import both_directions, check_share, negatives


@dataclasses.dataclass(frozen=True)
class Decoupled(Pairwise):
    """log sum exp of the negatives minus the positive, both directions (DCL; with `sigma`, DCLW).

    Yeh et al. 2021 (arXiv 2110.06848), in its image-text form: no negatives within a modality. The
    loss has no lower bound in the scale (orthonormal pairs give -scale + log(N - 1)), so bound
    the scale, or learn it with another term.
    """

    sigma: float | None = None
    """DCLW: weight pair i by 2 - exp(cos_i / sigma) / mean exp(cos / sigma); the paper has 0.5."""
    image_weight: float = 0.5
    """Share of the first side's direction, image-to-text; text-to-image gets the rest."""

    def __post_init__(self):
        check_share(self, "image_weight")
        if self.sigma is not None and self.sigma <= 0:
            raise ClipjaxError(f"Decoupled: sigma={self.sigma} must be positive")

    def __call__(self, encoded, context):
        engine, first, second = context.engine, encoded[self.first], encoded[self.second]
        if first.shape[0] == engine.blocks:
            raise ClipjaxError("Decoupled needs at least two rows in a batch (or group): negatives")
        rows, cols, positive, metrics = negatives(self, encoded, engine)
        if self.sigma is not None:
            cosine = jnp.sum(first * second, -1).reshape(engine.blocks, -1)
            share = jax.nn.softmax(jax.lax.stop_gradient(cosine) / self.sigma, -1)
            positive = positive * (2 - share.shape[1] * share).reshape(-1)
        return both_directions(rows - positive, cols - positive, self.image_weight), metrics
