"""Sample: tokens drawn at random, from all of the distribution or the likely part of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from clipjax.generation.stepwise import token_by_token
from clipjax.generation.strategy import Generated, Strategy, Task

TopK = Callable[[jax.Array, int], tuple[jax.Array, jax.Array]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample(Strategy):
    """Draws each token at random; deterministic by seed, each picture with a key of its own.

    Temperature comes first, then `top_k`, then `top_p` on what is left. Scores are sums of the
    log-probabilities before all three.
    """

    temperature: float = 1.0
    """Logits are divided by it: below 1 likely tokens gain, above 1 they lose."""
    top_k: int | None = None
    """Draw from the k likeliest tokens only; None: from all."""
    top_p: float = 1.0
    """Draw from the fewest likeliest tokens that together reach this probability (arXiv:1904.09751)."""

    def __post_init__(self):
        super().__post_init__()
        self._require("temperature", self.temperature > 0, "above 0 (Greedy is the limit)")
        if self.top_k is not None:
            self._require("top_k", self.top_k >= 1, "at least 1")
        self._require("top_p", 0 < self.top_p <= 1, "above 0 and at most 1")

    def search(self, task: Task) -> Generated:
        def draw(log_probs: jax.Array, position: jax.Array) -> jax.Array:
            kept = self.truncate(log_probs, task.top_k)
            keys = jax.vmap(jax.random.fold_in, (0, None))(task.keys, position)
            noise = jax.vmap(lambda key: jax.random.gumbel(key, kept.shape[1:]))(keys)
            return jnp.argmax(kept + noise, axis=-1).astype(jnp.int32)

        return token_by_token(self, task, draw)

    def truncate(self, log_probs: jax.Array, top_k: TopK = jax.lax.top_k) -> jax.Array:
        """Log-probabilities [B, V], up to a constant, of what is drawn from; -inf is never drawn."""
        logits = log_probs / self.temperature
        if self.top_k is not None:
            least = top_k(logits, min(self.top_k, logits.shape[1]))[0][:, -1:]
            logits = jnp.where(logits >= least, logits, -jnp.inf)
        if self.top_p < 1:
            ordered = jnp.flip(jnp.sort(logits, axis=-1), axis=-1)
            probs = jax.nn.softmax(ordered, axis=-1)
            before = jnp.cumsum(probs, axis=-1) - probs  # of all likelier ones; 0 for the first
            least = jnp.where(before < self.top_p, ordered, jnp.inf).min(axis=-1, keepdims=True)
            logits = jnp.where(logits >= least, logits, -jnp.inf)
        return logits
