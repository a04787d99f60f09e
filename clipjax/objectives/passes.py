"""What each device does of a `reduce`: its rows stay, blocks of columns are gathered or travel.

Forward, statistics of rows and columns; backward, cotangents of the sides, given the final shifts and
the cotangents of the final sums. Devices along `tensor` hold the same rows and share the columns.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from clipjax.mesh import BATCH_AXES
from clipjax.objectives.exchange import Route
from clipjax.objectives.reductions import State, fold, merged
from clipjax.objectives.tiles import Side, States, Sweep, floats, length, loop, put


class Block(NamedTuple):
    """One block of columns: how it is swept, the index of its first column, and whether it is a table."""

    sweep: Sweep
    first: int
    table: bool


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def run(plan: Pass, rows: Side, cols: tuple[Side, ...], shared: Any) -> tuple:
    """(row states, column states of each block). Only their sums have a gradient."""
    return _forward(plan, rows, cols, shared)[0]


def _forward(plan, rows, cols, shared):
    split, blocks = P(BATCH_AXES), plan.specs(cols)
    row_states, col_states, gathered = plan.map(
        plan.forward, (split, blocks, P()), (split, plan.state_specs, plan.gathered_specs)
    )(plan.narrow(rows), tuple(map(plan.narrow, cols)), shared)
    shifts = _shifts(row_states), tuple(map(_shifts, col_states))
    return (row_states, col_states), (rows, cols, shared, gathered, shifts)


def _backward(plan, residuals, cotangents):
    rows, cols, shared, gathered, (row_shifts, col_shifts) = residuals
    row_cts = _with_shifts(cotangents[0], row_shifts)
    col_cts = tuple(map(_with_shifts, cotangents[1], col_shifts))
    split, blocks = P(BATCH_AXES), plan.specs(cols)
    d_rows, d_cols, d_shared = plan.map(
        plan.backward,
        (split, blocks, P(), plan.gathered_specs, split, plan.state_specs),
        (split, plan.specs(tuple(map(floats, cols))), P()),
    )(plan.narrow(rows), tuple(map(plan.narrow, cols)), shared, gathered, row_cts, col_cts)
    leaves, tree = jax.tree.flatten(shared)
    d_shared = jax.tree.unflatten(tree, _like(dict(enumerate(leaves)), d_shared).values())
    return _like(rows, d_rows), tuple(map(_like, cols, d_cols)), d_shared


run.defvjp(_forward, _backward)


@dataclasses.dataclass(frozen=True)
class Pass:
    """One `reduce`, as every device runs it.

    Attributes:
      blocks: the blocks of columns.
      dtype: of embeddings, as they travel and as the products take them.
      mesh: the device mesh, None for one device.
      route: how blocks that are no tables reach the rows of other devices.
      tensor: the mesh axes whose devices hold the same rows and share the columns: one or none.
      grads: dtype of the columns' gradient as it travels; sums are float32 where it arrives.
      direct: whether every device is sent its part of that gradient by each other and adds up by itself,
        or a reduce-scatter does both.
    """

    blocks: tuple[Block, ...]
    dtype: str
    mesh: Mesh | None
    route: Route
    tensor: tuple[str, ...]
    grads: str = "float32"
    direct: bool = False

    def map(self, function: Callable, in_specs: Any, out_specs: Any) -> Callable:
        """`function`, which is given what one device has, on all devices."""
        if self.mesh is None:
            return function
        return jax.shard_map(
            function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
        )

    def narrow(self, side: Side) -> Side:
        """Embeddings in the engine's dtype."""
        return {
            k: v.astype(self.dtype) if v.ndim > 1 and v.dtype == jnp.float32 else v
            for k, v in side.items()
        }

    def specs(self, cols: tuple[Side, ...]) -> tuple:
        """How the sides of each block are split: as the batch is, or not at all, and over `tensor`."""

        def spec(block, array):
            if not block.table:
                return P(BATCH_AXES + self.tensor)
            return P(*[None] * (block.sweep.col_axis % array.ndim), self.tensor or None)

        return tuple(
            {k: spec(block, v) for k, v in side.items()}
            for block, side in zip(self.blocks, cols, strict=True)
        )

    @property
    def state_specs(self) -> tuple:
        """How the column statistics of each block are split."""
        split = P(BATCH_AXES + self.tensor)
        return tuple(P(self.tensor or None) if b.table else split for b in self.blocks)

    @property
    def gathered_specs(self) -> tuple:
        """Where gathered columns live between forward and backward (rings and tables keep none)."""
        axes = tuple(a for a in BATCH_AXES if a not in self.route.gather) + self.tensor
        return tuple(None if b.table or self.route.ring else P(axes or None) for b in self.blocks)

    def forward(self, rows, cols, shared):
        """Statistics of this device's rows and columns, and the columns that it gathered."""
        rows = self._rows(rows)
        tables, moving = self._parted(cols)
        placed = {i: self._place_table(i, c) for i, c in enumerate(cols)}  # positions do not matter
        empty = {i: self.blocks[i].sweep.no_stats(rows, c, shared) for i, c in placed.items()}
        row_states, home = empty[0][0], {i: empty[i][1] for i in moving}
        at_tables = {}
        for i, table in tables.items():
            table = self._place_table(i, table)
            row_states, seen = self.blocks[i].sweep.stats(rows, table, shared, row_states)
            at_tables[i] = self._everywhere(seen, BATCH_AXES)

        def visit(row_states, moving, hop):
            whole, seen = self._gather(moving), {}
            for i, block in whole.items():
                block = self._place(i, block, hop)
                row_states, seen[i] = self.blocks[i].sweep.stats(rows, block, shared, row_states)
            return row_states, self._bring_home(seen), whole

        gathered = {}
        if not self.route.ring:
            row_states, home, gathered = visit(row_states, moving, 0)
        elif moving:

            def travel(carry, hop):
                row_states, moving, home = carry
                next_moving = self._pass_on(moving)
                row_states, seen, _ = visit(row_states, moving, hop)
                return (row_states, next_moving, self._pass_on(_merged(home, seen))), None

            last = self._size(self.route.ring) - 1
            carry = row_states, moving, home
            (row_states, moving, home), _ = lax.scan(travel, carry, jnp.arange(last))
            row_states, seen, _ = visit(row_states, moving, last)
            home = self._pass_on(_merged(home, seen))
        count = range(len(self.blocks))
        col_states = tuple((at_tables | home)[i] for i in count)
        row_states = self._everywhere(row_states, self.tensor)
        return row_states, col_states, tuple(gathered.get(i) for i in count)

    def backward(self, rows, cols, shared, gathered, row_cts, col_cts):
        """Cotangents of this device's rows and columns, and of `shared`."""
        rows = self._rows(rows)
        tables, moving = self._parted(cols)
        d = self.blocks[0].sweep.no_grads(rows, shared)
        d_tables = {}
        for i, table in tables.items():
            table = self._place_table(i, table)
            d, d_table = self.blocks[i].sweep.grads(rows, table, shared, row_cts, col_cts[i], d)
            d_tables[i] = self._sum(d_table, BATCH_AXES)

        def visit(d, moving, hop):
            d_cols = {}
            for i, (side, cts) in moving.items():
                whole = self._gather(side) if gathered[i] is None else gathered[i]
                whole, cts = self._place(i, whole, hop), self._gather(cts)
                d, d_cols[i] = self._pieces(i, rows, whole, shared, row_cts, cts, d)
            return d, d_cols

        moving = {i: (side, col_cts[i]) for i, side in moving.items()}
        d_cols = {}
        if not self.route.ring:
            d, d_cols = visit(d, moving, 0)
        elif moving:

            def travel(carry, hop):
                d, moving, d_cols = carry
                next_moving = self._pass_on(moving)
                d, seen = visit(d, moving, hop)
                return (d, next_moving, self._pass_grads(_add(d_cols, seen))), None

            last = self._size(self.route.ring) - 1
            zero = {i: self.blocks[i].sweep.no_grads(m[0], None)[0] for i, m in moving.items()}
            (d, moving, d_cols), _ = lax.scan(travel, (d, moving, zero), jnp.arange(last))
            d, seen = visit(d, moving, last)
            d_cols = self._pass_grads(_add(d_cols, seen))
        d_rows, d_shared = d
        return (
            self._sum(d_rows, self.tensor),
            tuple((d_tables | d_cols)[i] for i in range(len(self.blocks))),
            self._sum(d_shared, BATCH_AXES + self.tensor),
        )

    def _pieces(self, i, rows, whole, shared, row_cts, cts, d):
        """Cotangents of a gathered block, sent home a few columns of every device at a time.

        The gradient of the whole block is never held.
        """
        sweep, parts = self.blocks[i].sweep, self._size(self.route.gather)
        if parts == 1:
            return sweep.grads(rows, whole, shared, row_cts, cts, d)
        n = length(whole) // parts

        def one_piece(carry, at, size):
            d, home = carry

            def piece(a):
                a = lax.dynamic_slice_in_dim(a.reshape(parts, n, *a.shape[1:]), at, size, 1)
                return a.reshape(parts * size, *a.shape[2:])

            cut = jax.tree.map(piece, (whole, cts))
            d, d_piece = sweep.grads(rows, cut[0], shared, row_cts, cut[1], d)
            return d, put(home, self._scatter(d_piece), at)

        home = {k: jnp.zeros((n, *v.shape[1:]), jnp.float32) for k, v in floats(whole).items()}
        return loop(n, -(-sweep.chunk // parts), (d, home), one_piece)

    def _parted(self, cols):
        """{position: side} of tables, and of the blocks that travel."""
        numbered = list(enumerate(cols))
        return (
            {i: c for i, c in numbered if self.blocks[i].table},
            {i: c for i, c in numbered if not self.blocks[i].table},
        )

    def _rows(self, rows):
        b = length(rows)
        return rows | {"index": _index_of(self._axis_index(BATCH_AXES) * b, b)}

    def _place_table(self, i, table):
        """Adds the positions of this device's part of a table."""
        n = length(table, self.blocks[i].sweep.col_axis)
        start = self.blocks[i].first + self._axis_index(self.tensor) * n
        return table | {"index": _index_of(start, n)}

    def _place(self, i, block, hop):
        """Adds the positions of a gathered block of columns, `hop` steps from home in the ring."""
        parts = self._size(self.route.gather)
        n = length(block) // parts
        owner = self._axis_index(tuple(a for a in BATCH_AXES if a not in self.route.gather))
        if self.route.ring:
            owner = (owner - hop) % self._size(self.route.ring)
        owners = (owner * parts + jnp.arange(parts)) * self._size(self.tensor)
        start = self.blocks[i].first + (owners + self._axis_index(self.tensor)) * n
        index = (start[:, None] + jnp.arange(n)).reshape(-1).astype(jnp.int32)
        return block | {"index": index}

    def _axis_index(self, axes) -> Any:
        return lax.axis_index(axes) if self.mesh is not None and axes else 0

    def _size(self, axes) -> int:
        return math.prod(self.mesh.shape[a] for a in axes) if self.mesh is not None else 1

    def _sum(self, tree, axes):
        return lax.psum(tree, axes) if self.mesh is not None and axes else tree

    def _gather(self, tree):
        if not self.route.gather:
            return tree
        return jax.tree.map(lambda a: lax.all_gather(a, self.route.gather, tiled=True), tree)

    def _scatter(self, tree):
        """Sums over the devices that shared a block; each keeps its own columns."""
        axes = self.route.gather

        def send(a):
            if not self.direct:
                return lax.psum_scatter(a.astype(self.grads), axes, tiled=True)
            a = a.astype(self.grads).reshape(self._size(axes), -1, *a.shape[1:])
            return jnp.sum(lax.all_to_all(a, axes, 0, 0, tiled=True), 0, dtype=jnp.float32)

        return jax.tree.map(send, tree)

    def _bring_home(self, states):
        """Merges the statistics of gathered blocks; each device keeps its own columns'."""
        if not self.route.gather:
            return states
        return {i: self._part(s, self.route.gather) for i, s in states.items()}

    def _everywhere(self, states, axes):
        """Merges statistics of the same rows or columns over `axes`; every device gets them."""
        if self.mesh is None or not axes:
            return states
        devices, n = self._size(axes), jax.tree.leaves(states)[0].shape[0] if states else 0
        fill = -n % devices
        states = jax.tree.map(lambda a: jnp.pad(a, [(0, fill)] + [(0, 0)] * (a.ndim - 1)), states)
        part = self._part(states, axes)
        return jax.tree.map(lambda a: lax.all_gather(a, axes, tiled=True)[:n], part)

    def _part(self, states, axes):
        """Merges statistics over the devices along `axes`; each device gets its part of them."""
        devices = self._size(axes)

        def send(a):
            a = a.reshape(devices, -1, *a.shape[1:])
            return lax.all_to_all(a, axes, split_axis=0, concat_axis=0, tiled=True)

        return fold(jax.tree.map(send, states))

    def _pass_grads(self, tree):
        sent = self._pass_on(jax.tree.map(lambda a: a.astype(self.grads), tree))
        return jax.tree.map(lambda a: a.astype(jnp.float32), sent)

    def _pass_on(self, tree):
        n = self._size(self.route.ring)
        ring = [(i, (i + 1) % n) for i in range(n)]
        return jax.tree.map(lambda a: lax.ppermute(a, self.route.ring, ring), tree)


def _shifts(states: States) -> dict[str, Any]:
    return {k: s.shift for k, s in states.items()}


def _with_shifts(cotangents: States, shifts: dict[str, Any]) -> States:
    return {k: State(shifts[k], ct.sums, ct.kind) for k, ct in cotangents.items()}


def _like(arrays: dict, cotangents: dict) -> dict:
    """Cotangents in the dtypes of `arrays`; None for those that have none."""
    return {
        k: cotangents[k].astype(v.dtype) if k in cotangents else None for k, v in arrays.items()
    }


def _index_of(start, n):
    return (start + jnp.arange(n)).astype(jnp.int32)


def _merged(a: dict[int, States], b: dict[int, States]) -> dict[int, States]:
    return {i: merged(a[i], b[i]) for i in a}


def _add(a, b):
    return jax.tree.map(jnp.add, a, b)
