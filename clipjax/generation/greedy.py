"""Greedy: the likeliest token, every time."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from clipjax.generation.stepwise import token_by_token
from clipjax.generation.strategy import Generated, Strategy, Task


@dataclasses.dataclass(frozen=True, kw_only=True)
class Greedy(Strategy):
    """The likeliest token, every time. Scores are sums of log-probabilities."""

    def search(self, task: Task) -> Generated:
        return token_by_token(
            self, task, lambda log_probs, _: jnp.argmax(log_probs, axis=-1).astype(jnp.int32)
        )
