"""GenView: pairs of views weigh by how much their foregrounds agree and their backgrounds do not.

Li et al. 2024, "GenView: Enhancing View Quality with Pretrained Generative Model for Self-Supervised Learning" (arXiv
2403.12003). Status: the authors' code (xiaojieli0903/genview) read.

A frozen encoder's tokens are projected on their first principal component; taken to 0..1 in each picture it is the map
of the foreground, and 1 minus it that of the background. With z_f and z_b the means of tokens under the two maps,

    q_i  = cos(z_f, z_f') - cos(z_b, z_b')          of the two views
    w    = N softmax(gamma q)                       over the batch: the mean weight is 1
    loss = mean of w_i NCE_i

What differs here: the softmax is over the global batch, not each device's; the principal component is that of the
batch's tokens, and it points where its third moment is positive, since the foreground is the smaller part; views
come of augmentation alone (pictures made by a diffusion model are a source of one's own, with `Image("image_2",
key=...)`).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from clipjax.methods.registry import Method
from clipjax.objectives import Aux, MovingAverage, Pairwise, Teacher
from clipjax.objectives.contrast import negatives

METHOD = Method(
    id="genview_quality",
    title="GenView: Enhancing View Quality with Pretrained Generative Model for Self-Supervised "
    "Learning",
    arxiv="2403.12003",
    status="official",
    summary="pairs of views weighted by the agreement of their foregrounds",
)


@dataclasses.dataclass(frozen=True)
class GenView(Pairwise):
    """Contrast of two views of a picture, weighted by the quality of the pair."""

    second: str = "image_2"
    """The other view."""
    teacher: Teacher = MovingAverage(0.99)
    """Whose tokens tell foreground from background (the paper's: `Frozen`, a CLIP)."""
    gamma: float = 1.0
    """How much quality counts; 0: all pairs weigh the same."""

    @property
    def teachers(self):
        return (self.teacher,)

    def prepare(self, state, context):
        names = [f"{side}_tokens" for side in (self.first, self.second)]
        rows = context.encode(self.teacher, frozenset(names)).rows
        q = quality(*(rows[name] for name in names))
        weight = len(q) * jax.nn.softmax(self.gamma * q)
        return Aux({"weight": weight, "quality": q})

    def __call__(self, encoded, context):
        aux = context.aux.rows
        rows, cols, positive, metrics = negatives(self, encoded, context.engine)
        nce = (jax.nn.softplus(rows - positive) + jax.nn.softplus(cols - positive)) / 2
        metrics |= {
            "genview/quality": jnp.mean(aux["quality"]),
            "genview/largest_weight": jnp.max(aux["weight"]),
        }
        return jnp.mean(aux["weight"] * nce), metrics


def quality(first: dict[str, jax.Array], second: dict[str, jax.Array]) -> jax.Array:
    """q [B] of two views' tokens, `values` [B, T, D], `mask` and `places` [B, T] each."""
    views = []
    for tokens in (first, second):
        patches = tokens["mask"] & (tokens["places"] >= 0)  # no class token
        views.append((tokens["values"].astype(jnp.float32), patches.astype(jnp.float32)))
    total = sum(jnp.sum(held) for _, held in views)
    mean = sum(jnp.einsum("btd,bt->d", x, held) for x, held in views) / total
    centered = [(x - mean, held) for x, held in views]
    covariance = sum(
        jnp.einsum("btd,bte,bt->de", x, x, held, precision="highest") for x, held in centered
    )
    direction = jnp.linalg.eigh(covariance)[1][:, -1]
    along = [(x @ direction, held) for x, held in centered]
    sign = jnp.sign(sum(jnp.sum(held * p**3) for p, held in along))
    parts = [_parts(x, sign * p, held) for (x, held), (p, _) in zip(views, along, strict=True)]
    (fore, back), (fore_2, back_2) = parts
    return _cosine(fore, fore_2) - _cosine(back, back_2)


def _parts(x, along, held):
    """The means [B, D] of tokens under the maps of foreground and background."""
    low = jnp.min(jnp.where(held > 0, along, jnp.inf), 1, keepdims=True)
    high = jnp.max(jnp.where(held > 0, along, -jnp.inf), 1, keepdims=True)
    fore = (along - low) / jnp.maximum(high - low, 1e-6)

    def mean(weights):
        weights = weights * held
        weights /= jnp.maximum(jnp.sum(weights, 1, keepdims=True), 1e-6)
        return jnp.einsum("btd,bt->bd", x, weights, precision="highest")

    return mean(fore), mean(1 - fore)


def _cosine(a, b):
    squares = jnp.sum(a * a, -1) * jnp.sum(b * b, -1)
    return jnp.sum(a * b, -1) * jax.lax.rsqrt(jnp.maximum(squares, 1e-12))
