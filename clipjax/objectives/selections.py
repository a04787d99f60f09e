"""Reductions that choose a pair of each row or column: the largest, the k largest, a random one.

They have no gradient: `engine.rows_at` fetches what was chosen, differentiably. Columns are named by
`index`, as the tile sees it. Where values are equal the lowest index wins, so every mesh, exchange
and tile size chooses the same; -1 stands for no pair at all, of value -inf.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jax.extend.random import threefry2x32_p

from clipjax.objectives.reductions import Places, Reduction, State, _keep

NOBODY = jnp.iinfo(jnp.int32).max  # while merging: after every index


@struct.dataclass
class Chosen:
    """Chosen pairs of n rows (or columns): [n], or [n, k] with the largest first."""

    value: jax.Array
    """Their values, float32."""
    index: jax.Array
    """The column (or row) of each, int32."""


@struct.dataclass
class Selection(Reduction):
    """What choices share: they keep `Chosen`, and no sums."""

    def sums(self, axis, shift):
        return ()

    @staticmethod
    def empty(like, n):
        shape = (n, *like.shift.value.shape[1:])
        value = jnp.full(shape, -jnp.inf, like.shift.value.dtype)
        return State(Chosen(value, jnp.full(shape, NOBODY, jnp.int32)), (), like.kind)

    @staticmethod
    def merge(states):
        chosen = states.shift
        return State(_largest(chosen.value, chosen.index, 0), (), states.kind)

    @staticmethod
    def value(state):
        value, index = state.shift.value, state.shift.index
        found = (value > -jnp.inf) & (index < NOBODY)
        return Chosen(value, jnp.where(found, index, -1))


@struct.dataclass
class ArgMax(Selection):
    """The largest of `values` [R, C] and where it is: `Chosen`, [n] each."""

    values: jax.Array
    where: jax.Array | None = None

    def lift(self, axis, places):
        values = lax.stop_gradient(_keep(self.values, self.where, -jnp.inf))
        index = places.cols if axis == 1 else places.rows[:, None]
        return State(_largest(values, index, axis), (), type(self))


@struct.dataclass
class TopK(Selection):
    """The k largest of `values` [R, C] and where they are: `Chosen`, [n, k] each, largest first."""

    values: jax.Array
    k: int = struct.field(pytree_node=False)
    where: jax.Array | None = None

    def lift(self, axis, places):
        values = lax.stop_gradient(_keep(self.values, self.where, -jnp.inf))
        values, index = (values, places.cols) if axis == 1 else (values.T, places.rows)
        top, at = lax.top_k(values, min(self.k, values.shape[1]))
        missing = (0, 0), (0, self.k - top.shape[1])
        top = jnp.pad(top, missing, constant_values=-jnp.inf)
        return State(
            Chosen(top, jnp.pad(index[at], missing, constant_values=NOBODY)), (), type(self)
        )

    @staticmethod
    def merge(states):
        k = states.shift.value.shape[-1]
        value, index = (jnp.concatenate([*a], -1) for a in (states.shift.value, states.shift.index))
        # Equal values by their index, whatever order tiles and devices came in.
        value, index = lax.sort((-value, index), num_keys=2)
        return State(Chosen(-value[:, :k], index[:, :k]), (), states.kind)


@struct.dataclass
class Sample(Selection):
    """A column drawn for each row from the softmax of its `logits` [R, C]: int32 [n].

    The Gumbel-max trick. The noise of a pair is a function of `key` and of the pair's place alone,
    so every mesh, exchange and tile size draws the same. The key (typed, as `jax.random.key` makes
    it) comes through `shared`. With one key, rows and columns draw independently.
    """

    logits: jax.Array
    key: jax.Array
    where: jax.Array | None = None

    def lift(self, axis, places):
        noisy = lax.stop_gradient(self.logits) + _gumbel(self.key, places, word=axis)
        return State(ArgMax(noisy, self.where).lift(axis, places).shift, (), type(self))

    @staticmethod
    def value(state):
        return Selection.value(state).index


def _largest(values, index, axis):
    top = values.max(axis)
    holds = (values == jnp.expand_dims(top, axis)) & (values > -jnp.inf)
    return Chosen(top, jnp.where(holds, index, NOBODY).min(axis))


def _gumbel(key: jax.Array, places: Places, word: int) -> jax.Array:
    """Standard Gumbel noise [R, C] by the place of each pair; two independent words of it."""
    seed = jax.random.bits(key, (2,), jnp.uint32)
    shape = len(places.rows), len(places.cols)
    place = places.rows[:, None], places.cols[None]
    operands = [*seed, *(p.astype(jnp.uint32) for p in place)]
    bits = threefry2x32_p.bind(*(jnp.broadcast_to(x, shape) for x in operands))[word]
    # The largest noise comes of the smallest uniform numbers, which float32 holds to 2^-33.
    uniform = jnp.minimum((bits.astype(jnp.float32) + 0.5) * 2.0**-32, 1 - 2.0**-24)
    return -jnp.log(-jnp.log1p(-uniform))
