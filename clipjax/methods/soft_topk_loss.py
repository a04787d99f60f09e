"""Soft top-k: a row's positives among its k best, and no matter in what order.

Gupta et al. 2023, "Dual-Encoders for Extreme Multi-Label Classification" (arXiv 2310.10636), its second
loss (the first is `DecoupledSoftmax`). Status: the authors' code (nilesh2797/DEXML) read.

A row's similarities s_ij become probabilities p_ij = sigmoid(alpha (s_ij + t_i)), with t_i such that they
sum to k: a soft indicator of the k largest. The loss is the mean over the row's positives of -log p_ij.
t_i is found by bisection, and its gradient is that of the implicit function:
d t_i / d s_ij = -v_ij / sum_j v_ij with v_ij = p_ij (1 - p_ij).

What differs here: columns are the batch's other side instead of all labels, in both directions. The gradient
comes from one Newton step after the bisection, differentiated with its slope held fixed: it moves the
value by rounding, and its derivative is the implicit one. Every halving is a pass over the pairs (without
gradient): with 32 of them the loss costs about eight times a softmax.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from clipjax.errors import ClipjaxError
from clipjax.methods.registry import Method
from clipjax.objectives import Pairwise
from clipjax.objectives.contrast import batch_ids, both_directions, check_share
from clipjax.objectives.pairs import PairEngine, Sum

METHOD = Method(
    id="soft_topk_loss",
    title="Dual-Encoders for Extreme Multi-Label Classification",
    arxiv="2310.10636",
    status="official",
    summary="positives (equal ids) among the k most similar, in whatever order",
)


@dataclasses.dataclass(frozen=True)
class SoftTopK(Pairwise):
    """-log of each positive's share in a soft top-k, averaged over a row's positives (equal `id`)."""

    k: int | None = 5
    """How many are on top; None: as many as the row has positives."""
    alpha: float = 2.0
    """Steepness; the larger, the harder the top-k."""
    halvings: int = 32
    """Steps of the bisection."""
    image_weight: float = 0.5
    """Share of the first side's direction, image-to-text; text-to-image gets the rest."""

    def __post_init__(self):
        check_share(self, "image_weight")
        if self.k is not None and self.k < 1:
            raise ClipjaxError(f"SoftTopK: k={self.k} must be at least 1")
        if self.alpha <= 0 or self.halvings < 1:
            raise ClipjaxError(
                f"SoftTopK: alpha={self.alpha} and halvings={self.halvings} must be positive"
            )

    def __call__(self, encoded, context):
        engine = context.engine
        ids = batch_ids(context.batch, "SoftTopK")
        rows = {"first": encoded.logit_scale * encoded[self.first], "id": ids}
        cols = {"second": encoded[self.second], "id": ids}
        columns = ids.shape[0] // engine.blocks
        if self.k is not None and self.k >= columns:
            raise ClipjaxError(
                f"SoftTopK: k={self.k} must be less than the {columns} columns that a row meets"
            )
        row_shift, col_shift = self.shifts(rows, cols, engine)

        def tile(row, col, shared):
            logits = engine.dot(row["first"], col["second"])
            same = row["id"][:, None] == col["id"]

            def terms(shift):
                nll = jax.nn.softplus(-self.alpha * (logits + shift))
                return {"nll": Sum(nll, same), "positives": Sum(same.astype(jnp.float32))}

            return terms(row["shift"][:, None]), terms(col["shift"])

        rows, cols = engine.reduce(tile, rows | {"shift": row_shift}, cols | {"shift": col_shift})
        row_loss, col_loss = (side["nll"] / side["positives"] for side in (rows, cols))
        metrics = {"positives": jnp.mean(rows["positives"])}
        return both_directions(row_loss, col_loss, self.image_weight), metrics

    def shifts(self, rows, cols, engine: PairEngine) -> tuple[jax.Array, jax.Array]:
        """t of each row and of each column, [N] each, differentiable.

        Args:
          rows: sides `first` [N, E], scaled, and `id` [N].
          cols: sides `second` [N, E] and `id` [N].
        """

        def tile(row, col, shared):
            logits = engine.dot(row["first"], col["second"])
            # With no k of its own, a row's probabilities sum to as much as its positives are.
            taken = (row["id"][:, None] == col["id"]) if self.k is None else 0.0

            def terms(shift):
                p = jax.nn.sigmoid(self.alpha * (logits + shift))
                return {"excess": Sum(p - taken), "slope": Sum(self.alpha * p * (1 - p))}

            return terms(row["shift"][:, None]), terms(col["shift"])

        def measure(shifts, rows, cols):
            """Per side, how much its probabilities exceed k, and how that grows with the shift."""
            sides = engine.reduce(tile, rows | {"shift": shifts[0]}, cols | {"shift": shifts[1]})
            return tuple((side["excess"] - (self.k or 0), side["slope"]) for side in sides)

        held = jax.lax.stop_gradient((rows, cols))
        n = rows["first"].shape[0]
        # Beyond this every probability is less than e^-10 / n, or as near to 1.
        reach = math.prod(_longest(a) for a in (held[0]["first"], held[1]["second"]))
        reach = jnp.broadcast_to(reach + (10 + math.log(n)) / self.alpha, (n,))

        def halve(_, bracket):
            middle = tuple(0.5 * (low + high) for low, high in bracket)
            return tuple(
                (jnp.where(excess < 0, m, low), jnp.where(excess < 0, high, m))
                for m, (low, high), (excess, _) in zip(
                    middle, bracket, measure(middle, *held), strict=True
                )
            )

        bracket = jax.lax.fori_loop(0, self.halvings, halve, ((-reach, reach), (-reach, reach)))
        middle = jax.lax.stop_gradient(tuple(0.5 * (low + high) for low, high in bracket))
        row_shift, col_shift = (
            # A step that is hard to its last digit has no slope, and no gradient.
            m - jnp.where(slope > 1e-6, excess / jax.lax.stop_gradient(jnp.maximum(slope, 1e-6)), 0)
            for m, (excess, slope) in zip(middle, measure(middle, rows, cols), strict=True)
        )
        return row_shift, col_shift


def _longest(a: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.max(jnp.sum(a**2, -1)))
