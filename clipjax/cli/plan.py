"""`clipjax plan CONFIG --on v5e-256`: a run's own step, compiled for a machine that is not here."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipjax.cli.arguments import new_parser, parse_run
from clipjax.errors import ClipjaxError
from clipjax.stores import place

if TYPE_CHECKING:
    from clipjax.config import Run
    from clipjax.plan.machines import Machine


def main(arguments: list[str]) -> int:
    """Plans, prints, and ends with one JSON line if asked. Exit code 1: it does not fit."""
    parser = new_parser(
        "plan", "Compile a run's step for a machine that is not here, and say what it would take."
    )
    parser.add_argument("config", type=place, help="a Python config file, or the folder of a run")
    parser.add_argument("--on", required="--help" not in arguments and "-h" not in arguments, metavar="MACHINE",
                        help="v5e-256, v6e-64, v5p-128 (cores), h100x64, h200x8, a100x8, cpux8 (CPUs)")  # fmt: skip
    parser.add_argument(
        "--examples", type=int, help="examples in one epoch, for durations in epochs"
    )
    parser.add_argument(
        "--json", action="store_true", help="end with one JSON object on the last line"
    )
    parser.add_argument(
        "--picture", type=Path, metavar="FILE.png", help="draw it too (.png, .svg, .pdf)"
    )
    parser.add_argument("--disk", type=float, default=1.0, metavar="GB/S",
                        help="what each host writes of a checkpoint a second (default: 1)")  # fmt: skip
    parser.add_argument("--check", action="store_true",
                        help="on cpuxN: take two steps for real too, and say what memory they took")  # fmt: skip
    search = parser.add_argument_group("--search")
    search.add_argument("--search", action="store_true",
                        help="try accumulate, remat, FSDP and groups, exchange, and rank what fits")  # fmt: skip
    search.add_argument(
        "--batch_sizes", type=int, nargs="+", metavar="N", help="to try (default: the run's)"
    )
    search.add_argument(
        "--most", type=int, metavar="N", help="steps to compile, at most (default: 6)"
    )
    search.add_argument("--minutes", type=float, help="for all of it (default: 10)")
    namespace, run = parse_run(parser, arguments)
    if namespace.batch_sizes and not namespace.search:
        raise ClipjaxError("--batch_sizes is for --search; one batch size is --data.batch_size")
    for name in ("most", "minutes"):
        if getattr(namespace, name) is not None and not namespace.search:
            raise ClipjaxError(f"--{name} is for --search")
    for name in ("most", "minutes", "disk", "examples"):
        if (value := getattr(namespace, name)) is not None and not value > 0:
            raise ClipjaxError(f"--{name} {value} must be above 0")
    if namespace.check and namespace.search:
        raise ClipjaxError("--check is for one plan: leave out --search")
    from clipjax.plan.machines import machine

    on = machine(namespace.on)
    files = [Path(file) for file in namespace.imports]
    if not Path(namespace.config).is_dir() and Path(namespace.config).suffix == ".py":
        files.append(Path(namespace.config))
    return (_search if namespace.search else _plan)(namespace, run, on, files)


def _plan(namespace: Namespace, run: Run, on: Machine, files: list[Path]) -> int:
    from clipjax.plan import table
    from clipjax.plan.estimate import estimate
    from clipjax.plan.program import checked_on_cpus, compiled_for

    compile_it = checked_on_cpus if namespace.check else compiled_for
    found = compile_it(run, on, files, namespace.examples)
    judged = estimate(run, on, found, namespace.examples, 1e9 * namespace.disk)
    table.show(_console(), run, on, found, judged)
    _picture(namespace, on, [("", judged)])
    if namespace.json:
        print(json.dumps({"on": on.name, "compiled": found, "estimated": judged}))
    return 0 if judged.get("fits", True) else 1


def _search(namespace: Namespace, run: Run, on: Machine, files: list[Path]) -> int:
    from clipjax.plan import table
    from clipjax.plan.search import search

    console = _console()
    most = 6 if namespace.most is None else namespace.most
    minutes = 10.0 if namespace.minutes is None else namespace.minutes
    ranked, counts = search(
        run, on, files, namespace.examples, namespace.batch_sizes or [run.data.batch_size],
        most, 60 * minutes, 1e9 * namespace.disk, lambda text: print(text, file=sys.stderr),
    )  # fmt: skip
    table.show_ranked(console, on, ranked, counts)
    named = [
        (" ".join(str(value) for value in entry["settings"].values()), entry["estimated"])
        for entry in ranked
    ]
    if named:
        _picture(namespace, on, named)
    if namespace.json:
        print(json.dumps({"on": on.name, "ranked": ranked, **counts}))
    return 0 if ranked and ranked[0]["estimated"].get("fits", True) else 1


def _picture(namespace: Namespace, on: Machine, plans: list[tuple[str, dict[str, Any]]]) -> None:
    if namespace.picture:
        from clipjax.plan.picture import draw

        draw(namespace.picture, f"{on.devices} x {on.chip.name}", plans)


def _console() -> Any:
    from rich.console import Console

    return Console(file=sys.stdout, width=None if sys.stdout.isatty() else 140)
