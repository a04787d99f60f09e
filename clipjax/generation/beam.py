"""Beam: several captions at once, the best of which wins."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct

from clipjax.generation.decoder import State
from clipjax.generation.strategy import Generated, Strategy, Task, put


@dataclasses.dataclass(frozen=True, kw_only=True)
class Beam(Strategy):
    """Beam search.

    A caption scores `log p(caption | picture) / length ** length_penalty`, where length counts what
    was generated, the end token included. A caption that ends is put aside, where only better ended
    ones can push it out. The search for a picture stops once `width` captions have ended, or when
    no open one can overtake the best any more; captions that are cut off at the greatest length
    compete as they are. Width 1 is greedy search; with a width of all captions that are possible
    the search is exhaustive.
    """

    width: int = 4
    """Captions that are kept open for each picture."""
    length_penalty: float = 1.0
    """Exponent of the length that a score is divided by; 0 favors short captions, above 1 long ones."""

    def __post_init__(self):
        super().__post_init__()
        self._require("width", self.width >= 1, "at least 1")

    def search(self, task: Task) -> Generated:
        count, width = len(task.prompt), self.width

        def unfinished(beams: _Beams) -> jax.Array:
            return (beams.position < task.length - 1) & ~beams.done.all()

        start = _Beams(
            position=jnp.int32(0),
            tokens=jnp.repeat(task.prompt[:, None], width, axis=1),
            totals=jnp.where(jnp.arange(width) == 0, jnp.zeros((count, 1)), -jnp.inf),
            state=task.decoder.repeat(task.decoder.start(task.length), width),
            ended=jnp.repeat(task.prompt[:, None], width, axis=1),
            ended_scores=jnp.full((count, width), -jnp.inf),
            done=jnp.zeros(count, bool),
        )
        beams = jax.lax.while_loop(unfinished, lambda beams: self._step(task, beams), start)
        # What is still open was cut off at the greatest length.
        cut_off = self._scores(beams.totals, task, beams.position)
        cut_off = jnp.where(beams.done[:, None], -jnp.inf, cut_off)
        scores, tokens = _best(
            task,
            jnp.concatenate([beams.ended_scores, cut_off], axis=1),
            jnp.concatenate([beams.ended, beams.tokens], axis=1),
            1,
        )
        return Generated(tokens[:, 0], scores[:, 0])

    def _step(self, task: Task, beams: _Beams) -> _Beams:
        count, width, length = beams.tokens.shape
        rows = beams.tokens.reshape(count * width, length)
        logits, _, state = task.decoder.step(rows, beams.position, beams.state)
        vocabulary = logits.shape[1]
        log_probs = self.log_probs(task, rows, logits, beams.position)
        candidates = beams.totals[:, :, None] + log_probs.reshape(count, width, vocabulary)

        # Twice the width: a beam ends in one way only, so that `width` of these go on.
        position = beams.position + 1
        totals, index = task.top_k(candidates.reshape(count, -1), 2 * width)
        parent, token = index // vocabulary, (index % vocabulary).astype(jnp.int32)
        tokens = jnp.take_along_axis(beams.tokens, parent[:, :, None], axis=1)
        tokens = put(tokens, position, token)
        ends = (token == task.special.eos) & ~task.forced(position)[1][:, None]

        # Ended captions count where they are among the best `width`, as open ones do.
        counts = ends & (jnp.arange(2 * width) < width) & ~beams.done[:, None]
        ended_scores, ended = _best(
            task,
            jnp.concatenate(
                [
                    beams.ended_scores,
                    jnp.where(counts, self._scores(totals, task, position), -jnp.inf),
                ],
                axis=1,
            ),
            jnp.concatenate([beams.ended, tokens], axis=1),
            width,
        )
        totals, chosen = task.top_k(jnp.where(ends, -jnp.inf, totals), width)
        parent = jnp.take_along_axis(parent, chosen, axis=1)
        full = (ended_scores > -jnp.inf).all(axis=1)
        overtaken = self._bound(totals[:, 0], task, position) <= ended_scores[:, 0]
        return _Beams(
            position=position,
            tokens=jnp.take_along_axis(tokens, chosen[:, :, None], axis=1),
            totals=totals,
            state=task.decoder.select(state, parent, given=beams.state, kept=beams.state),
            ended=ended,
            ended_scores=ended_scores,
            done=beams.done | full | overtaken,
        )

    def _scores(self, totals: jax.Array, task: Task, position: jax.Array) -> jax.Array:
        """[B, n]: log-probabilities of captions whose last token is at `position`, by length."""
        return totals / task.generated(position)[:, None] ** self.length_penalty

    def _bound(self, total: jax.Array, task: Task, position: jax.Array) -> jax.Array:
        """[B]: a score that no continuation of an open caption can exceed; the sum only falls."""
        lengths = task.generated(position + 1), task.generated(jnp.int32(task.length - 1))
        return jnp.maximum(*(total / length**self.length_penalty for length in lengths))


@struct.dataclass
class _Beams:
    position: jax.Array  # [], the last that is filled
    tokens: jax.Array  # [B, width, L], open captions
    totals: jax.Array  # [B, width], their log-probabilities, best first; -inf: no caption
    state: State
    ended: jax.Array  # [B, width, L]
    ended_scores: jax.Array  # [B, width], best first; -inf: no caption
    done: jax.Array  # [B]


def _best(
    task: Task, scores: jax.Array, tokens: jax.Array, count: int
) -> tuple[jax.Array, jax.Array]:
    """The `count` best of [B, n] scores, best first, with their tokens [B, n, L]."""
    scores, index = task.top_k(scores, count)
    return scores, jnp.take_along_axis(tokens, index[:, :, None], axis=1)
