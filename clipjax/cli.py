"""The command line: one command per verb.

    clipjax train CONFIG --workdir DIR [--dotted.path value ...]   train, or continue what DIR holds
    clipjax train RUN [--dotted.path value ...]                    continue a run from its own folder
    clipjax eval RUN [--json]                                      run its evaluators on a checkpoint
    clipjax report RUN                                             write RUN/report.html again
    clipjax config CONFIG [--dotted.path value ...]                print the resolved configuration
    clipjax bench loss [--help]                                    measure the contrastive loss

Exit codes: 0 done; 1 the run failed; 2 bad input, nothing was started; 75 stopped by a signal after saving.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from clipjax.errors import ClipjaxError, did_you_mean

if TYPE_CHECKING:
    from clipjax.config import Run

VERBS = ("train", "eval", "report", "config", "bench")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code; errors meant for the user become one line on stderr."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [a for a in arguments if a != "--debug"]
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("absl").setLevel(logging.ERROR)
    logging.getLogger("clipjax").setLevel(logging.INFO)
    try:
        return _dispatch(arguments)
    except ClipjaxError as error:
        if debug:
            raise
        print(f"clipjax: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # `clipjax config ... | head`
        sys.stderr.close()
        return 0


def _dispatch(arguments: list[str]) -> int:
    if arguments and arguments[0] in ("--version", "-V"):
        from importlib.metadata import version

        print(f"clipjax {version('clipjax')}")
        return 0
    if not arguments or arguments[0] in ("--help", "-h"):
        print(__doc__)
        return 0 if arguments else 2
    verb, rest = arguments[0], arguments[1:]
    if verb not in VERBS:
        raise ClipjaxError(f"no command {verb!r}{did_you_mean(verb, VERBS)}")
    return globals()[f"_{verb}"](rest)


def _parser(verb: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(f"clipjax {verb}", description=description, allow_abbrev=False)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument(
        "--imports", action="append", default=[], metavar="FILE.py", type=Path,
        help="a Python file of your own whose components the configuration names; repeatable",
    )  # fmt: skip
    return parser


def _parse_run(
    parser: argparse.ArgumentParser, arguments: list[str]
) -> tuple[argparse.Namespace, Run]:
    """Reads CONFIG and the overrides; `--help` after a config shows every option of that config."""
    from clipjax.config import load_config, load_module, override

    with_config = [a for a in arguments if a not in ("--help", "-h")]
    asks_help = len(with_config) < len(arguments)
    if asks_help and not any(not a.startswith("-") for a in arguments):
        parser.print_help()
        print("\nGive a config before --help to see every option it has.")
        raise SystemExit(0)
    namespace, options = parser.parse_known_args(with_config)
    for file in namespace.imports:
        load_module(file)
    source = namespace.config / "run.json" if namespace.config.is_dir() else namespace.config
    if namespace.config.is_dir() and not source.is_file():
        raise ClipjaxError(
            f"{namespace.config} is a folder without a run.json: give a config file or a run's folder"
        )
    if asks_help:
        parser.print_help()
    run = override(load_config(source), options + ["--help"] * asks_help, parser.prog)
    return namespace, run


def _train(arguments: list[str]) -> int:
    parser = _parser("train", "Train, or continue the run that the folder holds.")
    parser.add_argument(
        "config", type=Path, help="a Python config file, or the folder of a run to continue"
    )
    parser.add_argument(
        "--workdir", type=Path, help="the run's folder; default: runs/<name of the config file>"
    )
    namespace, run = _parse_run(parser, arguments)
    from clipjax.mesh import start_processes

    start_processes()
    from clipjax.train.loop import train

    default = (
        namespace.config if namespace.config.is_dir() else Path("runs") / namespace.config.stem
    )
    train(run, namespace.workdir or default)
    return 0


def _config(arguments: list[str]) -> int:
    parser = _parser("config", "Print the resolved configuration as JSON.")
    parser.add_argument(
        "config", type=Path, help="a Python config file, a run.json, or a run's folder"
    )
    _, run = _parse_run(parser, arguments)
    from clipjax.component import to_json

    print(json.dumps(to_json(run), indent=2, ensure_ascii=False))
    return 0


def _opened(verb: str, description: str, arguments: list[str], *flags: tuple[str, str]):
    parser = _parser(verb, description)
    parser.add_argument("run", type=Path, help="a run's folder, or one of its checkpoints/<step>")
    for flag, text in flags:
        parser.add_argument(flag, action="store_true", help=text)
    namespace = parser.parse_args(arguments)
    from clipjax.config import load_module
    from clipjax.mesh import start_processes

    for file in namespace.imports:
        load_module(file)
    start_processes()
    from clipjax.load import open_run

    return namespace, open_run(namespace.run)


def _eval(arguments: list[str]) -> int:
    flag = ("--json", "end with one JSON object on the last line")
    namespace, opened = _opened(
        "eval", "Run a run's evaluators on its checkpoint.", arguments, flag
    )
    from clipjax.tracking import print_results

    results = opened.evaluate()
    print_results(f"{namespace.run} at step {opened.step}", results)
    if namespace.json:
        print(json.dumps({"step": opened.step} | results))
    return 0


def _report(arguments: list[str]) -> int:
    _, opened = _opened(
        "report", "Write the run's report.html again from its checkpoint.", arguments
    )
    print(opened.report())
    return 0


def _bench(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("--help", "-h"):
        print("usage: clipjax bench loss [OPTIONS]   (clipjax bench loss --help lists them)")
        return 0 if arguments else 2
    if arguments[0] != "loss":
        raise ClipjaxError(f"no benchmark {arguments[0]!r}{did_you_mean(arguments[0], ['loss'])}")
    import tyro

    from clipjax.bench.loss import LossBench

    tyro.cli(LossBench, args=arguments[1:], prog="clipjax bench loss", use_underscores=True).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
