"""DualEncoder: an image tower and a text tower into one space of unit vectors."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from clipjax.batch import Batch, Encoded
from clipjax.errors import ClipjaxError
from clipjax.layout import batch_first
from clipjax.models.base import Model
from clipjax.models.scale import require_scale, scale_and_bias, scale_of
from clipjax.towers import layers
from clipjax.towers.base import Tower, require, require_choice, require_positive
from clipjax.towers.text import TextTransformer
from clipjax.towers.vit import ViT

PROJECTIONS = ("linear", "affine", "mlp", "none")


@dataclasses.dataclass(frozen=True)
class DualEncoder(Model):
    """Two towers, each with a projection, and the scale (and bias) of their similarities."""

    image: Tower = dataclasses.field(default_factory=ViT)
    """Tower for images."""
    text: Tower = dataclasses.field(default_factory=TextTransformer)
    """Tower for texts."""
    embed_dim: int = 512
    """Dimensions of the common space, E."""
    logit_scale_init: float = 1 / 0.07
    """What similarities are multiplied by at first: 1/0.07 in CLIP, 10 in SigLIP."""
    logit_scale_max: float | None = 100.0
    """The scale is never above this (100 in CLIP); None: no limit."""
    logit_bias_init: float | None = None
    """What is added to scaled similarities at first (-10 in SigLIP); None: no bias (CLIP)."""
    image_projection: str = "linear"
    """From the image tower's width to embed_dim: linear, affine (with a bias),
    mlp (one hidden layer of 4 times the width, GELU), or none."""
    text_projection: str = "linear"
    """The same for the text tower."""

    def __post_init__(self) -> None:
        require_positive(self, "embed_dim")
        require_choice(self, "image_projection", PROJECTIONS)
        require_choice(self, "text_projection", PROJECTIONS)
        for name in ("image", "text"):
            tower = getattr(self, name)
            require(isinstance(tower, Tower), f"DualEncoder.{name}={tower!r} is no Tower")
        require_scale(self)

    def build(self, rngs: nnx.Rngs) -> DualEncoderModule:
        """Makes the module.

        Raises:
          ClipjaxError: a tower without projection has another width than `embed_dim`.
        """
        return DualEncoderModule(self, rngs)


class DualEncoderModule(nnx.Module):
    """The module of `DualEncoder`. `logit_scale` is stored as its logarithm, as in CLIP."""

    def __init__(self, config: DualEncoder, rngs: nnx.Rngs):
        self.config = config
        self.image = config.image.build(rngs)
        self.text = config.text.build(rngs)
        self.image_projection = _projection(config, "image", self.image, rngs)
        self.text_projection = _projection(config, "text", self.text, rngs)
        self.logit_scale, self.logit_bias = scale_and_bias(config)

    def encode_image(self, image: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """[B, H, W, 3] uint8 (or float in 0..1) -> [B, E] float32, unit norm."""
        return self._embed_image(image, key)[1]

    def encode_text(self, text: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """int32 [B, L] -> [B, E] float32, unit norm."""
        return self._embed_text(text, key)[1]

    def __call__(
        self, batch: Batch, key: jax.Array | None = None, *, tokens: bool = False
    ) -> Encoded:
        """Encodes a batch.

        Args:
          batch: has `image` and `text`.
          key: PRNG key in training, None in inference.
          tokens: whether to return the towers' tokens too.
        """
        image_key, text_key = layers.keys(key, 2)
        image_tokens, image = self._embed_image(batch["image"], image_key)
        text_tokens, text = self._embed_text(batch["text"], text_key)
        return Encoded(
            image=image,
            text=text,
            logit_scale=self.scale(),
            logit_bias=None if self.logit_bias is None else self.logit_bias[...],
            image_tokens=image_tokens if tokens else None,
            text_tokens=text_tokens if tokens else None,
        )

    def scale(self) -> jax.Array:
        """float32 []: `exp(logit_scale)`, at most `logit_scale_max`."""
        return scale_of(self.logit_scale[...], self.config.logit_scale_max)

    def _embed_image(self, image, key):
        tokens, pooled = self.image(image, key=key)
        return tokens, to_unit(pooled, self.image_projection)

    def _embed_text(self, text, key):
        tokens, pooled = self.text(text, key=key)
        return tokens, to_unit(pooled, self.text_projection)


class Head(nnx.Module):
    """`fc2(gelu(fc1(x)))`: what adapts a frozen tower where one matrix is too little."""

    def __init__(self, width: int, embed_dim: int, rngs: nnx.Rngs):
        self.fc1 = layers.Linear(width, 4 * width, rngs)
        self.fc2 = layers.Linear(4 * width, embed_dim, rngs)

    def __call__(self, x: jax.Array, dtype: layers.Dtype = None) -> jax.Array:
        """[..., D] -> [..., E]; in `dtype` if it is given, as `Linear`."""
        return self.fc2(jax.nn.gelu(self.fc1(x), approximate=False), dtype)


def _projection(
    config: DualEncoder, side: str, tower: nnx.Module, rngs: nnx.Rngs
) -> layers.Linear | Head | None:
    width = getattr(tower, "width", None)
    if not isinstance(width, int):
        raise ClipjaxError(
            f"DualEncoder.{side}: the module of {type(getattr(config, side)).__name__} has no "
            "attribute `width` (the size of its pooled vectors)"
        )
    kind = getattr(config, f"{side}_projection")
    if kind == "none":
        require(
            width == config.embed_dim,
            f"DualEncoder.embed_dim={config.embed_dim} is not the {side} tower's width {width}: "
            f"make them equal, or set DualEncoder.{side}_projection to 'linear'",
        )
        return None
    if kind == "mlp":
        return Head(width, config.embed_dim, rngs)
    return layers.Linear(width, config.embed_dim, rngs, bias=kind == "affine")


def to_unit(pooled: jax.Array, projection: layers.Linear | Head | None) -> jax.Array:
    """Projects and normalizes; in float32 from the sums of the projection on."""
    x = pooled if projection is None else projection(pooled, jnp.float32)
    x = batch_first(x.astype(jnp.float32))
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-24))
