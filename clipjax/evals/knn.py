"""k nearest neighbors: what class do the pictures have that embed nearby?"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from clipjax.errors import ClipjaxError
from clipjax.evals.features import FeatureEvaluator, Labeled, accuracies
from clipjax.evals.logistic import spread
from clipjax.mesh import BATCH_AXES, batch_shards

QUERIES = 1024  # embeddings that look for their neighbors at a time


@dataclasses.dataclass(frozen=True, kw_only=True)
class KNN(FeatureEvaluator):
    """Votes of the k nearest training pictures, by cosine similarity.

    Weighted, a neighbor's vote counts exp(similarity / temperature), as in DINO (arXiv:2104.14294)
    after Wu et al. (arXiv:1805.01978): `{name}/top1`, `{name}/top5`, `{name}/mean_per_class`.
    Plain, every vote counts 1: `{name}/plain/top1` and so on. Equal votes count against the model.
    """

    name: str = "knn"
    """First part of the figures' names."""
    k: int = 20
    """Neighbors that vote."""
    temperature: float = 0.07
    """Of the weights."""

    def __post_init__(self):
        super().__post_init__()
        if self.k < 1:
            raise ClipjaxError(f"{self.name}: k={self.k} must be at least 1")
        if not self.temperature > 0:
            raise ClipjaxError(f"{self.name}: temperature={self.temperature} must be positive")

    def measure(
        self, train: Labeled, test: Labeled, classes: int, mesh: Mesh | None
    ) -> dict[str, float]:
        index, score = nearest(_unit(test.x), _unit(train.x), self.k, mesh)
        # From the nearest neighbor down: a common factor changes no vote, and nothing overflows.
        weight = np.exp((score - score[:, :1]) / self.temperature)
        voted = train.y[index]
        weighted = accuracies(votes(voted, weight, classes), test.y)
        plain = accuracies(votes(voted, np.ones_like(weight), classes), test.y)
        return weighted | {f"plain/{key}": value for key, value in plain.items()}


def _unit(x: np.ndarray) -> np.ndarray:
    """Rows of unit norm, as embeddings are already."""
    norm = np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True)
    return np.where(np.abs(norm - 1) < 1e-5, x, x / np.maximum(norm, 1e-12)).astype(np.float32)


def votes(label: np.ndarray, weight: np.ndarray, classes: int) -> np.ndarray:
    """[n, C]: the summed weights [n, k] of the neighbors with each label [n, k]."""
    rows = np.arange(len(label))[:, None] * classes
    flat = np.bincount(
        (rows + label).ravel(), weights=weight.ravel(), minlength=len(label) * classes
    )
    return flat.reshape(len(label), classes)


def nearest(
    query: np.ndarray, bank: np.ndarray, k: int, mesh: Mesh | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest rows of a bank, best first; equal similarities in order of index.

    The devices, each with its share of the bank, find their best 2 k in float32; then each, of its
    share of the queries, the best 2 k of all devices'. Only these come to the host, to be ordered by
    float64 similarities: neither its memory nor a device's grows with the number of devices.

    Args:
      query: [q, E].
      bank: [m, E].
      k: how many, cut down to m.
      mesh: what the bank is split over; None: the default device.

    Returns:
      (index [q, k] int64, similarity [q, k] float64: dot products).
    """
    shards = 1 if mesh is None else batch_shards(mesh)
    padded = np.pad(np.asarray(bank, np.float32), ((0, -len(bank) % shards), (0, 0)))
    placed = spread(padded, mesh)
    find = _finder(mesh, 2 * k, len(bank))
    indices, similarities = [], []
    rows = -(-min(QUERIES, len(query)) // shards) * shards  # at a time, as many of each device
    for start in range(0, len(query), rows):
        part = np.asarray(query[start : start + rows], np.float32)
        block = np.pad(part, ((0, rows - len(part)), (0, 0)))
        candidates = np.asarray(find(block, placed))[: len(part)]
        # In order of index, for the stable sort to break ties by it; what pads the bank comes last.
        candidates = np.sort(candidates, axis=1)
        there = np.minimum(candidates, len(bank) - 1)
        exact = np.einsum(
            "qe,qke->qk", part.astype(np.float64), np.asarray(bank)[there].astype(np.float64)
        )
        exact[candidates >= len(bank)] = -np.inf
        best = np.argsort(-exact, axis=1, kind="stable")[:, : min(k, len(bank))]
        indices.append(np.take_along_axis(there, best, axis=1))
        similarities.append(np.take_along_axis(exact, best, axis=1))
    return np.concatenate(indices), np.concatenate(similarities)


@functools.lru_cache(maxsize=8)
def _finder(mesh: Mesh | None, count: int, size: int):
    """Compiled: queries [q, E] and the bank -> the rows [q, count] of the best, fewer if there are fewer."""

    def local(query, bank, shard):
        index = shard * bank.shape[0] + jnp.arange(bank.shape[0])
        score = jnp.matmul(query, bank.T, precision=jax.lax.Precision.HIGHEST)
        score, best = jax.lax.top_k(
            jnp.where(index < size, score, -jnp.inf), min(count, bank.shape[0])
        )
        return score, shard * bank.shape[0] + best

    def best_of_all(query, bank):
        score, index = local(query, bank, jax.lax.axis_index(BATCH_AXES))
        # Of [q, count] here, to [q / shards, count x shards]: a share of the queries, from everywhere.
        score, index = (
            jax.lax.all_to_all(x, BATCH_AXES, split_axis=0, concat_axis=1, tiled=True)
            for x in (score, index)
        )
        best = jax.lax.top_k(score, min(count, score.shape[1]))[1]
        return jnp.take_along_axis(index, best, axis=1)

    if mesh is None:
        return jax.jit(lambda query, bank: local(query, bank, 0)[1])
    rows = PartitionSpec(BATCH_AXES)
    each = jax.shard_map(
        best_of_all,
        mesh=mesh,
        in_specs=(PartitionSpec(), rows),
        out_specs=rows,
        check_vma=False,
    )
    return jax.jit(each, out_shardings=jax.NamedSharding(mesh, PartitionSpec()))
