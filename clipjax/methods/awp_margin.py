"""AWP: of two outputs, the one with the better property should be the likelier, by a margin.

Segev et al. 2023, "Align With Purpose: Optimize Desired Properties in CTC Models with a General Plug-and-Play
Framework" (arXiv 2307.01715). Status: second hand (a summary of the method; the hinge as remembered).

For speech recognizers with CTC: alignments w are drawn from the model's own posteriors, and each is made into a better
one w' = f(w), a frame earlier (latency) or with one wrong word put right (word error rate). Beside the usual loss,

    loss = mean of max(0, log P(w) - log P(w') + margin)

What differs here: captions in the place of alignments. As posteriors of CTC are independent given the sound, tokens
are drawn at each position given the caption's own tokens before it; log P is the mean over the caption's tokens. The
property that comes along is the second (`Right`); another is a component of one's own. The paper's total is
`Caption() + alpha * AWP()`.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from clipjax.component import Component
from clipjax.errors import ClipjaxError
from clipjax.methods.registry import Method
from clipjax.objectives.caption import Captioning
from clipjax.objectives.pairs import LogSumExp, Sample, Table
from clipjax.objectives.products import How, dot

METHOD = Method(
    id="awp_margin",
    title="Align With Purpose: Optimize Desired Properties in CTC Models with a General "
    "Plug-and-Play Framework",
    arxiv="2307.01715",
    status="second hand",
    summary="captions drawn from the model are less likely than the same with a word put right",
)


@dataclasses.dataclass(frozen=True)
class Property(Component):
    """Role: what is better in a caption."""

    def __call__(
        self, drawn: jax.Array, target: jax.Array, counts: jax.Array, key: jax.Array
    ) -> jax.Array:
        """The drawn tokens, int32 [B, T], made better.

        Args:
          drawn: int32 [B, T].
          target: int32 [B, T], the caption that the data has.
          counts: bool [B, T], False for padding.
          key: PRNG key.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Right(Property):
    """Some wrong words are put right."""

    words: int = 1
    """How many, drawn from the wrong ones; all if there are fewer."""

    def __post_init__(self):
        if self.words < 1:
            raise ClipjaxError(f"Right: words={self.words} must be at least 1")

    def __call__(self, drawn, target, counts, key):
        wrong = counts & (drawn != target)
        order = jnp.where(wrong, jax.random.uniform(key, drawn.shape), 2.0)
        place = jnp.argsort(jnp.argsort(order, axis=1), axis=1)
        return jnp.where(wrong & (place < self.words), target, drawn)


@dataclasses.dataclass(frozen=True)
class AWP(Captioning):
    """A hinge between captions that the model would write and better ones, a mean over captions and draws."""

    better: Property = Right()
    """What is better in a caption."""
    margin: float = 0.0
    """lambda, in nats a token."""
    draws: int = 1
    """Captions drawn of each example."""

    def __post_init__(self):
        super().__post_init__()
        if self.draws < 1 or self.margin < 0:
            raise ClipjaxError(
                f"AWP: draws={self.draws} must be at least 1 and margin={self.margin} not negative"
            )

    def totals(self, context):
        captions = jnp.sum(self.counts(context).any(1), dtype=jnp.float32)
        return {"captions": jnp.maximum(captions, 1.0)}

    def local(self, encoded, context, totals):
        if context.key is None:
            raise ClipjaxError("AWP draws captions: the context needs a key")
        counts, target = self.counts(context), context.batch["text"][:, 1:]
        features, head = encoded["captions"], encoded.shared["caption_head"]
        draw_key, better_key = jax.random.split(context.key)
        log_sum, drawn = self._draw(features, head, draw_key, context)
        weights = counts / jnp.maximum(jnp.sum(counts, 1, keepdims=True), 1)

        def log_p(words):
            columns = jnp.take(head, words, axis=1).astype(features.dtype)  # [D, B, T]
            logits = jnp.einsum(
                "btd,dbt->bt", features, columns, preferred_element_type=jnp.float32
            )
            return jnp.sum(weights * (logits - log_sum), 1)

        loss, improved = jnp.zeros(()), jnp.zeros(())
        share = counts.any(1) / (totals["captions"] * self.draws)
        for words, key in zip(drawn, jax.random.split(better_key, self.draws), strict=True):
            better = self.better(words, target, counts, key)
            hinge = jax.nn.relu(log_p(words) - log_p(better) + self.margin)
            loss += jnp.sum(share * hinge)
            improved += jnp.sum(share * jnp.any(better != words, 1))
        return loss, {"awp/improved": improved}

    def _draw(self, features, head, key, context):
        """log sum exp of the logits, [B, T], and words drawn from their softmax, a list of int32 [B, T]."""
        engine, shape = context.engine, features.shape[:2]
        how = How(str(features.dtype), engine.platform, axis=0)

        def tile(row, col, keys):
            logits = dot(how, row["features"], col["words"])
            drawn = {f"drawn_{i}": Sample(logits, keys[i]) for i in range(self.draws)}
            return {"log_sum": LogSumExp(logits)} | drawn, {}

        engine = dataclasses.replace(engine, dtype=how.dtype, chunk=self.chunk)
        positions = {"features": features.reshape(-1, features.shape[-1])}
        keys = jax.random.split(key, self.draws)
        rows, _ = engine.reduce(tile, positions, Table({"words": head}, axis=-1), keys)
        drawn = [rows[f"drawn_{i}"].reshape(shape) for i in range(self.draws)]
        return rows["log_sum"].reshape(shape), drawn
