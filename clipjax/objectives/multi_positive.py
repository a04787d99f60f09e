"""Contrastive losses for rows with several positives, known by equal `id`."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from clipjax.objectives.base import Pairwise
from clipjax.objectives.contrast import batch_ids, both_directions, check_share
from clipjax.objectives.pairs import LogSumExp, PairEngine, Sum


@dataclasses.dataclass(frozen=True)
class MultiPositive(Pairwise):
    """Softmax cross-entropy with the target spread evenly over a row's positives.

    The supervised contrastive loss (Khosla et al. 2020, arXiv 2004.11362, "out" form) between
    modalities, as in UniCL (Yang et al. 2022, arXiv 2204.03610). Needs `id` in the batch.
    """

    image_weight: float = 0.5
    """Share of the first side's direction, image-to-text; text-to-image gets the rest."""

    def __post_init__(self):
        check_share(self, "image_weight")

    def __call__(self, encoded, context):
        engine = context.engine
        ids = batch_ids(context.batch, "MultiPositive")
        rows = {"first": encoded.logit_scale * encoded[self.first], "id": ids}
        cols = {"second": encoded[self.second], "id": ids}

        def tile(row, col, shared):
            logits = engine.dot(row["first"], col["second"])
            same = row["id"][:, None] == col["id"]
            terms = {
                "negatives": LogSumExp(logits, ~same),
                "positives": LogSumExp(logits, same),
                "sum": Sum(logits, same),
                "count": Sum(same.astype(jnp.float32)),
            }
            return terms, terms

        def loss(side):
            mean = side["sum"] / side["count"]
            return jax.nn.softplus(side["negatives"] - side["positives"]) + side["positives"] - mean

        rows, cols = engine.reduce(tile, rows, cols)
        metrics = {"positives": jnp.mean(rows["count"])}
        return both_directions(loss(rows), loss(cols), self.image_weight), metrics


@dataclasses.dataclass(frozen=True)
class DecoupledSoftmax(Pairwise):
    """Each positive against the row's negatives alone, averaged over the row's positives.

    Gupta et al. 2023 (arXiv 2310.10636): a row with k positives need not split its probability k
    ways. Needs `id` in the batch. Two passes over the tiles: a positive's term needs all negatives.
    """

    image_weight: float = 0.5
    """Share of the first side's direction, image-to-text; text-to-image gets the rest."""

    def __post_init__(self):
        check_share(self, "image_weight")

    def __call__(self, encoded, context):
        engine = context.engine
        ids = batch_ids(context.batch, "DecoupledSoftmax")
        rows = {"first": encoded.logit_scale * encoded[self.first], "id": ids}
        cols = {"second": encoded[self.second], "id": ids}
        row_stats, col_stats = _negatives_by_id(rows, cols, engine)

        def tile(row, col, shared):
            logits = engine.dot(row["first"], col["second"])
            same = row["id"][:, None] == col["id"]
            count = Sum(same.astype(jnp.float32))
            return (
                {"sum": Sum(jax.nn.softplus(row["out"][:, None] - logits), same), "count": count},
                {"sum": Sum(jax.nn.softplus(col["out"] - logits), same), "count": count},
            )

        rows, cols = engine.reduce(tile, rows | {"out": row_stats}, cols | {"out": col_stats})
        first_loss, second_loss = (side["sum"] / side["count"] for side in (rows, cols))
        metrics = {"positives": jnp.mean(rows["count"])}
        return both_directions(first_loss, second_loss, self.image_weight), metrics


def _negatives_by_id(rows, cols, engine: PairEngine) -> tuple[jax.Array, jax.Array]:
    """log sum exp of the logits of other ids, per row and per column."""

    def tile(row, col, shared):
        logits = engine.dot(row["first"], col["second"])
        term = LogSumExp(logits, row["id"][:, None] != col["id"])
        return {"out": term}, {"out": term}

    row_stats, col_stats = engine.reduce(tile, rows, cols)
    return row_stats["out"], col_stats["out"]
