"""`clipjax bench loss`: what the pair engine costs, against the dense formula and OpenCLIP's."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from typing import Any, Literal

from clipjax.bench.contestant import command, contest
from clipjax.bench.simulated import CASES, LATE, TOKENS, compile_for
from clipjax.bench.target import WAYS, compile_on
from clipjax.component import Component
from clipjax.errors import ClipjaxError
from clipjax.plan.machines import machine

PRODUCT = 4096  # side of the plain product that the rate is taken from
EXCHANGES = ("AllGather", "Ring", "Hierarchical", "Grouped")


@dataclasses.dataclass(frozen=True)
class LossBench(Component):
    """Time and memory of the contrastive loss, forward and backward, against other formulas."""

    rows: int = 16384
    """Batch of the run on one device."""
    width: int = 512
    """Embedding width of the run on one device."""
    objective: Literal["softmax", "sigmoid"] = "softmax"
    """Loss of the run on one device."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Operands of the engine's similarities on one device."""
    chunk: int | None = None
    """Rows and columns of a tile; None: as the engine chooses."""
    rounds: int = 3
    """Runs of each contestant, in turns; the least time counts."""
    torch_python: str = ""
    """A Python that has torch, when this one has none."""
    devices: int = 8
    """Simulated devices of the compiled comparison."""
    local_rows: int = 1024
    """Rows per device of the compiled comparison."""
    local_width: int = 768
    """Embedding width of the compiled comparison."""
    large: bool = False
    """Also compile for 64 devices a batch of 1,048,576 x 512, and one of 65,536 x 64 tokens x 256."""
    on: str = ""
    """Only compile `rows` x `width` in `dtype` for this machine (v5e-16, h100x8); needs its compiler alone."""
    json: bool = False
    """End with one JSON object on the last line."""

    def __post_init__(self):
        for name in ("rows", "width", "chunk", "rounds", "local_rows", "local_width"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ClipjaxError(f"bench loss: {name}={value} must be positive")
        if self.devices < 8 or self.devices % 8:
            raise ClipjaxError(f"bench loss: devices={self.devices} must be a multiple of 8")

    def run(self) -> dict[str, Any]:
        """Measures, prints the tables and returns what the JSON object holds."""
        if self.on:
            return self._on_target()
        single = self._single()
        batch = self.devices * self.local_rows
        compiled = compile_for(self.devices, batch, self.local_width, list(CASES))
        results = self._summary(single, compiled)
        if self.large:
            large = compile_for(64, 2**20, 512, [*EXCHANGES])
            results["large_temp_bytes"] = {name: row["temp"] for name, row in large.items()}
            late = compile_for(64, 2**16, TOKENS * 256, [*LATE])
            results["late_temp_bytes"] = {name: row["temp"] for name, row in late.items()}
        self._print(single, compiled, results)
        if self.json:
            print(json.dumps(results))
        return results

    def _on_target(self) -> dict[str, Any]:
        from rich.console import Console
        from rich.table import Table

        target = machine(self.on)
        found = compile_on(target, self.rows, self.width, self.objective, self.dtype, list(WAYS))
        title = f"{self.objective}, {self.rows} x {self.width} {self.dtype}, compiled for {self.on}"
        table = Table("exchange", "wire units", "temporary MB", "kernels", title=title)
        for name, row in found.items():
            table.add_row(
                name, f"{row['wire']:.2f}", f"{row['temp'] / 1e6:.0f}", str(row["kernels"])
            )
        Console().print(table)
        if self.json:
            print(json.dumps(found))
        return found

    def _single(self) -> dict[str, dict[str, float]]:
        size = {"rows": self.rows, "width": self.width}
        jax_side = size | {"objective": self.objective, "dtype": self.dtype, "chunk": self.chunk}
        contestants = {
            who: command(sys.executable, who=who, **jax_side) for who in ("clipjax", "dense")
        }
        if python := self._torch():
            contestants["torch"] = command(python, who="torch", objective=self.objective, **size)
        contestants["matmul"] = command(
            sys.executable, who="matmul", dtype=self.dtype, size=PRODUCT
        )
        return contest(contestants, self.rounds)

    def _torch(self) -> str | None:
        if self.torch_python:
            return self.torch_python
        return sys.executable if importlib.util.find_spec("torch") else None

    def _summary(self, single: dict[str, Any], compiled: dict[str, Any]) -> dict[str, Any]:
        ours, torch = single["clipjax"], single.get("torch")
        temp = {name: row["temp"] for name, row in compiled.items()}
        rate = 2 * PRODUCT**3 / single["matmul"]["seconds"]
        return {
            "wire_units": {name: row["wire"] for name, row in compiled.items()},
            "matmul_units": {name: row["matmul"] for name, row in compiled.items()},
            "temp_bytes": temp,
            "temp_ratio_vs_openclip": temp["OpenCLIP"] / temp["AllGather"],
            "ring_temp_ratio_vs_openclip": temp["OpenCLIP"] / temp["Ring"],
            "seconds": {name: row["seconds"] for name, row in single.items() if name != "matmul"},
            "added_bytes": {name: row["bytes"] for name, row in single.items() if name != "matmul"},
            "time_ratio_vs_dense": ours["seconds"] / single["dense"]["seconds"],
            "time_ratio_vs_torch": torch["seconds"] / ours["seconds"] if torch else None,
            "memory_ratio_vs_torch": torch["bytes"] / ours["bytes"] if torch else None,
            "share_of_matmul_rate": 8 * self.rows**2 * self.width / ours["seconds"] / rate,
        }

    def _print(self, single: dict[str, Any], compiled: dict[str, Any], results: Any) -> None:
        from rich.console import Console
        from rich.table import Table

        title = f"{self.objective}, {self.rows} x {self.width} {self.dtype}, forward and backward"
        table = Table("one device", "seconds", "added MB", title=title)
        for name in results["seconds"]:
            row = single[name]
            table.add_row(name, f"{row['seconds']:.3f}", f"{row['bytes'] / 1e6:.0f}")
        batch = self.devices * self.local_rows
        title = f"softmax, {batch} x {self.local_width} on {self.devices} simulated devices"
        wires = Table("compiled", "wire units", "matmul units", "temporary MB", title=title)
        for name, row in compiled.items():
            wires.add_row(
                name, f"{row['wire']:.2f}", f"{row['matmul']:.2f}", f"{row['temp'] / 1e6:.1f}"
            )
        ratios = Table("figure", "measured", "meaning", title="in short")
        for key, meaning in _MEANINGS.items():
            value = results[key]
            ratios.add_row(key, "-" if value is None else f"{value:.2f}", meaning)
        console = Console()
        for part in (table, wires, ratios):
            console.print(part)
        for name, size in results.get("large_temp_bytes", {}).items():
            console.print(f"1048576 x 512 on 64 devices, {name}: {size / 1e6:.0f} MB temporary")
        for name, size in results.get("late_temp_bytes", {}).items():
            console.print(f"65536 x 64 x 256 on 64 devices, {name}: {size / 1e6:.0f} MB temporary")


_MEANINGS = {
    "time_ratio_vs_dense": "clipjax / dense JAX formula, time",
    "time_ratio_vs_torch": "OpenCLIP's formula in torch / clipjax, time",
    "memory_ratio_vs_torch": "the same, added peak memory",
    "temp_ratio_vs_openclip": "OpenCLIP's pattern / AllGather, all temporary memory",
    "ring_temp_ratio_vs_openclip": "OpenCLIP's pattern / Ring, all temporary memory",
    "share_of_matmul_rate": "4 products / time, over a plain product's rate",
}


if __name__ == "__main__":
    import tyro

    tyro.cli(LossBench).run()
