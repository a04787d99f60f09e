"""The pair engine: every pair of the global batch computed once, in tiles, on any mesh.

An objective says what happens in a tile; the engine does the rest:

    def tile(row, col, shared):
        logits = engine.dot(row["image"], col["text"])
        negatives = LogSumExp(logits, where=row["index"][:, None] != col["index"])
        return {"negatives": negatives}, {"negatives": negatives}

    rows, cols = engine.reduce(tile, {"image": scale * image}, {"text": text})

`rows["negatives"]` and `cols["negatives"]` are [N], split over the devices as the rows are, so
what follows is ordinary code on global arrays. One tile serves both directions. Rows stay where
they are; columns travel (see `exchange.py`), with O(N) numbers of column statistics. The N x N
table never exists: memory is O(N E) or less, forward and backward, and all is exact up to rounding.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from clipjax.errors import ClipjaxError
from clipjax.mesh import BATCH_AXES, batch_shards
from clipjax.objectives.exchange import (
    AllGather,
    Auto,
    Exchange,
    Grouped,
    Hierarchical,
    Ring,
    Route,
)
from clipjax.objectives.reductions import (
    Expectation,
    LogSumExp,
    Max,
    Reduction,
    State,
    Sum,
    fold,
    merge,
)
from clipjax.objectives.tiles import Side, States, Sweep, Tile, length

__all__ = [
    "AllGather",
    "Auto",
    "Exchange",
    "Expectation",
    "Grouped",
    "Hierarchical",
    "LogSumExp",
    "Max",
    "PairEngine",
    "Reduction",
    "Ring",
    "Side",
    "Sum",
    "Tile",
]


@dataclasses.dataclass(frozen=True)
class PairEngine:
    """How all pairs of the global batch are reduced on this mesh.

    Attributes:
      mesh: the device mesh ("group", "data", "tensor"), or None for one device.
      exchange: how columns reach the rows of other devices.
      chunk: rows and columns of a tile, at most; None chooses by device. Any number works.
      dtype: "float32", or "bfloat16": operands of the similarities in bfloat16, on the wire as
        well. Similarities and gradients accumulate in float32 either way.
    """

    mesh: Mesh | None = None
    exchange: Exchange = dataclasses.field(default_factory=AllGather)
    chunk: int | None = None
    dtype: str = "float32"

    def __post_init__(self):
        if self.chunk is not None and self.chunk < 1:
            raise ClipjaxError(f"chunk={self.chunk}: a tile needs at least one row and column")
        if self.dtype not in ("float32", "bfloat16"):
            raise ClipjaxError(f"dtype={self.dtype!r}: choose 'float32' or 'bfloat16'")

    def dot(self, a: jax.Array, b: jax.Array) -> jax.Array:
        """Similarities a @ b.T [R, C] in float32, of operands in the engine's dtype."""
        return _dot(self.dtype, a, b)

    def reduce(
        self, tile: Tile, rows: Side, cols: Side, shared: Any = None
    ) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        """Statistics of every row over all columns, and of every column over all rows.

        Differentiable with respect to every floating side and `shared`; what nobody asks the
        gradient of is dropped by the compiler. Inside `jax.jit` or alone.

        Args:
          tile: `tile(row, col, shared) -> (row terms, column terms)`, each a dict of `Reduction`s,
            given the sides of R rows and of C columns. Both sides hold `index`, the position in the
            batch (int32). Must be built from its arguments only: no traced array may slip in.
          rows: sides of the rows, each [N, ...].
          cols: sides of the columns, each [N, ...]; these travel, so keep them small.
          shared: a pytree of arrays that every tile sees whole.

        Returns:
          (rows, cols): the value of each term, [N], float32.

        Raises:
          ClipjaxError: rows and columns differ in number, or the devices do not divide them.
        """
        n = self._check(rows, cols)
        engine = self._resolved(n, sum(math.prod(v.shape[1:]) for v in cols.values()))
        chunk = self._chunk(n)
        sweep = Sweep(tile, chunk, chunk)
        row_terms, col_terms = jax.eval_shape(tile, _sample(rows), _sample(cols), shared)
        row_states, col_states = _run(engine, sweep, rows, cols, shared)
        return _finish(row_terms, row_states), _finish(col_terms, col_states)

    def describe(self, batch_size: int, width: int) -> str:
        """One line for a log: the exchange (chosen, if `Auto`), what it keeps and the tiles.

        Args:
          batch_size: global batch N.
          width: embedding width E.
        """
        chunk = self._chunk(batch_size)
        if self.mesh is None:
            return f"pairs: {batch_size} x {batch_size} on one device, tiles of {chunk}"
        engine = self._resolved(batch_size, width)
        route = engine.exchange.route(self.mesh)
        columns = batch_size * _size(self.mesh, route.gather) // batch_shards(self.mesh)
        asked = "Auto chose " if isinstance(self.exchange, Auto) else ""
        devices = batch_shards(self.mesh)
        return (
            f"pairs: {asked}{type(engine.exchange).__name__}, {devices} device{'s' * (devices > 1)}, "
            f"{columns} of {batch_size} columns at a time ({8e-6 * columns * width:,.3g} MB with "
            f"their gradient), {batch_size // engine.blocks} columns a row, tiles of {chunk}, "
            f"{self.dtype}"
        )

    def _chunk(self, batch_size: int) -> int:
        """Tiles that fill an accelerator's matrix units; on a CPU, small beside the rows."""
        if self.chunk is not None:
            return self.chunk
        if jax.default_backend() != "cpu":
            return 4096
        rows = batch_size if self.mesh is None else batch_size // batch_shards(self.mesh)
        return min(max(2 ** int(math.log2(max(rows // 4, 1))), 256), 1024)

    def _resolved(self, columns: int, numbers: int) -> PairEngine:
        if self.mesh is None:
            return self
        exchange = self.exchange.resolve(self.mesh, columns, numbers)
        return dataclasses.replace(self, exchange=exchange)

    @property
    def blocks(self) -> int:
        """How many sets of rows never meet each other's columns: 1 for the exact exchanges."""
        if self.mesh is None:
            return 1
        route = self.exchange.route(self.mesh)
        return _size(self.mesh, [a for a in BATCH_AXES if a not in route.gather + route.ring])

    def _check(self, rows: Side, cols: Side) -> int:
        for kind, side in (("row", rows), ("column", cols)):
            for name, array in side.items():
                if array.shape[0] != length(rows):
                    raise ClipjaxError(
                        f"{kind} side {name!r} has {array.shape[0]} entries, the batch has "
                        f"{length(rows)} rows: every row needs one column, its positive"
                    )
        shards = 1 if self.mesh is None else batch_shards(self.mesh)
        if length(rows) % shards:
            raise ClipjaxError(
                f"a batch of {length(rows)} rows cannot be split over {shards} devices "
                "(mesh group x data): choose a multiple"
            )
        return length(rows)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dot(dtype: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return _contract(dtype, a, b, 1, 1)


def _dot_fwd(dtype, a, b):
    return _dot(dtype, a, b), (a, b)


def _dot_bwd(dtype, residuals, d):
    # The cotangent is narrowed too: all three products run at the operands' speed.
    a, b = residuals
    if jax.default_backend() == "cpu":  # d.T @ a is a quarter faster with d.T laid out first
        return _contract(dtype, d, b, 1, 0), _contract(
            dtype, lax.optimization_barrier(d.T), a, 1, 0
        )
    return _contract(dtype, d, b, 1, 0), _contract(dtype, d, a, 0, 0)


_dot.defvjp(_dot_fwd, _dot_bwd)


def _contract(dtype, a, b, a_axis, b_axis):
    return lax.dot_general(
        a.astype(dtype),
        b.astype(dtype),
        (((a_axis,), (b_axis,)), ((), ())),
        precision=lax.Precision.HIGHEST if dtype == "float32" else None,
        preferred_element_type=jnp.float32,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _run(engine: PairEngine, sweep: Sweep, rows: Side, cols: Side, shared: Any) -> tuple:
    """(row states, column states), each [N]. Only their sums have a gradient."""
    return _run_fwd(engine, sweep, rows, cols, shared)[0]


def _run_fwd(engine, sweep, rows, cols, shared):
    device = _Device.of(engine, sweep)
    row_states, col_states, gathered = device.map(
        device.forward, (_SPLIT, _SPLIT, P()), (_SPLIT, _SPLIT, device.gathered_spec)
    )(rows, cols, shared)
    shifts = tuple({k: s.shift for k, s in c.items()} for c in (row_states, col_states))
    return (row_states, col_states), (rows, cols, shared, gathered, shifts)


def _run_bwd(engine, sweep, residuals, cotangents):
    rows, cols, shared, gathered, shifts = residuals
    row_cts, col_cts = (
        {k: State(shift[k], ct[k].sums) for k in ct}
        for shift, ct in zip(shifts, cotangents, strict=True)
    )
    device = _Device.of(engine, sweep)
    d_rows, d_cols, d_shared = device.map(
        device.backward,
        (_SPLIT, _SPLIT, P(), device.gathered_spec, _SPLIT, _SPLIT),
        (_SPLIT, _SPLIT, P()),
    )(rows, cols, shared, gathered, row_cts, col_cts)
    leaves, tree = jax.tree.flatten(shared)
    d_shared = jax.tree.unflatten(tree, [d_shared.get(i) for i in range(len(leaves))])
    return {k: d_rows.get(k) for k in rows}, {k: d_cols.get(k) for k in cols}, d_shared


_run.defvjp(_run_fwd, _run_bwd)

_SPLIT = P(BATCH_AXES)


@dataclasses.dataclass(frozen=True)
class _Device:
    """What one device does: its rows stay, blocks of columns are gathered or travel."""

    sweep: Sweep
    dtype: str
    mesh: Mesh | None
    route: Route

    @classmethod
    def of(cls, engine: PairEngine, sweep: Sweep) -> _Device:
        route = Route((), ()) if engine.mesh is None else engine.exchange.route(engine.mesh)
        return cls(sweep, engine.dtype, engine.mesh, route)

    def map(self, function, in_specs, out_specs):
        if self.mesh is None:
            return function
        return jax.shard_map(
            function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
        )

    def forward(self, rows, cols, shared):
        rows, block = self._rows(rows), self._narrow(cols)
        row_states, col_states = self.sweep.no_stats(rows, block | {"index": rows["index"]}, shared)

        def visit(row_states, block, hop):
            whole = self._gather(block)
            row_states, seen = self.sweep.stats(rows, self._index(whole, hop), shared, row_states)
            return row_states, self._bring_home(seen), whole

        if not self.route.ring:
            row_states, col_states, whole = visit(row_states, block, 0)
            return row_states, col_states, whole

        def travel(carry, hop):
            row_states, block, col_states = carry
            next_block = self._pass_on(block)
            row_states, seen, _ = visit(row_states, block, hop)
            return (row_states, next_block, self._pass_on(_merge(col_states, seen))), None

        last = self._ring_size - 1
        carry = row_states, block, col_states
        (row_states, block, col_states), _ = lax.scan(travel, carry, jnp.arange(last))
        row_states, seen, _ = visit(row_states, block, last)
        return row_states, self._pass_on(_merge(col_states, seen)), None

    def backward(self, rows, cols, shared, gathered, row_cts, col_cts):
        rows, block = self._rows(rows), (self._narrow(cols), col_cts)

        def visit(d, block, hop):
            cols, cts = block
            whole = self._gather(cols) if gathered is None else gathered
            d, d_whole = self.sweep.grads(
                rows, self._index(whole, hop), shared, row_cts, self._gather(cts), d
            )
            return d, self._scatter(d_whole)

        d = self.sweep.no_grads(rows, shared)
        if not self.route.ring:
            d, d_cols = visit(d, block, 0)
        else:

            def travel(carry, hop):
                d, block, d_cols = carry
                next_block = self._pass_on(block)
                d, seen = visit(d, block, hop)
                return (d, next_block, self._pass_on(_add(d_cols, seen))), None

            last = self._ring_size - 1
            zero = self.sweep.no_grads(block[0], None)[0]
            (d, block, d_cols), _ = lax.scan(travel, (d, block, zero), jnp.arange(last))
            d, seen = visit(d, block, last)
            d_cols = self._pass_on(_add(d_cols, seen))
        d_rows, d_shared = d
        if self.mesh is not None:
            d_shared = lax.psum(d_shared, BATCH_AXES)
        return d_rows, d_cols, d_shared

    @property
    def gathered_spec(self):
        """Where the gathered columns live between forward and backward (a ring keeps none)."""
        return P(tuple(a for a in BATCH_AXES if a not in self.route.gather))

    @property
    def _ring_size(self) -> int:
        return _size(self.mesh, self.route.ring)

    def _narrow(self, side):
        """Embeddings in the engine's dtype, as they travel and as the products take them."""
        return {
            k: v.astype(self.dtype) if v.ndim > 1 and v.dtype == jnp.float32 else v
            for k, v in side.items()
        }

    def _rows(self, rows):
        b = length(rows)
        return self._narrow(rows) | {"index": _index_of(self._at(BATCH_AXES) * b, b)}

    def _index(self, block, hop):
        """Adds the positions of a block of columns, `hop` steps from home in the ring."""
        owner = self._at(tuple(a for a in BATCH_AXES if a not in self.route.gather))
        if self.route.ring:
            owner = (owner - hop) % self._ring_size
        m = length(block)
        return block | {"index": _index_of(owner * m, m)}

    def _at(self, axes) -> Any:
        return lax.axis_index(axes) if self.mesh is not None and axes else 0

    def _gather(self, tree):
        if not self.route.gather:
            return tree
        return jax.tree.map(lambda a: lax.all_gather(a, self.route.gather, tiled=True), tree)

    def _scatter(self, tree):
        """Sums over the devices that shared a block; each keeps its own columns."""
        if not self.route.gather:
            return tree
        return jax.tree.map(lambda a: lax.psum_scatter(a, self.route.gather, tiled=True), tree)

    def _bring_home(self, states):
        """Merges the statistics of a gathered block; each device keeps its own columns'."""
        if not self.route.gather:
            return states
        devices = _size(self.mesh, self.route.gather)
        parts = jax.tree.map(
            lambda a: lax.all_to_all(
                a.reshape(devices, -1), self.route.gather, split_axis=0, concat_axis=0, tiled=True
            ),
            states,
        )
        return {k: fold(s) for k, s in parts.items()}

    def _pass_on(self, tree):
        n = self._ring_size
        ring = [(i, (i + 1) % n) for i in range(n)]
        return jax.tree.map(lambda a: lax.ppermute(a, self.route.ring, ring), tree)


def _finish(terms: dict[str, Reduction], states: States) -> dict[str, jax.Array]:
    def fixed(state):
        return State(jax.tree.map(lax.stop_gradient, state.shift), state.sums)

    return {k: term.value(fixed(states[k])) for k, term in terms.items()}


def _sample(side: Side) -> Any:
    one = {k: jax.ShapeDtypeStruct((1, *v.shape[1:]), v.dtype) for k, v in side.items()}
    return one | {"index": jax.ShapeDtypeStruct((1,), jnp.int32)}


def _index_of(start, n):
    return (start + jnp.arange(n)).astype(jnp.int32)


def _size(mesh, axes) -> int:
    return math.prod(mesh.shape[a] for a in axes)


def _merge(a: States, b: States) -> States:
    return {k: merge(a[k], b[k]) for k in a}


def _add(a, b):
    return jax.tree.map(jnp.add, a, b)
