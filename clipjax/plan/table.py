"""What `clipjax plan` prints: tables that say of each number where it comes from, a chip's memory as a line."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from clipjax.config import Run
from clipjax.plan.machines import Machine

PREALLOCATED = 0.75  # of a GPU's memory, by default (JAX, "GPU memory allocation")
BAR = 60  # characters of the picture of a chip's memory
MARKS = {"parameters": "P", "optimizer": "O", "other state": "s", "batch": "b", "batches waiting": "b",
         "activations": "a", "gathered weights": "w", "gradients": "g", "loss": "l", "other": "t"}  # fmt: skip
COMPILER, SHAPES, SUMS = "compiler", "shapes and sharding", "arithmetic"


def show(
    console: Console, run: Run, on: Machine, found: dict[str, Any], judged: dict[str, Any]
) -> None:
    """One plan, as the command prints it."""
    per_shard = run.data.batch_size // found["shards"]
    micro = f" in {run.accumulate} micro-batches" if run.accumulate > 1 else ""
    title = f"{on.devices} x {on.chip.name}, {run.data.batch_size} pairs a step, {per_shard} on each batch shard{micro}"
    table = Table("one chip", "", "from", title=title)
    _memory(table, found, judged)
    _wire(table, on, found)
    if "step" in judged:
        _times(table, judged)
    if "hours" in judged:
        hours = f"{_few(judged['hours'])} h for {judged['steps']:,} steps"
        table.add_row(
            "whole run, at least", f"{hours}, {_few(judged['chip_hours'])} chip-hours", SUMS
        )
    elif "step" in judged:
        table.add_row("whole run", "unknown: --examples, how many are in an epoch", "")
    size = f"{bytes_(found['checkpoint'])}, {judged['checkpoint_seconds']:.1f} s on {_count(on.hosts, 'host')}"
    table.add_row("checkpoint", size, f"{SHAPES}; --disk")
    console.print(table)
    if "seconds" in found:
        console.print(f"traced and compiled in {found['seconds']:.0f} s")
    if "measured" in found:
        told = on.devices * judged["held"]
        console.print(
            f"run for real: {bytes_(found['measured'])} on {_count(on.devices, 'device')}, predicted {bytes_(told)}: "
            f"{told / found['measured']:.3f} of it (besides, {bytes_(found['stays'])} that stay when the run's arrays "
            "are gone: the program itself)"
        )
    if judged["memory"]:
        console.print(bar(judged["parts"], judged["held"], judged["memory"]))
        console.print(_roofline(on))
    console.print(found["layout"])
    if found["whole"]:
        whole = ", ".join(f"{path} ({bytes_(size)})" for path, size in found["whole"])
        console.print(f"whole on every device, the largest: {whole}")
    if "step" in judged:
        most = max(judged["parts"], key=lambda name: judged["parts"][name])
        console.print(f"limits: {judged['limit']} the time, {most} the memory")
    if (
        on.chip.platform == "gpu"
        and PREALLOCATED * judged["memory"] < judged["held"] <= judged["memory"]
    ):
        console.print(f"it fits, but not into the {PREALLOCATED:.0%} of a GPU's memory that JAX takes unless told: set "
                      "XLA_PYTHON_CLIENT_MEM_FRACTION=0.92, as launch/slurm.sbatch does")  # fmt: skip
    if not judged.get("fits", True):
        over = bytes_(judged["held"] - judged["memory"])
        console.print(f"[bold]It does not fit[/bold]: {over} too much. Raise --accumulate, set the towers' remat "
                      "to 'lean' or 'full', split with --sharding.fsdp, or ask --search")  # fmt: skip


def show_ranked(
    console: Console, on: Machine, ranked: list[dict[str, Any]], counts: dict[str, int]
) -> None:
    """What a search found, best first."""
    title = f"{on.devices} x {on.chip.name}: memory, bytes and products are the compiler's, times arithmetic on them"
    table = Table("", "batch", "accumulate", "remat", "group", "fsdp", "exchange", "GB a chip", "expected",
                  "sent GB", "step ms", "pairs/s", "hours", title=title)  # fmt: skip
    for place, entry in enumerate(ranked, 1):
        settings, judged = entry["settings"], entry["estimated"]
        fits = judged.get("fits", True)
        rest = [
            f"{_few(1e3 * judged['step'])} to {_few(1e3 * judged['serial'])}"
            if "step" in judged
            else "",
            f"{judged['pairs_per_second']:,.0f}" if "step" in judged else "",
            _few(judged["hours"]) if "hours" in judged else "",
        ]
        table.add_row(
            str(place) if fits else "over",
            *(str(settings[name]) for name in ("batch_size", "accumulate", "remat", "group", "fsdp", "exchange")),
            _few(judged["held"] / 1e9),
            _few(entry["expected"]["held"] / 1e9),
            _few(sum(entry["compiled"]["sent"].values()) / 1e9),
            *rest,
        )  # fmt: skip
    console.print(table)
    for entry in ranked[:3]:
        judged = entry["estimated"]
        if judged["memory"]:
            console.print(bar(judged["parts"], judged["held"], judged["memory"]))
    console.print(
        f"{counts['combinations']} combinations, {counts['left']} left by arithmetic, {counts['compiled']} compiled, "
        f"{counts['failed']} not in time or refused; expected: GB by arithmetic"
    )
    if ranked and ranked[0]["estimated"].get("fits", True):
        console.print(f"first: {options(ranked[0]['settings'])}")


def options(settings: dict[str, Any]) -> str:
    """A candidate as options of `clipjax train`; remat is a field of every tower."""
    fsdp = "--sharding.fsdp" if settings["fsdp"] else "--sharding.no_fsdp"
    return (
        f"--data.batch_size {settings['batch_size']} --accumulate {settings['accumulate']} "
        f"--mesh.group {settings['group']} {fsdp}, in the config exchange={settings['exchange']}() and "
        f"remat={settings['remat']!r} of the towers"
    )


def bar(parts: dict[str, float], held: float, memory: float) -> str:
    """A chip's memory as a line, a letter a kind."""
    drawn = "".join(MARKS[name] * round(BAR * size / memory) for name, size in parts.items())
    over = " over" if held > memory else ""
    seen = ", ".join(f"{MARKS[name]} {name}" for name, size in parts.items() if size > memory / 200)
    return f"|{drawn[: 2 * BAR]:.<{BAR}}| {held / memory:.0%}{over}   {seen}"


