"""Pairwise sigmoid loss."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from clipjax.errors import ClipjaxError
from clipjax.objectives.base import Pairwise
from clipjax.objectives.contrast import batch_ids
from clipjax.objectives.pairs import Similarities, Sum


@dataclasses.dataclass(frozen=True)
class Sigmoid(Pairwise):
    """Binary cross-entropy of every pair, summed over texts and averaged over images.

    SigLIP (Zhai et al. 2023, arXiv 2303.15343): -1/N sum_ij log sigmoid(z_ij (scale x_i.y_j +
    bias)), z = 1 for positives and -1 otherwise. The model must have a `logit_bias`.
    """

    positives_by_id: bool = False
    """Pairs with equal `id` are positives too (several captions of one image), not only i = j."""

    def __call__(self, encoded, context):
        engine = context.engine
        if encoded.logit_bias is None:
            raise ClipjaxError(
                "Sigmoid needs a model with a logit_bias: without one, the N - 1 negatives of each "
                "row swamp the loss at the start (SigLIP starts at -10)"
            )
        rows = {"first": encoded.logit_scale * encoded[self.first]}
        cols = {"second": encoded[self.second]}
        key = "index"
        if self.positives_by_id:
            key = "id"
            ids = batch_ids(context.batch, "Sigmoid(positives_by_id=True)")
            rows, cols = rows | {"id": ids}, cols | {"id": ids}

        def terms(similarities, row, col, bias):
            logits = similarities + bias
            positive = row[key][:, None] == col[key]
            return {"loss": Sum(jax.nn.softplus(jnp.where(positive, -logits, logits)))}, {}

        # On an H200, 65,536 pairs of 768 channels took 99 ms against 75 (softmax: 58 against 69).
        tile = Similarities(engine.dot, "first", "second", terms, slow_on=("gpu",))
        stats, _ = engine.reduce(tile, rows, cols, encoded.logit_bias)
        return jnp.mean(stats["loss"]), {}
