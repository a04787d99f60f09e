"""It's Not a Modality Gap: alignment and uniformity, within the modalities and between them.

Fahim et al. 2024, "It's Not a Modality Gap: Characterizing and Addressing the Contrastive Gap" (arXiv
2405.18570). Status: the authors' code (abrar-fahim/contrastive-gap) read.

To CLIP's loss come three terms, each of weight 1:

    align    mean_i ||x_i - y_i||^2
    uniform  mean of log mean_{i != j} exp(-2 ||x_i - x_j||^2) and the same of y
    cross    log mean_{i != j} exp(-2 ||x_i - y_j||^2)

The paper trains with the temperature fixed at 0.01. Its measures of the gap are in `Diagnostics`.

What differs here: nothing in the terms. `Softmax() + GapTerms()` keeps the temperature learned, unless the
run freezes it: `Group("^logit_scale", frozen=True)`.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from clipjax.methods.registry import Method
from clipjax.objectives import Pairwise
from clipjax.objectives.diagnostics import uniformity

METHOD = Method(
    id="contrastive_gap",
    title="It's Not a Modality Gap: Characterizing and Addressing the Contrastive Gap",
    arxiv="2405.18570",
    status="official",
    summary="alignment and uniformity within and across modalities beside the contrastive loss",
)


@dataclasses.dataclass(frozen=True)
class GapTerms(Pairwise):
    """The three terms that close the contrastive gap; add them to a contrastive loss."""

    align: float = 1.0
    """Weight of the squared distance of a pair."""
    uniform: float = 1.0
    """Weight of the uniformity within each side."""
    cross: float = 1.0
    """Weight of the uniformity between the sides."""

    def __call__(self, encoded, context):
        first, second, engine = encoded[self.first], encoded[self.second], context.engine
        terms = {
            "align": jnp.mean(jnp.sum((first - second) ** 2, -1)),
            "uniform": 0.5
            * (uniformity(first, first, engine) + uniformity(second, second, engine)),
            "cross": uniformity(first, second, engine),
        }
        loss = sum(getattr(self, name) * value for name, value in terms.items())
        return loss, {f"gap/{name}": value for name, value in terms.items()}
