"""SupReMix: hard pairs mixed from a row's own.

Wu et al. 2023, "Mixup Your Own Pairs" (arXiv 2309.16633). Status: second hand (a copy of the training code).

For regression: examples have a number t, pairs of equal t are positives, and the others count the more the
farther their numbers are. For anchor i, two kinds of mixtures of embeddings, both without gradient, join:

    mix-neg  a z_i + (1 - a) z_k, a ~ Beta(2, 8), t_k != t_i: a hard negative with the number a t_i + (1 - a) t_k
    mix-pos  a z_j + (1 - a) z_k, t_j < t_i < t_k both within a window, a such that it has the number t_i:
             a hard positive

    L_i = mean over positives p of -s_ip + log sum_q w_iq exp(s_iq),   w_iq = |t_i - t_q| + 1

What differs here: images and texts instead of one modality: anchors are images and what is mixed are texts, with
the anchor's own text as z_i; and the reverse. Without `label` nothing is ordered: own pairs are the only
positives, all weights are 1, and mix-neg alone remains (a cousin of MoCHi). Each anchor draws one a a step
for all its mixtures, and one mix-pos. Mixtures are not scaled to unit norm, so the logits of mix-neg
need no further products: a s_ii + (1 - a) s_ik. The code shifts real and mixed logits by a maximum each
before it adds them; here they are one sum.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from clipjax.batch import field
from clipjax.errors import ClipjaxError
from clipjax.methods.registry import Method
from clipjax.objectives import Context, Pairwise
from clipjax.objectives.contrast import both_directions, check_share
from clipjax.objectives.pairs import LogSumExp, Sample, Sum

METHOD = Method(
    id="supremix",
    title="Mixup Your Own Pairs",
    arxiv="2309.16633",
    status="second hand",
    summary="hard negatives (and positives, with ordered labels) mixed from a row's own pairs",
)


@dataclasses.dataclass(frozen=True)
class SupReMix(Pairwise):
    """Contrast with mixtures of the batch's embeddings."""

    label: str | None = None
    """Field of the batch with each example's number [B]; None: examples have none."""
    beta: tuple[float, float] = (2.0, 8.0)
    """The distribution of the anchor's share in a hard negative."""
    window: float = 5.0
    """How far the numbers of a hard positive's parts may be from the anchor's."""
    image_weight: float = 0.5
    """Share of the first side's direction, image-to-text; text-to-image gets the rest."""

    def __post_init__(self):
        check_share(self, "image_weight")
        if min(self.beta) <= 0 or self.window <= 0:
            raise ClipjaxError(
                f"SupReMix: beta={self.beta} and window={self.window} must be positive"
            )

    def __call__(self, encoded, context):
        engine = context.engine
        first, second = encoded.logit_scale * encoded[self.first], encoded[self.second]
        n = first.shape[0]
        draws, pairs = jax.random.split(_key(context))
        share = jax.random.beta(draws, *self.beta, (2, n)).astype(jnp.float32)
        if self.label is None:  # all apart, and none farther than another
            label, far = jnp.arange(n, dtype=jnp.float32), 0.0
        else:
            label, far = field(context.batch, self.label, "SupReMix").astype(jnp.float32), 1.0
        # Mixtures have no gradient; the scale of their logits has.
        x, y = jax.lax.stop_gradient((encoded[self.first], second))
        held = (encoded.logit_scale * x, y)

        def tile(row, col, shared):
            logits = engine.dot(row["side"], col["side"])
            gap = jnp.abs(row["label"][:, None] - col["label"])
            same = gap == 0

            def terms(share, own, mixed):
                weight = jnp.log1p(far * (1 - share) * gap)
                return {
                    "real": LogSumExp(logits + jnp.log1p(far * gap)),
                    "mixed": LogSumExp(share * own + (1 - share) * mixed + weight, ~same),
                    "positive": Sum(logits, same),
                    "count": Sum(same.astype(jnp.float32)),
                }

            return (
                terms(
                    row["share"][:, None],
                    row["own"][:, None],
                    engine.dot(row["side"], jax.lax.stop_gradient(col["side"])),
                ),
                terms(
                    col["share"],
                    col["own"],
                    engine.dot(row["held"], col["side"]),
                ),
            )

        rows, cols = engine.reduce(
            tile,
            {
                "side": first,
                "held": held[0],
                "share": share[0],
                "own": jnp.sum(first * held[1], -1),
                "label": label,
            },
            {
                "side": second,
                "share": share[1],
                "own": jnp.sum(held[0] * second, -1),
                "label": label,
            },
        )
        mixed = (None, None) if self.label is None else self._mixed(pairs, held, label, engine)
        row_loss = _loss(rows, first, mixed[1])
        return both_directions(row_loss, _loss(cols, second, mixed[0]), self.image_weight), {}

    def _mixed(self, key, held, label, engine):
        """The hard positive of each example on both sides, [N, E], and whether it has one, [N]."""

        def tile(row, col, key):
            gap = col["label"] - row["label"][:, None]
            even, (below, above) = jnp.zeros_like(gap), jax.random.split(key)
            return {
                "below": Sample(even, below, (gap < 0) & (gap >= -self.window)),
                "above": Sample(even, above, (gap > 0) & (gap <= self.window)),
            }, {}

        found, _ = engine.reduce(tile, {"label": label}, {"label": label}, key)
        sides = (*held, label)
        low, high = (engine.rows_at(sides, found[name]) for name in ("below", "above"))
        there = (found["below"] >= 0) & (found["above"] >= 0)
        share = jnp.where(there, (high[2] - label) / jnp.where(there, high[2] - low[2], 1), 0)
        return tuple(
            (share[:, None] * a + (1 - share)[:, None] * b, there)
            for a, b in zip(low[:2], high[:2], strict=True)
        )


def _loss(side, anchor, mixed):
    total = jnp.logaddexp(side["real"], side["mixed"])
    if mixed is None:
        return total - side["positive"] / side["count"]
    key, there = mixed
    logit = jnp.sum(anchor * key, -1)
    total = jnp.logaddexp(total, jnp.where(there, logit, -jnp.inf))
    positive = side["positive"] + jnp.where(there, logit, 0)
    return total - positive / (side["count"] + there)


def _key(context: Context) -> jax.Array:
    return jax.random.key(0) if context.key is None else context.key
