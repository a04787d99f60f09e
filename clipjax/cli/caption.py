"""`clipjax caption IMAGE... [--strategy NAME] [its options]`: captions of pictures."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipjax.cli.arguments import new_parser
from clipjax.cli.models import add_model, open_model
from clipjax.errors import EXIT_FAILED, ClipjaxError

if TYPE_CHECKING:
    from clipjax.generation import Strategy

STRATEGIES = {
    "greedy": "Greedy",
    "beam": "Beam",
    "sample": "Sample",
    "contrastive": "ContrastiveSearch",
}
"""Name -> class in `clipjax.generation`, whose fields are options."""


def main(arguments: list[str]) -> int:
    """Captions, and prints a table; 1 if a picture could not be read."""
    parser = new_parser("caption", "Write captions of pictures.")
    parser.add_argument(
        "images", type=Path, nargs="+", metavar="IMAGE", help="a picture, or a folder of pictures"
    )
    parser.add_argument(
        "--strategy", choices=STRATEGIES, default="greedy",
        help="how tokens are chosen; its own options are listed by --strategy NAME --help",
    )  # fmt: skip
    parser.add_argument("--prompt", default="", help="what every caption begins with")
    parser.add_argument("--seed", type=int, default=0, help="for --strategy sample")
    parser.add_argument(
        "--json", action="store_true", help="end with one JSON object on the last line"
    )
    add_model(parser)
    strategy_arguments, arguments = _split(arguments)
    asks_help = [a for a in arguments if a in ("--help", "-h")]
    if asks_help:
        parser.print_help()
        named = new_parser("caption", "")
        named.add_argument("--strategy", choices=STRATEGIES, default="greedy")
        rest = [a for a in arguments if a not in asks_help]
        _strategy(named.parse_known_args(rest)[0].strategy, ["--help"])
    namespace = parser.parse_intermixed_args(arguments)
    strategy = _strategy(namespace.strategy, strategy_arguments)
    files = _pictures(namespace.images)

    path, pretrained = open_model(namespace)
    from clipjax.cli.models import about, read_pictures

    predictor = pretrained.predictor()
    with about(path):
        predictor.require_decoder()
    pictures, skipped = read_pictures(predictor, [str(file) for file in files])
    generated = predictor.generate(
        list(pictures.values()), strategy, namespace.prompt, namespace.seed
    )
    captions = predictor.decode(generated)
    rows = list(zip(pictures, captions, generated.scores.tolist(), strict=True))
    _print(rows)
    if namespace.json:
        named_rows = [{"image": i, "caption": c, "score": s} for i, c, s in rows]
        print(json.dumps({"captions": named_rows, "skipped": skipped}, ensure_ascii=False))
    return EXIT_FAILED if skipped else 0


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """(options of strategies with their values, everything else)."""
    import clipjax.generation

    names = {
        field.name
        for name in STRATEGIES.values()
        for field in dataclasses.fields(getattr(clipjax.generation, name))
    }
    own: list[str] = []
    others: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        name, equals, _ = argument.partition("=")
        if not name.startswith("--") or name[2:].replace("-", "_") not in names:
            others.append(argument)
            continue
        own.append(argument)
        if not equals:
            own += [value for value in [next(rest, None)] if value is not None]
    return own, others


def _strategy(name: str, arguments: list[str]) -> Strategy:
    import tyro

    import clipjax.generation

    cls: Any = getattr(clipjax.generation, STRATEGIES[name])
    prog = f"clipjax caption ... --strategy {name}"
    return tyro.cli(cls, args=arguments, prog=prog, use_underscores=True)


def _pictures(paths: list[Path]) -> list[Path]:
    """The files, and those in folders that look like pictures.

    Raises:
      ClipjaxError: a path does not exist, or a folder has no pictures.
    """
    from clipjax.data.folder import PICTURE_SUFFIXES

    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            found = sorted(
                f
                for f in path.iterdir()
                if f.suffix.lower() in PICTURE_SUFFIXES and not f.name.startswith(".")
            )
            if not found:
                raise ClipjaxError(f"{path} holds no pictures ({', '.join(PICTURE_SUFFIXES)})")
            files += found
        elif path.is_file():
            files.append(path)
        else:
            raise ClipjaxError(f"there is no picture {str(path)!r}")
    return files


def _print(rows: list[tuple[str, str, float]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2))
    table.add_column("picture", overflow="fold")
    table.add_column("caption", overflow="fold")
    table.add_column("score", justify="right", no_wrap=True)
    for image, caption, score in rows:
        table.add_row(Text(image), Text(caption), f"{score:.2f}")
    Console(highlight=False).print(table)
