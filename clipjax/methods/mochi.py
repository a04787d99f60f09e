"""MoCHi: hard negatives mixed from the hardest there are.

Kalantidis et al. 2020, "Hard Negative Mixing for Contrastive Learning" (arXiv 2010.01028). Status: second hand (an
unofficial implementation read).

For a query q, the `hard` largest negatives are pooled. `mixed` vectors unit(a n_i + (1 - a) n_j), a ~ U(0, 1), and
`with_query` vectors unit(b q + (1 - b) n_j), b ~ U(0, 1/2), of random members of the pool are further negatives of
this query alone. Gradients pass through the query, not through what is mixed.

What differs here: image-text pairs; the pool comes from the batch, not from a queue; rows of equal `id` never enter
it, nor do those more similar than `cap`, since of image-text pairs many fit each other.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from clipjax.batch import field
from clipjax.errors import ClipjaxError
from clipjax.methods.registry import Method
from clipjax.objectives import Pairwise
from clipjax.objectives.contrast import both_directions, unit
from clipjax.objectives.pairs import LogSumExp, TopK

METHOD = Method(
    id="mochi",
    title="Hard Negative Mixing for Contrastive Learning",
    arxiv="2010.01028",
    status="second hand",
    summary="further negatives of each row, mixed from its hardest",
)


@dataclasses.dataclass(frozen=True)
class MoCHi(Pairwise):
    """InfoNCE with synthetic negatives."""

    hard: int = 32
    """Negatives in a row's pool."""
    mixed: int = 16
    """Synthetic negatives of two members of the pool."""
    with_query: int = 16
    """Synthetic negatives of the query and a member of the pool."""
    cap: float = 1.0
    """Largest cosine similarity of a member of the pool to the query."""
    start: int = 0
    """Step from which on there are synthetic negatives."""

    def __post_init__(self):
        if self.hard < 1 or self.mixed < 0 or self.with_query < 0:
            raise ClipjaxError(
                f"MoCHi: hard={self.hard} must be at least 1, mixed={self.mixed} and "
                f"with_query={self.with_query} not negative"
            )

    def __call__(self, encoded, context):
        engine, scale = context.engine, encoded.logit_scale
        first, second = encoded[self.first], encoded[self.second]
        ids = field(context.batch, "id", "MoCHi")

        def tile(row, col, scale):
            cosine = engine.dot(row["unit"], col["unit"])
            other = row["index"][:, None] != col["index"]
            strange = (row["id"][:, None] != col["id"]) & (cosine <= self.cap)
            terms = {
                "negatives": LogSumExp(scale * cosine, other),
                "pool": TopK(cosine, self.hard, strange),
            }
            return terms, terms

        sides = {"unit": first, "id": ids}, {"unit": second, "id": ids}
        rows, cols = engine.reduce(tile, *sides, scale)
        positive = scale * jnp.sum(first * second, -1)
        keys = jax.random.split(context.key)

        def loss(query, keys_of, seen, key):
            synthetic = self._synthetic(query, keys_of, seen["pool"].index, key, engine)
            logits = jnp.where(synthetic[1], scale * synthetic[0], -jnp.inf)
            logits = jnp.where(context.step >= self.start, logits, -jnp.inf)
            everything = jnp.concatenate([seen["negatives"][:, None], logits], 1)
            return jax.nn.softplus(jax.nn.logsumexp(everything, 1) - positive)

        first_loss = loss(first, second, rows, keys[0])
        second_loss = loss(second, first, cols, keys[1])
        return both_directions(first_loss, second_loss, 0.5), {}

    def _synthetic(self, query, others, index, key, engine):
        """Similarities [N, mixed + with_query] of the query to what is mixed, and which of them count."""
        rows, hard = index.shape
        pool = engine.rows_at(jax.lax.stop_gradient(others), index.reshape(-1))
        pool = pool.reshape(rows, hard, -1)
        key_i, key_j, key_a, key_b = jax.random.split(key, 4)
        count = self.mixed + self.with_query
        j = jax.random.randint(key_j, (rows, count), 0, hard)
        i = jax.random.randint(key_i, (rows, self.mixed), 0, hard)
        a = jax.random.uniform(key_a, (rows, self.mixed, 1))
        b = jax.random.uniform(key_b, (rows, self.with_query, 1), maxval=0.5)

        def member(at):
            return jnp.take_along_axis(pool, at[..., None], 1)

        partner = member(j)
        itself = jax.lax.stop_gradient(query)[:, None]
        made = jnp.concatenate(
            [
                a * member(i) + (1 - a) * partner[:, : self.mixed],
                b * itself + (1 - b) * partner[:, self.mixed :],
            ],
            1,
        )
        there = jnp.take_along_axis(index, j, 1) >= 0
        there &= jnp.pad(
            jnp.take_along_axis(index, i, 1) >= 0,
            ((0, 0), (0, self.with_query)),
            constant_values=True,
        )
        return jnp.einsum("nd,nkd->nk", query, unit(made), precision="highest"), there
