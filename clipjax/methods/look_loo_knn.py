"""LOOK: the leave-one-out error of a k-nearest-neighbor classifier as a loss.

Feng et al. 2021, "Rethinking supervised pre-training for better downstream transferring" (arXiv 2110.06014). Status:
reconstructed from the abstract and a summary (a weighted k-NN classifier whose leave-one-out error is minimized); no
code was found, and neither k nor the temperature of the paper is known.

With s_ij the cosine of rows i and j, and N_k(i) the k rows nearest to i but itself (chosen without gradient),

    loss_i = -log( sum over j in N_k(i) of the class of i of exp(s_ij / tau) / sum over all j in N_k(i) )

A class may have several modes: its far members are not among the neighbors, and nothing pulls at them.

What differs here: neighbors come from the batch alone, which is large, not from a queue; a row none of whose
neighbors is of its class gets the nearest row of its class beside them (`rescue`), or else is left out.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from clipjax.batch import field
from clipjax.errors import ClipjaxError
from clipjax.methods.registry import Method
from clipjax.objectives import Pairwise
from clipjax.objectives.pairs import ArgMax, TopK

METHOD = Method(
    id="look_loo_knn",
    title="Rethinking supervised pre-training for better downstream transferring",
    arxiv="2110.06014",
    status="reconstructed",
    summary="the k nearest rows of the batch must be of the row's own class",
)


@dataclasses.dataclass(frozen=True)
class LOOK(Pairwise):
    """Leave-one-out k-NN among pictures; `LOOK("image", "text")` looks for neighbors among the texts."""

    second: str = "image"
    """Where neighbors are looked for; the row itself is none."""
    label: str = "label"
    """The field of the batch with the classes, int32 [B]."""
    k: int = 20
    """Neighbors of a row."""
    temperature: float = 0.1
    """tau."""
    rescue: bool = True
    """Whether the nearest row of the own class counts where no neighbor is of it."""

    def __post_init__(self):
        if self.k < 1 or self.temperature <= 0:
            raise ClipjaxError(
                f"LOOK: k={self.k} must be at least 1 and temperature={self.temperature} above 0"
            )

    def __call__(self, encoded, context):
        engine, k = context.engine, self.k
        label = field(context.batch, self.label, "LOOK")
        z = encoded[self.first] / self.temperature
        cols = {"z": encoded[self.second], "label": label}

        def tile(row, col, shared):
            similarity = engine.dot(row["z"], col["z"])
            other = row["index"][:, None] != col["index"]
            kin = other & (row["label"][:, None] == col["label"])
            return {"near": TopK(similarity, k, other), "kin": ArgMax(similarity, kin)}, {}

        chosen, _ = engine.reduce(tile, {"z": z, "label": label}, cols)
        index = jnp.concatenate([chosen["near"].index, chosen["kin"].index[:, None]], 1)
        found = jax.tree.map(
            lambda x: x.reshape(*index.shape, *x.shape[1:]),
            engine.rows_at(cols, index.reshape(-1)),
        )
        own = (found["label"] == label[:, None]) & (index >= 0)
        near = jnp.arange(k + 1) < k
        rescued = self.rescue & ~near & ~jnp.any(own & near, 1, keepdims=True)
        counts = (near & (index >= 0)) | (rescued & own)
        own &= counts
        right = jnp.any(own, 1, keepdims=True)
        similarity = jnp.einsum("nd,nkd->nk", z, found["z"], precision="highest")

        def log_sum(where):
            # Rows that are left out take all of their places, so that their two sums are one.
            return jax.nn.logsumexp(jnp.where(where | ~right, similarity, -1e30), axis=1)

        losses = log_sum(counts) - log_sum(own)
        weights = jnp.where(counts, jax.nn.softmax(jnp.where(counts, similarity, -1e30)), 0)
        same = found["label"][:, :, None] == found["label"][:, None]
        guess = jnp.argmax(jnp.einsum("nkl,nl->nk", same, weights), 1)
        hit = jnp.take_along_axis(own, guess[:, None], 1)
        metrics = {"look/accuracy": jnp.mean(hit), "look/counted": jnp.mean(right)}
        return jnp.sum(losses) / jnp.maximum(jnp.sum(right), 1), metrics
