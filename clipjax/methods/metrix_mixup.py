"""Metrix: mixup for losses on pairs.

Venkataramanan et al. 2021, "It Takes Two to Tango: Mixup for Deep Metric Learning" (arXiv 2106.04990). Status: the
authors' code (billpsomas/Metrix_ICLR22) read, of which one variant is released.

An element mixed of two, l x + (1 - l) x', is a positive of whatever is a positive of x with weight l, and of what
is one of x' with weight 1 - l.

What differs here: the closest form on image-text pairs. Texts' embeddings are mixed with those of a random
permutation p of the batch: v_i' = unit(l v_i + (1 - l) v_p(i)), l ~ Beta(2, 2) once a step; each image k has the
soft target l on i = k and 1 - l on p(i) = k. It is added to the plain loss with the paper's weight of 0.4.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from clipjax.errors import ClipjaxError
from clipjax.methods.registry import Method
from clipjax.objectives import Pairwise
from clipjax.objectives.contrast import both_directions, unit
from clipjax.objectives.pairs import LogSumExp

METHOD = Method(
    id="metrix_mixup",
    title="It Takes Two to Tango: Mixup for Deep Metric Learning",
    arxiv="2106.04990",
    status="official",
    summary="mixed texts with mixed targets",
)


@dataclasses.dataclass(frozen=True)
class MixedContrast(Pairwise):
    """InfoNCE against mixed embeddings of the second side, whose targets are mixed alike."""

    concentration: float = 2.0
    """Both parameters of the Beta distribution of the share."""
    share: float | None = None
    """A fixed share of the own element instead of a drawn one."""

    def __post_init__(self):
        if self.concentration <= 0:
            raise ClipjaxError(f"MixedContrast: concentration={self.concentration} must be above 0")

    def __call__(self, encoded, context):
        engine, n = context.engine, len(encoded[self.first])
        share_key, order_key = jax.random.split(context.key)
        share = (
            jax.random.beta(share_key, self.concentration, self.concentration)
            if self.share is None
            else jnp.float32(self.share)
        )
        partner = jax.random.permutation(order_key, n).astype(jnp.int32)
        whose = jnp.argsort(partner).astype(jnp.int32)  # where each one is the partner
        first, second = encoded.logit_scale * encoded[self.first], encoded[self.second]
        mixed = unit(share * second + (1 - share) * engine.rows_at(second, partner))

        def tile(row, col, shared):
            terms = {"all": LogSumExp(engine.dot(row["first"], col["mixed"]))}
            return terms, terms

        rows, cols = engine.reduce(tile, {"first": first}, {"mixed": mixed})
        own = jnp.sum(first * mixed, -1)
        # Of a row, the column in which it is the partner; of a column, its partner's row.
        other_of_row = jnp.sum(first * engine.rows_at(mixed, whose), -1)
        other_of_col = jnp.sum(engine.rows_at(first, partner) * mixed, -1)
        loss = both_directions(
            rows["all"] - share * own - (1 - share) * other_of_row,
            cols["all"] - share * own - (1 - share) * other_of_col,
            0.5,
        )
        return loss, {}
