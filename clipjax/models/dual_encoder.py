"""Towers into one space of unit vectors: any number of them, or an image tower and a text tower."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from clipjax.component import Component
from clipjax.errors import ClipjaxError
from clipjax.layout import batch_first
from clipjax.models.base import Encoders, Model, as_tokens
from clipjax.models.scale import require_scale, scale_and_bias, scale_of
from clipjax.towers import layers
from clipjax.towers.base import Tower, require, require_choice, require_positive
from clipjax.towers.text import TextTransformer
from clipjax.towers.vit import ViT

PROJECTIONS = ("linear", "affine", "mlp", "none")


@dataclasses.dataclass(frozen=True)
class Encoder(Component):
    """One tower of a `MultiEncoder`, and its way into the common space."""

    name: str
    """What the batch calls its input; inputs whose names go on with `_` come here too."""
    tower: Tower
    """The tower."""
    projection: str = "linear"
    """From the tower's width to embed_dim: linear, affine (with a bias), mlp (one hidden layer of 4
    times the width, GELU), or none."""

    def __post_init__(self) -> None:
        require_choice(self, "projection", PROJECTIONS)
        require(isinstance(self.tower, Tower), f"Encoder.tower={self.tower!r} is no Tower")
        require(
            self.name.isidentifier(),
            f"Encoder.name={self.name!r} must be a name such as 'audio'",
        )


@dataclasses.dataclass(frozen=True)
class Joint(Model):
    """What models of towers in one space have: its size, and the scale (and bias) of similarities."""

    def encoders(self) -> tuple[Encoder, ...]:
        """The towers, with their names and projections."""
        raise NotImplementedError

    def build(self, rngs: nnx.Rngs) -> JointModule:
        """Makes the module.

        Raises:
          ClipjaxError: a tower without projection has another width than `embed_dim`.
        """
        return JointModule(self, rngs)


@dataclasses.dataclass(frozen=True)
class DualEncoder(Joint):
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

    def encoders(self):
        return (
            Encoder("image", self.image, self.image_projection),
            Encoder("text", self.text, self.text_projection),
        )


@dataclasses.dataclass(frozen=True)
class MultiEncoder(Joint):
    """Any number of towers, each for the inputs that bear its name: pictures, texts, audio, depth."""

    towers: tuple[Encoder, ...] = (
        Encoder("image", ViT()),
        Encoder("text", TextTransformer()),
    )
    """The towers. Parameters are called as in a `DualEncoder`: `audio/...`, `audio_projection/...`."""
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
        names = [one.name for one in self.towers]
        require(bool(names), "MultiEncoder.towers is empty: name at least one")
        for name in names:
            require(
                names.count(name) == 1,
                f"MultiEncoder.towers has two towers called {name!r}: names must differ",
            )
            require(
                not hasattr(JointModule, name)
                and name not in ("config", "logit_scale", "logit_bias"),
                f"MultiEncoder.towers: {name!r} is taken; call the tower something else",
            )

    def encoders(self):
        return self.towers


class JointModule(Encoders):
    """The module of `Joint`. `logit_scale` is stored as its logarithm, as in CLIP."""

    def __init__(self, config: Any, rngs: nnx.Rngs):
        self.config = config
        for one in config.encoders():
            setattr(self, one.name, one.tower.build(rngs))
        for one in config.encoders():
            projection = _projection(config, one, getattr(self, one.name), rngs)
            setattr(self, f"{one.name}_projection", projection)
        self.logit_scale, self.logit_bias = scale_and_bias(config)

    @property
    def encoders(self) -> tuple[str, ...]:
        return tuple(one.name for one in self.config.encoders())

    def outputs(
        self, encoder: str, inputs: jax.Array, key: jax.Array | None, wanted: frozenset[str]
    ) -> dict[str, Any]:
        tower = getattr(self, encoder)
        tokens, pooled = tower(inputs, key=key)
        projection = getattr(self, f"{encoder}_projection")
        found = {
            "embedding": to_unit(pooled, projection),
            "pooled": pooled,
            "tokens": as_tokens(tower, inputs, tokens, key),
        }
        if "token_embeddings" in wanted and hasattr(tower, "alone"):
            each = to_unit(tower.alone(tokens), projection)
            found["token_embeddings"] = found["tokens"] | {"values": each}
        return found

    def width(self, encoder: str, output: str) -> int:
        return self.config.embed_dim if output == "embedding" else getattr(self, encoder).width

    def shared(self) -> dict[str, jax.Array]:
        scale = scale_of(self.logit_scale[...], self.config.logit_scale_max)
        bias = {} if self.logit_bias is None else {"logit_bias": self.logit_bias[...]}
        return {"logit_scale": scale} | bias


class Head(nnx.Module):
    """`fc2(gelu(fc1(x)))`: what adapts a frozen tower where one matrix is too little."""

    def __init__(self, width: int, embed_dim: int, rngs: nnx.Rngs):
        self.fc1 = layers.Linear(width, 4 * width, rngs)
        self.fc2 = layers.Linear(4 * width, embed_dim, rngs)

    def __call__(self, x: jax.Array, dtype: layers.Dtype = None) -> jax.Array:
        """[..., D] -> [..., E]; in `dtype` if it is given, as `Linear`."""
        return self.fc2(jax.nn.gelu(self.fc1(x), approximate=False), dtype)


def _projection(
    config: Any, encoder: Encoder, tower: nnx.Module, rngs: nnx.Rngs
) -> layers.Linear | Head | None:
    width, model, name = getattr(tower, "width", None), type(config).__name__, encoder.name
    if not isinstance(width, int):
        raise ClipjaxError(
            f"{model}.{name}: the module of {type(encoder.tower).__name__} has no attribute "
            "`width` (the size of its pooled vectors)"
        )
    if encoder.projection == "none":
        require(
            width == config.embed_dim,
            f"{model}.embed_dim={config.embed_dim} is not the {name} tower's width {width}: "
            f"make them equal, or set {model}.{name}_projection to 'linear'",
        )
        return None
    if encoder.projection == "mlp":
        return Head(width, config.embed_dim, rngs)
    return layers.Linear(width, config.embed_dim, rngs, bias=encoder.projection == "affine")


def to_unit(pooled: jax.Array, projection: layers.Linear | Head | None) -> jax.Array:
    """Projects and normalizes; in float32 from the sums of the projection on."""
    x = pooled if projection is None else projection(pooled, jnp.float32)
    x = batch_first(x.astype(jnp.float32))
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-24))
