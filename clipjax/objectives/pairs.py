"""The pair engine: every pair of rows and columns computed once, in tiles, on any mesh.

An objective says what happens in a tile; the engine does the rest:

    def tile(row, col, shared):
        logits = engine.dot(row["image"], col["text"])
        negatives = LogSumExp(logits, where=row["index"][:, None] != col["index"])
        return {"negatives": negatives}, {"negatives": negatives}

    rows, cols = engine.reduce(tile, {"image": scale * image}, {"text": text})

`rows["negatives"]` and `cols["negatives"]` are [N], split over the devices as the rows are, so
what follows is ordinary code on global arrays. One tile serves both directions. Columns come in
one block or in several: the batch's other side, a bank of earlier steps, a `Table` of words. Rows
stay where they are; columns travel (see `exchange.py`), with O(N) numbers of column statistics. The
table of all pairs never exists: memory is O(N E) or less, forward and backward, and all is exact up
to rounding. What a device does is in `passes.py`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax import lax
from jax.sharding import Mesh

from clipjax import layout
from clipjax.errors import ClipjaxError
from clipjax.mesh import BATCH_AXES, batch_shards
from clipjax.objectives import products, tables
from clipjax.objectives.exchange import (
    AllGather,
    Auto,
    Exchange,
    Grouped,
    Hierarchical,
    Ring,
    Route,
)
from clipjax.objectives.kernels import BLOCKS, Kernel, Similarities
from clipjax.objectives.passes import Block, Pass, run
from clipjax.objectives.reductions import Expectation, LogSumExp, Max, Reduction, State, Sum
from clipjax.objectives.selections import ArgMax, Chosen, Sample, TopK
from clipjax.objectives.tiles import Side, Sweep, Tile, length

__all__ = [
    "AllGather",
    "ArgMax",
    "Auto",
    "Chosen",
    "Exchange",
    "Expectation",
    "Grouped",
    "Hierarchical",
    "LogSumExp",
    "Max",
    "PairEngine",
    "Reduction",
    "Ring",
    "Sample",
    "Side",
    "Similarities",
    "Sum",
    "Table",
    "Tile",
    "TopK",
]


@dataclasses.dataclass(frozen=True)
class Table:
    """Columns that are no part of a batch and that every device has: words, classes, prototypes.

    They do not travel, and `tensor` devices share them. Their gradient is summed over the batch.

    Attributes:
      sides: the columns' sides, each [C, ...], or [..., C] with `axis=-1`, as a tile sees them.
      axis: 0 or -1: where the columns are.
    """

    sides: Side
    axis: int = 0

    def __post_init__(self):
        if self.axis not in (0, -1):
            raise ClipjaxError(
                f"Table: axis={self.axis} must be 0, for [C, ...], or -1, for [..., C]"
            )


Columns = Side | Table

_CHOICES = {
    "dtype": ("float32", "bfloat16"),
    "grads": ("float32", "bfloat16"),
    "precision": ("highest", "high"),
    "kernel": ("auto", "fused", "generic"),
}


@dataclasses.dataclass(frozen=True)
class PairEngine:
    """How all pairs of rows and columns are reduced on this mesh.

    Attributes:
      mesh: the device mesh ("group", "data", "tensor"), or None for one device.
      exchange: how columns reach the rows of other devices.
      chunk: rows and columns of a tile, at most; None chooses by `tile_mb`. Any number works.
      dtype: "float32", or "bfloat16": operands of the similarities in bfloat16, and columns as they
        travel. Similarities and gradients are float32 either way.
      grads: "float32", or "bfloat16": columns' gradient as it travels; half the bytes, and each device's part of it
        is rounded once. It is added up in float32 (in a ring, after every hop).
      precision: of float32 operands: "highest", or "high": TF32 on NVIDIA's chips, three products of bfloat16
        parts on TPUs, float32 on CPUs.
      kernel: "fused": tiles that begin with a product (`Similarities`) are one kernel each, where whole blocks
        fit; "generic": the compiler's own; "auto": fused on accelerators, for bfloat16.
      tile_mb: size of the largest array that a tile makes, in MB of 2^20 bytes; None chooses by
        the kind of device.
    """

    mesh: Mesh | None = None
    exchange: Exchange = dataclasses.field(default_factory=AllGather)
    chunk: int | None = None
    dtype: str = "float32"
    tile_mb: float | None = None
    grads: str = "float32"
    precision: str = "highest"
    kernel: str = "auto"

    def __post_init__(self):
        if self.chunk is not None and self.chunk < 1:
            raise ClipjaxError(f"chunk={self.chunk}: a tile needs at least one row and column")
        if self.tile_mb is not None and self.tile_mb <= 0:
            raise ClipjaxError(f"tile_mb={self.tile_mb}: a tile needs some memory")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ClipjaxError(
                    f"{name}={getattr(self, name)!r}: choose {', '.join(map(repr, choices[:-1]))} or {choices[-1]!r}"
                )

    @property
    def platform(self) -> str:
        """The kind of device that the mesh has (or that the program is for): "cpu", "gpu", "tpu"."""
        if self.mesh is not None:
            return self.mesh.devices.flat[0].platform
        return layout.platform() or jax.devices()[0].platform

    def dot(self, a: jax.Array, b: jax.Array) -> jax.Array:
        """Similarities a @ b.T [R, C] in float32, of operands in the engine's dtype.

        Raises:
          ClipjaxError: they are no [R, D] and [C, D].
        """
        first, second = (tuple(getattr(x, "shape", ())) for x in (a, b))
        if len(first) != 2 or len(second) != 2 or first[1] != second[1]:
            widths = [shape[1:] or "no array" for shape in (first, second)]
            raise ClipjaxError(
                f"vectors of one side are {widths[0]} and of the other {widths[1]}: similarities need the same single "
                "width; a head (clipjax.models.MlpHead) makes a side of another width"
            )
        return products.dot(self._how, a, b)

    def reduce(
        self, tile: Tile, rows: Side, cols: Columns | Sequence[Columns], shared: Any = None
    ) -> tuple[dict[str, Any], Any]:
        """Statistics of every row over all columns, and of every column over all rows.

        Differentiable with respect to every floating side and `shared`; what nobody asks the
        gradient of is dropped by the compiler. Inside `jax.jit` or alone.

        Args:
          tile: `tile(row, col, shared) -> (row terms, column terms)`, each a dict of `Reduction`s,
            given the sides of some rows and of some columns. Both sides hold `index` (int32): the
            position in the batch, and in the columns, where those of a later block follow
            those of the earlier ones, so that a bank's never equal a row's. Must be built from its
            arguments only: no traced array may slip in.
          rows: sides of the rows, each [R, ...], split over the devices as the batch is.
          cols: the columns: one block or a sequence of blocks. A block is sides [C, ...], split as
            the batch is, which travel (so keep them small): the batch's other side, or a bank
            [K, ...] from earlier steps; or a `Table`. R, C and K need not agree. With `Grouped`,
            rows meet the part of a bank that their own group holds, and all of a table.
          shared: a pytree of arrays that every tile sees whole.

        Returns:
          (rows, cols): the value of each term, [R] and [C] (float32, [., k] or `Chosen` where the
          reduction says so). Of a sequence of blocks, `cols` is a tuple of dicts.

        Raises:
          ClipjaxError: sides of different lengths, or the devices do not divide a length.
        """
        blocks = [cols] if isinstance(cols, dict | Table) else list(cols)
        self._check(rows, blocks)
        plan = self._plan(tile, rows, blocks, shared)
        row_states, col_states = run(plan, rows, tuple(_sides(b) for b in blocks), shared)
        finished = tuple(_finish(states) for states in col_states)
        return _finish(row_states), finished[0] if isinstance(cols, dict | Table) else finished

    def rows_at(self, arrays: Any, index: jax.Array) -> Any:
        """Chosen rows, from whatever device has them.

        Differentiable with respect to the arrays: a row's gradient is the sum over all who asked.
        What travels are M rows (or the array, if it has fewer), never more of it.

        Args:
          arrays: an array [N, ...] or a pytree of them, split over the devices as the batch is.
          index: int [M], split in the same way, positions 0 .. N - 1: what `ArgMax`, `TopK` (of one
            place, or flattened) or `Sample` found. Any other, such as their -1, gives zeros.

        Returns:
          The rows [M, ...], split as `index` is.

        Raises:
          ClipjaxError: the devices do not divide N or M, or `index` is no vector of whole numbers.
        """
        return tables.rows_at(self.mesh, arrays, index)

    def set_rows(self, array: jax.Array, index: jax.Array, values: jax.Array) -> jax.Array:
        """An array with chosen rows replaced: a bank, or a table over the whole data set.

        Every device writes the rows of its own part, whoever brings them. Of equal indexes the last
        in batch order stands, on any mesh. Not for differentiation.

        Args:
          array: [N, ...], split over the devices as the batch is.
          index: int [M], split in the same way; nothing is written outside 0 .. N - 1.
          values: [M, ...], the new rows.

        Raises:
          ClipjaxError: the devices do not divide N or M, or shapes disagree.
        """
        return tables.set_rows(self.mesh, array, index, values)

    def describe(self, batch_size: int, width: int) -> str:
        """One line for a log: the exchange (chosen, if `Auto`), what it keeps and the tiles.

        Args:
          batch_size: global batch N.
          width: embedding width E.
        """
        chunk = self._chunk(batch_size, 4)
        if self.mesh is None:
            return f"pairs: {batch_size} x {batch_size} on one device, tiles of {chunk}"
        exchange = self.exchange.resolve(self.mesh, batch_size * width)
        gather = exchange.route(self.mesh).gather
        columns = batch_size * math.prod(self.mesh.shape[a] for a in gather) // self._shards
        asked = "Auto chose " if isinstance(self.exchange, Auto) else ""
        return (
            f"pairs: {asked}{type(exchange).__name__}, {self._shards} "
            f"device{'s' * (self._shards > 1)}, {columns} of {batch_size} columns at a time "
            f"({8e-6 * columns * width:,.3g} MB with their gradient), "
            f"{batch_size // dataclasses.replace(self, exchange=exchange).blocks} columns a row, "
            f"tiles of {chunk}, {self.dtype}"
        )

    @property
    def blocks(self) -> int:
        """How many sets of rows never meet each other's columns: 1 for the exact exchanges."""
        if self.mesh is None:
            return 1
        route = self.exchange.route(self.mesh)
        apart = [a for a in BATCH_AXES if a not in route.gather + route.ring]
        return math.prod(self.mesh.shape[a] for a in apart)

    @property
    def _shards(self) -> int:
        return 1 if self.mesh is None else batch_shards(self.mesh)

    @property
    def _how(self) -> products.How:
        asked = lax.Precision.HIGH if self.precision == "high" else lax.Precision.HIGHEST
        precision = asked if self.dtype == "float32" else None
        return products.How(self.dtype, self.platform, precision)

    @property
    def _kernel(self) -> Kernel | None:
        if self.kernel == "generic" or (self.kernel == "auto" and self.dtype != "bfloat16"):
            return None
        if self.kernel == "auto" and self.platform not in ("gpu", "tpu"):
            return None
        return Kernel(self._how, BLOCKS[self.platform], always=self.kernel == "fused")

    def _plan(self, tile: Tile, rows: Side, blocks: list[Columns], shared: Any) -> Pass:
        parts: list[tuple[frozenset[str], Block]] = []
        first = 0
        for block in blocks:
            sweep = Sweep(tile, 1, _axis(block))
            names, size = sweep.look(rows, _sides(block), shared)
            if parts and names != parts[0][0]:
                raise ClipjaxError(
                    f"the tile gives rows {sorted(parts[0][0])} for the first block of columns and "
                    f"{sorted(names)} for another: a row's terms must be the same for all blocks"
                )
            chunk = self._chunk(length(rows), size)
            sweep = dataclasses.replace(sweep, chunk=chunk, kernel=self._kernel)
            parts.append((names, Block(sweep, first, isinstance(block, Table))))
            first += _columns(block)
        route, tensor = Route((), ()), 1
        if self.mesh is not None:
            moving = [b for b in blocks if not isinstance(b, Table)]
            numbers = sum(math.prod(v.shape) for side in moving for v in side.values())
            route = self.exchange.resolve(self.mesh, numbers).route(self.mesh)
            tensor = self.mesh.shape["tensor"]
        held = [_columns(b) // (1 if isinstance(b, Table) else self._shards) for b in blocks]
        # Devices along `tensor` share the columns if that leaves each as many.
        share = tensor > 1 and all(n % tensor == 0 for n in held)
        # The compiler for TPUs makes an all-reduce of any reduce-scatter here: twice the bytes, and a
        # buffer more. NCCL would add up in bfloat16.
        direct = self.platform == "tpu" or self.grads != "float32"
        return Pass(
            tuple(b for _, b in parts), self.dtype, self.mesh, route, ("tensor",) * share,
            self.grads, direct,
        )  # fmt: skip

    def _chunk(self, rows: int, pair_bytes: float) -> int:
        """Tiles that fill an accelerator's matrix units; on a CPU, small beside the rows.

        Args:
          rows: rows of the global batch.
          pair_bytes: bytes of the largest array that a tile makes, for each of its pairs.
        """
        if self.chunk is not None:
            return self.chunk
        most = 2**20 * (self.tile_mb or TILE_MB.get(self.platform, TILE_MB["gpu"]))
        chunk = 2 ** int(math.log2(max(math.sqrt(most / pair_bytes), 1)))
        if self.platform != "cpu":
            return chunk
        return min(chunk, max(2 ** int(math.log2(max(rows // self._shards // 4, 1))), 256))

    def _check(self, rows: Side, blocks: list[Columns]) -> None:
        if not blocks:
            raise ClipjaxError("reduce: cols is an empty sequence; rows need columns to meet")
        many = len(blocks) > 1
        _same_length("row", rows, 0)
        for i, block in enumerate(blocks):
            kind = f"column (block {i})" if many else "column"
            _same_length(kind, _sides(block), _axis(block))
        if length(rows) % self._shards:
            raise ClipjaxError(
                f"a batch of {length(rows)} rows cannot be split over {self._shards} devices "
                "(mesh group x data): choose a multiple"
            )
        for i, block in enumerate(blocks):
            if not isinstance(block, Table) and length(block) % self._shards:
                raise ClipjaxError(
                    f"{length(block)} columns{f' (block {i})' * many} {sorted(block)} cannot be split "
                    f"over {self._shards} devices (mesh group x data): choose a multiple, or hand "
                    "them over as a Table, which every device has whole"
                )


# The largest array of a tile, in MB: 4096 x 4096 similarities fill a TPU's matrix units; 1024 x 1024 stay in
# a CPU's cache from one pass to the next; a GPU (H200) was faster the larger the tile, up to 8192 x 8192.
TILE_MB = {"cpu": 4, "gpu": 256, "tpu": 64}


def _sides(block: Columns) -> Side:
    return block.sides if isinstance(block, Table) else block


def _axis(block: Columns) -> int:
    return block.axis if isinstance(block, Table) else 0


def _columns(block: Columns) -> int:
    return length(_sides(block), _axis(block))


def _same_length(kind: str, sides: Side, axis: int) -> None:
    first = next(iter(sides))
    for name, array in sides.items():
        if array.shape[axis] != sides[first].shape[axis]:
            raise ClipjaxError(
                f"{kind} side {name!r} has {array.shape[axis]} entries, {first!r} has "
                f"{sides[first].shape[axis]}: they describe the same {kind.split()[0]}s"
            )


def _finish(states: dict[str, State]) -> dict[str, Any]:
    def fixed(state):
        return State(jax.tree.map(lax.stop_gradient, state.shift), state.sums, state.kind)

    return {k: s.kind.value(fixed(s)) for k, s in states.items()}
