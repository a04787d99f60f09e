"""`clipjax train CONFIG [--workdir DIR] [--dotted.path value ...]`, and `clipjax train RUN` to continue."""

from __future__ import annotations

from pathlib import Path

from clipjax.cli.arguments import new_parser, parse_run
from clipjax.stores import place


def main(arguments: list[str]) -> int:
    """Trains, or continues the run that the folder holds."""
    parser = new_parser("train", "Train, or continue the run that the folder holds.")
    parser.add_argument(
        "config", type=place, help="a Python config file, or the folder of a run to continue"
    )
    parser.add_argument(
        "--workdir", type=place, help="the run's folder; default: runs/<name of the config file>"
    )
    namespace, run = parse_run(parser, arguments)
    from clipjax.processes import start_processes

    start_processes()
    from clipjax.train.loop import train

    config: Path = namespace.config
    train(run, namespace.workdir or (config if config.is_dir() else Path("runs") / config.stem))
    return 0
