"""Norton's targets: faulty negatives found by optimal transport.

Lin et al. 2024, "Multi-granularity Correspondence Learning from Long-term Noisy Videos" (arXiv 2401.16702).
Status: the authors' code (XLearning-SCU/2024-ICLR-Norton) read.

The entropic transport plan between the images and the texts of the batch, with uniform marginals, says which
negatives may be none. Scaled so that its rows sum to 1 it is Q_ij = exp(s_ij / eps + u_i + v_j), found by
Sinkhorn's iterations, and the targets are (1 - beta) I + beta Q for images, and with Q's transpose for
texts; no gradient passes through Q.

What differs here: images and texts instead of clips and captions; only this part of the method, without its
fine-grained similarities and its transport between paragraphs and videos, which need long videos. Only the
potentials u and v exist, 2 N numbers, and each direction's plan ends with that direction's own
normalization, so that its targets sum to 1 whatever the number of iterations. The directions are averaged (the
code adds them). An iteration is two passes over the pairs, without gradient.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from clipjax.errors import ClipjaxError
from clipjax.methods.registry import Method
from clipjax.objectives import Pairwise
from clipjax.objectives.contrast import both_directions, check_share
from clipjax.objectives.pairs import Expectation, LogSumExp, PairEngine

METHOD = Method(
    id="norton_ot",
    title="Multi-granularity Correspondence Learning from Long-term Noisy Videos",
    arxiv="2401.16702",
    status="official",
    summary="soft targets from the optimal transport between the batch's images and texts",
)


@dataclasses.dataclass(frozen=True)
class Transported(Pairwise):
    """Softmax cross-entropy whose targets are partly an entropic transport plan of the batch."""

    beta: float = 0.3
    """Share of the plan in the target; 0 is `Softmax`."""
    eps: float = 1.0
    """Strength of the entropy, in units of the scaled similarities: the larger, the flatter the plan."""
    iterations: int = 50
    """Sinkhorn's iterations."""
    image_weight: float = 0.5
    """Share of the first side's direction, image-to-text; text-to-image gets the rest."""

    def __post_init__(self):
        check_share(self, "beta", "image_weight")
        if self.eps <= 0 or self.iterations < 1:
            raise ClipjaxError(
                f"Transported: eps={self.eps} must be positive and iterations={self.iterations} "
                "at least 1"
            )

    def __call__(self, encoded, context):
        engine = context.engine
        first, second = encoded.logit_scale * encoded[self.first], encoded[self.second]
        u, v = potentials(
            *jax.lax.stop_gradient((first / self.eps, second)), self.iterations, engine
        )

        def tile(row, col, shared):
            logits = engine.dot(row["first"], col["second"])
            plan = jax.lax.stop_gradient(logits) / self.eps
            negatives = LogSumExp(logits, row["index"][:, None] != col["index"])
            return (
                {"negatives": negatives, "target": Expectation(plan + col["v"], logits)},
                {"negatives": negatives, "target": Expectation(plan + row["u"][:, None], logits)},
            )

        rows, cols = engine.reduce(tile, {"first": first, "u": u}, {"second": second, "v": v})
        positive = jnp.sum(first * second, -1)

        def loss(side):
            hard = jax.nn.softplus(side["negatives"] - positive)
            return hard + self.beta * (positive - side["target"])

        return both_directions(loss(rows), loss(cols), self.image_weight), {}


def potentials(
    a: jax.Array, b: jax.Array, iterations: int, engine: PairEngine
) -> tuple[jax.Array, jax.Array]:
    """u and v, [N] each, such that exp(a_i.b_j + u_i + v_j) has columns, and nearly rows, that sum to 1."""

    def by_row(row, col, shared):
        return {"sum": LogSumExp(engine.dot(row["a"], col["b"]) + col["v"])}, {}

    def by_col(row, col, shared):
        return {}, {"sum": LogSumExp(engine.dot(row["a"], col["b"]) + row["u"][:, None])}

    def iterate(_, uv):
        u = -engine.reduce(by_row, {"a": a}, {"b": b, "v": uv[1]})[0]["sum"]
        v = -engine.reduce(by_col, {"a": a, "u": u}, {"b": b})[1]["sum"]
        return u, v

    zero = jnp.zeros(a.shape[:1], jnp.float32)
    u, v = jax.lax.fori_loop(0, iterations, iterate, (zero, zero))
    return jax.lax.stop_gradient(u), jax.lax.stop_gradient(v)
