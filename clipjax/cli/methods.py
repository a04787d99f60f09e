"""`clipjax methods [--json]`: the published methods that are here, with their papers."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Any

from clipjax.cli.arguments import new_parser


def main(arguments: list[str]) -> int:
    """Prints the list."""
    parser = new_parser("methods", "List the published methods that are here, with their papers.")
    parser.add_argument("--json", action="store_true", help="print JSON")
    namespace = parser.parse_args(arguments)
    from clipjax.methods.registry import methods

    rows = [described(method) for method in methods()]
    if namespace.json:
        print(json.dumps(rows, indent=2, ensure_ascii=False))
        return 0
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(caption="clipjax/methods/<id>.py and configs/methods/<id>.py, or as said")
    for column in ("id", "arXiv", "status"):
        table.add_column(column, no_wrap=True)
    table.add_column("what", overflow="fold")
    for row in rows:
        elsewhere = "" if row["config"] else f" ({row['file']})"
        table.add_row(row["id"], row["arxiv"], row["status"], escape(row["summary"] + elsewhere))
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    return 0


def described(method: Any) -> dict[str, Any]:
    """A method as JSON has it; `config` is a path in the repository, or None where there is none."""
    fields = dataclasses.asdict(method)
    place = fields.pop("place") or f"clipjax.methods.{method.id}"
    own = method.place is None
    return fields | {
        "file": place.partition(":")[0].replace(".", "/") + ".py" if own else place,
        "config": f"configs/methods/{method.id}.py" if own else None,
    }
