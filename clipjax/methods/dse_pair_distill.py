"""Distilled sentence embedding: a dual encoder learns the scores of a cross-encoder.

Barkan et al. 2019, "Scalable Attentive Sentence-Pair Modeling via Distilled Sentence Embedding" (arXiv 1908.05161).
Status: the authors' code (microsoft/Distilled-Sentence-Embedding) read.

A cross-encoder that reads both texts scores a pair; the student's score of the two embeddings is regressed on it,
on logits: the mean of (student - teacher)^2.

What differs here: the pair is an image and a text, the cross-encoder a fusion head that the same run trains by
`Matching`; each row gives its own pair and its hardest other text, since all pairs are out of reach; the student's
score is scale x similarity plus a bias, as retrieval uses it, and not a network on both embeddings.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from clipjax.methods.registry import Method
from clipjax.objectives.base import Chosen
from clipjax.objectives.pairs import ArgMax

METHOD = Method(
    id="dse_pair_distill",
    title="Scalable Attentive Sentence-Pair Modeling via Distilled Sentence Embedding",
    arxiv="1908.05161",
    status="official",
    summary="a dual encoder's scores after a cross-encoder's",
)


@dataclasses.dataclass(frozen=True)
class PairDistillation(Chosen):
    """Regression of similarities on a fusion head's logits of a match."""

    head: str = "fusion"
    """The head that scores: `head(text tokens, image tokens) -> [B, 2]`; no gradient reaches it."""

    @property
    def fuse_needs(self):
        return frozenset({"image", "text", "image_tokens", "text_tokens"})

    def choose(self, encoded, context):
        engine, ids = context.engine, context.batch["id"]

        def tile(row, col, shared):
            cosine = engine.dot(row["image"], col["text"])
            return {"hardest": ArgMax(cosine, row["id"][:, None] != col["id"])}, {}

        rows, _ = engine.reduce(
            tile, {"image": encoded["image"], "id": ids}, {"text": encoded["text"], "id": ids}
        )
        return {"text": rows["hardest"].index}

    def fuse(self, encoded, chosen, context, totals):
        bias = encoded.logit_bias if encoded.logit_bias is not None else 0.0
        loss = jnp.zeros((), jnp.float32)
        for texts in (encoded, chosen["text"]):
            judged = context.head(self.head, texts["text_tokens"], encoded["image_tokens"])
            teacher = jax.lax.stop_gradient(judged[:, 1] - judged[:, 0])
            similarity = jnp.sum(encoded["image"] * texts["text"], -1)
            loss += jnp.sum((encoded.logit_scale * similarity + bias - teacher) ** 2)
        return loss / (2 * totals["examples"]), {}
