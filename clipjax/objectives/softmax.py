"""Symmetric softmax InfoNCE."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from clipjax.errors import ClipjaxError
from clipjax.objectives.base import Objective
from clipjax.objectives.pairs import LogSumExp, PairEngine


@dataclasses.dataclass(frozen=True)
class Softmax(Objective):
    """Cross-entropy of each image against all texts and of each text against all images.

    CLIP (Radford et al. 2021, arXiv 2103.00020); label smoothing as in ALIGN (Jia et al. 2021,
    arXiv 2102.05918), the direction weight as in ConVIRT (Zhang et al. 2020, arXiv 2010.00747).

    Computed as softplus(log sum exp of the negatives - positive), which equals the cross-entropy
    and stays exact, gradient included, when a batch is nearly solved.
    """

    label_smoothing: float = 0.0
    """Mass of the target spread evenly over the batch."""
    image_weight: float = 0.5
    """Weight of the image-to-text direction; text-to-image gets the rest."""

    def __post_init__(self):
        for name in ("label_smoothing", "image_weight"):
            if not 0 <= getattr(self, name) <= 1:
                raise ClipjaxError(f"{name}={getattr(self, name)}: must lie in [0, 1]")

    def __call__(self, encoded, batch, engine):
        rows, cols, positive = negatives(encoded, engine)
        losses = [jax.nn.softplus(side - positive) for side in (rows, cols)]
        if self.label_smoothing:
            image, text = encoded.logit_scale * encoded.image, encoded.text
            smooth = [positive - mean_similarity(image, text, engine)]
            smooth += [positive - mean_similarity(text, image, engine)]
            losses = [
                loss + self.label_smoothing * s for loss, s in zip(losses, smooth, strict=True)
            ]
        image_loss, text_loss = (jnp.mean(loss) for loss in losses)
        loss = self.image_weight * image_loss + (1 - self.image_weight) * text_loss
        return loss, {}


def negatives(encoded, engine: PairEngine) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Per image and per text, log sum exp of the negative logits; the positive logits; each [N]."""
    image = encoded.logit_scale * encoded.image

    def tile(row, col, shared):
        logits = engine.dot(row["image"], col["text"])
        others = LogSumExp(logits, where=row["index"][:, None] != col["index"])
        return {"negatives": others}, {"negatives": others}

    rows, cols = engine.reduce(tile, {"image": image}, {"text": encoded.text})
    return rows["negatives"], cols["negatives"], jnp.sum(image * encoded.text, -1)


def mean_similarity(a: jax.Array, b: jax.Array, engine: PairEngine) -> jax.Array:
    """Mean of a_i . b_j over the rows j that row i meets, [N], by way of b's mean: no tile."""
    a, b = (v.reshape(engine.blocks, -1, v.shape[-1]) for v in (a, b))
    return jnp.einsum("gnd,gd->gn", a, b.mean(1), precision="highest").reshape(-1)
