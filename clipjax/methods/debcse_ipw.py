"""DebCSE: pairs of sentences drawn by inverse propensity, so that look-alikes do not decide.

Miao et al. 2023, "DebCSE: Rethinking Unsupervised Contrastive Sentence Embedding Learning in the Debiasing
Perspective" (arXiv 2309.07396). Status: reconstructed from the abstract: positive and negative pairs are chosen by
inverse propensity weighted sampling "according to both the surface and semantic similarity". The propensity, the
cut-offs and all numbers below are ours, not the paper's.

With a_ij in [0, 1] the tokens that two texts have in common (the cosine of their sets of tokens) and m_ij the cosine of
a teacher's embeddings, a naive choice takes look-alikes with propensity p(a) = exp(surface (a - 1)). So

    w_ij = min(exp(semantic (m_ij - 1)) / max(p(a_ij), floor), max_weight)

Of a record's other texts c_ik one is drawn with probability w_ik / sum over k of w_ik: it means the same and looks
different. Negatives are the texts drawn for other rows, weighted by w_ij / mean over j of w_ij; those with m_ij above
`most_alike` mean the same and are left out:

    loss_i = -log exp s_i / (exp s_i + sum over j of w_ij exp s_ij),  s = cosine / temperature

What differs here: it stands beside the contrast of pictures and texts, whose tower it trains; candidates are the
record's other captions (in other words, in other languages); all texts of the batch are negatives, weighted instead of
drawn, which has the same expectation.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from clipjax.batch import field
from clipjax.errors import ClipjaxError
from clipjax.methods.registry import Method
from clipjax.objectives import Aux, Itself, Objective, Teacher
from clipjax.objectives.pairs import LogSumExp, Sum

METHOD = Method(
    id="debcse_ipw",
    title="DebCSE: Rethinking Unsupervised Contrastive Sentence Embedding Learning in the Debiasing "
    "Perspective",
    arxiv="2309.07396",
    status="reconstructed",
    summary="texts that mean the same but look different, and the reverse, weigh more",
)


@dataclasses.dataclass(frozen=True)
class DebCSE(Objective):
    """Contrast of texts with other texts of their records, chosen and weighted by inverse propensity."""

    text: str = "text"
    """The text of each row."""
    candidates: str = "text_candidates"
    """Other texts of the record, a field with a `count`; `{candidates}_mask` tells the real ones."""
    teacher: Teacher = Itself()
    """Whose embeddings say what means the same."""
    semantic: float = 5.0
    """How much meaning counts."""
    surface: float = 5.0
    """How much the propensity grows with the tokens in common; 0: it is constant."""
    floor: float = 0.05
    """Smallest propensity."""
    max_weight: float = 10.0
    """Largest weight, before the mean is taken to 1."""
    most_alike: float | None = 0.95
    """A negative that the teacher finds more alike is none; None: all are negatives."""
    temperature: float = 0.05
    """Of the contrast (SimCSE's)."""
    buckets: int = 1024
    """Sets of tokens are kept modulo this: with fewer than the vocabulary, some tokens count as one."""

    def __post_init__(self):
        for name in ("floor", "max_weight", "temperature", "buckets"):
            if getattr(self, name) <= 0:
                raise ClipjaxError(f"DebCSE: {name}={getattr(self, name)} must be above 0")

    @property
    def needs(self):
        return frozenset({self.text, self.candidates})

    @property
    def teachers(self):
        return (self.teacher,)

    def log_weight(self, alike: jax.Array, shared: jax.Array) -> jax.Array:
        """log w of the cosines of meanings and of sets of tokens."""
        log_propensity = jnp.maximum(self.surface * (shared - 1), math.log(self.floor))
        return jnp.minimum(self.semantic * (alike - 1) - log_propensity, math.log(self.max_weight))

    def prepare(self, state, context):
        rows = context.encode(self.teacher, self.needs).rows
        alike = jnp.einsum("nd,nkd->nk", rows[self.text], rows[self.candidates])
        texts, others = (field(context.batch, n, "DebCSE") for n in (self.text, self.candidates))
        own, other = self._tokens(texts, context), self._tokens(others, context)
        weight = self.log_weight(alike, jnp.einsum("nv,nkv->nk", own, other))
        real = context.batch.get(f"{self.candidates}_mask")
        weight = weight if real is None else jnp.where(real, weight, -jnp.inf)
        if context.key is not None:
            weight = weight + jax.random.gumbel(context.key, weight.shape)
        drawn = jnp.argmax(weight, 1)
        return Aux(
            {
                "drawn": drawn,
                "meaning": rows[self.text],
                "tokens": own,
                "drawn_meaning": _picked(rows[self.candidates], drawn),
                "drawn_tokens": _picked(other, drawn),
            }
        )

    def __call__(self, encoded, context):
        engine, aux = context.engine, context.aux.rows
        query = encoded[self.text] / self.temperature
        key = _picked(encoded[self.candidates], aux["drawn"])

        def tile(row, col, shared):
            alike = engine.dot(row["meaning"], col["meaning"])
            weight = self.log_weight(alike, engine.dot(row["tokens"], col["tokens"]))
            negative = row["index"][:, None] != col["index"]
            if self.most_alike is not None:
                negative &= alike <= self.most_alike
            logits = engine.dot(row["query"], col["key"])
            return {
                "negatives": LogSumExp(logits + weight, negative),
                "weight": LogSumExp(weight, negative),
                "count": Sum(negative.astype(jnp.float32)),
            }, {}

        rows = {"query": query, "meaning": aux["meaning"], "tokens": aux["tokens"]}
        cols = {"key": key, "meaning": aux["drawn_meaning"], "tokens": aux["drawn_tokens"]}
        found, _ = engine.reduce(tile, rows, cols)
        some = found["count"] > 0
        mean = jnp.where(some, found["weight"] - jnp.log(jnp.maximum(found["count"], 1)), 0)
        positive = jnp.sum(query * key, -1)
        negatives = jnp.where(some, found["negatives"] - mean, -1e30)
        return jnp.mean(jax.nn.softplus(negatives - positive)), {
            "debcse/negatives": jnp.mean(found["count"])
        }

    def _tokens(self, texts: jax.Array, context) -> jax.Array:
        """Sets of tokens as unit vectors: int32 [..., L] -> [..., buckets]; special tokens are in none."""
        held = jnp.ones(texts.shape, bool)
        for token in dataclasses.astuple(context.tokens) if context.tokens else ():
            held &= texts != (-1 if token is None else token)
        found = (texts[..., None] % self.buckets == jnp.arange(self.buckets)) & held[..., None]
        sets = found.any(-2).astype(jnp.float32)
        return sets * jax.lax.rsqrt(jnp.maximum(jnp.sum(sets, -1, keepdims=True), 1))


def _picked(rows: jax.Array, index: jax.Array) -> jax.Array:
    """[B, K, ...], int [B] -> [B, ...]."""
    return jnp.take_along_axis(rows, index[:, None, None], 1)[:, 0]
