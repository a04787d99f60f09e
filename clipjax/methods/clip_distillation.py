"""CLIP distillation: a student's embeddings, and its relations, after a teacher's.

Yang et al. 2023, "CLIP-KD: An Empirical Study of CLIP Model Distillation" (arXiv 2307.12732). Status: second hand.

Feature distillation is the squared distance of the student's and the teacher's embeddings of the same input, the
mean over inputs. Relational distillation is, for each row, the divergence KL(teacher || student) of the two
softmaxes over the batch's similarities, images against texts and texts against images.

The teacher is a component: `Frozen("models/L14")` is another model of any architecture, encoded along the way;
`MovingAverage` or `Itself`, the model; None, vectors from a file: fields `teacher_image` and `teacher_text`
(`Embeddings`, written by `clipjax embed`). What differs here: a student of another width than the teacher's is
compared by a head (`MlpHead("distilled", widths=(teacher's,))`, and `rows=("image_distilled", "text_distilled")`).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from clipjax.batch import field
from clipjax.errors import ClipjaxError
from clipjax.methods.registry import Method
from clipjax.objectives import Aux, Pairwise, PerExample, Teacher
from clipjax.objectives.contrast import both_directions, unit
from clipjax.objectives.pairs import Expectation, LogSumExp

METHOD = Method(
    id="clip_distillation",
    title="CLIP-KD: An Empirical Study of CLIP Model Distillation",
    arxiv="2307.12732",
    status="second hand",
    summary="a student's embeddings and relations after a teacher's, live or from a file",
)


def teachers_rows(teacher: Teacher | None, names: tuple[str, ...], context) -> Aux:
    """A teacher's embeddings of these inputs, unit norm, and its scale if it has one."""
    if teacher is None:
        rows = {n: field(context.batch, f"teacher_{n}", "distillation from a file") for n in names}
        return Aux({n: unit(r.astype(jnp.float32)) for n, r in rows.items()})
    made = context.encode(teacher, frozenset(names))
    return Aux(dict(made.rows), dict(made.shared))


@dataclasses.dataclass(frozen=True)
class FeatureDistillation(PerExample):
    """Squared distance of the student's embeddings to the teacher's."""

    inputs: tuple[str, ...] = ("image", "text")
    """What both embed."""
    rows: tuple[str, ...] = ("image", "text")
    """The student's output for each of these: its embeddings, or a head's of the teacher's width."""
    teacher: Teacher | None = None
    """Who is followed; None: fields `teacher_<input>` of the batch."""

    def __post_init__(self):
        if len(self.inputs) != len(self.rows):
            raise ClipjaxError(
                f"FeatureDistillation: inputs={self.inputs} and rows={self.rows} must be as many"
            )

    @property
    def needs(self):
        return frozenset(self.rows)

    @property
    def teachers(self):
        return () if self.teacher is None else (self.teacher,)

    def prepare(self, state, context):
        return teachers_rows(self.teacher, self.inputs, context)

    def local(self, encoded, context, totals):
        losses = []
        for name, row in zip(self.inputs, self.rows, strict=True):
            student, teacher = encoded[row], context.aux.rows[name]
            if student.shape != teacher.shape:
                raise ClipjaxError(
                    f"the teacher's {name!r} is {teacher.shape}, the student's {row!r} {student.shape}: give "
                    f"the student a head of the teacher's width, and name it in rows"
                )
            losses.append(jnp.sum((student - teacher) ** 2) / totals["examples"])
        return sum(losses) / len(losses), {}


@dataclasses.dataclass(frozen=True)
class RelationalDistillation(Pairwise):
    """KL of the teacher's softmax over the batch to the student's, both directions; widths may differ."""

    teacher: Teacher | None = None
    """Who is followed; None: fields `teacher_<side>` of the batch."""
    teacher_scale: float | None = None
    """What the teacher's similarities are multiplied by; None: its own logit_scale, or the student's."""

    @property
    def teachers(self):
        return () if self.teacher is None else (self.teacher,)

    def prepare(self, state, context):
        return teachers_rows(self.teacher, (self.first, self.second), context)

    def __call__(self, encoded, context):
        engine, scale, aux = context.engine, encoded.logit_scale, context.aux
        own = aux.shared.get("logit_scale", scale)
        own = own if self.teacher_scale is None else jnp.float32(self.teacher_scale)

        def tile(row, col, own):
            student = engine.dot(row["student"], col["student"])
            teacher = jax.lax.stop_gradient(own * engine.dot(row["teacher"], col["teacher"]))
            terms = {
                "student": LogSumExp(student),
                "teacher": LogSumExp(teacher),
                "gap": Expectation(teacher, teacher - student),
            }
            return terms, terms

        rows, cols = engine.reduce(
            tile,
            {"student": scale * encoded[self.first], "teacher": aux.rows[self.first]},
            {"student": encoded[self.second], "teacher": aux.rows[self.second]},
            jax.lax.stop_gradient(own),
        )
        first, second = (s["student"] - s["teacher"] + s["gap"] for s in (rows, cols))
        return both_directions(first, second, 0.5), {}
