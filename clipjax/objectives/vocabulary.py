"""What a caption loss needs of the logits over the vocabulary, which never exist as a whole.

Logits [B, T, V] are a hundred times larger than the features that they come from. Here a piece of
the vocabulary at a time is multiplied, reduced to a few numbers for each position (an online log
sum exp), and multiplied once more in the backward pass, as the pair engine does with columns.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from clipjax.mesh import BATCH_AXES


class WordStats(NamedTuple):
    """Per position, float32 [B, T]."""

    log_sum: jax.Array
    """log sum exp of the logits."""
    target: jax.Array
    """The logit of the right word."""
    mean: jax.Array
    """The mean logit."""
    top: jax.Array
    """The largest logit; has no gradient."""


def word_stats(
    features: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    *,
    chunk: int,
    mesh: Mesh | None = None,
) -> WordStats:
    """Reduces `features @ head` over the vocabulary.

    Differentiable with respect to features and head. Products take operands in the features' dtype
    and accumulate in float32. On a mesh, features are split as the batch is, and words over the
    `tensor` axis where it divides them; the head is gathered whole over `data` (FSDP).

    Args:
      features: [B, T, D].
      head: [D, V].
      targets: int32 [B, T], the right words.
      chunk: words at a time on a device; the logits of so many exist.
      mesh: the device mesh, None for one device.
    """
    shards = 1 if mesh is None else mesh.shape["tensor"]
    if head.shape[1] % shards:
        shards = 1
    # A piece holds some words of every shard: a slice of its own for each device.
    split = head.astype(features.dtype).reshape(head.shape[0], shards, -1)
    return WordStats(*_stats(_Pieces(chunk, mesh), features, split, targets))


class _Pieces(NamedTuple):
    """How the vocabulary [shards, V / shards] is walked."""

    chunk: int
    mesh: Mesh | None

    def loop(self, head: jax.Array, carry: Any, body: Callable[[Any, Any, int], Any]) -> Any:
        """`carry = body(carry, at, size)` for all pieces, the last of them smaller."""
        size = min(self.chunk, head.shape[2])
        whole, rest = divmod(head.shape[2], size)
        if whole == 1:
            carry = body(carry, 0, size)
        else:
            carry = lax.fori_loop(0, whole, lambda i, c: body(c, i * size, size), carry)
        return body(carry, whole * size, rest) if rest else carry

    def rows(self, x: jax.Array) -> jax.Array:
        """[B, ...], split as the batch."""
        return self._laid_out(x, BATCH_AXES)

    def words(self, head: jax.Array) -> jax.Array:
        """[D, shards, ...], split over the shards."""
        return self._laid_out(head, None, "tensor" if head.shape[1] > 1 else None)

    def _laid_out(self, x: jax.Array, *spec: Any) -> jax.Array:
        if self.mesh is None:
            return x
        return lax.with_sharding_constraint(x, NamedSharding(self.mesh, PartitionSpec(*spec)))


def _logits(features: jax.Array, piece: jax.Array) -> jax.Array:
    """[B, T, D] and [D, shards, c] -> float32 [B, T, shards, c]."""
    return jnp.einsum("btd,dsc->btsc", features, piece, preferred_element_type=jnp.float32)


def _piece(head: jax.Array, targets: jax.Array, at: Any, size: int) -> tuple[jax.Array, jax.Array]:
    """Words at to at + size - 1 of every shard [D, shards, c], and where the right ones are."""
    piece = lax.dynamic_slice_in_dim(head, at, size, axis=2)
    first = jnp.arange(head.shape[1])[:, None] * head.shape[2]
    return piece, targets[..., None, None] == first + at + jnp.arange(size)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _stats(pieces, features, head, targets):
    return _stats_forward(pieces, features, head, targets)[0]


def _stats_forward(pieces, features, head, targets):
    features, head = pieces.rows(features), pieces.words(head)

    def body(carry, at, size):
        top, total, target, plain = carry
        piece, right = _piece(head, targets, at, size)
        logits = _logits(features, piece)
        new_top = jnp.maximum(top, logits.max((-2, -1)))
        exps = jnp.exp(logits - new_top[..., None, None]).sum((-2, -1))
        return (
            new_top,
            total * jnp.exp(top - new_top) + exps,
            target + jnp.where(right, logits, 0.0).sum((-2, -1)),
            plain + logits.sum((-2, -1)),
        )

    zero = jnp.zeros(targets.shape, jnp.float32)
    top, total, target, plain = pieces.loop(head, (zero - jnp.inf, zero, zero, zero), body)
    log_sum = top + jnp.log(total)
    words = head.shape[1] * head.shape[2]
    return (log_sum, target, plain / words, top), (features, head, targets, log_sum)


def _stats_backward(pieces, residuals, cotangents):
    features, head, targets, log_sum = residuals
    d_log_sum, d_target, d_mean, _ = cotangents
    d_mean = d_mean / (head.shape[1] * head.shape[2])

    def body(carry, at, size):
        d_features, d_head = carry
        piece, right = _piece(head, targets, at, size)
        p = jnp.exp(_logits(features, piece) - log_sum[..., None, None])
        d = d_log_sum[..., None, None] * p + d_mean[..., None, None]
        d = (d + jnp.where(right, d_target[..., None, None], 0.0)).astype(features.dtype)
        d_features += jnp.einsum("btsc,dsc->btd", d, piece, preferred_element_type=jnp.float32)
        d_piece = jnp.einsum("btd,btsc->dsc", features, d, preferred_element_type=jnp.float32)
        d_head = lax.dynamic_update_slice_in_dim(d_head, d_piece.astype(d_head.dtype), at, axis=2)
        return pieces.rows(d_features), pieces.words(d_head)

    start = (
        pieces.rows(jnp.zeros(features.shape, jnp.float32)),
        pieces.words(jnp.zeros(head.shape, head.dtype)),
    )
    d_features, d_head = pieces.loop(head, start, body)
    return d_features.astype(features.dtype), d_head, None


_stats.defvjp(_stats_forward, _stats_backward)
