"""SimCLR: two views of a picture are nearer to each other than to all other views.

Chen et al. 2020, "A Simple Framework for Contrastive Learning of Visual Representations" (arXiv 2002.05709).
Status: second hand.

NT-Xent: of 2N views each is compared with the 2N - 1 others at a fixed temperature, its partner being the right
one; the mean cross-entropy over all views. The views go through a projection head, which is thrown away after
training.

What differs here: it stands beside an image-text loss, as in SLIP; the head norms with layer norm, which needs
nothing from other devices, instead of batch norm.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from clipjax.errors import ClipjaxError
from clipjax.methods.registry import Method
from clipjax.objectives import Pairwise
from clipjax.objectives.pairs import LogSumExp

METHOD = Method(
    id="simclr",
    title="A Simple Framework for Contrastive Learning of Visual Representations",
    arxiv="2002.05709",
    status="second hand",
    summary="two views of a picture against all other views",
)


@dataclasses.dataclass(frozen=True)
class NTXent(Pairwise):
    """Cross-entropy of each of 2N views among the others."""

    first: str = "image_projected"
    """One view's output of a head, of unit norm."""
    second: str = "image_2_projected"
    """The other's."""
    temperature: float = 0.1
    """What similarities are divided by."""

    def __post_init__(self):
        if self.temperature <= 0:
            raise ClipjaxError(f"NTXent: temperature={self.temperature} must be above 0")

    def __call__(self, encoded, context):
        engine, temperature = context.engine, self.temperature
        first, second = encoded[self.first], encoded[self.second]
        rows = len(first)

        def tile(row, col, shared):
            logits = engine.dot(row["view"], col["view"])
            # The block of the other view comes first, that of the view itself after it.
            own = row["index"][:, None]
            other = (own != col["index"]) & (own + rows != col["index"])
            return {"negatives": LogSumExp(logits, other)}, {}

        def negatives(view, partner):
            blocks = {"view": partner}, {"view": view}
            return engine.reduce(tile, {"view": view / temperature}, blocks)[0]["negatives"]

        positive = jnp.sum(first * second, -1) / temperature
        one = jax.nn.softplus(negatives(first, second) - positive)
        other = jax.nn.softplus(negatives(second, first) - positive)
        return 0.5 * (jnp.mean(one) + jnp.mean(other)), {}
