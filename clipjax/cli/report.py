"""`clipjax report RUN`: a run's report.html, written again from its checkpoint."""

from __future__ import annotations

from clipjax.cli.arguments import add_opened_run, new_parser, open_named_run


def main(arguments: list[str]) -> int:
    """Writes the report and prints where."""
    parser = new_parser("report", "Write the run's report.html again from its checkpoint.")
    add_opened_run(parser)
    print(open_named_run(parser.parse_args(arguments)).report())
    return 0
