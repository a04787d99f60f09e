"""FILTER, its self-teaching: what a text in one language chooses, its translation is taught to choose.

Fang et al. 2020, "FILTER: An Enhanced Fusion Method for Cross-lingual Language Understanding" (arXiv 2009.05166).
Status: the authors' code (yuwfan/FILTER) read.

The paper fuses a text and its translation in the middle layers, and teaches the model on translated texts its own
soft predictions: (1 - a) CE + a T^2 KL(softmax(teacher / T) || softmax(student / T)).

What differs here: the self-teaching part alone, on the softmax over the batch's images: the translation's choice
among them follows that of the text itself, held fixed. The cross-entropy is the run's own image-text loss. The
fused layers are not built.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from clipjax.errors import ClipjaxError
from clipjax.methods.registry import Method
from clipjax.objectives import Objective
from clipjax.objectives.pairs import Expectation, LogSumExp

METHOD = Method(
    id="filter_fusion",
    title="FILTER: An Enhanced Fusion Method for Cross-lingual Language Understanding",
    arxiv="2009.05166",
    status="official",
    summary="translations taught what the text itself chooses (self-teaching part)",
)


@dataclasses.dataclass(frozen=True)
class SelfTeaching(Objective):
    """T^2 KL(teacher's softmax over the images || student's), a mean over texts."""

    student: str = "text_2"
    """The translation."""
    teacher: str = "text"
    """The text whose choice is followed."""
    image: str = "image"
    """What is chosen from."""
    temperature: float = 2.0
    """T: both softmaxes are this much softer."""

    def __post_init__(self):
        if self.temperature <= 0:
            raise ClipjaxError(f"SelfTeaching: temperature={self.temperature} must be above 0")

    @property
    def needs(self):
        return frozenset({self.student, self.teacher, self.image})

    def __call__(self, encoded, context):
        engine, scale = context.engine, encoded.logit_scale / self.temperature

        def tile(row, col, shared):
            student = engine.dot(row["student"], col["image"])
            teacher = jax.lax.stop_gradient(engine.dot(row["teacher"], col["image"]))
            terms = {
                "student": LogSumExp(student),
                "teacher": LogSumExp(teacher),
                "gap": Expectation(teacher, teacher - student),
            }
            return terms, {}

        rows = {
            "student": scale * encoded[self.student],
            "teacher": jax.lax.stop_gradient(scale * encoded[self.teacher]),
        }
        seen, _ = engine.reduce(tile, rows, {"image": encoded[self.image]})
        divergence = jnp.mean(seen["student"] - seen["teacher"] + seen["gap"])
        return self.temperature**2 * divergence, {}
