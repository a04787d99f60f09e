"""AMCL: several heads, and a temperature for each pair in each head.

Wang et al. 2023, "Adaptive Multi-head Contrastive Learning" (arXiv 2310.05615). Status: reconstructed: heads and
temperatures follow code that was read (LeiWangR/cl); its loss does not run, and that here is rebuilt.

C heads read an encoder. The temperature of a pair in head h is

    tau_ij = low + (high - low) sigmoid(MLP_h([z_i, z_j]))

and the loss is, summed over heads, InfoNCE with logits z_i.z_j / tau_ij plus beta times the mean over all pairs
of (k / 2) log tau_ij + 1 / tau_ij, which alone would set tau to 2 / k.

What differs here: heads of the image tower are compared with those of the text tower. k is the heads' width (in
the code that was read it comes out as the batch size). low is 0.01 instead of 1e-5, whose logits would be
in the hundred thousands. The MLP's first layer is applied to each side alone, [z_i, z_j] W = z_i W' + z_j W'',
and its second is no layer: the weights of units (max(0, .)) go into the first, all but their signs, which are +1 and
-1 in turn. It can be any MLP of that form, and a tile adds and squashes: still `hidden` numbers a pair.
Add it to a contrastive loss of the embeddings, which retrieval reads.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from clipjax.errors import ClipjaxError
from clipjax.methods.registry import Method
from clipjax.models import Head, MlpHead
from clipjax.objectives import Pairwise
from clipjax.objectives.contrast import both_directions, check_share
from clipjax.objectives.pairs import LogSumExp, PairEngine, Side, Sum

METHOD = Method(
    id="amcl",
    title="Adaptive Multi-head Contrastive Learning",
    arxiv="2310.05615",
    status="reconstructed",
    summary="several projection heads, each with a learned temperature for every pair",
)


def heads(count: int = 3, hidden: int = 512, width: int = 128) -> tuple[Head, ...]:
    """The heads that `AMCL(count=count)` reads, for `Headed`: of both encoders, and what temperatures are of.

    Args:
      count: how many heads an encoder has.
      hidden: of a head's hidden layer.
      width: of a head's output, and of the hidden layer of its temperatures' MLP.
    """
    return tuple(
        head
        for encoder in ("image", "text")
        for h in range(count)
        for head in (
            MlpHead(f"amcl_{h}", of=encoder, reads="embedding", widths=(hidden, width)),
            MlpHead(f"temperature_{h}", of=encoder, reads=f"amcl_{h}", widths=(width,), unit=False),
        )
    )


@dataclasses.dataclass(frozen=True)
class AMCL(Pairwise):
    """InfoNCE in several heads, with a temperature for each pair; the model needs `heads(count)`."""

    count: int = 3
    """How many heads."""
    low: float = 0.01
    """The least temperature."""
    high: float = 2.0
    """The greatest temperature."""
    beta: float = 0.1
    """Weight of the temperatures' regularizer."""
    image_weight: float = 0.5
    """Share of the first side's direction, image-to-text; text-to-image gets the rest."""

    def __post_init__(self):
        check_share(self, "image_weight")
        if self.count < 1 or not 0 < self.low <= self.high:
            raise ClipjaxError(
                f"AMCL: count={self.count} must be at least 1 and low={self.low} positive and no more "
                f"than high={self.high}"
            )

    @property
    def needs(self):
        return frozenset(
            f"{side}_{name}_{h}"
            for side in (self.first, self.second)
            for name in ("amcl", "temperature")
            for h in range(self.count)
        )

    def __call__(self, encoded, context):
        loss, metrics = jnp.zeros((), jnp.float32), {}
        for h in range(self.count):
            first, second = (
                {"z": encoded[f"{side}_amcl_{h}"], "hidden": encoded[f"{side}_temperature_{h}"]}
                for side in (self.first, self.second)
            )
            contrast, regularizer, mean = self.in_head(first, second, context.engine)
            loss += contrast + self.beta * regularizer
            metrics[f"amcl/temperature_{h}"] = mean
        return loss, metrics

    def in_head(self, first: Side, second: Side, engine: PairEngine) -> tuple[jax.Array, ...]:
        """InfoNCE, the regularizer and the mean temperature of one head, [] each.

        Args:
          first: `z` [N, E], a head's output, and `hidden` [N, H], its share of the temperatures' MLP.
          second: the same of the other side.
          engine: how pairs are reduced.
        """
        width = first["z"].shape[-1]

        def tile(row, col, shared):
            hidden = jax.nn.relu(row["hidden"][:, None] + col["hidden"])  # [R, C, H]
            raw = jnp.sum(hidden[..., ::2], -1) - jnp.sum(hidden[..., 1::2], -1)
            tau = self.low + (self.high - self.low) * jax.nn.sigmoid(raw)
            logits = engine.dot(row["z"], col["z"]) / tau
            own = row["index"][:, None] == col["index"]
            negatives = {"negatives": LogSumExp(logits, ~own)}
            return negatives | {
                "positive": Sum(logits, own),
                "regularizer": Sum(0.5 * width * jnp.log(tau) + 1 / tau),
                "temperature": Sum(tau),
            }, negatives

        rows, cols = engine.reduce(tile, first, second)
        # One reduction gives the positives: a pair is a row's own and a column's own at once.
        row_loss, col_loss = (
            jax.nn.softplus(side["negatives"] - rows["positive"]) for side in (rows, cols)
        )
        columns = len(first["z"]) // engine.blocks
        return (
            both_directions(row_loss, col_loss, self.image_weight),
            jnp.mean(rows["regularizer"]) / columns,
            jnp.mean(rows["temperature"]) / columns,
        )
