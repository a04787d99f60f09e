"""Contrastive attraction and contrastive repulsion: far positives pull more, near negatives push more.

Zheng et al. 2021, "Contrastive Attraction and Contrastive Repulsion for Representation Learning" (arXiv
2105.03746). Status: the authors' code (JegZheng/CACR-SSL) read.

A query has K positives p_k and the other examples' as negatives n_j; d is the squared Euclidean distance:

    attraction  sum_k pi_k d(q, p_k),   pi = softmax_k(t+ d(q, p_k))
    repulsion  -sum_j pi_j d(q, n_j),   pi = softmax_j(-t- d(q, n_j))

What differs here: the positives of an image are K captions of it (a field `Text("text_views", count=K)`); the
paper's are views of the image. The texts are queries too, with one positive, where attraction is plain
distance, and the images of the others as negatives. The weights pi carry no gradient, as in the authors'
ImageNet code (their small one lets it through). The model's scale is not used, and so not trained.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from clipjax.methods.registry import Method
from clipjax.objectives import Pairwise
from clipjax.objectives.contrast import check_share
from clipjax.objectives.pairs import Expectation

METHOD = Method(
    id="cacr",
    title="Contrastive Attraction and Contrastive Repulsion for Representation Learning",
    arxiv="2105.03746",
    status="official",
    summary="far captions of an image pull more, near captions of others push more",
)


@dataclasses.dataclass(frozen=True)
class CACR(Pairwise):
    """Weighted distances to several positives, less weighted distances to the negatives."""

    second: str = "text_views"
    """The positives: a row of the model's output, [B, K, E] with the mask `<second>_mask` [B, K] in the
    batch, or [B, E]."""
    attraction: float = 1.0
    """t+: how much more a far positive weighs; 0 weighs all alike."""
    repulsion: float = 2.0
    """t-: how much more a near negative weighs; 0 weighs all alike."""
    image_weight: float = 0.5
    """Share of the first side's direction, image-to-text; text-to-image gets the rest."""

    def __post_init__(self):
        check_share(self, "image_weight")

    def __call__(self, encoded, context):
        engine, query, keys = context.engine, encoded[self.first], encoded[self.second]
        keys = keys.reshape(keys.shape[0], -1, keys.shape[-1])
        several = keys.shape[1]
        there = context.batch.get(f"{self.second}_mask", jnp.ones(keys.shape[:2], bool))
        distance = jnp.sum((query[:, None] - keys) ** 2, -1)  # [B, K]
        weights = jax.nn.softmax(jnp.where(there, self.attraction * distance, -jnp.inf), -1)
        pulled = jnp.sum(jax.lax.stop_gradient(weights) * distance, -1)

        def tile(row, col, shared):
            distance = 2 - 2 * engine.dot(row["query"], col["key"])
            nearness = jax.lax.stop_gradient(-self.repulsion * distance)
            other = row["index"][:, None] != col["index"] // several
            return (
                {"distance": Expectation(nearness, distance, other & col["there"])},
                {"distance": Expectation(nearness, distance, other)},
            )

        rows, cols = engine.reduce(
            tile,
            {"query": query},
            {"key": keys.reshape(-1, keys.shape[-1]), "there": there.reshape(-1)},
        )
        image = jnp.mean(pulled - rows["distance"])
        per_text = distance - cols["distance"].reshape(distance.shape)
        text = jnp.sum(jnp.where(there, per_text, 0)) / jnp.sum(there)
        metrics = {
            "attraction": jnp.mean(pulled),
            "repulsion": -jnp.mean(rows["distance"]),
        }
        return self.image_weight * image + (1 - self.image_weight) * text, metrics
