"""All pairs of R rows and C columns on one device, tile by tile: statistics and their gradient.

The gradient does not differentiate the loop over tiles. Given the final shifts and the cotangents
of the final sums (see `reductions.py`), each tile's share of the gradient stands alone: the tile
is computed again, its sums are differentiated, and nothing but the inputs needs to be kept.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Jaxpr, subjaxprs

from clipjax.objectives.kernels import Kernel
from clipjax.objectives.reductions import Places, Reduction, State, merged

Side = dict[str, jax.Array]
Terms = dict[str, Reduction]
Tile = Callable[[Side, Side, Any], tuple[Terms, Terms]]
States = dict[str, State]


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A pass over all tiles of `rows` x `cols`, the columns in the outer loop.

    Attributes:
      tile: `tile(row, col, shared) -> (row terms, column terms)`, given one tile's sides.
      chunk: rows and columns of a tile, at most.
      col_axis: the axis of the columns in their sides: 0, or -1 for [..., C].
      kernel: makes a tile in one kernel where it can; None: never.
    """

    tile: Tile
    chunk: int
    col_axis: int = 0
    kernel: Kernel | None = None

    def look(self, rows: Side, cols: Side, shared: Any) -> tuple[frozenset[str], float]:
        """The names of the rows' statistics, and bytes for each pair of the largest array of a tile."""

        def sample(side, n, axis=0):
            def cut(v):
                shape = list(v.shape)
                shape[axis] = n
                return jax.ShapeDtypeStruct(tuple(shape), v.dtype)

            return jax.tree.map(cut, side) | {"index": jax.ShapeDtypeStruct((n,), jnp.int32)}

        n, m = 61, 67  # primes, so that an array's size tells whether it holds every pair
        traced, (row_states, _) = jax.make_jaxpr(self._tile_stats, return_shape=True)(
            sample(rows, n), sample(cols, m, self.col_axis), shared
        )
        sizes = [a.size * a.dtype.itemsize for a in _arrays(traced.jaxpr) if a.size % (n * m) == 0]
        return frozenset(row_states), max(sizes, default=4 * n * m) / (n * m)

    def no_stats(self, rows: Side, cols: Side, shared: Any) -> tuple[States, States]:
        """The statistics of these rows and of these columns before any pair was seen."""
        sample = _take(rows, 0, 1), _take(cols, 0, 1, self.col_axis)
        row_like, col_like = jax.eval_shape(self._tile_stats, *sample, shared)
        n, m = length(rows), length(cols, self.col_axis)
        return (
            {k: s.kind.empty(s, n) for k, s in row_like.items()},
            {k: s.kind.empty(s, m) for k, s in col_like.items()},
        )

    def stats(
        self, rows: Side, cols: Side, shared: Any, row_states: States
    ) -> tuple[States, States]:
        """Merges these columns into the rows' statistics; returns them and the columns' own.

        Args:
          rows: sides [R, ...] of the rows.
          cols: sides [C, ...] of the columns.
          shared: arrays that every tile sees whole.
          row_states: the rows' statistics over the columns seen before.
        """

        def one_column_chunk(carry, at, size):
            row_states, col_states = carry
            col = _take(cols, at, size, self.col_axis)

            def one_tile(carry, at, size):
                row_states, chunk_states = carry
                row_seen, col_seen = self._tile_stats(_take(rows, at, size), col, shared)
                row_seen = merged(_take(row_states, at, size), row_seen)
                return put(row_states, row_seen, at), merged(chunk_states, col_seen)

            carry = row_states, _take(col_states, at, size)
            row_states, seen = loop(length(rows), self.chunk, carry, one_tile)
            return row_states, put(col_states, seen, at)

        carry = row_states, self.no_stats(rows, cols, shared)[1]
        return loop(length(cols, self.col_axis), self.chunk, carry, one_column_chunk)

    def grads(
        self, rows: Side, cols: Side, shared: Any, row_cts: States, col_cts: States, carry: Any
    ) -> tuple[tuple[Side, Any], Side]:
        """Cotangents of the sides and of `shared`, of the pairs of these rows and columns.

        Args:
          rows: sides [R, ...] of the rows.
          cols: sides [C, ...] of the columns.
          shared: arrays that every tile sees whole.
          row_cts: per row statistic, the final shift and the cotangents of the final sums.
          col_cts: the same for the columns.
          carry: cotangents (rows, shared) so far, from `no_grads`.

        Returns:
          `carry` with these pairs added, and the columns' cotangents; float32, floating leaves.
        """

        def one_column_chunk(carry, at, size):
            row_and_shared, d_cols = carry
            col = _take(cols, at, size, self.col_axis)
            col_ct = _take(col_cts, at, size)

            def one_tile(carry, at, size):
                (d_rows, d_shared), d_col = carry
                row, row_ct = _take(rows, at, size), _take(row_cts, at, size)
                d = self._tile_grads(row, col, shared, row_ct, col_ct)
                d_rows = put(d_rows, _add(_take(d_rows, at, size), d[0]), at)
                return (d_rows, _add(d_shared, d[2])), _add(d_col, d[1])

            carry = row_and_shared, _zeros(floats(col))
            row_and_shared, d_col = loop(length(rows), self.chunk, carry, one_tile)
            return row_and_shared, put(d_cols, d_col, at, self.col_axis)

        start = carry, _zeros(floats(cols))
        return loop(length(cols, self.col_axis), self.chunk, start, one_column_chunk)

    def no_grads(self, rows: Side, shared: Any) -> tuple[Side, Any]:
        """Zero cotangents of the rows' sides and of `shared`."""
        return _zeros(floats(rows)), _zeros(floats(dict(enumerate(jax.tree.leaves(shared)))))

    def _fused(self, row, col, shared) -> Kernel | None:
        fits = self.kernel is not None and self.kernel.fits(self.tile, row, col, shared)
        return self.kernel if fits else None

    def _tile_stats(self, row, col, shared):
        if kernel := self._fused(row, col, shared):
            return kernel.stats(self.tile, row, col, shared)
        row, col = _wide(row), _wide(col)
        row_terms, col_terms = self.tile(row, col, shared)
        places = Places(row["index"], col["index"])
        return (
            {k: term.lift(1, places) for k, term in row_terms.items()},
            {k: term.lift(0, places) for k, term in col_terms.items()},
        )

    def _tile_grads(self, row, col, shared, row_cts, col_cts):
        if kernel := self._fused(row, col, shared):
            return kernel.grads(self.tile, row, col, shared, row_cts, col_cts)
        row, col = _wide(row), _wide(col)
        leaves, tree = jax.tree.flatten(shared)
        whole = dict(enumerate(leaves))

        def sums(row_floats, col_floats, shared_floats):
            shared = jax.tree.unflatten(tree, (whole | shared_floats).values())
            row_terms, col_terms = self.tile(row | row_floats, col | col_floats, shared)
            return (
                {k: t.sums(1, row_cts[k].shift) for k, t in row_terms.items()},
                {k: t.sums(0, col_cts[k].shift) for k, t in col_terms.items()},
            )

        _, pullback = jax.vjp(sums, floats(row), floats(col), floats(whole))
        return pullback(tuple({k: s.sums for k, s in c.items()} for c in (row_cts, col_cts)))


