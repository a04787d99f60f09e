"""WhitenedCSE: several positives from one embedding, by whitening shuffled groups of its channels.

Zhuo et al. 2023, "WhitenedCSE: Whitening-based Contrastive Learning of Sentence Embeddings" (arXiv
2305.17746). Status: the authors' code (SupstarZh/WhitenedCSE) read; as released it does not run.

Shuffled group whitening: permute the channels, cut them into groups, make each group's covariance over the
batch the identity by ZCA (W = U S^(-1/2) U^T), undo the permutation. Each permutation gives another view of
the same sentence; the loss is the sum of contrasts of the first view with each other one.

What differs here: the two sides are images and texts; the image has one permutation, the text `views` others,
and the contrasts are averaged. Whitening follows the model's projection, without the paper's MLP
behind it, and rows are scaled to unit norm again. Moments are those of the whole global batch, on any
mesh and under accumulation. The paper whitens in training only, and so it is here: `encode` is unchanged.
The derivative of S^(-1/2) is taken in closed form, which equal eigenvalues do not break.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from einops import rearrange

from clipjax.batch import Encoded
from clipjax.errors import ClipjaxError
from clipjax.methods.registry import Method
from clipjax.objectives import Softmax

METHOD = Method(
    id="whitened_cse",
    title="WhitenedCSE: Whitening-based Contrastive Learning of Sentence Embeddings",
    arxiv="2305.17746",
    status="official",
    summary="contrast of embeddings whitened over the batch in shuffled groups of channels",
)


@dataclasses.dataclass(frozen=True)
class Whitened(Softmax):
    """Softmax between embeddings whitened in shuffled groups of channels."""

    channels: int = 6
    """Channels of a group; the batch should have many times as many rows."""
    views: int = 2
    """Permutations of the second side, each a contrast with the first."""
    eps: float = 1e-5
    """Added to each group's covariance, as a share of its mean variance."""

    def __post_init__(self):
        super().__post_init__()
        if self.channels < 1 or self.views < 1 or self.eps < 0:
            raise ClipjaxError(
                f"Whitened: channels={self.channels} and views={self.views} must be at least 1 and "
                f"eps={self.eps} not negative"
            )

    def __call__(self, encoded, context):
        key = jax.random.key(0) if context.key is None else context.key
        first_key, *second_keys = jax.random.split(key, 1 + self.views)
        first = self.whiten(encoded[self.first], first_key)
        outcomes = []
        for key in second_keys:
            rows = {self.first: first, self.second: self.whiten(encoded[self.second], key)}
            outcomes.append(super().__call__(Encoded(rows, encoded.shared), context))
        return jax.tree.map(lambda *views: sum(views) / self.views, *outcomes)

    def whiten(self, z: jax.Array, key: jax.Array) -> jax.Array:
        """Shuffled group whitening of z [N, E]; rows of unit norm.

        Raises:
          ClipjaxError: groups of `channels` do not divide E.
        """
        width = z.shape[1]
        if width % self.channels:
            raise ClipjaxError(
                f"Whitened: channels={self.channels} does not divide the width {width} of embeddings"
            )
        order = jax.random.permutation(key, width)
        white = whitened(z[:, order], self.channels, self.eps)[:, jnp.argsort(order)]
        return white * jax.lax.rsqrt(jnp.maximum(jnp.sum(white**2, -1, keepdims=True), 1e-24))


def whitened(z: jax.Array, channels: int, eps: float) -> jax.Array:
    """z [N, E] with a covariance over N that is the identity within each group of `channels`."""
    groups = rearrange(z - z.mean(0), "n (g c) -> g n c", c=channels)
    covariance = jnp.einsum("gnc,gnd->gcd", groups, groups, precision="highest") / len(z)
    level = jnp.trace(covariance, axis1=1, axis2=2)[:, None, None] / channels
    # 1e-12: a group without any variance stays zero.
    root = inverse_sqrt(covariance + (eps * level + 1e-12) * jnp.eye(channels))
    white = jnp.einsum("gnc,gcd->gnd", groups, root, precision="highest")
    return rearrange(white, "g n c -> n (g c)")


@jax.custom_jvp
def inverse_sqrt(a: jax.Array) -> jax.Array:
    """a^(-1/2) of symmetric positive matrices [..., C, C]."""
    values, vectors = jnp.linalg.eigh(a)
    return _sandwich(vectors, _diagonal(values**-0.5))


@inverse_sqrt.defjvp
def _inverse_sqrt_jvp(primals, tangents):
    # In a's own basis, (f(p) - f(q)) / (p - q) for f = x^(-1/2), without the difference p - q.
    (a,), (d,) = primals, tangents
    values, vectors = jnp.linalg.eigh(a)
    root = jnp.sqrt(values)
    p, q = root[..., :, None], root[..., None, :]
    turned = _sandwich(jnp.swapaxes(vectors, -1, -2), d)
    return _sandwich(vectors, _diagonal(1 / root)), _sandwich(vectors, -turned / (p * q * (p + q)))


def _diagonal(values: jax.Array) -> jax.Array:
    return values[..., None] * jnp.eye(values.shape[-1])


def _sandwich(u: jax.Array, a: jax.Array) -> jax.Array:
    """u a u^T."""
    return jnp.einsum("...ij,...jk,...lk->...il", u, a, u, precision="highest")
