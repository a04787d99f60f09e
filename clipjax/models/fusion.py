"""A fusion encoder: one transformer that reads a text and looks at an image, to judge whether they match."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from clipjax.errors import ClipjaxError
from clipjax.models.heads import Head
from clipjax.towers import layers
from clipjax.towers.pooling import mean_pool
from clipjax.towers.text import attention_mask
from clipjax.towers.transformer import Block, Transformer, apply_stack, stack


@dataclasses.dataclass(frozen=True)
class FusionEncoder(Head):
    """Blocks of self-attention over a text's tokens and cross-attention to an image's (ALBEF, arXiv:2107.07651).

    An objective calls it: `context.head("fusion", text_tokens, image_tokens) -> [B, outputs]`.
    """

    name: str = "fusion"
    """What objectives call it."""
    of: str | None = None
    """Not of one encoder: it joins two."""
    reads: str = "tokens"
    """It is given tokens."""
    blocks: Transformer = dataclasses.field(default_factory=lambda: Transformer(depth=6))
    """The blocks; their width is the text tower's."""
    outputs: int = 2
    """Numbers that it gives: of two, the second is the logit of a match."""
    text: str = "text"
    """The encoder whose tokens it reads."""
    image: str = "image"
    """The encoder whose tokens it looks at."""

    def build(self, rngs: nnx.Rngs, base: Any) -> FusionEncoderModule:
        """Makes the module.

        Raises:
          ClipjaxError: the blocks are of another width than the text's tokens.
        """
        width = base.width(self.text, "tokens")
        if width != self.blocks.width:
            raise ClipjaxError(
                f"FusionEncoder.blocks.width={self.blocks.width} is not the width {width} of the tokens of "
                f"{self.text!r}: make them equal"
            )
        return FusionEncoderModule(self, rngs, base.width(self.image, "tokens"))


class FusionEncoderModule(nnx.Module):
    """The module of `FusionEncoder`."""

    def __init__(self, config: FusionEncoder, rngs: nnx.Rngs, image_width: int):
        self.config, self.width = config, config.outputs
        self.blocks = stack(
            lambda rngs: Block(config.blocks, rngs, memory_width=image_width),
            config.blocks.depth,
            rngs,
        )
        self.norm = layers.Norm(config.blocks.norm, config.blocks.width, config.blocks.eps)
        self.out = layers.Linear(config.blocks.width, config.outputs, rngs)

    def __call__(
        self,
        text: dict[str, jax.Array],
        image: dict[str, jax.Array],
        *,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """Tokens (`values` [B, L, D], `mask` [B, L]; [B, N, D_image]) -> float32 [B, outputs]."""
        mask = attention_mask(False, text["mask"])
        x = apply_stack(
            self.blocks,
            text["values"],
            self.config.blocks,
            mask=mask,
            memory=image["values"],
            key=key,
        )
        return self.out(mean_pool(self.norm(x), text["mask"])).astype(jnp.float32)
