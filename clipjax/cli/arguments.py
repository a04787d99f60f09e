"""What the commands' arguments have in common: a run by its config, a run by its folder."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
from pathlib import Path
from typing import TYPE_CHECKING

from clipjax.errors import ClipjaxError, did_you_mean
from clipjax.stores import is_hub, place

if TYPE_CHECKING:
    from clipjax.config import Run
    from clipjax.restore import Opened


def new_parser(verb: str, description: str) -> argparse.ArgumentParser:
    """A parser with the options that every command has."""
    parser = argparse.ArgumentParser(f"clipjax {verb}", description=description, allow_abbrev=False)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument(
        "--imports", action="append", default=[], metavar="FILE.py", type=Path,
        help="a Python file of your own whose components the configuration names; repeatable",
    )  # fmt: skip
    return parser


def model_path(text: str) -> Path:
    """A place that a model is read from; of hf://owner/name, where it was fetched to."""
    if not is_hub(text):
        return place(text)
    from clipjax.hub import snapshot

    return snapshot(text)


def import_files(files: list[Path]) -> None:
    """Imports the user's own files, so that the components in them are known."""
    for file in files:
        from clipjax.config import load_module  # imports all that a run needs: not for nothing

        load_module(file)


def parse_run(
    parser: argparse.ArgumentParser, arguments: list[str]
) -> tuple[argparse.Namespace, Run]:
    """Reads `config` and the overrides; `--help` after a config shows every option of that config.

    Args:
      parser: has a positional argument `config`.
      arguments: what the user typed after the verb.
    """
    from clipjax.config import load_config, override

    with_config = [a for a in arguments if a not in ("--help", "-h")]
    asks_help = len(with_config) < len(arguments)
    if asks_help and not any(not a.startswith("-") for a in arguments):
        parser.print_help()
        print("\nGive a config before --help to see every option it has.")
        raise SystemExit(0)
    needed = [action for action in parser._actions if action.required and action.option_strings]
    for action in needed:  # not of one who asks for help
        action.required = not asks_help
    namespace, options = parser.parse_known_args(with_config)
    for action in needed:
        action.required = True
    _refuse_misspelt(parser, options)
    import_files(namespace.imports)
    source = namespace.config / "run.json" if namespace.config.is_dir() else namespace.config
    if namespace.config.is_dir() and not source.is_file():
        raise ClipjaxError(
            f"{namespace.config} is a folder without a run.json: give a config file or a run's folder"
        )
    if asks_help:
        parser.print_help()
    run = override(load_config(source), options + ["--help"] * asks_help, parser.prog)
    return namespace, run


def _refuse_misspelt(parser: argparse.ArgumentParser, options: list[str]) -> None:
    """Names the command's own option that one is near to, unless it is a field of a run."""
    from clipjax.config import Run

    own = [name for action in parser._actions for name in action.option_strings]
    fields = {field.name for field in dataclasses.fields(Run)}
    for option in options:
        name = option.split("=")[0]
        is_field = name.removeprefix("--").removeprefix("no_").split(".")[0] in fields
        if name.startswith("--") and not is_field and difflib.get_close_matches(name, own):
            raise ClipjaxError(f"{parser.prog}: no option {name!r}{did_you_mean(name, own)}")


def add_opened_run(parser: argparse.ArgumentParser) -> None:
    """Adds the positional argument `run` that `open_named_run` opens."""
    parser.add_argument("run", type=place, help="a run's folder, or one of its checkpoints/<step>")


def open_named_run(namespace: argparse.Namespace) -> Opened:
    """The run that the user named, on all devices there are."""
    from clipjax.processes import start_processes

    import_files(namespace.imports)
    start_processes()
    from clipjax.restore import open_run

    return open_run(namespace.run)
