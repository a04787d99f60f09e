"""Symmetric softmax InfoNCE."""

from __future__ import annotations

import dataclasses

import jax

from clipjax.objectives.base import Pairwise
from clipjax.objectives.contrast import both_directions, check_share, mean_similarity, negatives


@dataclasses.dataclass(frozen=True)
class Softmax(Pairwise):
    """Cross-entropy of each image against all texts and of each text against all images.

    CLIP (Radford et al. 2021, arXiv 2103.00020); label smoothing as in ALIGN (Jia et al. 2021,
    arXiv 2102.05918; ALIGN sums the directions, here they are averaged); the direction weight as in
    ConVIRT (Zhang et al. 2020, arXiv 2010.00747).
    """

    label_smoothing: float = 0.0
    """Share of the target spread evenly over the batch, own pair included."""
    image_weight: float = 0.5
    """Share of the first side's direction, image-to-text; text-to-image gets the rest."""

    def __post_init__(self):
        check_share(self, "label_smoothing", "image_weight")

    def __call__(self, encoded, context):
        engine = context.engine
        rows, cols, positive, metrics = negatives(self, encoded, engine)
        first_loss, second_loss = jax.nn.softplus(rows - positive), jax.nn.softplus(cols - positive)
        if self.label_smoothing:
            first, second = encoded.logit_scale * encoded[self.first], encoded[self.second]
            spread = positive - mean_similarity(first, second, engine)
            first_loss += self.label_smoothing * spread
            spread = positive - mean_similarity(second, first, engine)
            second_loss += self.label_smoothing * spread
        return both_directions(first_loss, second_loss, self.image_weight), metrics
