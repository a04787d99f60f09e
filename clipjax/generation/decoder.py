"""The model seen from a search: one position at a time, for rows that multiply and swap places.

Rows come in groups: B pictures with n rows each (beams, candidates) are R = B * n consecutive rows.
"""

from __future__ import annotations

from typing import Any, Protocol

import jax
import jax.numpy as jnp

State = Any
"""What a decoder keeps between positions: a pytree of arrays."""


class Captioner(Protocol):
    """What a model needs to caption (an `nnx.Module`; `models/coca.py` has it)."""

    def caption_memory(self, image: jax.Array) -> jax.Array:
        """Pictures [B, H, W, 3] to what the decoder looks at, [B, Q, D]."""

    def start_cache(self, memory: jax.Array, length: int) -> Any:
        """An empty cache for `length` positions: nested dict, every leaf [layers, B, ...]."""

    def decode(
        self, tokens: jax.Array, start: jax.Array, cache: Any
    ) -> tuple[jax.Array, jax.Array, Any]:
        """Positions start..start+T-1: (logits [B, T, V], hidden states [B, T, D], cache)."""

    def caption_logits(self, tokens: jax.Array, memory: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(logits [B, L, V], hidden states [B, L, D]) of whole rows, each position seeing no later one."""


class Decoder:
    """Next-token logits and hidden states."""

    def __init__(self, module: Captioner, memory: jax.Array):
        self.module, self.memory = module, memory

    def start(self, length: int) -> State:
        """The state before the first position, one row a picture."""
        raise NotImplementedError

    def step(
        self, tokens: jax.Array, position: jax.Array, state: State
    ) -> tuple[jax.Array, jax.Array, State]:
        """(logits [R, V] of what follows, hidden states [R, D] of, state after) a position.

        Args:
          tokens: int32 [R, L], filled up to `position`.
          position: int32 []; every earlier one has been stepped through.
          state: of the same rows.
        """
        raise NotImplementedError

    def repeat(self, state: State, times: int) -> State:
        """Each row `times` times."""
        raise NotImplementedError

    def select(self, after: State, index: jax.Array, given: State, kept: State) -> State:
        """The state of chosen rows.

        Args:
          after: what `step` gave back.
          index: int32 [B, n], for each picture which of its rows become its n new ones.
          given: what `step` was given.
          kept: stands, with n rows a picture, for what `step` handed back untouched (a picture's
            keys and values, which are the same in all its rows).
        """
        raise NotImplementedError


class Cached(Decoder):
    """Keeps keys and values: a step costs one position."""

    def start(self, length):
        return self.module.start_cache(self.memory, length)

    def step(self, tokens, position, state):
        token = jax.lax.dynamic_slice_in_dim(tokens, position, 1, axis=1)
        logits, hidden, state = self.module.decode(token, position, state)
        return logits[:, 0], hidden[:, 0], state

    def repeat(self, state, times):
        return jax.tree.map(lambda leaf: jnp.repeat(leaf, times, axis=1), state)

    def select(self, after, index, given, kept):
        count = len(index)

        def chosen(new, old, same):
            if new is old:
                return same
            grouped = new.reshape(new.shape[0], count, -1, *new.shape[2:])
            # As a batched gather, which stays within the device that has the group.
            picked = jax.vmap(lambda group, i: group[:, i], (1, 0), 1)(grouped, index)
            return picked.reshape(new.shape[0], -1, *new.shape[2:])

        return jax.tree.map(chosen, after, given, kept)


class Uncached(Decoder):
    """Runs the whole row again at every position: slow, and what the cached decoder must equal."""

    def start(self, length):
        return ()

    def step(self, tokens, position, state):
        memory = jnp.repeat(self.memory, len(tokens) // len(self.memory), axis=0)
        logits, hidden = self.module.caption_logits(tokens, memory)
        return (
            jax.lax.dynamic_index_in_dim(logits, position, 1, keepdims=False),
            jax.lax.dynamic_index_in_dim(hidden, position, 1, keepdims=False),
            state,
        )

    def repeat(self, state, times):
        return state

    def select(self, after, index, given, kept):
        return after
