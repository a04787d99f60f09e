"""`clipjax search FOLDER "words"`: the pictures of a folder that fit words best."""

from __future__ import annotations

import json
from pathlib import Path

from clipjax.cli.arguments import new_parser
from clipjax.cli.models import add_model, open_model, say
from clipjax.errors import ClipjaxError


def main(arguments: list[str]) -> int:
    """Prints the pictures, the best first."""
    parser = new_parser(
        "search",
        "Rank the pictures of a folder by words. Their embeddings are kept in FOLDER/.clipjax, and "
        "made again for files that change.",
    )
    parser.add_argument("folder", metavar="FOLDER", help="searched with the folders in it")
    parser.add_argument("words", metavar="WORDS", help="what to look for")
    parser.add_argument(
        "--top", type=int, default=10, metavar="K", help="pictures to show; default 10"
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a gallery of them, too")
    parser.add_argument("--json", action="store_true", help="print one JSON object, on one line")
    parser.add_argument(
        "--no-cache", action="store_true", help="neither read nor write FOLDER/.clipjax"
    )
    add_model(parser)
    namespace = parser.parse_intermixed_args(arguments)
    if namespace.top < 1:
        raise ClipjaxError(f"--top {namespace.top}: must be at least 1")
    if not namespace.words.strip():
        raise ClipjaxError("the words to look for are empty")
    if not Path(namespace.folder).is_dir():
        raise ClipjaxError(f"{namespace.folder}: there is no such folder")
    if namespace.html and not namespace.html.absolute().parent.is_dir():
        raise ClipjaxError(f"--html {namespace.html}: there is no folder to write it into")
    path, pretrained = open_model(namespace)
    from clipjax.cli.counting import Counting
    from clipjax.embeddings.folder import FolderIndex
    from clipjax.embeddings.pictures import require_finite

    index = FolderIndex(namespace.folder, pretrained.fingerprint(), keep=not namespace.no_cache)
    for reason in index.refused:
        say(f"left out: {reason}")
    predictor = pretrained.predictor()
    with Counting(len(index.stale), "pictures") as counting:
        index.refresh(predictor, counting)
    if index.stale:
        say(counting.summary())
    words = require_finite(predictor.encode_text(namespace.words))
    hits = index.search(words, namespace.top)
    if namespace.html:
        from clipjax.embeddings.gallery import write_gallery

        write_gallery(
            namespace.html, namespace.folder, namespace.words, hits, len(index), str(path)
        )
    if namespace.json:
        found = [{"image": hit.name, "score": hit.score} for hit in hits]
        print(json.dumps({"words": namespace.words, "images": found}, ensure_ascii=False))
        return 0
    _print_table(hits)
    if namespace.html:
        print(namespace.html)
    return 0


def _print_table(hits) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2), show_edge=False)
    table.add_column("", justify="right", style="dim", no_wrap=True)
    table.add_column("similarity", justify="right", no_wrap=True)
    table.add_column("image", overflow="fold")
    for rank, hit in enumerate(hits, start=1):
        table.add_row(str(rank), f"{hit.score:.3f}", Text(hit.name))
    Console(highlight=False).print(table)
