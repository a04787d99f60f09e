"""The contrastive loss as others compute it: what the pair engine is measured against."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from clipjax.mesh import BATCH_AXES


def dense_softmax(image: jax.Array, text: jax.Array, scale: jax.Array) -> jax.Array:
    """Symmetric InfoNCE over the full N x N table, in as few operations as JAX needs."""
    logits = scale * (image @ text.T)
    positive = jnp.diagonal(logits)
    rows, cols = (jax.nn.logsumexp(logits, axis) - positive for axis in (1, 0))
    return 0.5 * (rows.mean() + cols.mean())


def dense_sigmoid(image: jax.Array, text: jax.Array, scale: jax.Array) -> jax.Array:
    """SigLIP's loss over the full N x N table, bias -10."""
    n = image.shape[0]
    logits = scale * (image @ text.T) - 10
    return jnp.sum(jax.nn.softplus(jnp.where(jnp.eye(n, dtype=bool), -logits, logits))) / n


def gathered_softmax(mesh: Mesh):
    """OpenCLIP's pattern: local loss with gathered gradients.

    Every device gathers both modalities and holds its own rows of both b x N tables; the gradient
    goes back through both gathers.
    """

    def local(image, text, scale):
        images, texts = (lax.all_gather(a, BATCH_AXES, tiled=True) for a in (image, text))
        labels = lax.axis_index(BATCH_AXES) * image.shape[0] + jnp.arange(image.shape[0])

        def cross_entropy(logits):
            rows = jax.nn.log_softmax(logits)
            return -jnp.take_along_axis(rows, labels[:, None], 1)[:, 0]

        losses = cross_entropy(scale * image @ texts.T) + cross_entropy(scale * text @ images.T)
        return losses / 2

    split = P(BATCH_AXES)
    rows = jax.shard_map(
        local, mesh=mesh, in_specs=(split, split, P()), out_specs=split, check_vma=False
    )
    return lambda image, text, scale: rows(image, text, scale).mean()
