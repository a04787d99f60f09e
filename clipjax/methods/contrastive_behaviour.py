"""Understanding the Behaviour of Contrastive Loss: hard negatives alone, and what temperature trades.

Wang and Liu 2020 (arXiv 2012.09740). Status: second hand (notes on the paper; the algebra derived again).

A row's negatives are pushed away in proportion to r_ij = exp(s_ij) / sum_{k != i} exp(s_ik), so the
temperature decides how many of them count. The paper makes that choice explicit: `HardContrast` keeps
the negatives at or above the row's upper quantile of similarity,

    L_i = -log(exp(s_ii) / (exp(s_ii) + sum_{j != i, s_ij >= q_i} exp(s_ij))),

and its "hard simple" loss is -c_ii + simple * mean of the kept c_ij. `Behaviour` measures the two ends of
the dilemma: uniformity is in `Diagnostics`; tolerance is the mean over pairs of examples of a_i.a_j where
they share a label, 0 elsewhere; exp(entropy of r_i) is the number of negatives that count.

What differs here: image-text pairs instead of two views of an image, both directions. The threshold lies
halfway between the last similarity kept and the first left out, so that rounding cannot move it. The k
largest of each row are kept meanwhile, 8 bytes each, so choose a share that leaves k in the hundreds.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from clipjax.batch import field
from clipjax.errors import ClipjaxError
from clipjax.methods.registry import Method
from clipjax.objectives import Pairwise
from clipjax.objectives.contrast import both_directions, check_share
from clipjax.objectives.pairs import Expectation, LogSumExp, Sum, TopK

METHOD = Method(
    id="contrastive_behaviour",
    title="Understanding the Behaviour of Contrastive Loss",
    arxiv="2012.09740",
    status="second hand",
    summary="a row's hardest negatives alone; tolerance and the number of negatives that count",
)


@dataclasses.dataclass(frozen=True)
class HardContrast(Pairwise):
    """InfoNCE over the hardest negatives of each row."""

    share: float = 0.05
    """Share of a row's negatives that is kept, the hardest, at least one; 1 is InfoNCE."""
    simple: float | None = None
    """None: the contrastive loss. A number: the hard simple loss, with this weight of its negatives;
    it compares cosines, without the model's scale."""
    image_weight: float = 0.5
    """Share of the first side's direction, image-to-text; text-to-image gets the rest."""

    def __post_init__(self):
        check_share(self, "share", "image_weight")

    def __call__(self, encoded, context):
        engine, second = context.engine, encoded[self.second]
        scale = encoded.logit_scale if self.simple is None else 1.0
        first = scale * encoded[self.first]
        others = first.shape[0] // engine.blocks - 1
        if others < 1:
            raise ClipjaxError("HardContrast needs at least two rows in a batch (or group)")
        row_cut, col_cut = thresholds(first, second, max(round(self.share * others), 1), engine)

        def tile(row, col, shared):
            logits = engine.dot(row["first"], col["second"])
            other = row["index"][:, None] != col["index"]

            def terms(kept):
                if self.simple is None:
                    return {"negatives": LogSumExp(logits, kept)}
                return {"negatives": Expectation(jnp.zeros_like(logits), logits, kept)}

            return (
                terms(other & (logits >= row["cut"][:, None])),
                terms(other & (logits >= col["cut"])),
            )

        rows, cols = engine.reduce(
            tile, {"first": first, "cut": row_cut}, {"second": second, "cut": col_cut}
        )
        positive = jnp.sum(first * second, -1)

        def loss(side):
            if self.simple is None:
                return jax.nn.softplus(side["negatives"] - positive)
            return self.simple * side["negatives"] - positive

        return both_directions(loss(rows), loss(cols), self.image_weight), {}


def thresholds(first, second, count: int, engine) -> tuple[jax.Array, jax.Array]:
    """What parts the `count` largest a_i.b_j, j != i, from the others: of each row and column, [N] each.

    No gradient passes. -inf where there are no more than `count`.
    """

    def tile(row, col, shared):
        logits = engine.dot(row["first"], col["second"])
        top = TopK(logits, count + 1, row["index"][:, None] != col["index"])
        return {"top": top}, {"top": top}

    rows, cols = engine.reduce(
        tile,
        {"first": jax.lax.stop_gradient(first)},
        {"second": jax.lax.stop_gradient(second)},
    )
    row_cut, col_cut = (
        0.5 * (side["top"].value[:, count - 1] + side["top"].value[:, count])
        for side in (rows, cols)
    )
    return row_cut, col_cut


@dataclasses.dataclass(frozen=True)
class Behaviour(Pairwise):
    """Adds metrics to a run and nothing to its loss: `HardContrast() + Behaviour()`.

    `negatives/image_to_text`, how many negatives of a row count, exp of the entropy of r_i, mean over
    rows (and text to image); `tolerance/image`, mean over pairs i != j of a_i.a_j where both have the
    same label; `closeness/image`, the mean over those pairs alone. Labels below 0 are unknown.
    """

    label: str = "label"
    """Field of the batch with a class, whole numbers [B]: `Array("label", dtype="int32")`."""

    def __call__(self, encoded, context):
        engine, scale = context.engine, jax.lax.stop_gradient(encoded.logit_scale)
        first, second = (jax.lax.stop_gradient(encoded[n]) for n in (self.first, self.second))
        label = field(context.batch, self.label, "Behaviour")

        def tile(row, col, shared):
            other = row["index"][:, None] != col["index"]
            logits = engine.dot(row["scaled"], col["second"])
            same = other & (row["label"][:, None] == col["label"]) & (col["label"] >= 0)
            terms = {
                "log_sum": LogSumExp(logits, other),
                "mean": Expectation(logits, logits, other),
            }
            return terms | {
                "first": Sum(engine.dot(row["first"], col["first"]), same),
                "second": Sum(engine.dot(row["second"], col["second"]), same),
                "same": Sum(same.astype(jnp.float32)),
            }, terms

        both = {"first": first, "second": second, "label": label}
        rows, cols = engine.reduce(tile, both | {"scaled": scale * first}, both)
        same = jnp.sum(rows["same"])
        pairs = first.shape[0] * (first.shape[0] // engine.blocks - 1)
        metrics = {}
        for a, b, side in ((self.first, self.second, rows), (self.second, self.first, cols)):
            metrics[f"negatives/{a}_to_{b}"] = jnp.mean(jnp.exp(side["log_sum"] - side["mean"]))
        for name, side in ((self.first, "first"), (self.second, "second")):
            total = jnp.sum(rows[side])
            metrics[f"tolerance/{name}"] = total / max(pairs, 1)
            metrics[f"closeness/{name}"] = total / jnp.maximum(same, 1)
        return jnp.zeros((), jnp.float32), metrics
