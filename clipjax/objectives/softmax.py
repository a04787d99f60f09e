"""Symmetric softmax InfoNCE."""

from __future__ import annotations

import dataclasses

import jax

from clipjax.objectives.base import Objective
from clipjax.objectives.contrast import both_directions, check_share, mean_similarity, negatives


@dataclasses.dataclass(frozen=True)
class Softmax(Objective):
    """Cross-entropy of each image against all texts and of each text against all images.

    CLIP (Radford et al. 2021, arXiv 2103.00020); label smoothing as in ALIGN (Jia et al. 2021,
    arXiv 2102.05918; ALIGN sums the directions, here they are averaged); the direction weight as in
    ConVIRT (Zhang et al. 2020, arXiv 2010.00747).
    """

    label_smoothing: float = 0.0
    """Share of the target spread evenly over the batch, own pair included."""
    image_weight: float = 0.5
    """Share of the image-to-text direction; text-to-image gets the rest."""

    def __post_init__(self):
        check_share(self, "label_smoothing", "image_weight")

    def __call__(self, encoded, batch, engine):
        rows, cols, positive, metrics = negatives(encoded, engine)
        image_loss, text_loss = jax.nn.softplus(rows - positive), jax.nn.softplus(cols - positive)
        if self.label_smoothing:
            image, text = encoded.logit_scale * encoded.image, encoded.text
            spread = positive - mean_similarity(image, text, engine)
            image_loss += self.label_smoothing * spread
            spread = positive - mean_similarity(text, image, engine)
            text_loss += self.label_smoothing * spread
        return both_directions(image_loss, text_loss, self.image_weight), metrics
