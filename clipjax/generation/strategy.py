"""Strategy: how the next token of a caption is chosen, and what all strategies have in common."""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from clipjax.batch import SpecialTokens
from clipjax.component import Component
from clipjax.errors import ClipjaxError
from clipjax.generation.decoder import Decoder
from clipjax.mesh import BATCH_AXES


class Generated(NamedTuple):
    """Captions as tokens.

    Attributes:
      tokens: int32 [B, L], rows `bos, prompt..., caption..., eos, pad...`; a caption that reached
        its greatest length has no eos.
      scores: float32 [B], the sum of the log-probabilities of what was generated (the end token
        counted, the prompt not), as the strategy's docstring qualifies it.
    """

    tokens: jax.Array | np.ndarray
    scores: jax.Array | np.ndarray


@dataclasses.dataclass(frozen=True)
class Task:
    """What a strategy is to complete; arrays may be tracers.

    Attributes:
      decoder: the model, one position at a time.
      prompt: int32 [B, L], rows `bos, prompt..., pad...`.
      prompt_length: int32 [B], tokens of each row that are given, bos counted; at least 1.
      keys: PRNG keys [B]; only what draws at random uses them.
      special: the tokens that are no text.
      mesh: what the rows are split over; None: one device.
    """

    decoder: Decoder
    prompt: jax.Array
    prompt_length: jax.Array
    keys: jax.Array
    special: SpecialTokens
    mesh: Mesh | None = None

    @property
    def length(self) -> int:
        """L, positions of a row."""
        return self.prompt.shape[1]

    def top_k(self, x: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
        """`jax.lax.top_k` of [B, n], each device for its own rows.

        The partitioner does not always know that it may: left alone it gathers [B, n].
        """
        if self.mesh is None:
            return jax.lax.top_k(x, k)
        split = PartitionSpec(BATCH_AXES)
        own = jax.shard_map(
            functools.partial(jax.lax.top_k, k=k), mesh=self.mesh, in_specs=split, out_specs=split
        )
        values, index = own(x)
        return values, index

    def generated(self, position: jax.Array) -> jax.Array:
        """[B]: how many tokens a row has beyond its prompt once `position` is filled; at least 1."""
        return jnp.maximum(position + 1 - self.prompt_length, 1)

    def forced(self, position: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(token [B], whether the prompt prescribes it [B] bool) for a position.

        Prompts differ in length from row to row, so the loop walks through them like through
        everything else: no shape, and so no compilation, depends on a prompt.
        """
        token = jax.lax.dynamic_index_in_dim(self.prompt, position, axis=1, keepdims=False)
        return token, position < self.prompt_length


@dataclasses.dataclass(frozen=True, kw_only=True)
class Strategy(Component):
    """Role: how the next token is chosen."""

    max_length: int | None = None
    """Most tokens of a caption, prompt and end token counted; None: as many as the model's texts have."""
    min_length: int = 0
    """Fewest tokens before the end token may come, prompt counted."""
    repetition_penalty: float = 1.0
    """Makes tokens that a caption has already less likely (arXiv:1909.05858); 1 is off, 1.2 usual."""

    def __post_init__(self):
        if self.max_length is not None:
            self._require("max_length", self.max_length >= 1, "at least 1")
        self._require("min_length", self.min_length >= 0, "at least 0")
        if self.max_length is not None and self.min_length >= self.max_length:
            raise ClipjaxError(
                f"{type(self).__name__}: min_length={self.min_length} leaves no room for the end "
                f"token within max_length={self.max_length}"
            )
        self._require("repetition_penalty", self.repetition_penalty > 0, "above 0")

    def search(self, task: Task) -> Generated:
        """Completes every row of the task; traced once."""
        raise NotImplementedError

    def log_probs(
        self, task: Task, tokens: jax.Array, logits: jax.Array, position: jax.Array
    ) -> jax.Array:
        """The distribution of the token after `position`, float32 [R, V] of log-probabilities.

        The penalty is applied, and what may not come (padding, bos, an end that is too early) has
        probability 0. Where the prompt prescribes the token, it is certain.

        Args:
          task: its B rows stand for R / B consecutive ones here.
          tokens: int32 [R, L], filled up to `position`.
          logits: [R, V].
          position: int32 [].
        """
        special, vocabulary = task.special, logits.shape[1]
        logits = logits.astype(jnp.float32)
        if self.repetition_penalty != 1.0:
            seen = _seen(tokens, position, vocabulary)
            worse = jnp.where(
                logits > 0, logits / self.repetition_penalty, logits * self.repetition_penalty
            )
            logits = jnp.where(seen, worse, logits)
        token = jnp.arange(vocabulary)
        banned = (token == special.pad) & (special.pad != special.eos)
        if special.bos is not None:
            banned |= (token == special.bos) & (special.bos != special.eos)
        written = position if special.bos is not None else position + 1
        banned |= (token == special.eos) & (written < self.min_length)
        log_probs = jax.nn.log_softmax(jnp.where(banned, -jnp.inf, logits), axis=-1)
        given, forced = (jnp.repeat(x, len(tokens) // len(x)) for x in task.forced(position + 1))
        return jnp.where(forced[:, None], certain(given, vocabulary), log_probs)

    def _require(self, field: str, holds: bool, what: str) -> None:
        if not holds:
            raise ClipjaxError(
                f"{type(self).__name__}: {field}={getattr(self, field)!r} must be {what}"
            )


def certain(token: jax.Array, vocabulary: int) -> jax.Array:
    """Log-probabilities [R, V] of distributions that give all to one token each, [R]."""
    return jnp.where(jnp.arange(vocabulary) == token[:, None], 0.0, -jnp.inf)


def put(tokens: jax.Array, position: jax.Array, token: jax.Array) -> jax.Array:
    """`tokens` [..., L] with `token` [...] at a position."""
    return jnp.where(jnp.arange(tokens.shape[-1]) == position, token[..., None], tokens)


def _seen(tokens: jax.Array, position: jax.Array, vocabulary: int) -> jax.Array:
    """bool [R, V]: which tokens a row has up to `position`."""
    filled = jnp.arange(tokens.shape[1]) <= position

    def of_row(row):
        index = jnp.where(filled, row, vocabulary)  # out of range: dropped
        return jnp.zeros(vocabulary, bool).at[index].set(True, mode="drop")

    return jax.vmap(of_row)(tokens)
