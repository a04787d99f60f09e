"""`clipjax config CONFIG [--dotted.path value ...]`: the resolved configuration as JSON."""

from __future__ import annotations

import json

from clipjax.cli.arguments import new_parser, parse_run
from clipjax.stores import place


def main(arguments: list[str]) -> int:
    """Prints the configuration."""
    parser = new_parser("config", "Print the resolved configuration as JSON.")
    parser.add_argument(
        "config", type=place, help="a Python config file, a run.json, or a run's folder"
    )
    _, run = parse_run(parser, arguments)
    from clipjax.component import to_json

    print(json.dumps(to_json(run), indent=2, ensure_ascii=False))
    return 0
