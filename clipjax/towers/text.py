"""TextTransformer: the text tower of CLIP (causal, end-of-text pooling) and of SigLIP and LiT."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat
from flax import nnx

from clipjax.errors import ClipjaxError, did_you_mean
from clipjax.towers import layers
from clipjax.towers.attention import Causal, Mask
from clipjax.towers.base import everything, require, require_choice, require_positive
from clipjax.towers.cache import Cache, decode_stack, start_cache
from clipjax.towers.pooling import AttentionPool, last_valid, mean_pool, take
from clipjax.towers.rotary import Local, Rotation, distance_buckets, sinusoids, text_rotation
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
    """eos (the first end-of-text token), last (the last token that is no padding), mean, map, class
    (appended: it sees the text and no text token sees it, CoCa), or none (a decoder's first half)."""
    pad_id: int | None = 0
    """Padding token, never attended to or pooled; None: every token counts (CLIP, SigLIP)."""
    eos_id: int = 2
    """End-of-text token, where pool="eos" looks."""
    positions: str = "learned"
    """learned, sinusoidal (fixed, added), rotary (turns queries and keys) or relative (T5's bias of scores by
    distance)."""
    rope_theta: float = 10_000.0
    """Base of the frequencies of positions="rotary"."""
    relative_buckets: int = 32
    """Learned biases a head of positions="relative"."""
    relative_distance: int = 128
    """From this distance on all have the same bias."""
    window: int | None = None
    """How far to either side the blocks that window_layers names can see."""
    window_layers: str = ""
    """Which: "gll" repeats a block that sees all and two with the window."""
    window_theta: float | None = None
    """rope_theta of these blocks; None: the same."""
    embed_scale: bool = False
    """Whether token embeddings are multiplied by the root of the width (Gemma, TIPS)."""
    embed_norm: bool = False
    """Whether embeddings are normed before the first block (BERT)."""
    final_norm: bool = True
    """Whether what the last block gives is normed; not after norms="post"."""
    class_position: bool = False
    """Whether the class token has a learned position too, that after the row's last (OpenCLIP)."""
    legacy_class_mask: bool = False
    """Mask padding one position late, as OpenCLIP's released CoCa weights were trained to expect."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "vocab_size", "context_length")
        require_choice(self, "pool", ("eos", "last", "mean", "map", "class", "none"))
        require(
            self.pool == "class" or not (self.legacy_class_mask or self.class_position),
            "TextTransformer.legacy_class_mask and class_position are about the class token: they "
            "need pool='class'",
        )
        require_choice(self, "positions", ("learned", "sinusoidal", "rotary", "relative"))
        require_positive(self, "relative_buckets", "relative_distance")
        if self.window is not None:
            require_positive(self, "window")
        require(
            (self.window is None) == (not self.window_layers),
            f"TextTransformer.window={self.window} and window_layers={self.window_layers!r}: both or neither",
        )
        require(
            not set(self.window_layers) - set("gl"),
            f"TextTransformer.window_layers={self.window_layers!r}: g (all) and l (the window) alone",
        )
        require(
            self.positions != "rotary" or self.head_width % 2 == 0,
            f"TextTransformer.positions='rotary' turns pairs of channels: heads of {self.head_width} "
            "cannot be halved",
        )
        require(
            self.pool != "class" or (self.positions == "learned" and self.window is None),
            f"TextTransformer.pool='class' needs positions='learned', not {self.positions!r}, and no window",
        )
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

    @property
    def _may_be_empty(self) -> bool:
        return self.pool == "none"  # embeddings alone: a decoder without a first half

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

    def used_lengths(self, ids: np.ndarray) -> np.ndarray:
        """How many tokens of each row of int32 [n, L] are seen: what follows changes no pooled vector.

        Returns:
          int [n], from 1 to L; L where the tower sees its padding.
        """
        n, length = ids.shape
        if self.causal and self.pool == "eos":
            is_end = ids == self.eos_id
            return np.where(is_end.any(axis=1), is_end.argmax(axis=1) + 1, length)
        moved = (
            self.class_position or self.legacy_class_mask
        )  # the class token's view of the row's end
        if self.pad_id is None or moved or self.pool == "none":
            return np.full(n, length)
        is_text = (ids != self.pad_id) | (ids == self.eos_id)
        return np.where(is_text.any(axis=1), length - is_text[:, ::-1].argmax(axis=1), 1)


class TextTransformerModule(nnx.Module):
    """The module of `TextTransformer`."""

    def __init__(self, config: TextTransformer, rngs: nnx.Rngs):
        self.config, self.width = config, config.width
        self.embedding = layers.normal(rngs, (config.vocab_size, config.width), 0.02)
        places = config.context_length + config.class_position
        learned = config.positions == "learned"
        self.positions = layers.normal(rngs, (places, config.width), 0.01) if learned else None
        shape, relative = (config.relative_buckets, config.heads), config.positions == "relative"
        self.distances = layers.normal(rngs, shape, 0.1) if relative else None
        first_norm = layers.Norm(config.norm, config.width, config.eps)
        self.embed_norm = first_norm if config.embed_norm else None
        self.blocks = stack(lambda rngs: Block(config, rngs), config.depth, rngs)
        norm = layers.Norm(config.norm, config.width, config.eps)
        self.norm = norm if config.pool != "none" and config.final_norm else None
        self.pool = AttentionPool(config, rngs) if config.pool == "map" else None
        has_class = config.pool == "class"
        self.class_token = layers.normal(rngs, (config.width,), 0.01) if has_class else None

    def __call__(
        self, text: jax.Array, *, key: jax.Array | None = None, valid: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Texts to tokens and one vector.

        A text of padding alone counts as its first token. Without an end-of-text token (a text cut
        short, or embeddings), pool="eos" takes the last token that is no padding.

        Args:
          text: int32 [B, L], L at most `context_length`, or embeddings [B, L, D] as from `embed`.
          key: for dropout in training; None in inference.
          valid: bool [B, L], False for padding, which is neither attended to nor pooled. None: of
            ids, what is not `pad_id`; of embeddings, all.

        Returns:
          tokens [B, L, D] and pooled [B, D], both in the compute dtype.

        Raises:
          ClipjaxError: the array is neither, or longer than the context.
        """
        if self.config.pool == "none":
            raise ClipjaxError(
                "TextTransformer.pool='none' makes no vector of a text: it is for "
                "CoCa.unimodal alone; choose another pool"
            )
        hidden, pooled = self.hidden(text, key=key, valid=valid)
        return self._normed(hidden), pooled

    def embed(self, ids: jax.Array) -> jax.Array:
        """Token embeddings, without positions: int32 [B, L] -> [B, L, D] in the compute dtype.

        Whatever is made of them goes back in as `module(embeddings, valid=...)`: learned vectors in
        place of words, noise. `valid(ids)` says where these ids are padding; with pool="eos" the
        last True is to be the end-of-text token.
        """
        return layers.lookup(self.embedding[...], ids, self.config.dtype)

    def describe(
        self, text: jax.Array, *, key: jax.Array | None = None, valid: jax.Array | None = None
    ) -> dict[str, jax.Array]:
        """Which tokens are text, and their positions, as in `Tower`."""
        text = jnp.asarray(text)
        found = everything(*text.shape[:2])
        valid = self.valid(text) if valid is None else valid
        return found if valid is None else found | {"mask": valid}

    def hidden(
        self, text: jax.Array, *, key: jax.Array | None = None, valid: jax.Array | None = None
    ) -> tuple[jax.Array, Any]:
        """`__call__` before the last norm: what a decoder's second half goes on from.

        Returns:
          hidden [B, L, D], and pooled [B, D] (None for pool="none").
        """
        config = self.config
        text = jnp.asarray(text)
        self._check(text)
        drop_key, block_key = layers.keys(key, 2)
        if valid is None and config.pool != "none":
            valid = self.valid(text)
        x = layers.dropout(self._embed(text, 0), config.dropout, drop_key)
        if self.class_token is None:
            mask = attention_mask(config.causal, valid)
        else:
            # By default it has no place of its own in the row, so that padding does not move it.
            token = self.class_token[...]
            if config.class_position and self.positions is not None:
                token = token + self.positions[text.shape[1]]
            token = repeat(token.astype(x.dtype), "d -> b 1 d", b=len(x))
            x = jnp.concatenate([x, token], axis=1)
            mask = class_mask(text.shape[1], config.causal, valid, config.legacy_class_mask)
        places = self._places(text.shape[1], mask)
        x = apply_stack(self.blocks, x, config, mask=mask, key=block_key, **places)
        return (x if self.class_token is None else x[:, :-1]), self._pool(x, text, valid)

    def start_cache(self, rows: int, length: int) -> Cache:
        """An empty cache of `length` positions for `decode`.

        Raises:
          ClipjaxError: the context is shorter than that.
        """
        self._check_length(length)
        require(
            self.config.positions in ("learned", "sinusoidal") and self.config.window is None,
            f"TextTransformer.positions={self.config.positions!r} with window={self.config.window}: token by "
            "token, only positions that are added to embeddings are known here; use Uncached",
        )
        return start_cache(self.blocks, self.config, rows, length)

    def decode(self, tokens: jax.Array, start: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """`hidden` of int32 [B, T] at positions from `start`, given the cache of those before."""
        x = self._embed(tokens, start)
        return decode_stack(self.blocks, x, self.config, start, cache)

    def valid(self, text: jax.Array) -> jax.Array | None:
        """bool [B, L], False for padding; None where every token counts, as embeddings do."""
        if self.config.pad_id is None or text.ndim == 3:
            return None
        valid = jnp.not_equal(text, self.config.pad_id)
        return valid.at[:, 0].set(valid[:, 0] | ~valid.any(axis=1))

    def _embed(self, text: jax.Array, start: jax.Array | int) -> jax.Array:
        config = self.config
        x = self.embed(text) if text.ndim == 2 else text
        if config.embed_scale:
            x = x * jnp.asarray(config.width**0.5, x.dtype)
        table: Any = None
        if self.positions is not None:
            table = self.positions[...]
        elif config.positions == "sinusoidal":
            table = jnp.asarray(sinusoids(config.context_length, config.width))
        if table is not None:
            x = x + jax.lax.dynamic_slice_in_dim(table, start, x.shape[1])
        x = x.astype(config.dtype)
        return x if self.embed_norm is None else self.embed_norm(x)

    def _places(self, length: int, mask: Mask) -> dict[str, Any]:
        """What attention is told of positions that are not added to embeddings, by `apply_stack`'s names."""
        config = self.config
        found: dict[str, Any] = {}
        if config.positions == "rotary":
            found["rotation"] = text_rotation(length, config.head_width, config.rope_theta)
        if self.distances is not None:
            buckets = distance_buckets(
                length, config.relative_buckets, config.relative_distance, config.causal
            )
            found["bias"] = rearrange(self.distances[...][buckets], "n m h -> 1 h n m")
        if config.window is not None:
            seen = mask.array(length) if isinstance(mask, Causal) else mask
            found["local"] = self._local(length, seen)
        return found

    def _local(self, length: int, mask: jax.Array | None) -> Local:
        config = self.config
        assert config.window is not None
        away = np.abs(np.arange(length)[:, None] - np.arange(length)[None, :])
        near = jnp.asarray(away <= config.window)[None, None]
        turned: Rotation | None = None
        if config.positions == "rotary":
            theta = config.rope_theta if config.window_theta is None else config.window_theta
            turned = text_rotation(length, config.head_width, theta)
        pattern = config.window_layers
        named = [pattern[i % len(pattern)] == "l" for i in range(config.depth)]
        return Local(near if mask is None else mask & near, turned, np.array(named))

    def _normed(self, x: jax.Array) -> jax.Array:
        return x if self.norm is None else self.norm(x)

    def _pool(self, x: jax.Array, text: jax.Array, valid: jax.Array | None) -> Any:
        if self.config.pool == "none":
            return None
        if self.class_token is not None:
            return self._normed(x[:, -1])
        tokens = self._normed(x)
        if self.pool is not None:
            return self.pool(tokens, valid)
        if self.config.pool == "mean":
            return mean_pool(tokens, valid)
        last = last_valid(jnp.ones(text.shape[:2], bool) if valid is None else valid)
        if self.config.pool == "last" or text.ndim == 3:
            return take(tokens, last)
        is_eos = text == self.config.eos_id
        return take(tokens, jnp.where(is_eos.any(axis=1), jnp.argmax(is_eos, axis=1), last))

    def _check(self, text: jax.Array) -> None:
        is_ids = text.ndim == 2 and jnp.issubdtype(text.dtype, jnp.integer)
        is_embeddings = text.ndim == 3 and jnp.issubdtype(text.dtype, jnp.floating)
        require(
            is_ids or (is_embeddings and text.shape[2] == self.width),
            f"TextTransformer takes integers [B, L], or embeddings [B, L, {self.width}], got "
            f"{text.dtype} {list(text.shape)}",
        )
        self._check_length(text.shape[1])

    def _check_length(self, length: int) -> None:
        require(
            length <= self.config.context_length,
            f"texts of {length} tokens are longer than "
            f"TextTransformer.context_length={self.config.context_length}",
        )


def attention_mask(causal: bool, valid: jax.Array | None) -> Mask:
    """Who may be attended to, for `attention`.

    Args:
      causal: keep keys at or before the query only.
      valid: bool [B, L], False for padding, which is no key for anyone.
    """
    keys = None if valid is None else valid[:, None, None, :]
    return Causal(keys) if causal else keys


def class_mask(length: int, causal: bool, valid: jax.Array | None, late: bool) -> jax.Array:
    """`attention_mask` for a row of L tokens and a class token after them, [B or 1, 1, L+1, L+1].

    The class token sees itself and all tokens but padding; no token sees it.

    Args:
      length: L.
      causal: tokens see those at or before them only.
      valid: bool [B, L], False for padding; None for none.
      late: shift by one what the class token sees: the first token counts as valid, the next as
        the first does, and so on; the class token itself as the last.
    """
    # Causal tokens need no mask against padding, which comes after them.
    token_rows = jnp.ones((1, 1, length, length), bool)
    if causal:
        token_rows = Causal().array(length)
    elif valid is not None:
        token_rows = token_rows & valid[:, None, None, :]
    seen = jnp.ones((1, length), bool) if valid is None else valid
    seen = jnp.pad(seen, ((0, 0), (1, 0) if late else (0, 1)), constant_values=True)
    token_rows = jnp.broadcast_to(token_rows, (len(seen), 1, length, length))
    token_rows = jnp.pad(token_rows, ((0, 0), (0, 0), (0, 0), (0, 1)))
    return jnp.concatenate([token_rows, seen[:, None, None, :]], axis=2)
