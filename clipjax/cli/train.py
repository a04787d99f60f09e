"""`clipjax train CONFIG [--workdir DIR] [--dotted.path value ...]`, and `clipjax train RUN` to continue."""

from __future__ import annotations

from pathlib import Path

from clipjax.cli.arguments import new_parser, parse_run
from clipjax.errors import ClipjaxError
from clipjax.stores import place


def steps(text: str) -> tuple[int, int]:
    """(100, 105) for "100:105"."""
    first, _, last = text.partition(":")
    if not (first.isdigit() and last.isdigit() and 1 <= int(first) <= int(last)):
        raise ClipjaxError(f"--profile {text}: give the first and the last step, such as 100:105")
    return int(first), int(last)


def main(arguments: list[str]) -> int:
    """Trains, or continues the run that the folder holds."""
    parser = new_parser("train", "Train, or continue the run that the folder holds.")
    parser.add_argument(
        "config", type=place, help="a Python config file, or the folder of a run to continue"
    )
    parser.add_argument(
        "--workdir", type=place, help="the run's folder; default: runs/<name of the config file>"
    )
    parser.add_argument(
        "--from-step", "--from_step", type=int, metavar="N",
        help="go back to the checkpoint of step N; later ones are moved to the run's aside/",
    )  # fmt: skip
    parser.add_argument(
        "--fallback", action="store_true",
        help="where the newest checkpoint is damaged, move it to aside/ and go on from an earlier one",
    )  # fmt: skip
    parser.add_argument(
        "--new-data", "--new_data", action="store_true",
        help="go on although the data are other than they were",
    )  # fmt: skip
    parser.add_argument(
        "--profile", type=steps, metavar="A:B",
        help="write a trace of steps A to B into the run's profile/ (XProf, Perfetto)",
    )  # fmt: skip
    namespace, run = parse_run(parser, arguments)
    config: Path = namespace.config
    from clipjax.processes import start_processes

    start_processes()
    workdir = namespace.workdir or (config if config.is_dir() else Path("runs") / config.stem)
    from clipjax.train.loop import train

    train(
        run,
        workdir,
        from_step=namespace.from_step,
        fallback=namespace.fallback,
        new_data=namespace.new_data,
        profile=namespace.profile,
    )
    return 0
