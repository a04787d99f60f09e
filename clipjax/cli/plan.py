"""`clipjax plan CONFIG --on v5e-256`: a run's own step, compiled for a machine that is not here."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from clipjax.cli.arguments import new_parser, parse_run
from clipjax.stores import place

BAR = 40  # characters of the picture of a chip's memory
NAMES = {"params": "parameters", "opt_state": "optimizer", "ema": "average", "averages": "teachers",
         "objective_state": "objective", "model_state": "statistics"}  # fmt: skip
"""What the table calls parts of the train state."""


def main(arguments: list[str]) -> int:
    """Plans, prints, and ends with one JSON line if asked. Exit code 1: it does not fit."""
    parser = new_parser(
        "plan", "Compile a run's step for a machine that is not here, and say what it would take."
    )
    parser.add_argument("config", type=place, help="a Python config file, or the folder of a run")
    parser.add_argument("--on", required="--help" not in arguments and "-h" not in arguments, metavar="MACHINE",
                        help="v5e-256, v6e-64, v5p-128 (cores), h100x64, a100x8, cpux8 (simulated)")  # fmt: skip
    parser.add_argument(
        "--examples", type=int, help="examples in one epoch, for durations in epochs"
    )
    parser.add_argument(
        "--json", action="store_true", help="end with one JSON object on the last line"
    )
    namespace, run = parse_run(parser, arguments)
    from clipjax.plan.estimate import estimate
    from clipjax.plan.machines import machine
    from clipjax.plan.program import compiled_for

    on = machine(namespace.on)
    files = [Path(file) for file in namespace.imports]
    if not Path(namespace.config).is_dir() and Path(namespace.config).suffix == ".py":
        files.append(Path(namespace.config))
    found = compiled_for(run, on, files, namespace.examples or run.data.batch_size)
    expected = estimate(run, on, found, namespace.examples)
    _print(run, on, found, expected)
    if namespace.json:
        print(json.dumps({"on": on.name, "compiled": found, "estimated": expected}))
    return 0 if expected.get("fits", True) else 1


def _print(run: Any, on: Any, found: dict[str, Any], expected: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(file=sys.stdout)
    per_shard = run.data.batch_size // found["shards"]
    title = f"{on.devices} x {on.chip.name}, {run.data.batch_size} pairs a step, {per_shard} on each batch shard"
    table = Table("one chip", "", "from", title=title)
    for name, size in found["state"].items():
        table.add_row(NAMES.get(name, name), _bytes(size), "shapes and sharding")
    table.add_row("batch", _bytes(found["batch"]), "shapes and sharding")
    table.add_row("temporary", _bytes(found["temporary"]), "compiler")
    held, memory = expected["held"], expected["memory"]
    of = f" of {_bytes(memory)}" if memory else ""
    table.add_row("all of it", f"{_bytes(held)}{of}", "compiler", end_section=True)
    for kind, size in found["sent"].items():
        table.add_row(f"sent: {kind}", _bytes(size), "compiler's program")
    if "step" in expected:
        table.add_section()
        for name, seconds in expected["seconds"].items():
            table.add_row(
                f"a step's {name}", f"{1000 * seconds:.1f} ms", "arithmetic, at the maker's figures"
            )
        table.add_row(
            "step, at least", f"{1000 * expected['step']:.1f} ms: {expected['limit']}", "arithmetic"
        )
        table.add_row("if nothing overlaps", f"{1000 * expected['serial']:.1f} ms", "arithmetic")
        table.add_row("MFU, at most", f"{expected['mfu']:.0%}", "arithmetic: 3 forward passes")
        table.add_row("pairs/s, at most", f"{expected['pairs_per_second']:,.0f}", "arithmetic")
        table.add_row(
            "pairs/s a host must feed", f"{expected['pairs_per_host']:,.0f}", "arithmetic"
        )
    if "hours" in expected:
        hours = f"{expected['hours']:,.1f} h for {expected['steps']:,} steps"
        table.add_row(
            "whole run, at least",
            f"{hours}, {expected['chip_hours']:,.0f} chip-hours",
            "arithmetic",
        )
    console.print(table)
    if memory:
        console.print(_bar(found, held, memory))
        console.print(f"chip: {on.chip.flops / 1e12:g} TFLOP/s bfloat16, {on.chip.bandwidth / 1e9:g} GB/s memory, "
                      f"{on.chip.link / 1e9:g} GB/s links one way ({on.chip.source})")  # fmt: skip
    console.print(found["layout"])
    if not expected.get("fits", True):
        console.print(f"[bold]It does not fit[/bold]: {_bytes(held - memory)} too much. Raise --accumulate, set the "
                      "towers' remat to 'lean' or 'full', or split with --sharding.fsdp")  # fmt: skip


def _bar(found: dict[str, Any], held: float, memory: float) -> str:
    """A chip's memory as a line: state, batch and what is temporary."""
    parts = {"#": sum(found["state"].values()), "b": found["batch"], "t": found["temporary"]}
    drawn = "".join(mark * round(BAR * size / memory) for mark, size in parts.items())
    over = " over" if held > memory else ""
    return f"|{drawn[: 2 * BAR]:.<{BAR}}| {held / memory:.0%}{over}   # state, b batch, t temporary"


def _bytes(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"
