"""`clipjax search SOURCE "words"`: the pictures of a folder, of tars, ... that fit words best."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from clipjax.cli.arguments import new_parser
from clipjax.cli.embed import KINDS, open_source
from clipjax.cli.models import add_model, cache_folder, open_model, say
from clipjax.errors import ClipjaxError

if TYPE_CHECKING:
    from clipjax.data import RandomAccess
    from clipjax.embeddings.folder import Hit


def main(arguments: list[str]) -> int:
    """Prints the pictures, the best first."""
    parser = new_parser(
        "search",
        "Rank pictures by words. Their embeddings are kept, and made again for files that change: of a "
        "folder of pictures in FOLDER/.clipjax, of other sources in the user's cache folder.",
    )
    parser.add_argument("source", metavar="SOURCE", help=KINDS.replace("%", "%%"))
    parser.add_argument("words", metavar="WORDS", help="what to look for")
    parser.add_argument(
        "--top", type=int, default=10, metavar="K", help="pictures to show; default 10"
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a gallery of them, too")
    parser.add_argument("--json", action="store_true", help="print one JSON object, on one line")
    parser.add_argument(
        "--no-cache", action="store_true", help="neither read nor write kept embeddings"
    )
    add_model(parser)
    namespace = parser.parse_intermixed_args(arguments)
    if namespace.top < 1:
        raise ClipjaxError(f"--top {namespace.top}: must be at least 1")
    if not namespace.words.strip():
        raise ClipjaxError("the words to look for are empty")
    if namespace.html and not namespace.html.absolute().parent.is_dir():
        raise ClipjaxError(f"--html {namespace.html}: there is no folder to write it into")
    opened = _open_collection(namespace.source)
    path, pretrained = open_model(namespace)
    from clipjax.cli.counting import Counting
    from clipjax.embeddings.folder import CollectionIndex, FolderIndex
    from clipjax.embeddings.pictures import require_finite

    index: FolderIndex | CollectionIndex
    fingerprint, keep = pretrained.fingerprint(), not namespace.no_cache
    if opened is None:
        index = FolderIndex(namespace.source, fingerprint, keep)
    else:
        # Nothing marks a change of a TFDS data set: its embeddings are made each time.
        keep = keep and not namespace.source.startswith("tfds:")
        folder = cache_folder().with_name("search") if keep else None
        index = CollectionIndex(namespace.source, *opened, fingerprint, folder)
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

        source = namespace.source if opened else os.path.abspath(namespace.source)
        write_gallery(namespace.html, source, index, namespace.words, hits, str(path))
    if namespace.json:
        found = [{"image": hit.name, "score": hit.score, "file": hit.file} for hit in hits]
        print(json.dumps({"words": namespace.words, "images": found}, ensure_ascii=False))
        return 0
    _print_table(hits, with_files=opened is not None)
    if namespace.html:
        print(namespace.html)
    return 0


def _open_collection(source: str) -> tuple[RandomAccess, str] | None:
    """(the opened source, a mark that changes when its files do); None of a folder of pictures.

    Raises:
      ClipjaxError: it is nothing that can be searched.
    """
    from clipjax.data import PictureFolder, found_source
    from clipjax.embeddings.parquet import Texts

    if os.path.isdir(os.path.expanduser(source)):
        found = found_source(source, captions=False)
        if isinstance(found, PictureFolder):
            return None
        say(f"{source} is read as {type(found).__name__}")
    opened, mark = open_source(source)
    if isinstance(opened, Texts):
        raise ClipjaxError(f"{source!r} holds texts: search ranks pictures")
    return opened, mark


def _print_table(hits: Sequence[Hit], with_files: bool) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2), show_edge=False)
    table.add_column("", justify="right", style="dim", no_wrap=True)
    table.add_column("similarity", justify="right", no_wrap=True)
    table.add_column("image", overflow="fold")
    if with_files := with_files and any(hit.file for hit in hits):
        table.add_column("file", overflow="fold")
    for rank, hit in enumerate(hits, start=1):
        files = [Text(hit.file)] if with_files else []
        table.add_row(str(rank), f"{hit.score:.3f}", Text(hit.name), *files)
    Console(highlight=False).print(table)
