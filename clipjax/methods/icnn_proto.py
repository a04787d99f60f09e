"""SuSana Distancia: how well classes lie apart, as a score and as a loss of prototypes.

Mendez-Ruiz et al. 2023, "SuSana Distancia is all you need: Enforcing class separability in metric learning via two
novel distance-based loss functions for few-shot image classification" (arXiv 2305.09062). Status: the authors' loss
file read.

ICNN, the intra-class and nearest-neighbor score, looks at the k nearest neighbors of each example, itself left out:

    r        = distance / distance of the nearest point of another class, over the largest r if that is above 1
    lambda_s = 1 - mean of r over the neighbors of its class
    lambda_d = mean distance of neighbors of other classes / that of the farthest neighbor; 1 where there are none
    gamma    = share of the neighbors that are of its class
    score    = mean of 1/2 (1/2 (lambda_s + lambda_d) + gamma)

1 is perfect. The proto-triplet loss: with p_c the mean of a class and d the Euclidean distance,

    loss = mean of relu(d(q, p_y) - min over c != y of d(q, p_c) + margin)

What differs here: the score is an evaluator of a whole split (as a loss, -log score, its counts have no gradient);
equal points are told by masks, not by a distance of zero; without a neighbor of its class lambda_s is 0. In
`ProtoTriplet` queries are pictures and prototypes the means of their classes' texts in the batch, where the paper
draws episodes of support and query pictures.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from clipjax.batch import field
from clipjax.data import Source, load_eval
from clipjax.errors import ClipjaxError
from clipjax.evals import Evaluator
from clipjax.evals.base import require_at_least
from clipjax.evals.embed import embed_images
from clipjax.methods.registry import Method
from clipjax.objectives import Pairwise

METHOD = Method(
    id="icnn_proto",
    title="SuSana Distancia is all you need: Enforcing class separability in metric learning via "
    "two novel distance-based loss functions for few-shot image classification",
    arxiv="2305.09062",
    status="official",
    summary="how well classes lie apart: a score of neighbors, and prototypes with a margin",
)


@dataclasses.dataclass(frozen=True)
class ProtoTriplet(Pairwise):
    """The first side's rows are nearer to their class's mean of the second side than to any other, by a margin."""

    classes: int = 1000
    """Classes that there are; those that the batch lacks have no prototype."""
    margin: float = 0.5
    """By how much."""
    label: str = "label"
    """The field of the batch with the classes, int32 [B]."""

    def __call__(self, encoded, context):
        label = field(context.batch, self.label, "ProtoTriplet")
        member = jax.nn.one_hot(label, self.classes)
        count = member.sum(0)
        sums = jnp.einsum("nc,nd->cd", member, encoded[self.second], precision="highest")
        prototypes = sums / jnp.maximum(count, 1)[:, None]
        query = encoded[self.first]
        cross = jnp.einsum("nd,cd->nc", query, prototypes, precision="highest")
        squared = jnp.sum(query**2, -1)[:, None] + jnp.sum(prototypes**2, -1)[None, :] - 2 * cross
        distance = jnp.sqrt(jnp.maximum(squared, 1e-12))
        own = jnp.sum(member * distance, 1)
        other = jnp.min(jnp.where((count > 0) & (member == 0), distance, jnp.inf), 1)
        losses = jax.nn.relu(jnp.where(other < jnp.inf, own - other + self.margin, 0.0))
        return jnp.mean(losses), {"proto/accuracy": jnp.mean(own < other)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ICNN(Evaluator):
    """The ICNN score of a labeled split's pictures: `{name}/score`, and its part `{name}/gamma`."""

    source: Source
    """The split."""
    name: str = "icnn"
    """First part of the figures' names."""
    k: int = 4
    """Neighbors of each picture."""
    limit: int | None = 10_000
    """Most records to use (the time grows with the square); None: all."""

    def __post_init__(self):
        require_at_least(self, 1, "k", "limit")

    def run(self, predictor):
        data = load_eval(self.source, predictor.image_size, self.limit, predictor.resize)
        if data.labels is None:
            raise ClipjaxError(f"{self.source} has no labels, which {self.name} asks for")
        rows = np.flatnonzero(data.labels >= 0)
        x = embed_images(predictor, data.images, rows)
        seen = ~data.images.unreadable[rows]
        figures = icnn(x[seen], data.labels[rows[seen]], self.k)
        return {f"{self.name}/{key}": value for key, value in figures.items()}


def icnn(x: np.ndarray, label: np.ndarray, k: int = 4) -> dict[str, float]:
    """`score` and `gamma` of points [n, E] with classes int [n]; k is n - 1 at most.

    Raises:
      ClipjaxError: fewer than two points, or no two classes.
    """
    if len(np.unique(label)) < 2:
        raise ClipjaxError("ICNN compares classes, and there are no two of them")
    x, k = np.asarray(x, np.float64), min(k, len(x) - 1)
    norms = np.square(x).sum(1)
    scores, gammas = [], []
    for i in range(0, len(x), 1024):
        block = slice(i, i + 1024)
        here = np.arange(len(x))[block]
        squared = norms[block, None] + norms - 2 * x[block] @ x.T
        distance = np.sqrt(np.maximum(squared, 0))
        same = label[block, None] == label
        foreign = np.where(same, np.inf, distance).min(1, keepdims=True)
        distance[np.arange(len(here)), here] = np.inf
        near = np.argpartition(distance, k - 1, axis=1)[:, :k]
        d, own = (np.take_along_axis(a, near, 1) for a in (distance, same))
        ratio = np.where(own, d / np.maximum(foreign, 1e-12), 0)
        ratio /= np.maximum(ratio.max(1, keepdims=True), 1)
        kin = own.sum(1)
        lambda_s = np.where(kin > 0, 1 - ratio.sum(1) / np.maximum(kin, 1), 0)
        others = np.where(own, 0, d).sum(1) / np.maximum(k - kin, 1)
        lambda_d = np.where(kin < k, others / np.maximum(d.max(1), 1e-12), 1)
        gammas.append(kin / k)
        scores.append(((lambda_s + lambda_d) / 2 + gammas[-1]) / 2)
    return {
        "score": float(np.concatenate(scores).mean()),
        "gamma": float(np.concatenate(gammas).mean()),
    }
