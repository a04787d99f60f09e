"""XBT: a new model's embeddings translated into an old one's space, so that no gallery is embedded again.

"Towards Cross-modal Backward-compatible Representation Learning for Vision-Language Models" (ICCV 2025; arXiv
2405.14715). Status: reconstructed; the outline from another paper's description.

A projection p from the new space to the old one is trained on texts alone: the cosine distance of unit(p(y_new +
noise)) and y_old, where Gaussian noise stands for the distance of images from texts, so that p serves images too.

Besides, the baseline that needs no training: `procrustes`, the orthogonal map nearest to taking new embeddings to
old ones. What differs here: the second stage (LoRA on a few pairs) is `Lora` with `Softmax("image_old",
"text_old")`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from clipjax.errors import ClipjaxError
from clipjax.methods.registry import Method
from clipjax.models import Head, MlpHead
from clipjax.objectives import Aux, MovingAverage, PerExample, Teacher

METHOD = Method(
    id="xbt",
    title="Towards Cross-modal Backward-compatible Representation Learning for Vision-Language Models",
    arxiv="2405.14715",
    status="reconstructed",
    summary="new embeddings translated into an old model's space",
)


@dataclasses.dataclass(frozen=True)
class Translator(Head):
    """The projection into the old space, with noise on its input in training."""

    name: str = "old"
    """What it makes is called `<input>_old`."""
    of: str | None = "text"
    """The encoder whose embeddings it reads."""
    reads: str = "embedding"
    """It reads embeddings."""
    widths: tuple[int, ...] = (512, 512)
    """Outputs of each layer; the last is the old model's width."""
    noise: float = 0.05
    """Standard deviation of what is added to each number of the input in training."""

    def build(self, rngs: nnx.Rngs, base: Any) -> TranslatorModule:
        """Makes the module."""
        return TranslatorModule(self, rngs, base)


class TranslatorModule(nnx.Module):
    """The module of `Translator`."""

    def __init__(self, config: Translator, rngs: nnx.Rngs, base: Any):
        self.noise, self.width = config.noise, config.widths[-1]
        mlp = MlpHead(config.name, of=config.of, reads=config.reads, widths=config.widths)
        self.mlp = mlp.build(rngs, base)

    def __call__(self, x: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        """Embeddings [B, E] -> float32 [B, widths[-1]], unit norm."""
        noise = 0.0 if key is None else self.noise * jax.random.normal(key, x.shape)
        return self.mlp(x + noise)


@dataclasses.dataclass(frozen=True)
class BackwardCompatible(PerExample):
    """Cosine distance of translated embeddings to the old model's."""

    row: str = "text_old"
    """What is translated: a `Translator`'s output."""
    input: str = "text"
    """What the old model embeds."""
    old: Teacher = MovingAverage(1.0)
    """The old model; with a decay of 1, the model as the run began with it."""

    @property
    def needs(self):
        return frozenset({self.row})

    @property
    def teachers(self):
        return (self.old,)

    def prepare(self, state, context):
        return Aux({"old": context.encode(self.old, frozenset({self.input}))[self.input]})

    def local(self, encoded, context, totals):
        cosine = jnp.sum(encoded[self.row] * context.aux.rows["old"], -1)
        return jnp.sum(1 - cosine) / totals["examples"], {}


def procrustes(new: np.ndarray, old: np.ndarray) -> np.ndarray:
    """The orthogonal map R [E_new, E_old] that minimizes |new R - old|: of equal rows, new [n, E_new], old [n, E_old].

    Raises:
      ClipjaxError: they are not equally many.
    """
    if len(new) != len(old):
        raise ClipjaxError(f"procrustes: {len(new)} new embeddings and {len(old)} old ones")
    u, _, vt = np.linalg.svd(new.T.astype(np.float64) @ old, full_matrices=False)
    return u @ vt
