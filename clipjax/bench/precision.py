"""`clipjax bench precision`: the loss of one configuration's first steps in several precisions of its towers."""

from __future__ import annotations

import dataclasses
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from clipjax.component import Component
from clipjax.errors import ClipjaxError

PRECISIONS = ("float32", "bfloat16", "int8", "fp8")


@dataclasses.dataclass(frozen=True)
class PrecisionBench(Component):
    """The same weights and the same batches for each precision; what differs is the rounding in the towers."""

    config: str = "configs/quickstart.py"
    """A config file, or the folder of a run."""
    precisions: tuple[str, ...] = PRECISIONS
    """float32 and bfloat16 are the towers' dtype; int8 and fp8 round the blocks' products besides (Quantize),
    in the configuration's dtype."""
    steps: int = 100
    """Steps of each; the configuration's schedule stays as long as it is."""
    batch_size: int | None = None
    """Replaces the configuration's."""
    json: bool = False
    """End with one JSON object on the last line."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ClipjaxError(f"bench precision: steps={self.steps} must be positive")
        for name in self.precisions:
            if name not in PRECISIONS:
                raise ClipjaxError(
                    f"bench precision: {name!r} is no precision: choose from {', '.join(PRECISIONS)}"
                )

    def run(self) -> dict[str, Any]:
        """Trains, prints and returns what the JSON object holds.

        Returns:
          precision -> losses (of every step), seconds (the median step's).
        """
        results = {name: self._curve(name) for name in self.precisions}
        self._print(results)
        if self.json:
            print(json.dumps(results))
        return results

    def _curve(self, precision: str) -> dict[str, Any]:
        import jax

        from clipjax.config import load_config
        from clipjax.data.placement import to_global
        from clipjax.towers import Quantize, with_fields
        from clipjax.train.setup import setup

        path = Path(self.config)
        run = load_config(path / "run.json" if path.is_dir() else path)
        fields: dict[str, Any] = {"dtype": precision}
        if precision in ("int8", "fp8"):
            fields = {"quantize": (Quantize(format=precision),)}  # type: ignore[arg-type]
        run = dataclasses.replace(
            run,
            model=with_fields(run.model, **fields),
            data=dataclasses.replace(run.data, batch_size=self.batch_size or run.data.batch_size),
            evals=(),
            trackers=(),
        )
        losses: list[float] = []
        seconds: list[float] = []
        with tempfile.TemporaryDirectory() as folder:
            session = setup(run, Path(folder) / "run")
            state = session.restore_or_init()
            for step in range(self.steps):
                rows = to_global(session.loader.batch(step), session.mesh)
                began = time.perf_counter()
                state, metrics = session.step(state, rows)
                losses.append(float(jax.block_until_ready(metrics["loss"])))
                seconds.append(time.perf_counter() - began)
        return {"losses": losses, "seconds": statistics.median(seconds)}

    def _print(self, results: dict[str, Any]) -> None:
        from rich.console import Console
        from rich.table import Table

        marks = sorted({1, *(max(1, self.steps * i // 5) for i in range(1, 6))})
        title = f"{self.config}: loss by step (mean of the ten before)"
        table = Table("towers", *map(str, marks), "ms a step", title=title)
        for name, found in results.items():
            means = [statistics.fmean(found["losses"][max(0, i - 10) : i]) for i in marks]
            table.add_row(name, *(f"{x:.3f}" for x in means), f"{1e3 * found['seconds']:.0f}")
        Console(width=120).print(table)
