"""ContrastiveSearch: likely tokens whose hidden states are not yet there."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct

from clipjax.generation.decoder import State
from clipjax.generation.strategy import Generated, Strategy, Task, put


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContrastiveSearch(Strategy):
    """Contrastive search (arXiv:2202.06417, arXiv:2210.14140). Deterministic.

    Of the k likeliest tokens, the one with the greatest
    `(1 - alpha) * p(token) - alpha * max_j cos(h(token), h_j)`, where h(token) is the decoder's last
    hidden state at the token and h_j run over those of everything before it, bos and prompt included.
    Alpha 0 is greedy search. Scores are sums of log-probabilities. It takes a step of k rows for
    every token.
    """

    alpha: float = 0.6
    """Weight of the degeneration penalty, from 0 (greedy) to 1 (probability only makes the shortlist)."""
    k: int = 4
    """Candidates for each token."""

    def __post_init__(self):
        super().__post_init__()
        self._require("alpha", 0 <= self.alpha <= 1, "from 0 to 1")
        self._require("k", self.k >= 1, "at least 1")

    def search(self, task: Task) -> Generated:
        def unfinished(rows: _Rows) -> jax.Array:
            return (rows.position < task.length - 1) & ~rows.finished.all()

        first = jnp.int32(0)
        logits, hidden, state = task.decoder.step(
            task.prompt, first, task.decoder.start(task.length)
        )
        count, width = hidden.shape
        history = jnp.zeros((count, task.length, width))
        rows = _Rows(
            position=first,
            tokens=task.prompt,
            scores=jnp.zeros(count),
            finished=jnp.zeros(count, bool),
            log_probs=self.log_probs(task, task.prompt, logits, first),
            history=history.at[:, 0].set(_unit(hidden)),
            state=state,
        )
        rows = jax.lax.while_loop(unfinished, lambda rows: self._step(task, rows), rows)
        return Generated(rows.tokens, rows.scores)

    def _step(self, task: Task, rows: _Rows) -> _Rows:
        count, length = rows.tokens.shape
        k = min(self.k, rows.log_probs.shape[1])
        position = rows.position + 1
        log_probs, token = task.top_k(rows.log_probs, k)
        tokens = put(jnp.repeat(rows.tokens[:, None], k, axis=1), position, token)
        flat = tokens.reshape(count * k, length)

        before = task.decoder.repeat(rows.state, k)
        logits, hidden, after = task.decoder.step(flat, position, before)
        hidden = _unit(hidden).reshape(count, k, -1)
        cosine = jnp.einsum("bkd,bld->bkl", hidden, rows.history)
        filled = jnp.arange(length) <= rows.position
        penalty = jnp.where(filled, cosine, -jnp.inf).max(axis=-1)
        score = (1 - self.alpha) * jnp.exp(log_probs) - self.alpha * penalty
        # A token of probability 0 is no candidate: an end that is too early, or all but the prompt's.
        winner = jnp.argmax(jnp.where(log_probs > -jnp.inf, score, -jnp.inf), axis=1)[:, None]

        token = jnp.take_along_axis(token, winner, axis=1)[:, 0]
        token = jnp.where(rows.finished, task.special.pad, token)
        gained = jnp.take_along_axis(log_probs, winner, axis=1)[:, 0]
        hidden = jnp.take_along_axis(hidden, winner[:, :, None], axis=1)
        logits = jnp.take_along_axis(logits.reshape(count, k, -1), winner[:, :, None], axis=1)
        tokens = put(rows.tokens, position, token)
        ends = (token == task.special.eos) & ~task.forced(position)[1]
        return _Rows(
            position=position,
            tokens=tokens,
            scores=rows.scores + jnp.where(rows.finished, 0.0, gained),
            finished=rows.finished | ends,
            log_probs=self.log_probs(task, tokens, logits[:, 0], position),
            history=jax.lax.dynamic_update_slice_in_dim(rows.history, hidden, position, axis=1),
            state=task.decoder.select(after, winner, given=before, kept=rows.state),
        )


@struct.dataclass
class _Rows:
    position: jax.Array  # [], the last that is filled
    tokens: jax.Array  # [B, L]
    scores: jax.Array  # [B]
    finished: jax.Array  # [B]
    log_probs: jax.Array  # [B, V], of the next token
    history: jax.Array  # [B, L, D], hidden states of unit norm, 0 beyond position
    state: State


def _unit(x: jax.Array) -> jax.Array:
    x = x.astype(jnp.float32)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
