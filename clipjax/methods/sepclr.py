"""SepCLR: what is common and what is salient, in two spaces that know nothing of each other.

Louiset et al. 2024, "Separating common from salient patterns with Contrastive Representation Learning" (arXiv
2402.11928). Status: the authors' code (neurospin-projects/2024_rlouiset_sep_clr) read.

Two heads read an encoder: c (unit norm) keeps what a background and a target data set share, s (any norm) what the
target alone has. With the kernel K(a, b) = exp(-||a - b||^2 / (2 tau)),

    align(a, b)  mean_i ||a_i - b_i||^2 / (2 tau)        unif(a)  log mean_{i != j} K(a_i, a_j)
    common       align + 2 unif of c, all examples
    salient      align of s over the target, + 2 unif of s with the background's set to zero
    nothing      align(s, 0) over the background
    k-JEM        mean_i log mean_j K(s_i, s_j) K(c_i, c_j), j = i included: its fall raises the joint entropy

What differs here: c is what an image shares with its text, so its two views are the modalities; s is what
an image has of its own, and its views are two pictures of one record (a field `Image("image_2")`). Without
`target` every example is of the target, and nothing is forced to zero. Unproven on image-text data.
Add it to a contrastive loss of the embeddings, which retrieval reads.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from clipjax.batch import field
from clipjax.errors import ClipjaxError
from clipjax.methods.registry import Method
from clipjax.models import Head, MlpHead
from clipjax.objectives import Objective
from clipjax.objectives.pairs import LogSumExp, PairEngine

METHOD = Method(
    id="sepclr",
    title="Separating common from salient patterns with Contrastive Representation Learning",
    arxiv="2402.11928",
    status="official",
    summary="heads for what image and text share and for the image's own, kept independent",
)


def heads(width: int = 32, hidden: int = 128) -> tuple[Head, ...]:
    """The heads that `SepCLR` reads, for `Headed`: what is common, of both encoders, and the image's own."""
    layers = (hidden, width)
    return (
        MlpHead("common", of="image", widths=layers),
        MlpHead("common", of="text", widths=layers),
        MlpHead("salient", of="image", widths=layers, unit=False),
    )


@dataclasses.dataclass(frozen=True)
class SepCLR(Objective):
    """Contrast within a common and within a salient space, and independence of the two."""

    common: tuple[str, str] = ("image_common", "text_common")
    """Two views of what is common, rows of the model's output."""
    salient: tuple[str, str] = ("image_salient", "image_2_salient")
    """Two views of what is salient; the first belongs to the first of `common`."""
    target: str | None = None
    """Field of the batch that marks the target's examples (not 0), [B]; None: all are."""
    tau: float = 0.5
    """Width of the kernel."""
    common_weight: float = 1.0
    """Weight of the contrast in the common space."""
    salient_weight: float = 1000.0
    """Weight of the contrast in the salient space (the authors' CIFAR-MNIST script has 1000)."""
    nothing_weight: float = 1000.0
    """Weight of the background's salient part, which is to be zero."""
    independence_weight: float = 10.0
    """Weight of k-JEM."""

    def __post_init__(self):
        if self.tau <= 0:
            raise ClipjaxError(f"SepCLR: tau={self.tau} must be positive")

    @property
    def needs(self):
        return frozenset((*self.common, *self.salient))

    def __call__(self, encoded, context):
        engine = context.engine
        c, other_c = (encoded[name] for name in self.common)
        s, other_s = (encoded[name] for name in self.salient)
        if self.target is None:
            target = jnp.ones(len(s), jnp.float32)
        else:
            target = (field(context.batch, self.target, "SepCLR") != 0).astype(jnp.float32)

        def uniform(*views):
            rows = (self.kernel_sums(view, engine, itself=False) for view in views)
            pairs = len(c) * (len(c) // engine.blocks - 1)
            return sum(jax.nn.logsumexp(r) - math.log(max(pairs, 1)) for r in rows) / len(views)

        def align(a, b, weight):
            far = jnp.sum((a - b) ** 2, -1) / (2 * self.tau)
            return jnp.sum(weight * far) / jnp.maximum(jnp.sum(weight), 1)

        kept = target[:, None]
        joint = self.kernel_sums(jnp.concatenate([c, s * kept], -1), engine, itself=True)
        terms = {
            "common": align(c, other_c, jnp.ones_like(target)) + 2 * uniform(c, other_c),
            "salient": align(s, other_s, target) + 2 * uniform(s * kept, other_s * kept),
            "nothing": align(s, jnp.zeros_like(s), 1 - target),
            "independence": jnp.mean(joint) - math.log(len(c) // engine.blocks),
        }
        loss = sum(getattr(self, f"{name}_weight") * value for name, value in terms.items())
        return loss, {f"sepclr/{name}": value for name, value in terms.items()}

    def kernel_sums(self, a: jax.Array, engine: PairEngine, *, itself: bool) -> jax.Array:
        """log sum_j K(a_i, a_j) [N], of rows a [N, E]; with or without j = i."""
        square = jnp.sum(a**2, -1)

        def tile(row, col, shared):
            far = row["square"][:, None] + col["square"] - 2 * engine.dot(row["a"], col["a"])
            met = None if itself else row["index"][:, None] != col["index"]
            return {"sum": LogSumExp(-far / (2 * self.tau), met)}, {}

        side = {"a": a, "square": square}
        return engine.reduce(tile, side, side)[0]["sum"]
