"""ALBEF: align with momentum keys and queues, then fuse.

Li et al. 2021, "Align before Fuse: Vision and Language Representation Learning with Momentum Distillation" (arXiv
2107.07651). Status: the authors' code (salesforce/ALBEF) read.

Contrast: an image is compared with the momentum encoder's texts of the batch and of a queue of earlier batches.
With P the softmax over these keys and Q that of the momentum encoder's own image over the same keys, the loss is
the cross-entropy of P against (1 - alpha) own key + alpha Q; texts alike; the mean of the two. Fusion: `Matching`,
that is, image-text matching with negatives drawn from the softmax.

What differs here: no masked language modeling (a third term of the paper); rows of the queue that have the id of
the row itself are left out, as the code does for retrieval alone; the queue begins empty instead of random; alpha's
ramp is told in steps, not in an epoch.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from clipjax.methods.registry import Method
from clipjax.objectives import Aux, MovingAverage, Pairwise, Queue, Teacher
from clipjax.objectives.contrast import both_directions, check_share
from clipjax.objectives.pairs import Expectation, LogSumExp

METHOD = Method(
    id="albef",
    title="Align before Fuse: Vision and Language Representation Learning with Momentum Distillation",
    arxiv="2107.07651",
    status="official",
    summary="momentum keys in queues, soft targets, and a fusion encoder on drawn negatives",
)


@dataclasses.dataclass(frozen=True)
class QueueContrast(Pairwise):
    """Contrast with a teacher's keys of this batch and of earlier ones."""

    queue: Queue = Queue(65536)
    """The keys of earlier batches."""
    alpha: float = 0.4
    """Share of the teacher's softmax in the target."""
    ramp_steps: int = 0
    """Steps over which alpha grows linearly from 0."""
    teacher: Teacher = MovingAverage(0.995)
    """Who makes the keys."""

    def __post_init__(self):
        check_share(self, "alpha")

    @property
    def teachers(self):
        return (self.teacher,)

    def init_state(self, setting):
        return self.queue.init(**{side: setting.width(side) for side in (self.first, self.second)})

    def prepare(self, state, context):
        share = jnp.asarray(self.alpha, jnp.float32)
        if self.ramp_steps:
            share *= jnp.minimum(context.step / self.ramp_steps, 1)
        keys = context.encode(self.teacher, self.needs).rows
        return Aux(keys, {"share": share} | self.queue.columns(state))

    def __call__(self, encoded, context):
        engine, scale, aux = context.engine, encoded.logit_scale, context.aux
        ids, share = context.batch["id"], aux.shared["share"]

        def tile(row, col, scale):
            logits = engine.dot(row["query"], col["key"])
            teacher = scale * engine.dot(row["teacher"], col["key"])
            same = row["id"][:, None] == col["id"]
            own = row["index"][:, None] == col["index"]
            meets = (col["id"] >= 0) & (own | ~same)
            terms = {"all": LogSumExp(logits, meets), "target": Expectation(teacher, logits, meets)}
            return terms, {}

        def direction(side, other):
            blocks = (
                {"key": aux.rows[other], "id": ids},
                {"key": aux.shared[other], "id": aux.shared["id"]},
            )
            query = scale * encoded[side]
            rows, _ = engine.reduce(
                tile,
                {"query": query, "teacher": aux.rows[side], "id": ids},
                blocks,
                jax.lax.stop_gradient(scale),
            )
            own = jnp.sum(query * aux.rows[other], -1)
            return rows["all"] - (1 - share) * own - share * rows["target"]

        loss = both_directions(
            direction(self.first, self.second), direction(self.second, self.first), 0.5
        )
        return loss, {}, {side: aux.rows[side] for side in (self.first, self.second)}

    def advance(self, state, results, context):
        return self.queue.push(context.engine, state, context.batch["id"], **results)
