"""One token after another: what greedy search and sampling share."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct

from clipjax.generation.decoder import State
from clipjax.generation.strategy import Generated, Strategy, Task, put

Choose = Callable[[jax.Array, jax.Array], jax.Array]
"""(log-probabilities [B, V], position of the token to choose) -> token int32 [B]."""


@struct.dataclass
class _Rows:
    position: jax.Array  # [], the last that is filled
    tokens: jax.Array  # [B, L]
    scores: jax.Array  # [B]
    finished: jax.Array  # [B]
    state: State


def token_by_token(strategy: Strategy, task: Task, choose: Choose) -> Generated:
    """Completes the rows; stops as soon as all of them have ended."""
    special = task.special

    def unfinished(rows: _Rows) -> jax.Array:
        return (rows.position < task.length - 1) & ~rows.finished.all()

    def step(rows: _Rows) -> _Rows:
        logits, _, state = task.decoder.step(rows.tokens, rows.position, rows.state)
        log_probs = strategy.log_probs(task, rows.tokens, logits, rows.position)
        position = rows.position + 1
        given, forced = task.forced(position)
        token = jnp.where(forced, given, choose(log_probs, position))
        gained = jnp.take_along_axis(log_probs, token[:, None], axis=1)[:, 0]
        return _Rows(
            position=position,
            tokens=put(rows.tokens, position, jnp.where(rows.finished, special.pad, token)),
            scores=rows.scores + jnp.where(rows.finished, 0.0, gained),
            finished=rows.finished | (~forced & (token == special.eos)),
            state=state,
        )

    count = len(task.prompt)
    rows = _Rows(
        position=jnp.int32(0),
        tokens=task.prompt,
        scores=jnp.zeros(count),
        finished=jnp.zeros(count, bool),
        state=task.decoder.start(task.length),
    )
    rows = jax.lax.while_loop(unfinished, step, rows)
    return Generated(rows.tokens, rows.scores)
