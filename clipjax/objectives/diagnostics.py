"""What the embeddings look like, measured on every batch."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from clipjax.batch import Encoded
from clipjax.objectives.base import Metrics, Pairwise
from clipjax.objectives.pairs import LogSumExp, PairEngine


@dataclasses.dataclass(frozen=True)
class Diagnostics(Pairwise):
    """Adds metrics to a run and nothing to its loss: `Softmax() + Diagnostics()`.

    `alignment`, mean ||x_i - y_i||^2, and `uniformity/image`, `uniformity/text`,
    log mean exp(-2 ||a_i - a_j||^2) over i != j (Wang & Isola 2020, arXiv 2005.10242);
    `uniformity/cross`, the same between x_i and y_j (Fahim et al. 2024, arXiv 2405.18570);
    `modality_gap`, the distance of the two means (Liang et al. 2022, arXiv 2203.02053);
    `temperature`, 1 / logit_scale.

    Costs three forward passes over the tiles a step, without gradient. With `Grouped`, uniformity
    is taken over the pairs inside the groups.
    """

    def __call__(self, encoded, context):
        engine = context.engine
        first, second = (jax.lax.stop_gradient(encoded[n]) for n in (self.first, self.second))
        gap = jnp.mean(first, 0) - jnp.mean(second, 0)
        metrics = {
            "alignment": jnp.mean(jnp.sum((first - second) ** 2, -1)),
            f"uniformity/{self.first}": uniformity(first, first, engine),
            f"uniformity/{self.second}": uniformity(second, second, engine),
            "uniformity/cross": uniformity(first, second, engine),
            "modality_gap": jnp.sqrt(jnp.sum(gap**2)),
            "temperature": 1 / jax.lax.stop_gradient(encoded.logit_scale),
        }
        return jnp.zeros((), jnp.float32), metrics


def broken_rows(encoded: Encoded) -> Metrics:
    """How many embeddings of each input hold a NaN or an infinity: names what broke a loss."""
    return {
        f"broken_rows/{name}": jnp.sum(~jnp.isfinite(array).all(-1))
        for name, array in sorted(encoded.rows.items())
        if isinstance(array, jax.Array) and array.ndim == 2 and array.dtype == jnp.float32
    }


def uniformity(a: jax.Array, b: jax.Array, engine: PairEngine) -> jax.Array:
    """log mean exp(-2 ||a_i - b_j||^2) over i != j, [], for unit rows a, b [N, E]."""

    def tile(row, col, shared):
        # ||a - b||^2 = 2 - 2 a.b on the sphere
        logits = 4 * engine.dot(row["a"], col["b"]) - 4
        return {"log_sum": LogSumExp(logits, row["index"][:, None] != col["index"])}, {}

    rows, _ = engine.reduce(tile, {"a": a}, {"b": b})
    pairs = a.shape[0] * (a.shape[0] // engine.blocks - 1)
    return jax.nn.logsumexp(rows["log_sum"]) - math.log(max(pairs, 1))
