"""`clipjax classify IMAGE... --labels a,b,c`: what pictures show, of a set of labels."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from clipjax.cli.arguments import new_parser
from clipjax.cli.models import add_model, open_model, read_pictures
from clipjax.errors import EXIT_FAILED, ClipjaxError, did_you_mean


def main(arguments: list[str]) -> int:
    """Prints a table of probabilities; 1 if a picture could not be read."""
    parser = new_parser("classify", "Say which of some labels pictures show, with probabilities.")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="picture files")
    parser.add_argument(
        "--labels", required=True,
        help="the names, separated by commas; or a .txt file with one a line",
    )  # fmt: skip
    parser.add_argument(
        "--templates", default="{}",
        help='a prompt such as "a photo of a {}", a file with one a line, or a data set whose prompts come '
        'with clipjax (imagenet, cifar10, ...); the embeddings of several are averaged, {} stands for '
        'the name; default: the name alone',
    )  # fmt: skip
    parser.add_argument("--top", type=int, default=5, metavar="K", help="labels to show; default 5")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object, on one line, instead of a table"
    )
    add_model(parser)
    namespace = parser.parse_intermixed_args(arguments)
    labels, templates = _labels(namespace.labels), _templates(namespace.templates)
    if namespace.top < 1:
        raise ClipjaxError(f"--top {namespace.top}: must be at least 1")
    for image in namespace.images:
        if not Path(image).exists():
            raise ClipjaxError(f"{image}: there is no such file")
    path, pretrained = open_model(namespace)
    from clipjax.embeddings.pictures import require_finite

    predictor = pretrained.predictor()
    pictures, skipped = read_pictures(predictor, namespace.images)
    found = predictor.classify(list(pictures.values()), labels, templates)
    require_finite(found.probabilities)
    ranked = dict(zip(pictures, found.top(namespace.top), strict=True))
    if namespace.json:
        print(json.dumps(_as_json(namespace, path, ranked, skipped), ensure_ascii=False))
    else:
        _print_table(ranked)
    return EXIT_FAILED if skipped else 0


def _labels(given: str) -> list[str]:
    if given.endswith(".txt"):
        return _lines(given, "--labels")
    return [label.strip() for label in given.split(",")]


def _templates(given: str) -> list[str]:
    if "{}" in given:
        return [given]
    if Path(given).exists():
        return _lines(given, "--templates")
    from clipjax.evals.prompts import read_classes, shipped_classes

    shipped = shipped_classes()
    if given not in shipped:
        raise ClipjaxError(
            f"--templates {given!r} has no {{}} where the label goes, is no file, and no data set whose "
            f"prompts come with clipjax{did_you_mean(given, shipped)}"
        )
    return list(read_classes(given).templates)


def _lines(file: str, option: str) -> list[str]:
    from clipjax.plain_text import read_lines

    return read_lines(file, option)


def _as_json(
    namespace: argparse.Namespace,
    path: Path,
    ranked: dict[str, list[tuple[str, float]]],
    skipped: dict[str, str],
) -> dict[str, Any]:
    return {
        "model": str(path),
        "images": [
            {"image": name, "labels": [{"label": lb, "probability": p} for lb, p in top]}
            for name, top in ranked.items()
        ],
        "skipped": skipped,
    }


def _print_table(ranked: dict[str, list[tuple[str, float]]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2), show_edge=False)
    table.add_column("image", overflow="fold")
    table.add_column("label", overflow="fold")
    table.add_column("probability", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for name, top in ranked.items():
        for rank, (label, probability) in enumerate(top):
            style = "bold" if rank == 0 else "dim"
            table.add_row(
                Text(name if rank == 0 else ""),
                Text(label, style=style),
                Text(f"{100 * probability:.1f} %", style=style),
                Text("█" * round(20 * probability), style="blue"),
            )
    Console(highlight=False).print(table)