def bytes_(size: float) -> str:
    """In GB, or MB or kB where it is little."""
    if size >= 1e8:
        return f"{size / 1e9:.2f} GB"
    return f"{size / 1e6:.2f} MB" if size >= 1e5 or not size else f"{size / 1e3:.2f} kB"


def _memory(table: Table, found: dict[str, Any], judged: dict[str, Any]) -> None:
    parts, temporary = judged["parts"], found["temporary_parts"]
    for name in ("parameters", "optimizer", "other state", "batch", "batches waiting"):
        if parts[name]:
            table.add_row(name, bytes_(parts[name]), SHAPES)
    if found["on_host"]:
        table.add_row("state that waits on the host", bytes_(found["on_host"]), SHAPES)
    table.add_row("temporary", bytes_(found["temporary"]), COMPILER)
    for name, size in temporary.items():
        if size:
            table.add_row(f"  of it {name}", bytes_(size), SUMS)
    if parts["other"]:
        table.add_row("other", bytes_(parts["other"]), f"{SUMS}: what the kinds leave")
    memory = judged["memory"]
    of = f" of {bytes_(memory)}" if memory else ""
    everything = f"{bytes_(judged['held'])}{of}"
    table.add_row("all of it", everything, f"{COMPILER}, and what waits", end_section=True)


def _wire(table: Table, on: Machine, found: dict[str, Any]) -> None:
    fabric = on.chip.fabric or "links"
    for kind, size in found["sent"].items():
        slow = found["network"].get(kind, 0.0)
        over = (
            f" ({bytes_(size - slow)} {fabric}, {bytes_(slow)} network)" if slow else f" ({fabric})"
        )
        table.add_row(f"sent: {kind}", bytes_(size) + over, "compiler's program, on rings")
    table.add_row(
        "products", f"{_few(found['flops'] / found['devices'] / 1e12)} TFLOP", "the step's program"
    )


def _times(table: Table, judged: dict[str, Any]) -> None:
    table.add_section()
    for name, seconds in judged["seconds"].items():
        table.add_row(
            f"a step's {name}", f"{_few(1000 * seconds)} ms", f"{SUMS}, at the maker's figures"
        )
    table.add_row("step, at least", f"{_few(1000 * judged['step'])} ms: {judged['limit']}", SUMS)
    table.add_row("if nothing overlaps", f"{_few(1000 * judged['serial'])} ms", SUMS)
    table.add_row("MFU, at most", f"{judged['mfu']:.0%}", f"{SUMS}: 3 forward passes")
    table.add_row("pairs/s, at most", f"{judged['pairs_per_second']:,.0f}", SUMS)
    table.add_row("images/s a host must feed", f"{judged['images_per_host']:,.0f}", SUMS)


def _roofline(on: Machine) -> str:
    chip = on.chip
    half = " (half in float32)" if chip.platform == "gpu" else ""
    network = f", {chip.network / 1e9:g} GB/s network one way" if chip.network else ""
    return (
        f"chip: {chip.flops / 1e12:g} TFLOP/s bfloat16{half}, {chip.bandwidth / 1e9:g} GB/s memory, "
        f"{on.link / 1e9:g} GB/s {chip.fabric} one way{network} ({chip.source})"
    )


def _few(number: float) -> str:
    """Three digits that say something, or all before the point; of the very small, no more than is read."""
    if number >= 100:
        return f"{number:,.0f}"
    return f"{number:.3g}" if number >= 1e-4 or not number else "under 0.0001"


def _count(number: int, name: str) -> str:
    return f"{number} {name}{'s' * (number != 1)}"
