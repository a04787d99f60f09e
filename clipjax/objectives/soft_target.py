"""Soft targets from a momentum teacher."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from clipjax.batch import field
from clipjax.errors import ClipjaxError
from clipjax.objectives.base import Aux, Pairwise
from clipjax.objectives.contrast import both_directions, check_share
from clipjax.objectives.pairs import Expectation, LogSumExp
from clipjax.objectives.teachers import MovingAverage, Teacher


@dataclasses.dataclass(frozen=True)
class SoftTarget(Pairwise):
    """ALBEF's image-text contrast with momentum distillation, without its queue.

    Li et al. 2021 (arXiv 2107.07651): the teacher is a moving average of the model. Queries are the
    student's embeddings, keys the teacher's, and the target is (1 - alpha) x own pair + alpha x the
    teacher's softmax. The gradient reaches the queries only. The large global batch stands in for
    the queue. Any other teacher of the model's width will do: another checkpoint, or, with
    `teacher=None`, the fields `teacher_<side>` of the batch. Whoever it is, its softmax has the
    temperature of the model that is trained, as ALBEF's has.
    """

    alpha: float = 0.4
    """Share of the teacher in the target."""
    ramp_steps: int = 0
    """Steps over which alpha grows linearly from 0 (ALBEF: one epoch)."""
    teacher: Teacher | None = MovingAverage(0.995)
    """Who makes the keys; None: they are in the batch."""
    image_weight: float = 0.5
    """Share of the first side's direction, image-to-text; text-to-image gets the rest."""

    def __post_init__(self):
        check_share(self, "alpha", "image_weight")
        if self.ramp_steps < 0:
            raise ClipjaxError(f"SoftTarget: ramp_steps={self.ramp_steps} must not be negative")

    @classmethod
    def upgraded(cls, fields):
        if "momentum" in fields:
            momentum = fields.pop("momentum")
            fields["teacher"] = None if momentum is None else MovingAverage(momentum)
        return fields

    @property
    def teachers(self):
        return () if self.teacher is None else (self.teacher,)

    def prepare(self, state, context):
        """The teacher's embeddings, and its share in the target."""
        share = jnp.asarray(self.alpha, jnp.float32)
        if self.ramp_steps:
            share *= jnp.minimum(context.step / self.ramp_steps, 1)
        if self.teacher is None:
            names = (self.first, self.second)
            rows = {n: field(context.batch, f"teacher_{n}", "SoftTarget") for n in names}
        else:
            rows = context.encode(self.teacher, self.needs).rows
        return Aux(rows, {"share": share})

    def __call__(self, encoded, context):
        engine, scale, share = context.engine, encoded.logit_scale, context.aux.shared["share"]
        first, second = encoded[self.first], encoded[self.second]
        keys = {}
        for name, student in ((self.first, first), (self.second, second)):
            keys[name] = jax.lax.stop_gradient(context.aux.rows[name].astype(jnp.float32))
            if keys[name].shape != student.shape:
                raise ClipjaxError(
                    f"the teacher's {name!r} is {keys[name].shape}, the model's embedding "
                    f"{student.shape}: they must agree, for the teacher's serve as keys"
                )

        def tile(row, col, teacher_scale):
            row_key, col_key = (jax.lax.stop_gradient(side["key"]) for side in (row, col))
            teacher = jax.lax.stop_gradient(teacher_scale * engine.dot(row_key, col_key))
            other = row["index"][:, None] != col["index"]

            def terms(logits):
                return {
                    "negatives": LogSumExp(logits, other),
                    "teacher": Expectation(teacher, logits),
                }

            return terms(engine.dot(row["query"], col_key)), terms(
                engine.dot(row_key, col["query"])
            )

        rows, cols = engine.reduce(
            tile,
            {"query": scale * first, "key": keys[self.first]},
            {"query": scale * second, "key": keys[self.second]},
            jax.lax.stop_gradient(scale),
        )

        def loss(side, query, key):
            positive = scale * jnp.sum(query * key, -1)
            hard = jax.nn.softplus(side["negatives"] - positive)
            return hard + share * (positive - side["teacher"])

        first_loss = loss(rows, first, keys[self.second])
        second_loss = loss(cols, second, keys[self.first])
        return both_directions(first_loss, second_loss, self.image_weight), {}
