"""What can be accumulated over the pairs of one row or column, tile by tile.

A reduction in progress is a `State`: `shift`, which carries no gradient, and `sums`, which do. Most
are sums under a shift: a running maximum keeps them in range, and they simply add once they are
brought to a common one. So tiles, chunks and devices merge in any order, and the derivative of
the finished value with respect to one tile needs only the final shift and the cotangents of the
final sums, never the other tiles. Reductions that choose a pair have no sums (`selections.py`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct


class Places(NamedTuple):
    """Where a tile's pairs are: `index` of its rows [R] and of its columns [C], int32."""

    rows: jax.Array
    cols: jax.Array


@struct.dataclass
class State:
    """A reduction in progress, for n rows or columns.

    Attributes:
      shift: what merges without a gradient: [n, ...], a tuple of such, or None.
      sums: [n] each; they have a gradient.
      kind: the reduction, which knows how to merge it.
    """

    shift: Any
    sums: tuple[jax.Array, ...]
    kind: type[Reduction] = struct.field(pytree_node=False)


@struct.dataclass
class Reduction:
    """One quantity of a tile [R, C], to be reduced along its rows or its columns.

    A new reduction gives `sums` and `value`, and `shift` where its terms need one; one that is no
    shifted sum has a `lift`, `empty` and `merge` of its own as well. `where` (bool, broadcastable
    to [R, C]) leaves pairs out: they contribute neither value nor gradient.
    """

    def shift(self, axis: int) -> jax.Array | None:
        """The largest exponent along `axis`, or None for terms that need no shift."""
        return None

    def sums(self, axis: int, shift: Any) -> tuple[jax.Array, ...]:
        """Sums of the tile's terms along `axis`, scaled by exp(-shift)."""
        raise NotImplementedError

    @staticmethod
    def value(state: State) -> Any:
        """The finished quantity, [n, ...]. Differentiated with respect to `state.sums` alone."""
        raise NotImplementedError

    def lift(self, axis: int, places: Places) -> State:
        """The state of one tile alone; `places` says where in the batch its pairs are."""
        shift = self.shift(axis)
        return State(shift, self.sums(axis, shift), type(self))

    @staticmethod
    def empty(like: State, n: int) -> State:
        """The state of no pairs at all, for `n` rows or columns."""
        shift = None if like.shift is None else jnp.full((n,), -jnp.inf, like.shift.dtype)
        return State(shift, tuple(jnp.zeros((n,), s.dtype) for s in like.sums), like.kind)

    @staticmethod
    def merge(states: State) -> State:
        """The state of the pairs of all `states`, stacked along a leading axis."""
        if states.shift is None:
            return State(None, tuple(s.sum(0) for s in states.sums), states.kind)
        shift = states.shift.max(0)
        # -inf - -inf would be NaN: a side without pairs weighs nothing.
        weight = jnp.where(states.shift == -jnp.inf, 0.0, jnp.exp(states.shift - _finite(shift)))
        return State(shift, tuple((s * weight).sum(0) for s in states.sums), states.kind)


@struct.dataclass
class Sum(Reduction):
    """Sum of `values` [R, C]."""

    values: jax.Array
    where: jax.Array | None = None

    def sums(self, axis, shift):
        return (jnp.sum(_keep(self.values, self.where, 0.0), axis),)

    @staticmethod
    def value(state):
        return state.sums[0]


@struct.dataclass
class LogSumExp(Reduction):
    """log sum exp of `logits` [R, C]; -inf, with zero gradient, where every pair is left out."""

    logits: jax.Array
    where: jax.Array | None = None

    def shift(self, axis):
        return _max(self.logits, self.where, axis)

    def sums(self, axis, shift):
        return (jnp.sum(_exp(self.logits, self.where, axis, shift), axis),)

    @staticmethod
    def value(state):
        total = state.sums[0]
        empty = total == 0  # not `total > 0`: a NaN must stay one
        return jnp.where(
            empty, -jnp.inf, _finite(state.shift) + jnp.log(jnp.where(empty, 1, total))
        )


@struct.dataclass
class Expectation(Reduction):
    """Mean of `values` [R, C] under the softmax of `logits` [R, C]; 0 without any pair."""

    logits: jax.Array
    values: jax.Array
    where: jax.Array | None = None

    def shift(self, axis):
        return _max(self.logits, self.where, axis)

    def sums(self, axis, shift):
        weights = _exp(self.logits, self.where, axis, shift)
        return jnp.sum(weights, axis), jnp.sum(weights * _keep(self.values, self.where, 0.0), axis)

    @staticmethod
    def value(state):
        total, weighted = state.sums
        return weighted / jnp.where(total == 0, 1, total)


@struct.dataclass
class Max(Reduction):
    """Largest of `values` [R, C], without gradient; -inf where every pair is left out."""

    values: jax.Array
    where: jax.Array | None = None

    def shift(self, axis):
        return _max(self.values, self.where, axis)

    def sums(self, axis, shift):
        return ()

    @staticmethod
    def value(state):
        return state.shift


def merged(a: dict[str, State], b: dict[str, State]) -> dict[str, State]:
    """The statistics of the pairs of both."""
    return fold(jax.tree.map(lambda x, y: jnp.stack([x, y]), a, b))


def fold(states: dict[str, State]) -> dict[str, State]:
    """Merges statistics stacked along a leading axis."""
    return {k: s.kind.merge(s) for k, s in states.items()}


def _keep(values, where, other):
    return values if where is None else jnp.where(where, values, other)


def _max(values, where, axis):
    return jax.lax.stop_gradient(jnp.max(_keep(values, where, -jnp.inf), axis))


def _exp(logits, where, axis, shift):
    return jnp.exp(_keep(logits, where, -jnp.inf) - jnp.expand_dims(_finite(shift), axis))


def _finite(shift):
    """`shift` with -inf (no pairs) as 0; NaN and +inf stay, so that a broken embedding shows."""
    return jnp.where(shift == -jnp.inf, 0.0, shift)
