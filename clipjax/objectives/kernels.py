"""A tile as one kernel: the product of two sides and all that is made of it, nothing of which is written down.

The generic path (`tiles.py`) is what these kernels must agree with, and what runs where they do not fit. A tile
that says which product it begins with (`Similarities`) is cut into blocks. Forward, a block's similarities become
statistics of its rows and columns before they leave the chip, and blocks are merged outside. Backward, they
become their own cotangent, in the operands' dtype; the two products of it with the sides are the compiler's.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from clipjax.objectives.products import How, contract
from clipjax.objectives.reductions import Places, Reduction, State, fold

Side = dict[str, jax.Array]
States = dict[str, State]
Terms = dict[str, Reduction]


class Block(NamedTuple):
    """What one program of a kernel takes.

    Attributes:
      rows: rows of similarities.
      cols: columns of similarities.
      width: of the sides, as much as it multiplies at once; 0: all.
      warps: of an NVIDIA chip.
      stages: loads under way at once, on an NVIDIA chip.
    """

    rows: int
    cols: int
    width: int = 0
    warps: int = 8
    stages: int = 3


BLOCKS = {
    "gpu": Block(128, 128, 64, warps=4),
    "tpu": Block(512, 512),
    "cpu": Block(8, 8),  # for a look at the kernel without a chip
}
"""By the kind of device."""


@dataclasses.dataclass(frozen=True)
class Similarities:
    """A tile that begins with the similarities of two sides, and reads those sides for nothing else.

    Attributes:
      dot: `engine.dot`.
      first: name of the rows' side in the product.
      second: name of the columns' side.
      terms: `terms(similarities, row, col, shared) -> (row terms, column terms)`.
      slow_on: platforms where its kernels were found slower than what the compiler makes of it.
    """

    dot: Callable[[jax.Array, jax.Array], jax.Array]
    first: str
    second: str
    terms: Callable[[jax.Array, Side, Side, Any], tuple[Terms, Terms]]
    slow_on: tuple[str, ...] = ()

    def __call__(self, row: Side, col: Side, shared: Any) -> tuple[Terms, Terms]:
        return self.terms(self.dot(row[self.first], col[self.second]), row, col, shared)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """How a tile's kernels run.

    Attributes:
      how: the product.
      block: what one program takes.
      always: also where a tile says that it is slow.
    """

    how: How
    block: Block
    always: bool = True

    def fits(self, tile: Any, row: Side, col: Side, shared: Any) -> bool:
        """Whether a tile of these sides can be a kernel.

        It is made of whole blocks, reads whole numbers and scalars besides the two sides, and its statistics are a
        number each.
        """
        if not isinstance(tile, Similarities):
            return False
        if not self.always and self.how.platform in tile.slow_on:
            return False
        first, second = row[tile.first], col[tile.second]
        lanes = 128 if self.how.platform == "tpu" else 1
        whole = (
            len(first) % self.block.rows == 0
            and len(second) % self.block.cols == 0
            and first.shape[1] % (self.block.width or lanes) == 0
        )
        small = [v for k, v in row.items() if k != tile.first]
        small += [v for k, v in col.items() if k != tile.second]
        plain = all(v.ndim == 1 and v.dtype == jnp.int32 for v in small) and all(
            jnp.ndim(v) == 0 for v in jax.tree.leaves(shared)
        )
        if not (whole and plain):
            return False
        states = jax.tree.leaves(self._like(tile, row, col, shared))
        return all(leaf.ndim == 1 and leaf.dtype == jnp.float32 for leaf in states)

    def stats(self, tile: Any, row: Side, col: Side, shared: Any) -> tuple[States, States]:
        """The statistics of these rows [R, ...] and of these columns [C, ...]."""
        like = self._like(tile, row, col, shared)
        rows, cols = map(jax.tree.structure, like)

        def body(sims, row, col, shared, _):
            row_states, col_states = _states(tile, sims, row, col, shared)
            return jax.tree.leaves(row_states), jax.tree.leaves(col_states), None

        outs = len(jax.tree.leaves(like[0])), len(jax.tree.leaves(like[1]))
        of_rows, of_cols, _ = self._run(tile, body, row, col, shared, ({}, {}), outs)
        return fold(jax.tree.unflatten(rows, of_rows)), fold(jax.tree.unflatten(cols, of_cols))

    def grads(
        self,
        tile: Any,
        row: Side,
        col: Side,
        shared: Any,
        row_cts: States,
        col_cts: States,
    ) -> tuple[Side, Side, dict[int, jax.Array]]:
        """Cotangents of the two sides, and of the leaves of `shared`, float32.

        Args:
          tile: what happens.
          row: sides [R, ...].
          col: sides [C, ...].
          shared: scalars.
          row_cts: per row statistic, the final shift and the cotangents of the final sums.
          col_cts: the same for the columns.
        """
        leaves, tree = jax.tree.flatten(shared)
        moving = [i for i, v in enumerate(leaves) if jnp.issubdtype(v.dtype, jnp.inexact)]

        def body(sims, row, col, shared, cts):
            row_cts, col_cts = cts
            found = jax.tree.leaves(shared)

            def sums(sims, floats):
                whole = [floats[moving.index(i)] if i in moving else v for i, v in enumerate(found)]
                row_terms, col_terms = tile.terms(sims, row, col, jax.tree.unflatten(tree, whole))
                return (
                    {k: t.sums(1, row_cts[k].shift) for k, t in row_terms.items()},
                    {k: t.sums(0, col_cts[k].shift) for k, t in col_terms.items()},
                )

            _, pullback = jax.vjp(sums, sims, [found[i] for i in moving])
            d_sims, d_shared = pullback(tuple({k: s.sums for k, s in c.items()} for c in cts))
            # A block's part of a scalar stands in each of its columns: a chip writes rows of numbers.
            return [], [jnp.full((self.block.cols,), d) for d in d_shared], d_sims

        cts, outs = (row_cts, col_cts), (0, len(moving))
        _, parts, d_sims = self._run(tile, body, row, col, shared, cts, outs, self.how.dtype)
        first, second = row[tile.first], col[tile.second]
        d_first = contract(self.how, d_sims, second, 1, 0)
        d_second = contract(self.how, d_sims, first, 0, 0)
        d_shared = {i: x[:, :: self.block.cols].sum() for i, x in zip(moving, parts, strict=True)}
        return {tile.first: d_first}, {tile.second: d_second}, d_shared

    def _like(self, tile, row, col, shared):
        """What the statistics of a few rows and columns look like."""

        def few(side, wide):
            return {k: jax.ShapeDtypeStruct((8,), v.dtype) for k, v in side.items() if k != wide}

        sims = jax.ShapeDtypeStruct((8, 8), jnp.float32)
        small = few(row, tile.first), few(col, tile.second)
        return jax.eval_shape(functools.partial(_states, tile), sims, *small, shared)

    def _run(self, tile, body, row, col, shared, cts, outs, sims_dtype=None):
        """Runs `body` on all blocks: it gives rows of numbers for its rows and for its columns, and a block.

        Returns:
          `outs[0]` arrays [C / block, R] and `outs[1]` arrays [R / block, C], float32, of what the blocks
          gave for their rows and columns; and, if a dtype is given, one array [R, C].
        """
        block, how = self.block, self.how
        first, second = (s.astype(how.dtype) for s in (row[tile.first], col[tile.second]))
        (n, width), m = first.shape, len(second)
        grid = n // block.rows, m // block.cols
        small = (
            {k: v for k, v in row.items() if k != tile.first},
            {k: v for k, v in col.items() if k != tile.second},
        )
        inputs = (small[0], cts[0]), (small[1], cts[1]), shared
        arrays = jax.tree.map(lambda v: v.reshape(1, -1), inputs)
        by_row = pl.BlockSpec((1, block.rows), lambda i, j: (0, i))
        by_col = pl.BlockSpec((1, block.cols), lambda i, j: (0, j))
        alone = pl.BlockSpec((1, 1), lambda i, j: (0, 0))
        specs = by_row, by_col, alone
        small_specs = [
            s for part, s in zip(arrays, specs, strict=True) for _ in jax.tree.leaves(part)
        ]
        flat, tree = jax.tree.flatten(arrays)

        def program(first_ref, second_ref, *refs):
            reads, writes = refs[: len(flat)], refs[len(flat) :]
            values = [
                ref[0, 0] if spec is alone else ref[0, :]
                for ref, spec in zip(reads, small_specs, strict=True)
            ]
            (rows, row_cts), (cols, col_cts), shared = jax.tree.unflatten(tree, values)
            sims = self._product(first_ref, second_ref, width)
            of_rows, of_cols, sims = body(sims, rows, cols, shared, (row_cts, col_cts))
            for ref, value in zip(writes[: sum(outs)], [*of_rows, *of_cols], strict=True):
                ref[0, 0, :] = value
            if sims_dtype is not None:
                writes[-1][...] = sims.astype(sims_dtype)

        out_specs = [pl.BlockSpec((1, 1, block.rows), lambda i, j: (j, 0, i))] * outs[0]
        out_specs += [pl.BlockSpec((1, 1, block.cols), lambda i, j: (i, 0, j))] * outs[1]
        out_shapes = [jax.ShapeDtypeStruct((grid[1], 1, n), jnp.float32)] * outs[0]
        out_shapes += [jax.ShapeDtypeStruct((grid[0], 1, m), jnp.float32)] * outs[1]
        if sims_dtype is not None:
            out_specs.append(pl.BlockSpec((block.rows, block.cols), lambda i, j: (i, j)))
            out_shapes.append(jax.ShapeDtypeStruct((n, m), sims_dtype))
        found = pl.pallas_call(
            program,
            grid=grid,
            in_specs=[
                pl.BlockSpec((block.rows, width), lambda i, j: (i, 0)),
                pl.BlockSpec((block.cols, width), lambda i, j: (j, 0)),
                *small_specs,
            ],
            out_specs=out_specs,
            out_shape=out_shapes,
            name=f"pairs_{'statistics' if sims_dtype is None else 'gradient'}",
            **_options(how.platform, block),
        )(first, second, *flat)
        numbers = [x[:, 0] for x in found[: sum(outs)]]
        return numbers[: outs[0]], numbers[outs[0] :], found[-1]

    def _product(self, first, second, width):
        step = self.block.width or width
        if step == width:
            return self._dot(first[...], second[...])

        def one(k, sims):
            at = pl.ds(k * step, step)
            return sims + self._dot(first[:, at], second[:, at])

        zeros = jnp.zeros((self.block.rows, self.block.cols), jnp.float32)
        return lax.fori_loop(0, width // step, one, zeros)

    def _dot(self, a, b):
        return lax.dot_general(
            a, b, (((1,), (1,)), ((), ())),
            precision=self.how.precision, preferred_element_type=jnp.float32,
        )  # fmt: skip


def _options(platform: str, block: Block) -> dict[str, Any]:
    if platform == "gpu":
        from jax.experimental.pallas import triton

        params: Any = triton.CompilerParams(num_warps=block.warps, num_stages=block.stages)
        return {"compiler_params": params}
    if platform == "tpu":
        from jax.experimental.pallas import tpu

        params = tpu.CompilerParams(dimension_semantics=("parallel", "parallel"))
        return {"compiler_params": params}
    return {"interpret": True}


def _states(tile, sims, row, col, shared) -> tuple[States, States]:
    row_terms, col_terms = tile.terms(sims, row, col, shared)
    places = Places(row["index"], col["index"])
    return (
        {k: term.lift(1, places) for k, term in row_terms.items()},
        {k: term.lift(0, places) for k, term in col_terms.items()},
    )
