"""The contrastive loss as others compute it: what the pair engine is measured against."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from clipjax.mesh import BATCH_AXES
from clipjax.objectives.pairs import LogSumExp, PairEngine, Sum


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


def late_interaction(
    engine: PairEngine, image: jax.Array, text: jax.Array, scale: jax.Array
) -> jax.Array:
    """FILIP's contrast (arXiv 2111.07783) of tokens [N, L, E] and [N, M, E], on the engine: tiles of tokens.

    Every token of one side meets its most similar token of the other; a pair's similarity is the
    mean of those, and each direction has its own.
    """

    def tile(row, col, scale):
        a, b = row["image"], col["text"]
        tokens = engine.dot(a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1]))
        tokens = scale * tokens.reshape(*a.shape[:2], *b.shape[:2])
        other = row["index"][:, None] != col["index"]
        return (
            {"all": LogSumExp(tokens.max(3).mean(1)), "own": Sum(tokens.max(3).mean(1), ~other)},
            {"all": LogSumExp(tokens.max(1).mean(2)), "own": Sum(tokens.max(1).mean(2), ~other)},
        )

    rows, cols = engine.reduce(tile, {"image": image}, {"text": text}, scale)
    return 0.5 * (jnp.mean(rows["all"] - rows["own"]) + jnp.mean(cols["all"] - cols["own"]))
