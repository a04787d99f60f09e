"""Soft targets from a momentum teacher."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from clipjax.errors import ClipjaxError
from clipjax.objectives.base import Objective
from clipjax.objectives.contrast import both_directions, check_share
from clipjax.objectives.pairs import Expectation, LogSumExp


@dataclasses.dataclass(frozen=True)
class SoftTarget(Objective):
    """ALBEF's image-text contrast with momentum distillation, without its queue.

    Li et al. 2021 (arXiv 2107.07651): the teacher is a moving average of the model. Queries are the
    student's embeddings, keys the teacher's, and the target is (1 - alpha) x own pair + alpha x the
    teacher's softmax. The gradient reaches the queries only. The large global batch stands in for
    the queue. With `momentum=None` the batch itself brings `teacher_image` and `teacher_text`, of
    the model's width.
    """

    alpha: float = 0.4
    """Share of the teacher in the target."""
    ramp_steps: int = 0
    """Steps over which alpha grows linearly from 0 (ALBEF: one epoch)."""
    momentum: float | None = 0.995
    """Decay of the moving average per step; None takes the teacher from the batch."""
    image_weight: float = 0.5
    """Share of the image-to-text direction; text-to-image gets the rest."""

    def __post_init__(self):
        check_share(self, "alpha", "image_weight")
        if self.momentum is not None:
            check_share(self, "momentum")
        if self.ramp_steps < 0:
            raise ClipjaxError(f"SoftTarget: ramp_steps={self.ramp_steps} must not be negative")

    def init_state(self, params):
        state = {"step": jnp.zeros((), jnp.int32)}
        if self.momentum is None:
            return state
        return state | {"params": jax.tree.map(jnp.copy, params)}

    def prepare(self, state, params, batch, encode):
        """Advances the teacher; adds `teacher_image`, `teacher_text` and `teacher_share` [N]."""
        new = {"step": state["step"] + 1}
        if self.momentum is not None:
            m = self.momentum
            new["params"] = jax.tree.map(
                lambda t, p: (m * t + (1 - m) * p).astype(t.dtype), state["params"], params
            )
            teacher = encode(new["params"], batch)
            batch = batch | {"teacher_image": teacher.image, "teacher_text": teacher.text}
        ramp = jnp.minimum(state["step"] / self.ramp_steps, 1) if self.ramp_steps else 1.0
        n = batch["teacher_image"].shape[0] if "teacher_image" in batch else 0
        return new, batch | {"teacher_share": jnp.full((n,), self.alpha * ramp, jnp.float32)}

    def __call__(self, encoded, batch, engine):
        scale = encoded.logit_scale
        keys = {}
        for name, student in (("image", encoded.image), ("text", encoded.text)):
            if f"teacher_{name}" not in batch:
                raise ClipjaxError(
                    f"SoftTarget needs `teacher_{name}` in the batch: set momentum, or add it there"
                )
            keys[name] = jax.lax.stop_gradient(batch[f"teacher_{name}"].astype(jnp.float32))
            if keys[name].shape != student.shape:
                raise ClipjaxError(
                    f"`teacher_{name}` is {keys[name].shape}, the model's embedding "
                    f"{student.shape}: they must agree, for the teacher's serve as keys"
                )

        def tile(row, col, teacher_scale):
            image_key, text_key = (jax.lax.stop_gradient(side["key"]) for side in (row, col))
            teacher = jax.lax.stop_gradient(teacher_scale * engine.dot(image_key, text_key))
            other = row["index"][:, None] != col["index"]

            def terms(logits):
                return {
                    "negatives": LogSumExp(logits, other),
                    "teacher": Expectation(teacher, logits),
                }

            image_logits = engine.dot(row["query"], text_key)
            return terms(image_logits), terms(engine.dot(image_key, col["query"]))

        rows, cols = engine.reduce(
            tile,
            {"query": scale * encoded.image, "key": keys["image"]},
            {"query": scale * encoded.text, "key": keys["text"]},
            jax.lax.stop_gradient(scale),
        )
        share = batch.get("teacher_share", self.alpha)

        def loss(side, query, key):
            positive = scale * jnp.sum(query * key, -1)
            hard = jax.nn.softplus(side["negatives"] - positive)
            return hard + share * (positive - side["teacher"])

        image_loss = loss(rows, encoded.image, keys["text"])
        text_loss = loss(cols, encoded.text, keys["image"])
        return both_directions(image_loss, text_loss, self.image_weight), {}
