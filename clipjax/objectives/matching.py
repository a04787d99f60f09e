"""Matching: whether a text belongs to an image, judged by a fusion encoder on hard pairs."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from clipjax.errors import ClipjaxError
from clipjax.objectives.base import Chosen
from clipjax.objectives.selections import Sample


@dataclasses.dataclass(frozen=True)
class Matching(Chosen):
    """Image-text matching with negatives drawn from the softmax of the batch (ALBEF, arXiv:2107.07651).

    For each image a text of another row is drawn with probability proportional to exp(scale x
    similarity), and for each text an image; pairs of equal `id` are never drawn. A head of the model (see
    `FusionEncoder`) says of the row's own pair and of the two drawn ones whether they match: the mean
    cross-entropy of the three. No gradient passes through the draws.
    """

    head: str = "fusion"
    """The head of the model that judges: `head(text tokens, image tokens) -> [B, 2]`."""
    temperature: float | None = None
    """Of the softmax that is drawn from; None: the model's, 1 / logit_scale."""

    def __post_init__(self):
        if self.temperature is not None and self.temperature <= 0:
            raise ClipjaxError(f"Matching: temperature={self.temperature} must be above 0")

    def choose(self, encoded, context):
        """int32 [B]: for each row the text, and the image, of a row drawn for it; -1 if there is no other."""
        if context.key is None:
            raise ClipjaxError("Matching draws negatives: the context needs a key")
        engine, scale = context.engine, encoded.logit_scale
        scale = scale if self.temperature is None else 1 / self.temperature
        ids = context.batch["id"]

        def tile(row, col, key):
            logits = engine.dot(row["image"], col["text"])
            drawn = Sample(logits, key, row["id"][:, None] != col["id"])
            return {"text": drawn}, {"image": drawn}

        rows = {"image": scale * encoded["image"], "id": ids}
        cols = {"text": encoded["text"], "id": ids}
        texts, images = engine.reduce(tile, rows, cols, context.key)
        return {"text": texts["text"], "image": images["image"]}

    def fuse(self, encoded, chosen, context, totals):
        own = encoded["text_tokens"], encoded["image_tokens"]
        pairs = {
            "own": (*own, 1),
            "drawn text": (chosen["text"]["text_tokens"], own[1], 0),
            "drawn image": (own[0], chosen["image"]["image_tokens"], 0),
        }
        losses, right = [], []
        for text, image, label in pairs.values():
            log_p = jax.nn.log_softmax(context.head(self.head, text, image))
            losses.append(-log_p[:, label])
            right.append(log_p.argmax(-1) == label)
        share = 1 / (3 * totals["examples"])
        loss = share * jnp.sum(jnp.stack(losses))
        return loss, {"matching/accuracy": share * jnp.sum(jnp.stack(right), dtype=jnp.float32)}