def length(side: Any, axis: int = 0) -> int:
    """Rows of a side (or its columns, along `axis`)."""
    return jax.tree.leaves(side)[0].shape[axis]


def _arrays(jaxpr: Jaxpr) -> Iterator[Any]:
    """Shapes of all that a traced function makes on its way."""
    for equation in jaxpr.eqns:
        yield from (v.aval for v in equation.outvars)
    for inner in subjaxprs(jaxpr):
        yield from _arrays(inner)


def loop(n: int, size: int, carry: Any, body: Callable[[Any, Any, int], Any]) -> Any:
    """`carry = body(carry, at, size)` over n rows in pieces of `size`, the last one smaller."""
    size = min(size, n)
    whole, rest = divmod(n, size)
    if whole == 1:  # no loop: the compiler may keep a lone tile for the backward pass
        carry = body(carry, 0, size)
    if whole > 1:
        carry = lax.fori_loop(0, whole, lambda i, c: body(c, i * size, size), carry)
    return body(carry, whole * size, rest) if rest else carry


def _take(tree, at, size, axis=0):
    return jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, at, size, axis), tree)


def put(tree, piece, at, axis=0):
    return jax.tree.map(
        lambda a, p: lax.dynamic_update_slice_in_dim(a, p.astype(a.dtype), at, axis), tree, piece
    )


def _add(a, b):
    return jax.tree.map(jnp.add, a, b)


def floats(side: dict) -> dict:
    """The arrays that may have a gradient."""
    return {k: v for k, v in side.items() if jnp.issubdtype(v.dtype, jnp.inexact)}


def _zeros(tree):
    return jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), tree)


def _wide(side):
    """Sides as the tile sees them: bfloat16 (they travel so) as float32, so that cotangents are."""
    return {k: v.astype(jnp.float32) if v.dtype == jnp.bfloat16 else v for k, v in side.items()}
