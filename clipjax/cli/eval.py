"""`clipjax eval RUN [--json]`: the figures of a run's evaluators on one of its checkpoints."""

from __future__ import annotations

import json

from clipjax.cli.arguments import add_opened_run, new_parser, open_named_run


def main(arguments: list[str]) -> int:
    """Evaluates."""
    parser = new_parser("eval", "Run a run's evaluators on its checkpoint.")
    add_opened_run(parser)
    parser.add_argument(
        "--json", action="store_true", help="end with one JSON object on the last line"
    )
    namespace = parser.parse_args(arguments)
    opened = open_named_run(namespace)
    from clipjax.tracking import print_results

    results = opened.evaluate()
    print_results(f"{namespace.run} at step {opened.step}", results)
    if namespace.json:
        print(json.dumps({"step": opened.step} | results))
    return 0
