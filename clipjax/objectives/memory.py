"""What objectives remember from step to step: rows of earlier batches, and numbers about every record.

Both are split over the devices as the batch is, checkpointed with the run, and resumed on any mesh.
An objective has one as a field, makes its state in `init_state`, and writes in `advance`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from clipjax.component import Component
from clipjax.errors import ClipjaxError
from clipjax.objectives.base import Setting
from clipjax.objectives.pairs import PairEngine

TABLE_MULTIPLE = 12288
"""The length of a table is a multiple of this: 3 x 2^12, which most numbers of devices divide."""

State = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Queue(Component):
    """The last rows of some arrays, first in, first out (MoCo, arXiv:1911.05722).

    As columns beside those of the batch: `engine.reduce(tile, rows, (columns, queue.columns(state)))`.
    """

    size: int = 65536
    """Rows that are kept; a multiple of the batch size, or of the devices at least."""

    def __post_init__(self):
        if self.size < 1:
            raise ClipjaxError(f"Queue: size={self.size} must be at least 1")

    def init(self, **widths: int | None) -> State:
        """Empty; for each array its width (None: one number a row)."""
        rows = {
            name: jnp.zeros((self.size,) if width is None else (self.size, width), jnp.float32)
            for name, width in widths.items()
        }
        rows["id"] = jnp.full((self.size,), -1, jnp.int32)
        return {"rows": rows, "pushed": jnp.zeros((), jnp.int32)}

    def columns(self, state: State) -> dict[str, jax.Array]:
        """The arrays [size, ...] by name, with `id` int32 [size], -1 where nothing was pushed yet."""
        return state["rows"]

    def push(self, engine: PairEngine, state: State, ids: jax.Array, **rows: jax.Array) -> State:
        """The state with the rows of a batch in place of the oldest.

        Args:
          engine: of the mesh.
          state: the present one.
          ids: int32 [B], not negative.
          **rows: [B, ...], by the names given to `init`.
        """
        if len(ids) > self.size:
            raise ClipjaxError(
                f"Queue: size={self.size} is smaller than the batch of {len(ids)}: make it a multiple of that"
            )
        at = (state["pushed"] + jnp.arange(len(ids), dtype=jnp.int32)) % self.size
        new = rows | {"id": ids}
        return {
            "rows": {
                name: engine.set_rows(kept, at, new[name]) for name, kept in state["rows"].items()
            },
            "pushed": (state["pushed"] + len(ids)) % self.size,
        }


@dataclasses.dataclass(frozen=True)
class Table(Component):
    """Numbers about every record of the data set, by the batch's `sample`: 4 bytes a record and number.

    Each device holds its share of the rows. If a record stands twice in a batch, its last row is kept.
    """

    def init(self, setting: Setting, **begin: float | tuple[float, int]) -> State:
        """One column for each name, of the value to begin with; (value, width) for vectors."""
        if not setting.examples:
            raise ClipjaxError(
                f"{type(self).__name__} keeps something of every example, and it is not known how many records the "
                "stream has: let `clipjax data sizes` count them into a sizes.json beside the files"
            )
        length = -(-setting.examples // TABLE_MULTIPLE) * TABLE_MULTIPLE

        def column(value, *width):
            return jnp.full((length, *width), value, jnp.float32)

        return {
            "rows": {
                name: column(*v) if isinstance(v, tuple) else column(v) for name, v in begin.items()
            }
        }

    def read(self, engine: PairEngine, state: State, sample: jax.Array) -> dict[str, jax.Array]:
        """The columns [B] (or [B, width]) at these records, int32 [B]."""
        return engine.rows_at(state["rows"], sample)

    def write(
        self, engine: PairEngine, state: State, sample: jax.Array, **columns: jax.Array
    ) -> State:
        """The state with the columns [B] written at these records; others stay."""
        rows = {
            name: engine.set_rows(state["rows"][name], sample, v) for name, v in columns.items()
        }
        return {"rows": state["rows"] | rows}
