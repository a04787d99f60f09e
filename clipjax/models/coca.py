"""CoCa: one model that contrasts and captions (arXiv:2205.01917), and its relatives.

The image's tokens are pooled twice: into the memory that captions are written from, and into the
image's embedding. The text goes through the first, unimodal half of the decoder, which gives the
text's embedding, and on through the second half, which looks at the memory, to the caption. One
forward pass serves both losses, and what is not asked for is not computed.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from clipjax.batch import PAIR, Batch, Encoded
from clipjax.component import Component
from clipjax.errors import ClipjaxError, did_you_mean
from clipjax.models.base import Encoders, Model, as_tokens, key_for
from clipjax.models.dual_encoder import to_unit
from clipjax.models.scale import require_scale, scale_and_bias, scale_of
from clipjax.towers import layers
from clipjax.towers.attention import Causal, Mask
from clipjax.towers.base import Tower, require, require_choice, require_positive
from clipjax.towers.cache import decode_stack, start_cache
from clipjax.towers.pooling import QueryPool, mean_pool
from clipjax.towers.text import TextTransformer, TextTransformerModule, attention_mask
from clipjax.towers.transformer import Block, Transformer, apply_stack, stack
from clipjax.towers.vit import ViT

Cache = dict[str, Any]

SIZES = {
    # name: (width, heads, mlp_dim, image depth, depth of each half of the decoder, tied head);
    # table 1 of arXiv:2205.01917. Its parameter counts (383M, 787M, 2.1B) hold two matrices of
    # 64,000 words for the first two sizes and, by the same arithmetic, one for the third.
    "coca_base": (768, 12, 3072, 12, 12, False),
    "coca_large": (1024, 16, 4096, 24, 12, False),
    "coca_giant": (1408, 16, 6144, 40, 18, True),
}
LAYOUTS = ("cascade", "parallel", "single")


@dataclasses.dataclass(frozen=True)
class Poolers(Component):
    """The attentional poolers of the image's tokens, one for each task."""

    queries: int = 256
    """Tokens that captions are written from."""
    layout: str = "cascade"
    """cascade (the contrastive pooler, of one query, looks at the other's tokens), parallel (at the
    image's), or single (one pooler, whose first token is the embedding: OpenCLIP's weights)."""
    heads: int = 8
    """Attention heads of the poolers; must divide the decoder's width."""
    norm_context: bool = True
    """Whether a pooler norms the tokens it looks at."""
    norm_out: bool = False
    """Whether it norms what it makes."""

    def __post_init__(self) -> None:
        require_positive(self, "queries", "heads")
        require_choice(self, "layout", LAYOUTS)
        require(
            self.layout != "single" or self.queries > 1,
            f"Poolers.queries={self.queries}: with layout='single' the first is the embedding, "
            "and captions need another",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CaptionDecoder(Transformer):
    """The decoder's second half, which looks at the image, and the vocabulary head."""

    tie: bool = False
    """Predict with the token embeddings instead of a matrix of its own."""
    cross_mlp: bool = False
    """An MLP after self-attention and one after cross-attention (OpenCLIP); else the last alone."""
    parallel: float = 0.0
    """Share of the captions that training predicts all at once, from mask tokens alone and without
    a causal mask (CapPa, arXiv:2306.07915, has 0.75)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            0.0 <= self.parallel <= 1.0,
            f"CaptionDecoder.parallel={self.parallel} must lie in [0, 1]",
        )


@dataclasses.dataclass(frozen=True)
class CoCa(Model):
    """An image tower, a text decoder in two halves, and what makes embeddings of both.

    The defaults are CoCa's. Relatives by their settings:

    - CapPa (arXiv:2306.07915), captions alone: `text=None`, `poolers=None`,
      `unimodal=TextTransformer(pool="none", depth=0)`, `decoder.parallel=0.75`.
    - MaMMUT (arXiv:2303.16839), one decoder for both tasks: the same without `parallel`, and
      `two_pass=True`.
    - A dual encoder with a captioner beside its text tower: any `text`, and `unimodal`.
    """

    image: Tower = dataclasses.field(default_factory=lambda: ViT(pool="mean"))
    """Tower for images; the decoder looks at its tokens."""
    text: Tower | None = dataclasses.field(default_factory=lambda: TextTransformer(pool="class"))
    """Tower for texts, and the first half of the decoder unless that is given; None: no tower."""
    unimodal: TextTransformer | None = None
    """The decoder's own first half (pool="none"; depth 0: embeddings alone); None: the text tower."""
    decoder: CaptionDecoder = dataclasses.field(default_factory=CaptionDecoder)
    """The second half of the decoder."""
    poolers: Poolers | None = dataclasses.field(default_factory=Poolers)
    """Poolers of the image's tokens; None: the decoder sees all, the tower pools for contrast."""
    two_pass: bool = False
    """Without a text tower: embed texts with the decoder, bidirectional and without the image."""
    embed_dim: int = 512
    """Dimensions of the common space, E."""
    logit_scale_init: float = 1 / 0.07
    """What similarities are multiplied by at first."""
    logit_scale_max: float | None = 100.0
    """The scale is never above this; None: no limit."""
    logit_bias_init: float | None = None
    """What is added to scaled similarities at first; None: no bias."""

    def __post_init__(self) -> None:
        require_positive(self, "embed_dim")
        require_scale(self)
        require(
            not (self.two_pass and self.text is not None),
            "CoCa.two_pass embeds texts with the decoder: set CoCa.text to None",
        )
        name, first = ("text", self.text) if self.unimodal is None else ("unimodal", self.unimodal)
        require(
            isinstance(first, TextTransformer) and first.causal,
            f"CoCa.{name} is the first half of the decoder, so it must be a causal "
            f"TextTransformer, not {first!r}; for another text tower set CoCa.unimodal",
        )
        assert isinstance(first, TextTransformer)
        require(
            first.width == self.decoder.width,
            f"CoCa.decoder.width={self.decoder.width} is not CoCa.{name}.width={first.width}: "
            "the decoder's halves are one stack",
        )
        require(
            self.unimodal is None or self.unimodal.pool == "none",
            "CoCa.unimodal makes no vector of a text: set its pool to 'none'",
        )
        require(
            self.unimodal is not None or first.pool != "none",
            "CoCa.text with pool='none' makes no vector to contrast: choose another pool, or make "
            "it CoCa.unimodal",
        )
        require(
            self.decoder.parallel == 0 or (self.unimodal is not None and self.unimodal.depth == 0),
            "CoCa.decoder.parallel replaces the decoder's whole input by mask tokens: it needs "
            "CoCa.unimodal with depth=0 (CapPa)",
        )

    @property
    def first_half(self) -> TextTransformer:
        """The decoder's first half: tokens to the stream that the second goes on from."""
        first = self.text if self.unimodal is None else self.unimodal
        assert isinstance(first, TextTransformer)
        return first

    @property
    def contrasts(self) -> bool:
        """Whether texts have embeddings."""
        return self.text is not None or self.two_pass

    @classmethod
    def preset(
        cls,
        name: str,
        *,
        image_size: int = 288,
        vocab_size: int = 64000,
        context_length: int = 76,
        dtype: str = "float32",
        remat: str = "none",
        **overrides: Any,
    ) -> CoCa:
        """A size of the paper.

        Args:
          name: coca_base, coca_large or coca_giant.
          image_size: side of the images in pixels, a multiple of 18.
          vocab_size: number of different tokens.
          context_length: longest text, in tokens.
          dtype: compute dtype of every part.
          remat: what every part recomputes.
          **overrides: any fields of CoCa.

        Raises:
          ClipjaxError: the name is unknown.
        """
        if name not in SIZES:
            raise ClipjaxError(f"unknown CoCa preset {name!r}{did_you_mean(name, SIZES)}")
        width, heads, mlp_dim, image_depth, depth, tie = SIZES[name]
        common: dict[str, Any] = {"width": width, "heads": heads, "mlp_dim": mlp_dim}
        common |= {"dtype": dtype, "remat": remat}
        fields: dict[str, Any] = {
            "image": ViT(
                image_size=image_size, patch_size=18, depth=image_depth, pool="mean", **common
            ),
            "text": TextTransformer(
                vocab_size=vocab_size,
                context_length=context_length,
                depth=depth,
                pool="class",
                **common,
            ),
            "decoder": CaptionDecoder(depth=depth, tie=tie, **common),
            "embed_dim": width,
        }
        return cls(**(fields | overrides))

    def build(self, rngs: nnx.Rngs) -> CoCaModule:
        """Makes the module.

        Raises:
          ClipjaxError: the image tower does not say its width.
        """
        return CoCaModule(self, rngs)


class CoCaModule(Encoders):
    """The module of `CoCa`. `logit_scale` is stored as its logarithm, as in CLIP."""

    def __init__(self, config: CoCa, rngs: nnx.Rngs):
        self.config = config
        self.image = config.image.build(rngs)
        self.text: Any = None if config.text is None else config.text.build(rngs)
        self.unimodal: Any = None if config.unimodal is None else config.unimodal.build(rngs)
        width, image_width = config.decoder.width, _width(self.image, config.image, "image")
        memory_width = image_width if config.poolers is None else width
        self.decoder = CaptionDecoderModule(config.decoder, config.first_half, memory_width, rngs)
        self.memory_pool, self.contrast_pool = _pools(config, image_width, rngs)
        if not config.contrasts:
            self.image_projection = self.text_projection = None
            self.logit_scale = self.logit_bias = None
            return
        text_width = width if config.text is None else _width(self.text, config.text, "text")
        self.image_projection = layers.Linear(memory_width, config.embed_dim, rngs, bias=False)
        self.text_projection = layers.Linear(text_width, config.embed_dim, rngs, bias=False)
        self.logit_scale, self.logit_bias = scale_and_bias(config)

    @property
    def encoders(self) -> tuple[str, ...]:
        return ("image", "text")

    def outputs(
        self, encoder: str, inputs: jax.Array, key: jax.Array | None, wanted: frozenset[str]
    ) -> dict[str, Any]:
        """Besides the usual: `memory` of an image and `hidden` of a text, what captions are made of.

        The embedding of an image by a model that only captions is the image tower's own vector.

        Raises:
          ClipjaxError: texts have no embeddings, as the model only captions.
        """
        if encoder == "image":
            tokens, pooled, memory = self._see(inputs, key)
            return {
                "embedding": to_unit(pooled, self.image_projection),
                "pooled": pooled,
                "tokens": as_tokens(self.image, inputs, tokens, key),
                "memory": memory,
            }
        if not self.config.contrasts and wanted - {"hidden"}:
            raise ClipjaxError(
                "this CoCa has no text embeddings: it only captions (set CoCa.text or two_pass, or take "
                "Caption alone as the objective)"
            )
        hidden, tokens, pooled = self._read(inputs, key, tokens="tokens" in wanted)
        made: dict[str, Any] = {}
        if hidden is not None:
            made["hidden"] = hidden
        if tokens is not None:
            made["tokens"] = as_tokens(self.text, inputs, tokens, key)
        if pooled is not None:
            made |= {"embedding": to_unit(pooled, self.text_projection), "pooled": pooled}
        return made

    def width(self, encoder: str, output: str) -> int:
        if output == "embedding":
            return self.config.embed_dim if self.config.contrasts else self.image.width
        if encoder == "image":
            whole = output == "tokens" or self.config.poolers is None
            return self.image.width if whole else self.config.decoder.width
        return self.config.decoder.width if self.text is None else self.text.width

    def shared(self) -> dict[str, jax.Array]:
        """Nothing of a model that only captions."""
        if self.logit_scale is None:
            return {}
        scale = scale_of(self.logit_scale[...], self.config.logit_scale_max)
        bias = {} if self.logit_bias is None else {"logit_bias": self.logit_bias[...]}
        return {"logit_scale": scale} | bias

    def __call__(
        self, batch: Batch, key: jax.Array | None = None, needs: frozenset[str] = PAIR
    ) -> Encoded:
        """Encodes a batch.

        Args:
          batch: has `image` and `text`, whose rows are start, tokens, end, padding.
          key: PRNG key in training, None in inference.
          needs: as for any model, and `captions`: what captions are predicted from. Embeddings are
            the same with and without, dropout included.
        """
        if "captions" not in needs:
            return super().__call__(batch, key, needs)
        asked = needs - {"captions"}
        halves = {"image_memory"} | (set() if self.config.unimodal else {"text_hidden"})
        encoded = super().__call__(batch, key, asked | halves)
        features = self._caption(
            batch["text"],
            encoded.rows.get("text_hidden"),
            encoded["image_memory"],
            key_for(key, "captions"),
        )
        rows = {name: encoded[name] for name in asked} | {"captions": features}
        return Encoded(rows, encoded.shared | {"caption_head": self._head()})

    def caption_memory(self, image: jax.Array) -> jax.Array:
        """The image's tokens that captions are written from: [B, H, W, 3] -> [B, Q, D]."""
        return self._see(image, None)[2]

    def start_cache(self, memory: jax.Array, length: int) -> Cache:
        """An empty cache for `decode`.

        Args:
          memory: [B, Q, D] from `caption_memory`; its keys and values go into the cache.
          length: positions to make room for.

        Returns:
          A nested dict of arrays, all [layers, B, ...].

        Raises:
          ClipjaxError: the model's context is shorter than `length`.
        """
        rows = len(memory)
        return {
            "unimodal": self._first_half.start_cache(rows, length),
            "multimodal": start_cache(
                self.decoder.blocks, self.config.decoder, rows, length, memory
            ),
        }

    def decode(
        self, tokens: jax.Array, start: jax.Array, cache: Cache
    ) -> tuple[jax.Array, jax.Array, Cache]:
        """The next tokens' logits, from the tokens at hand and the cache of those before.

        Args:
          tokens: int32 [B, T], at positions start to start + T - 1, all of them in the cache's room.
          start: int32 [].
          cache: from `start_cache` or the last call; what it holds at later positions does not count.

        Returns:
          logits [B, T, V] and the decoder's last features [B, T, D], both float32, and the cache
          with these positions in it.
        """
        x, unimodal = self._first_half.decode(tokens, start, cache["unimodal"])
        x, multimodal = decode_stack(
            self.decoder.blocks, x, self.config.decoder, start, cache["multimodal"]
        )
        logits, features = self._predict(self.decoder.norm(x))
        return logits, features, {"unimodal": unimodal, "multimodal": multimodal}

    def caption_logits(self, tokens: jax.Array, memory: jax.Array) -> tuple[jax.Array, jax.Array]:
        """`decode` of whole rows, int32 [B, T], without a cache."""
        hidden = self._first_half.hidden(tokens)[0]
        return self._predict(self.decoder(hidden, memory, mask=Causal()))

    @property
    def _first_half(self) -> TextTransformerModule:
        return self.text if self.unimodal is None else self.unimodal

    def _see(self, image, key):
        """The image tower's tokens, the vector to contrast [B, D] and the memory [B, Q, D]."""
        tokens, pooled = self.image(image, key=key)
        memory, poolers = tokens, self.config.poolers
        if poolers is not None and self.memory_pool is not None:
            memory = self.memory_pool(tokens)
            if poolers.layout == "single":
                pooled, memory = memory[:, 0], memory[:, 1:]
            elif self.contrast_pool is not None:
                seen = memory if poolers.layout == "cascade" else tokens
                pooled = self.contrast_pool(seen)[:, 0]
        return tokens, pooled, memory

    def _read(self, text, key, *, tokens=False):
        """The stream for the decoder [B, L, D] if the text tower makes it, tokens, vector [B, D]."""
        if self.text is None:
            pooled = self._second_pass(text, key) if self.config.two_pass else None
            hidden = text_tokens = None
        elif self.unimodal is not None:
            hidden, (text_tokens, pooled) = None, self.text(text, key=key)
        else:
            hidden, pooled = self.text.hidden(text, key=key)
            text_tokens = self.text.norm(hidden) if tokens else None
        return hidden, text_tokens, pooled

    def _second_pass(self, text, key):
        """[B, D]: the mean token of the decoder, bidirectional and without cross-attention."""
        embed_key, block_key = layers.keys(key, 2)
        hidden = self.unimodal.hidden(text, key=embed_key)[0]
        valid = self.unimodal.valid(text)
        mask = attention_mask(False, valid)
        return mean_pool(self.decoder(hidden, None, mask=mask, key=block_key), valid)

    def _caption(self, text, hidden, memory, key):
        """Features [B, L - 1, D] from which text[:, 1:] is predicted."""
        embed_key, parallel_key, block_key = layers.keys(key, 3)
        if hidden is None:
            hidden = self.unimodal.hidden(text, key=embed_key)[0]
        hidden = hidden[:, :-1]  # nothing follows the last token
        mask: Mask = Causal()
        if self.decoder.mask_token is not None and parallel_key is not None:
            rate = self.config.decoder.parallel
            chosen = jax.random.bernoulli(parallel_key, rate, (len(hidden), 1, 1))
            blank = self.decoder.mask_token[...] + self.unimodal.positions[: hidden.shape[1]]
            hidden = jnp.where(chosen, blank.astype(hidden.dtype), hidden)
            mask = Causal().array(hidden.shape[1]) | chosen[:, None]
        return self.decoder(hidden, memory, mask=mask, key=block_key)

    def _head(self) -> jax.Array:
        if self.decoder.head is None:
            return self._first_half.embedding[...].T
        return self.decoder.head.kernel[...]

    def _predict(self, features):
        head = self._head().astype(features.dtype)
        logits = jnp.einsum("btd,dv->btv", features, head, preferred_element_type=jnp.float32)
        return logits, features.astype(jnp.float32)


class CaptionDecoderModule(nnx.Module):
    """The module of `CaptionDecoder`: from the first half's stream to features of the next token."""

    def __init__(
        self, config: CaptionDecoder, first: TextTransformer, memory_width: int, rngs: nnx.Rngs
    ):
        self.config = config

        def block(rngs: nnx.Rngs) -> Block:
            return Block(config, rngs, memory_width=memory_width, cross_mlp=config.cross_mlp)

        self.blocks = stack(block, config.depth, rngs)
        self.norm = layers.Norm(config.norm, config.width, config.eps)
        words = first.vocab_size
        self.head = None if config.tie else layers.Linear(config.width, words, rngs, bias=False)
        self.mask_token = layers.normal(rngs, (config.width,), 0.02) if config.parallel else None

    def __call__(
        self,
        x: jax.Array,
        memory: jax.Array | None,
        *,
        mask: Mask,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """[B, T, D] and memory [B, Q, D_memory] (None: without) -> [B, T, D]."""
        return self.norm(
            apply_stack(self.blocks, x, self.config, mask=mask, memory=memory, key=key)
        )


def _pools(
    config: CoCa, image_width: int, rngs: nnx.Rngs
) -> tuple[QueryPool | None, QueryPool | None]:
    """The poolers for captions and for contrast; None for those that the layout has not."""
    poolers = config.poolers
    if poolers is None:
        return None, None
    settings = dataclasses.replace(config.decoder, heads=poolers.heads)
    norms = {"norm_context": poolers.norm_context, "norm_out": poolers.norm_out}
    memory = QueryPool(settings, rngs, queries=poolers.queries, context_width=image_width, **norms)
    if not config.contrasts or poolers.layout == "single":
        return memory, None
    context = settings.width if poolers.layout == "cascade" else image_width
    return memory, QueryPool(settings, rngs, queries=1, context_width=context, **norms)


def _width(module: Any, config: Tower | None, name: str) -> int:
    width = getattr(module, "width", None)
    if not isinstance(width, int):
        raise ClipjaxError(
            f"CoCa.{name}: the module of {type(config).__name__} has no attribute `width` (the size "
            "of its tokens and pooled vectors)"
        )
    return width
