"""What `clipjax eval` prints: figures of models, their intervals, and what tells models apart."""

from __future__ import annotations

import csv
import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO


def print_figures(
    results: Mapping[str, Mapping[str, float]],
    steps: Mapping[Path, int | None],
    table: str | None,
    resamples: int | None,
    as_json: bool,
) -> None:
    """Prints figures, and with `resamples` how far they can be trusted.

    Args:
      results: by model, its figures by name, in one order with `steps`.
      steps: by path, the step of a run's checkpoint.
      table: "md" or "csv" for a table, None for lists. Of a CSV, intervals go to stderr: stdout is the table.
      resamples: bootstrap resamples; None for no intervals.
      as_json: whether to end with one object on the last line.
    """
    if table:
        print_table(results, table)
    else:
        from clipjax.tracking import print_results

        for (path, figures), step in zip(results.items(), steps.values(), strict=True):
            shown = {name: float(value) for name, value in figures.items()}
            print_results(path if step is None else f"{path} at step {step}", shown)
    out = sys.stderr if table == "csv" else sys.stdout
    spread, apart = _trust(results, resamples, out) if resamples else ({}, {})
    if not as_json:
        return
    facts: dict[str, dict[str, Any]] = {
        path: ({} if step is None else {"step": step}) | dict(figures)
        for (path, figures), step in zip(results.items(), steps.values(), strict=True)
    }
    for path, found in spread.items():
        facts[path]["interval_95"] = found
    for path, found in apart.items():
        facts[path]["difference"] = found
    print(json.dumps(next(iter(facts.values())) if len(facts) == 1 else facts))


def _trust(
    results: Mapping[str, Mapping[str, float]], resamples: int, out: TextIO
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """(95 % intervals by model and figure, differences from the first model likewise); prints both to `out`."""
    from clipjax.evals.intervals import differences, intervals

    spread: dict[str, dict[str, Any]] = {}
    apart: dict[str, dict[str, Any]] = {}
    first, *others = results
    for path, figures in results.items():
        spread[path] = intervals(figures, resamples)
        print(f"95 % intervals of {path}, {resamples} resamples", file=out)
        for name, (low, high) in spread[path].items():
            print(f"  {name:40} {low:.4f} to {high:.4f}", file=out)
    for path in others:
        apart[path] = {}
        print(f"{path} less {first}, on the same examples", file=out)
        for name, found in differences(results[first], results[path], resamples).items():
            apart[path][name] = dataclasses.asdict(found)
            exact = "" if found.mcnemar is None else f", McNemar's p = {found.mcnemar:.3g}"
            print(
                f"  {name:40} {found.value:+.4f} ({found.low:+.4f} to {found.high:+.4f}), "
                f"p = {found.p:.3g}{exact}",
                file=out,
            )
    return spread, apart


def print_table(results: Mapping[str, Mapping[str, float]], kind: str) -> None:
    """Figures of several models on stdout: a row a figure, a column a model.

    Args:
      results: by model, its figures by name; what a model lacks stays empty.
      kind: "md" (four decimals) or "csv" (all digits).
    """
    names = list(dict.fromkeys(name for figures in results.values() for name in figures))
    head = ["figure", *results]
    if kind == "csv":
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(head)
        for name in names:
            writer.writerow([name, *(figures.get(name, "") for figures in results.values())])
        return
    rows = [
        [name, *(f"{figures[name]:.4f}" if name in figures else "" for figures in results.values())]
        for name in names
    ]
    head = [cell.replace("|", "\\|") for cell in head]
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    print("| " + " | ".join(cell.ljust(w) for cell, w in zip(head, widths, strict=True)) + " |")
    rule = ["-" * widths[0]] + ["-" * (w - 1) + ":" for w in widths[1:]]
    print("| " + " | ".join(rule) + " |")
    for row in rows:
        cells = [row[0].ljust(widths[0])] + [
            c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)
        ]
        print("| " + " | ".join(cells) + " |")
