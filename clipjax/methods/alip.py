"""ALIP: a synthetic caption tells how far the alt-text can be trusted, and is learned from too.

Yang et al. 2023, "ALIP: Adaptive Language-Image Pre-training with Synthetic Caption" (arXiv 2308.08428). Status: the
authors' code (deepglint/ALIP) and the paper read.

With image x, raw text t and synthetic caption c, S the cosines, and H moving averages of the batch's means of S,

    W_s = min(1, exp(gamma_s (S_tc - H_tc)))                          the sample
    W_t = 1 where W_s = 1, else exp(gamma_p (S_xt - H_xt))            its pair with the raw text; W_c alike
    loss = mean of W_s W_t NCE(x, t) + mean of W_s W_c NCE(x, c)

where NCE(x, t) of a row is the mean of its two directions. No gradient passes through weights. As in the code the
averages follow before they are used, and begin at 1: at first nearly all samples weigh less (`begin` = 0 trusts all).

What differs here: averages are taken over the global batch, as one number each, which is what the code's gathering
comes to.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from clipjax.errors import ClipjaxError
from clipjax.methods.registry import Method
from clipjax.objectives import Aux, Pairwise
from clipjax.objectives.contrast import negatives

METHOD = Method(
    id="alip",
    title="ALIP: Adaptive Language-Image Pre-training with Synthetic Caption",
    arxiv="2308.08428",
    status="official",
    summary="pairs weighted by how raw text, synthetic caption and image agree",
)


@dataclasses.dataclass(frozen=True)
class ALIP(Pairwise):
    """Contrast with raw text and synthetic caption, weighted by their agreement with the image and each other."""

    synthetic: str = "text_2"
    """The synthetic caption: a name of the model's output."""
    gamma_sample: float = 2.0
    """gamma_s; 0: all samples weigh the same."""
    gamma_pair: float = 2.0
    """gamma_p."""
    decay: float = 0.99
    """Share of the averages that stays, per step."""
    begin: float = 1.0
    """What the averages begin at."""

    def __post_init__(self):
        if not 0 <= self.decay <= 1:
            raise ClipjaxError(f"ALIP: decay={self.decay} must lie in [0, 1]")

    @property
    def needs(self):
        return frozenset({self.first, self.second, self.synthetic})

    def init_state(self, setting):
        return {name: jnp.full((), self.begin, jnp.float32) for name in ("tc", "xt", "xc")}

    def prepare(self, state, context):
        return Aux(shared=state)

    def __call__(self, encoded, context):
        x, t, c = (encoded[name] for name in (self.first, self.second, self.synthetic))
        alike = {
            name: jax.lax.stop_gradient(jnp.sum(a * b, -1))
            for name, a, b in (("tc", t, c), ("xt", x, t), ("xc", x, c))
        }
        means = self._followed(context.aux.shared, alike)
        above = {name: alike[name] - means[name] for name in alike}
        sample = jnp.minimum(1, jnp.exp(self.gamma_sample * above["tc"]))

        def weighted(name, other):
            pair = jnp.where(sample == 1, 1, jnp.exp(self.gamma_pair * above[name]))
            sides = dataclasses.replace(self, second=other)
            rows, cols, positive, metrics = negatives(sides, encoded, context.engine)
            nce = (jax.nn.softplus(rows - positive) + jax.nn.softplus(cols - positive)) / 2
            return jnp.mean(sample * pair * nce), jnp.mean(sample * pair), metrics

        raw, raw_weight, metrics = weighted("xt", self.second)
        synthetic, synthetic_weight, _ = weighted("xc", self.synthetic)
        metrics |= {"alip/weight": raw_weight, "alip/synthetic_weight": synthetic_weight}
        return raw + synthetic, metrics, alike

    def advance(self, state, results, context):
        return self._followed(state, results)

    def _followed(self, means, alike):
        """The averages after a batch of cosines, [B] by name."""
        return {
            name: self.decay * mean + (1 - self.decay) * jnp.mean(alike[name])
            for name, mean in means.items()
        }
