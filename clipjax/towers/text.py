"""TextTransformer: the text tower of CLIP (causal, end-of-text pooling) and of SigLIP and LiT."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from clipjax.errors import ClipjaxError, did_you_mean
from clipjax.layout import gathered
from clipjax.towers import layers
from clipjax.towers.base import require, require_choice, require_positive
from clipjax.towers.pooling import AttentionPool, last_valid, mean_pool, take
from clipjax.towers.transformer import Block, TransformerTower, apply_stack, stack

SIZES = {
    # The towers that CLIP and OpenCLIP pair with the ViT of that name: (width, depth, heads)
    "S": (384, 12, 6),
    "B": (512, 12, 8),
    "L": (768, 12, 12),
    "H": (1024, 24, 16),
    "G": (1280, 32, 20),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextTransformer(TransformerTower):
    """Text transformer: tokens in, features of every position and one vector out."""

    vocab_size: int = 49408
    """Number of different tokens."""
    context_length: int = 77
    """Longest text, in tokens; shorter ones are accepted."""
    causal: bool = True
    """Whether a position sees only itself and what comes before."""
    pool: str = "eos"
    """eos (the first end-of-text token), last (the last token that is no padding), mean, or map."""
    pad_id: int | None = 0
    """Padding token, never attended to or pooled; None: every token counts (CLIP, SigLIP)."""
    eos_id: int = 2
    """End-of-text token, where pool="eos" looks."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "vocab_size", "context_length")
        require_choice(self, "pool", ("eos", "last", "mean", "map"))
        for field, value in (("pad_id", self.pad_id), ("eos_id", self.eos_id)):
            require(
                value is None or 0 <= value < self.vocab_size,
                f"TextTransformer.{field}={value} is no token of a vocabulary of "
                f"TextTransformer.vocab_size={self.vocab_size}",
            )
        require(
            self.pool != "eos" or self.pad_id != self.eos_id,
            f"TextTransformer.pad_id={self.pad_id} is also the eos_id, and pool='eos' would look "
            "for a token that is masked: give padding its own token, or set pad_id to None",
        )

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> TextTransformer:
        """A published size, by the name of the ViT that it accompanies in CLIP and OpenCLIP.

        Args:
          name: S (384 x 12), B (512 x 12), L (768 x 12), H (1024 x 24) or G (1280 x 32).
          **overrides: any other fields, or these.

        Raises:
          ClipjaxError: the name is unknown.
        """
        if name not in SIZES:
            raise ClipjaxError(
                f"unknown TextTransformer preset {name!r}{did_you_mean(name, SIZES)}"
            )
        width, depth, heads = SIZES[name]
        return cls(**({"width": width, "depth": depth, "heads": heads} | overrides))

    def build(self, rngs: nnx.Rngs) -> TextTransformerModule:
        return TextTransformerModule(self, rngs)


class TextTransformerModule(nnx.Module):
    """The module of `TextTransformer`."""

    def __init__(self, config: TextTransformer, rngs: nnx.Rngs):
        self.config, self.width = config, config.width
        self.embedding = layers.normal(rngs, (config.vocab_size, config.width), 0.02)
        self.positions = layers.normal(rngs, (config.context_length, config.width), 0.01)
        self.blocks = stack(lambda rngs: Block(config, rngs), config.depth, rngs)
        self.norm = layers.Norm(config.norm, config.width, config.eps)
        self.pool = AttentionPool(config, rngs) if config.pool == "map" else None

    def __call__(
        self, text: jax.Array, *, key: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Texts to tokens and one vector.

        A text of padding alone counts as its first token. Without an end-of-text token (a text cut
        short), pool="eos" takes the last token that is no padding.

        Args:
          text: int32 [B, L], L at most `context_length`.
          key: for dropout in training; None in inference.

        Returns:
          tokens [B, L, D] and pooled [B, D], both in the compute dtype.

        Raises:
          ClipjaxError: the array is no [B, L] of integers, or longer than the context.
        """
        config = self.config
        text = jnp.asarray(text)
        self._check(text)
        drop_key, block_key = layers.keys(key, 2)
        valid = None
        if config.pad_id is not None:
            valid = text != config.pad_id
            valid = valid.at[:, 0].set(valid[:, 0] | ~valid.any(axis=1))
        length = text.shape[1]
        x = gathered(self.embedding[...])[text] + self.positions[:length]
        x = layers.dropout(x.astype(config.dtype), config.dropout, drop_key)
        mask = attention_mask(length, config.causal, valid)
        tokens = self.norm(apply_stack(self.blocks, x, config, mask=mask, key=block_key))
        return tokens, self._pool(tokens, text, valid)

    def _pool(self, tokens: jax.Array, text: jax.Array, valid: jax.Array | None) -> jax.Array:
        if self.pool is not None:
            return self.pool(tokens, valid)
        if self.config.pool == "mean":
            return mean_pool(tokens, valid)
        last = last_valid(jnp.ones_like(text, bool) if valid is None else valid)
        if self.config.pool == "last":
            return take(tokens, last)
        is_eos = text == self.config.eos_id
        return take(tokens, jnp.where(is_eos.any(axis=1), jnp.argmax(is_eos, axis=1), last))

    def _check(self, text: jax.Array) -> None:
        require(
            text.ndim == 2 and jnp.issubdtype(text.dtype, jnp.integer),
            f"TextTransformer takes integers [B, L], got {text.dtype} {list(text.shape)}",
        )
        require(
            text.shape[1] <= self.config.context_length,
            f"texts of {text.shape[1]} tokens are longer than "
            f"TextTransformer.context_length={self.config.context_length}",
        )


def attention_mask(length: int, causal: bool, valid: jax.Array | None) -> jax.Array | None:
    """Who may be attended to, bool broadcastable to [B, heads, L, L]; None for everyone.

    Args:
      length: L.
      causal: keep keys at or before the query only.
      valid: bool [B, L], False for padding, which is no key for anyone.
    """
    mask = jnp.tril(jnp.ones((length, length), bool))[None, None] if causal else None
    if valid is None:
        return mask
    keys = valid[:, None, None, :]
    return keys if mask is None else mask & keys
