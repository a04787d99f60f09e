"""The Z-loss: cross-entropy's place taken by a loss that no number of classes makes dearer.

De Brebisson and Vincent 2016, "The Z-loss: a shift and scale invariant classification loss belonging to the
Spherical Family" (arXiv 1604.08859). Status: second hand (summaries with the formula). Not the auxiliary
log^2 Z term of the same name.

Logits o [D] with mean mu and standard deviation sigma; of the right class c, z = (o_c - mu) / sigma:

    L = softplus(a (b - z)) / a

All it asks of the logits are o_c, their sum and their sum of squares. Where o = W h these are w_c.h and
moments of W: D logits need never be made.

What differs here: `SphericalCaption` is the paper's use, words of a vocabulary. `Spherical` is ours: the batch's
other side as classes, both directions, so a batch of N pairs costs E^2 numbers on the wire and N E^2
operations, no table of pairs. Moments are taken of centered columns: nothing cancels. The defaults of a and b
are ours. Neither loss feels a scale: the temperature is not trained.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from clipjax.errors import ClipjaxError
from clipjax.methods.registry import Method
from clipjax.objectives import Pairwise
from clipjax.objectives.caption import Captioning
from clipjax.objectives.contrast import both_directions, check_share

METHOD = Method(
    id="zloss_spherical",
    title="The Z-loss: a shift and scale invariant classification loss belonging to the Spherical Family",
    arxiv="1604.08859",
    status="second hand",
    summary="a loss of a row's standardized right logit, by moments, without any logits",
)
_TINY = 1e-12  # added to variances: where all classes are one, z is 0


@dataclasses.dataclass(frozen=True)
class Spherical(Pairwise):
    """Z-loss of each row among the batch's other side, without a table of pairs."""

    a: float = 1.0
    """Steepness; the larger, the more like a hinge."""
    b: float = 8.0
    """How many standard deviations above the mean the right logit should be; sqrt(N - 1) is the most
    that it can, and about sqrt(E) where rows point everywhere."""
    image_weight: float = 0.5
    """Share of the first side's direction, image-to-text; text-to-image gets the rest."""

    def __post_init__(self):
        check_share(self, "image_weight")
        _check(self)

    def __call__(self, encoded, context):
        blocks = context.engine.blocks
        first, second = (
            v.reshape(blocks, -1, v.shape[-1]) for v in (encoded[self.first], encoded[self.second])
        )

        def z(row, col):
            centered = col - col.mean(1, keepdims=True)
            moments = _product("gnd,gne->gde", centered, centered) / col.shape[1]
            spread = jnp.sum(_product("gnd,gde->gne", row, moments) * row, -1)
            return jnp.sum(row * centered, -1) * jax.lax.rsqrt(spread + _TINY)

        row_z, col_z = z(first, second), z(second, first)
        metrics = {
            f"z/{self.first}_to_{self.second}": jnp.mean(row_z),
            f"z/{self.second}_to_{self.first}": jnp.mean(col_z),
        }
        return both_directions(_loss(self, row_z), _loss(self, col_z), self.image_weight), metrics


@dataclasses.dataclass(frozen=True)
class SphericalCaption(Captioning):
    """Z-loss of every next token of a caption, a mean over all tokens of the batch."""

    a: float = 1.0
    """Steepness; the larger, the more like a hinge."""
    b: float = 8.0
    """How many standard deviations above the mean the right word's logit should be."""

    def __post_init__(self):
        super().__post_init__()
        _check(self)

    def totals(self, context):
        return {"tokens": jnp.maximum(jnp.sum(self.counts(context), dtype=jnp.float32), 1.0)}

    def local(self, encoded, context, totals):
        features = encoded["captions"].astype(jnp.float32)  # [B, T, D]
        words = encoded.shared["caption_head"].astype(jnp.float32).T  # [V, D]
        centered = words - words.mean(0)
        moments = _product("vd,ve->de", centered, centered) / len(words)
        spread = jnp.sum(_product("btd,de->bte", features, moments) * features, -1)
        right = jnp.sum(features * centered[context.batch["text"][:, 1:]], -1)
        z = right * jax.lax.rsqrt(spread + _TINY)
        weights = self.counts(context) / totals["tokens"]
        return jnp.sum(weights * _loss(self, z)), {"caption/z": jnp.sum(weights * z)}


def _loss(config: Spherical | SphericalCaption, z: jax.Array) -> jax.Array:
    return jax.nn.softplus(config.a * (config.b - z)) / config.a


def _check(config: Spherical | SphericalCaption) -> None:
    if config.a <= 0:
        raise ClipjaxError(f"{type(config).__name__}: a={config.a} must be positive")


def _product(spec: str, *arrays: jax.Array) -> jax.Array:
    return jnp.einsum(spec, *arrays, precision="highest")
