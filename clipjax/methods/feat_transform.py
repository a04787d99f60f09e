"""Feature transformation: positives pushed apart, negatives mixed, in the space of embeddings.

Zhu et al. 2021, "Improving Contrastive Learning by Visualizing Feature Transformation" (arXiv 2108.02982). Status:
the authors' code (DTennant/CL-Visualizing-Feature-Transformation) read.

With l = 1 + Beta(2, 2) a pair q, k becomes q' = l q + (1 - l) k and k' = l k + (1 - l) q, whose product q.k - 2 l
(l - 1) (1 - q.k) is a harder positive. With m ~ Beta(1.6, 1.6) a negative n becomes m n + (1 - m) n_p, p a random
permutation. Then InfoNCE of q' with k' and the mixed negatives; nothing is normalized again; one l and one m a
step.

What differs here: image-text pairs, both directions; negatives come from the batch instead of a queue, so those
mixed with the row's own key are left out; the statistics that the paper draws are logged (`scores/...`).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from clipjax.errors import ClipjaxError
from clipjax.methods.registry import Method
from clipjax.objectives import Pairwise
from clipjax.objectives.contrast import both_directions
from clipjax.objectives.pairs import LogSumExp, Sum

METHOD = Method(
    id="feat_transform",
    title="Improving Contrastive Learning by Visualizing Feature Transformation",
    arxiv="2108.02982",
    status="official",
    summary="positives extrapolated, negatives interpolated, as embeddings",
)


@dataclasses.dataclass(frozen=True)
class FeatureTransformation(Pairwise):
    """InfoNCE of transformed embeddings."""

    positive: float = 2.0
    """Both parameters of the Beta distribution of l - 1; 0: positives stay as they are."""
    negative: float = 1.6
    """Both parameters of the Beta distribution of m; 0: negatives stay as they are."""

    def __post_init__(self):
        if self.positive < 0 or self.negative < 0:
            raise ClipjaxError(
                f"FeatureTransformation: positive={self.positive} and negative={self.negative} must not "
                "be negative"
            )

    def __call__(self, encoded, context):
        engine, scale = context.engine, encoded.logit_scale
        first, second = encoded[self.first], encoded[self.second]
        n = len(first)
        keys = jax.random.split(context.key, 3)
        apart = 1 + jax.random.beta(keys[0], self.positive, self.positive) if self.positive else 1.0
        mixed = jax.random.beta(keys[1], self.negative, self.negative) if self.negative else 1.0
        partner = jax.random.permutation(keys[2], n) if self.negative else jnp.arange(n)

        def tile(row, col, shared):
            logits = engine.dot(row["query"], col["mixed"])
            own = row["index"][:, None]
            other = (own != col["index"]) & (own != col["partner"])
            terms = {
                "negatives": LogSumExp(logits, other),
                "sum": Sum(logits, other),
                "square": Sum(logits**2, other),
                "count": Sum(other.astype(jnp.float32)),
            }
            return terms, {}

        def direction(query, key):
            q, k = apart * query + (1 - apart) * key, apart * key + (1 - apart) * query
            negative = mixed * key + (1 - mixed) * engine.rows_at(key, partner)
            seen, _ = engine.reduce(
                tile, {"query": scale * q}, {"mixed": negative, "partner": partner}
            )
            positive = scale * jnp.sum(q * k, -1)
            mean = seen["sum"] / seen["count"]
            spread = seen["square"] / seen["count"] - mean**2
            return jax.nn.softplus(seen["negatives"] - positive), positive, mean, spread

        one, positive, mean, spread = direction(first, second)
        loss = both_directions(one, direction(second, first)[0], 0.5)
        figures = {"positive": positive, "negative": mean, "negative_variance": spread}
        return loss, {f"scores/{name}": jnp.mean(v) for name, v in figures.items()}
