"""Caption: the cross-entropy of every next token of a caption."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from clipjax.batch import Encoded, field
from clipjax.errors import ClipjaxError
from clipjax.objectives.base import Context, PerExample
from clipjax.objectives.contrast import check_share
from clipjax.objectives.pairs import LogSumExp, Max, PairEngine, Sum, Table
from clipjax.objectives.products import How, dot


class WordStats(NamedTuple):
    """What a caption loss needs of the logits over the vocabulary, per position: float32 [B, T]."""

    log_sum: jax.Array
    """log sum exp of the logits."""
    target: jax.Array
    """The logit of the right word."""
    mean: jax.Array
    """The mean logit."""
    top: jax.Array
    """The largest logit; has no gradient."""


def word_stats(
    features: jax.Array, head: jax.Array, targets: jax.Array, engine: PairEngine
) -> WordStats:
    """Reduces the logits `features @ head` over the vocabulary; they never exist as a whole.

    Rows are the positions of all captions, columns the words. Products take operands in the
    features' dtype and accumulate in float32; so does the gradient of the head.

    Args:
      features: [B, T, D], split as the batch is.
      head: [D, V]; devices along `tensor` share the words where they divide V.
      targets: int32 [B, T], the right words.
      engine: has the mesh and the size of a tile of logits.
    """
    how = How(str(features.dtype), engine.platform, axis=0)

    def tile(row, col, shared):
        logits = dot(how, row["features"], col["words"])
        return {
            "log_sum": LogSumExp(logits),
            "target": Sum(logits, row["target"][:, None] == col["index"]),
            "sum": Sum(logits),
            "top": Max(logits),
        }, {}

    positions = {
        "features": features.reshape(-1, features.shape[-1]),
        "target": targets.reshape(-1),
    }
    rows, _ = dataclasses.replace(engine, dtype=how.dtype).reduce(
        tile, positions, Table({"words": head}, axis=-1)
    )
    stats = {name: value.reshape(targets.shape) for name, value in rows.items()}
    mean = stats["sum"] / head.shape[1]
    return WordStats(stats["log_sum"], stats["target"], mean, stats["top"])


@dataclasses.dataclass(frozen=True)
class Captioning(PerExample):
    """What objectives on captions share: which tokens count, and how logits are taken apart."""

    pad_id: int | None = None
    """The padding token; those at the end of a row are not predicted. None: the tokenizer's."""
    pad_is_end: bool | None = None
    """A row's first padding token is its end-of-text token, and predicted (SigLIP's tokenizer). None: if
    the tokenizer pads with its end-of-text token."""
    chunk: int = 2048
    """Words of the vocabulary, and positions, at a time: logits are [chunk, chunk] at most."""

    def __post_init__(self):
        if self.chunk < 1:
            raise ClipjaxError(f"{type(self).__name__}: chunk={self.chunk} must be at least 1")

    @property
    def needs(self):
        return frozenset({"captions"})

    def counts(self, context: Context) -> jax.Array:
        """bool [B, L - 1]: which of the targets `text[:, 1:]` count.

        Raises:
          ClipjaxError: the padding token is neither said nor known from a tokenizer.
        """
        tokens, pad, pad_is_end = context.tokens, self.pad_id, self.pad_is_end
        if pad is None:
            if tokens is None:
                raise ClipjaxError(
                    f"{type(self).__name__}: which token is padding? Set pad_id, or give the context the "
                    "tokenizer's special tokens"
                )
            pad = tokens.pad
        if pad_is_end is None:
            pad_is_end = tokens is not None and tokens.eos == pad
        # Only what is at the end is padding: a vocabulary may have a word where padding is.
        held = from_here_on(jnp.not_equal(field(context.batch, "text"), pad))
        return held[:, 1:] | held[:, :-1] if pad_is_end else held[:, 1:]

    def stats(self, encoded: Encoded, context: Context) -> WordStats:
        """`word_stats` of the batch's targets."""
        if "captions" not in encoded.rows or "caption_head" not in encoded.shared:
            raise ClipjaxError(
                f"{type(self).__name__} needs a model that returns `captions` and a `caption_head` "
                "when asked for captions, such as CoCa"
            )
        return word_stats(
            encoded["captions"],
            encoded.shared["caption_head"],
            context.batch["text"][:, 1:],
            dataclasses.replace(context.engine, chunk=self.chunk),
        )


@dataclasses.dataclass(frozen=True)
class Caption(Captioning):
    """Cross-entropy of each token given those before it and the image, a mean over all tokens.

    CoCa's second term (arXiv:2205.01917): `Softmax() * 1.0 + Caption() * 2.0`. Numerator and
    denominator are sums over the global batch, so a long caption weighs more than a short one.
    CapPa's parallel prediction is the model's to set (`CaptionDecoder.parallel`).
    """

    label_smoothing: float = 0.0
    """Share of the target spread evenly over the vocabulary."""

    def __post_init__(self):
        super().__post_init__()
        check_share(self, "label_smoothing")

    def totals(self, context):
        return {"tokens": jnp.maximum(jnp.sum(self.counts(context), dtype=jnp.float32), 1.0)}

    def local(self, encoded, context, totals):
        stats = self.stats(encoded, context)
        weights = self.counts(context) / totals["tokens"]
        nll = stats.log_sum - stats.target
        losses = nll + self.label_smoothing * (stats.target - stats.mean)
        metrics = {
            "caption/nll": jnp.sum(weights * nll),
            "caption/accuracy": jnp.sum(weights * (stats.target >= stats.top)),
        }
        return jnp.sum(weights * losses), metrics


def from_here_on(held: jax.Array) -> jax.Array:
    """bool [B, L] -> bool [B, L]: whether it holds here or anywhere after."""
    return jax.lax.cummax(held.astype(jnp.int32), axis=1, reverse=True) > 0
