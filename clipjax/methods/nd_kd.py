"""Norm and direction: a student's features towards the teacher's norm, along a class direction.

Wang et al. 2023, "Improving Knowledge Distillation via Regularizing Feature Norm and Direction" (arXiv 2305.17007).
Status: the authors' code (WangYZ1608/Knowledge-Distillation-via-ND) read.

With s the student's feature, t the teacher's and e the unit mean of the teacher's features of the class, the loss
is the mean of 1 - <s, e> / max(|s|, |t|): a student shorter than its teacher is pushed outwards along e, a longer
one turned towards e alone.

What differs here: image-text pairs have no classes: e is the teacher's embedding of the row's own text. Features
must not be normalized: they come from a head (`MlpHead("feature", unit=False)` of the width of the embeddings).
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from clipjax.methods.registry import Method
from clipjax.objectives import Aux, MovingAverage, PerExample, Teacher
from clipjax.objectives.contrast import unit

METHOD = Method(
    id="nd_kd",
    title="Improving Knowledge Distillation via Regularizing Feature Norm and Direction",
    arxiv="2305.17007",
    status="official",
    summary="features towards a teacher's norm, along the direction of the class",
)


@dataclasses.dataclass(frozen=True)
class NormDirection(PerExample):
    """1 - <s, e> / max(|s|, |t|), a mean over the examples."""

    feature: str = "image_feature"
    """The student's and the teacher's features: a head's output that is not normalized."""
    direction: str = "text"
    """The input whose embedding by the teacher is the direction."""
    teacher: Teacher = MovingAverage(0.995)
    """Who is followed."""

    @property
    def needs(self):
        return frozenset({self.feature})

    @property
    def teachers(self):
        return (self.teacher,)

    def prepare(self, state, context):
        made = context.encode(self.teacher, frozenset({self.feature, self.direction}))
        norm = jnp.linalg.norm(made[self.feature], axis=-1)
        return Aux({"norm": norm, "direction": unit(made[self.direction])})

    def local(self, encoded, context, totals):
        student, aux = encoded[self.feature], context.aux.rows
        along = jnp.sum(student * aux["direction"], -1)
        length = jnp.sqrt(jnp.maximum(jnp.sum(student**2, -1), 1e-24))
        loss = 1 - along / jnp.maximum(length, aux["norm"])
        share = 1 / totals["examples"]
        return share * jnp.sum(loss), {"nd/norm": share * jnp.sum(length)}
