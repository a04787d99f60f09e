"""What the softmax family shares: negatives, positives, ids, and the two directions' weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from clipjax.batch import Batch, Encoded, field
from clipjax.errors import ClipjaxError
from clipjax.objectives.base import Pairwise
from clipjax.objectives.pairs import LogSumExp, Max, PairEngine, Similarities


def negatives(
    objective: Pairwise, encoded: Encoded, engine: PairEngine
) -> tuple[jax.Array, jax.Array, jax.Array, dict[str, jax.Array]]:
    """Per row of either side, log sum exp of the logits of all but its own partner.

    Returns:
      (the first side's [N], the second's [N], positive logits [N], in-batch retrieval accuracies). A softmax
      cross-entropy is softplus(negatives - positive). That form keeps its relative precision,
      gradient included, when the loss goes to 0, where log sum exp minus positive cancels.
    """
    first, second = encoded.logit_scale * encoded[objective.first], encoded[objective.second]

    def terms(logits, row, col, shared):
        other = row["index"][:, None] != col["index"]
        terms = {"negatives": LogSumExp(logits, other), "hardest": Max(logits, other)}
        return terms, terms

    tile = Similarities(engine.dot, "first", "second", terms)
    rows, cols = engine.reduce(tile, {"first": first}, {"second": second})
    positive = jnp.sum(first * second, -1)
    accuracy = {
        f"accuracy/{objective.first}_to_{objective.second}": jnp.mean(positive > rows["hardest"]),
        f"accuracy/{objective.second}_to_{objective.first}": jnp.mean(positive > cols["hardest"]),
    }
    return rows["negatives"], cols["negatives"], positive, accuracy


def mean_similarity(a: jax.Array, b: jax.Array, engine: PairEngine) -> jax.Array:
    """Mean of a_i . b_j over the rows j that row i meets, [N], by way of b's mean: no tile."""
    a, b = (v.reshape(engine.blocks, -1, v.shape[-1]) for v in (a, b))
    return jnp.einsum("gnd,gd->gn", a, b.mean(1), precision="highest").reshape(-1)


def both_directions(first: jax.Array, second: jax.Array, first_weight: float) -> jax.Array:
    """Mean over the batch of the first side's losses [N] and the second's [N], weighted."""
    return first_weight * jnp.mean(first) + (1 - first_weight) * jnp.mean(second)


def unit(x: jax.Array) -> jax.Array:
    """Vectors [..., E] scaled to unit norm."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, -1, keepdims=True), 1e-24))


def batch_ids(batch: Batch, objective: str) -> jax.Array:
    """`batch["id"]`, or a refusal that names the objective that needs it."""
    return field(batch, "id", f"{objective} needs `id` to know positives")


def check_share(objective: object, *names: str) -> None:
    """Refuses fields that are no share of 1."""
    for name in names:
        if not 0 <= getattr(objective, name) <= 1:
            raise ClipjaxError(
                f"{type(objective).__name__}: {name}={getattr(objective, name)} must lie in [0, 1]"
            )
