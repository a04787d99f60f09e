"""What the softmax family shares: negatives, positives, ids, and the two directions' weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from clipjax.batch import Batch, Encoded
from clipjax.errors import ClipjaxError
from clipjax.objectives.pairs import LogSumExp, Max, PairEngine


def negatives(
    encoded: Encoded, engine: PairEngine
) -> tuple[jax.Array, jax.Array, jax.Array, dict[str, jax.Array]]:
    """Per image and per text, log sum exp of the logits of all but its own partner.

    Returns:
      (images' [N], texts' [N], positive logits [N], in-batch retrieval accuracies). A softmax
      cross-entropy is softplus(negatives - positive). That form keeps its relative precision,
      gradient included, when the loss goes to 0, where log sum exp minus positive cancels.
    """
    image = encoded.logit_scale * encoded.image

    def tile(row, col, shared):
        logits = engine.dot(row["image"], col["text"])
        other = row["index"][:, None] != col["index"]
        terms = {"negatives": LogSumExp(logits, other), "hardest": Max(logits, other)}
        return terms, terms

    rows, cols = engine.reduce(tile, {"image": image}, {"text": encoded.text})
    positive = jnp.sum(image * encoded.text, -1)
    accuracy = {
        "accuracy/image_to_text": jnp.mean(positive > rows["hardest"]),
        "accuracy/text_to_image": jnp.mean(positive > cols["hardest"]),
    }
    return rows["negatives"], cols["negatives"], positive, accuracy


def mean_similarity(a: jax.Array, b: jax.Array, engine: PairEngine) -> jax.Array:
    """Mean of a_i . b_j over the rows j that row i meets, [N], by way of b's mean: no tile."""
    a, b = (v.reshape(engine.blocks, -1, v.shape[-1]) for v in (a, b))
    return jnp.einsum("gnd,gd->gn", a, b.mean(1), precision="highest").reshape(-1)


def both_directions(image: jax.Array, text: jax.Array, image_weight: float) -> jax.Array:
    """Mean over the batch of the images' losses [N] and the texts' losses [N], weighted."""
    return image_weight * jnp.mean(image) + (1 - image_weight) * jnp.mean(text)


def batch_ids(batch: Batch, objective: str) -> jax.Array:
    """`batch["id"]`, or a refusal that names the objective that needs it."""
    if "id" not in batch:
        raise ClipjaxError(f"{objective} needs `id` in the batch to know positives; it has none")
    return batch["id"]


def check_share(objective: object, *names: str) -> None:
    """Refuses fields that are no share of 1."""
    for name in names:
        if not 0 <= getattr(objective, name) <= 1:
            raise ClipjaxError(
                f"{type(objective).__name__}: {name}={getattr(objective, name)} must lie in [0, 1]"
            )
