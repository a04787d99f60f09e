"""Continuously weighted contrastive loss."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from clipjax.batch import field
from clipjax.errors import ClipjaxError
from clipjax.objectives.base import Pairwise
from clipjax.objectives.contrast import both_directions, check_share
from clipjax.objectives.pairs import Expectation, LogSumExp, Reduction


@dataclasses.dataclass(frozen=True)
class Weighted(Pairwise):
    """CWCL: targets of one direction follow the similarities within the frozen ("locked") modality.

    Srinivasa et al. 2023 (arXiv 2309.14580). With u the locked modality's embeddings, w_ij =
    (1 + u_i.u_j) / 2 and the locked side's row i has the target w_ij / sum_j w_ij; the other
    direction is plain InfoNCE. u is the model's own embedding of that modality, or `teacher` [N, any
    width, unit norm] of the batch; no gradient passes to it.
    """

    locked: str = "image"
    """The side whose similarities weight the targets."""
    teacher: str | None = None
    """The field of the batch with the locked side's embeddings (a teacher's, read from a file); None:
    the model's own."""
    sharpness: float = 0.0
    """0: the paper's weights. Otherwise w_ij = exp(sharpness (u_i.u_j - 1)), nearer to plain."""
    locked_weight: float = 0.5
    """Share of the weighted direction. The paper sums both: twice this loss at 0.5."""

    def __post_init__(self):
        check_share(self, "locked_weight")
        if self.locked not in (self.first, self.second):
            raise ClipjaxError(
                f"Weighted: locked={self.locked!r} must be {self.first!r} or {self.second!r}"
            )
        if self.sharpness < 0:
            raise ClipjaxError(f"Weighted: sharpness={self.sharpness} must not be negative")

    def __call__(self, encoded, context):
        engine, locked = context.engine, encoded[self.locked]
        anchor = encoded.logit_scale * locked
        key = encoded[self.second if self.locked == self.first else self.first]
        unit = locked if self.teacher is None else field(context.batch, self.teacher, "Weighted")
        unit = jax.lax.stop_gradient(unit.astype(jnp.float32))

        def tile(row, col, shared):
            logits = engine.dot(row["anchor"], col["key"])
            negatives = LogSumExp(logits, row["index"][:, None] != col["index"])
            terms: dict[str, Reduction] = {"negatives": negatives}
            if self.sharpness:
                closeness = engine.dot(row["unit"], col["unit"])
                weights = jax.lax.stop_gradient(self.sharpness * closeness)
                terms["target"] = Expectation(weights, logits)
            return terms, {"negatives": negatives}

        rows, cols = {"anchor": anchor}, {"key": key}
        if self.sharpness:
            rows, cols = rows | {"unit": unit}, cols | {"unit": unit}
        rows, cols = engine.reduce(tile, rows, cols)
        positive = jnp.sum(anchor * key, -1)
        target = rows["target"] if self.sharpness else _target(anchor, key, unit, engine)
        weighted = jax.nn.softplus(rows["negatives"] - positive) + positive - target
        plain = jax.nn.softplus(cols["negatives"] - positive)
        return both_directions(weighted, plain, self.locked_weight), {}


def _target(anchor, key, unit, engine):
    """sum_j w_ij a_i.k_j / sum_j w_ij with w_ij = (1 + u_i.u_j) / 2, [N], by moments of k and u.

    The double sum factorizes: sum_j u_i.u_j a_i.k_j = a_i (sum_j k_j u_j^T) u_i, a d x d_u matrix.
    """
    a, k, u = (v.reshape(engine.blocks, -1, v.shape[-1]) for v in (anchor, key, unit))

    def product(spec, *arrays):
        return jnp.einsum(spec, *arrays, precision="highest")

    moment = product("gnd,gne->gde", k, u)
    matched = product("gnd,gd->gn", a, k.sum(1)) + jnp.sum(
        product("gnd,gde->gne", a, moment) * u, -1
    )
    return (matched / (a.shape[1] + product("gne,ge->gn", u, u.sum(1)))).reshape(-1)
