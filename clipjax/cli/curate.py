"""`clipjax data keep`, `near` and `count`: what to train on, as lists of keys and counts that sources read."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipjax.cli.models import say
from clipjax.errors import ClipjaxError
from clipjax.files import replace_file

if TYPE_CHECKING:
    from clipjax.data import Source

VERBS = ("keep", "near", "count")
SOURCE = "a path of data (tars, Parquet files, a table, a folder, ...), or a TFDS data set and its split, NAME:SPLIT"


def add_verbs(verbs: Any) -> None:
    """Adds the verbs to `clipjax data`."""
    keep = verbs.add_parser(
        "keep",
        help="list the keys of records that meet conditions",
        description="List the keys of the records that meet all conditions, for Filtered(keep=...).",
    )
    keep.add_argument("source", metavar="SOURCE", help=SOURCE)
    keep.add_argument(
        "--where", action="append", default=[], metavar="CONDITION",
        help='such as "json:similarity >= 0.28", "image.width >= 200" or "language in en,fr"; repeatable',
    )  # fmt: skip
    keep.add_argument("--table", metavar="FILE", help="side table of scores with a column key")
    keep.add_argument("--keys", metavar="FILE", help="only the keys in this file")
    keep.add_argument("--drop", metavar="FILE", help="without the keys in this file")
    keep.add_argument("--out", required=True, metavar="FILE.txt", help="where to write the keys")

    near = verbs.add_parser(
        "near",
        help="list the keys that are left without near-duplicates, or without those near an evaluation set",
        description="List the keys of vectors that are no near-duplicates of earlier ones, nor near any of an "
        "evaluation set, for Filtered(keep=...). VECTORS is what `clipjax embed` wrote.",
    )
    near.add_argument("vectors", metavar="VECTORS.parquet", help="of the data to choose from")
    near.add_argument(
        "--threshold", type=float, default=0.95, metavar="COSINE",
        help="from which two are near; default 0.95. It depends on the model: look at --pairs first",
    )  # fmt: skip
    near.add_argument("--against", metavar="VECTORS.parquet", help="of an evaluation set")
    near.add_argument("--column", default="embedding", help="with the vectors; default embedding")
    near.add_argument(
        "--approximate", action="store_true",
        help="with faiss, in a part of the time; misses a few (needs clipjax[curation])",
    )  # fmt: skip
    near.add_argument(
        "--pairs", metavar="FILE.tsv", help="write which key was left out because of which"
    )
    near.add_argument("--out", required=True, metavar="FILE.txt", help="where to write the keys")

    count = verbs.add_parser(
        "count",
        help="count the captions that hold each of a list of entries",
        description="Count the records whose captions hold each of a list of words, for Balanced(counts=...).",
    )
    count.add_argument("source", metavar="SOURCE", help=SOURCE)
    count.add_argument(
        "--entries", required=True, metavar="FILE", help="words, or a few of them, one entry a line"
    )
    count.add_argument("--out", required=True, metavar="FILE.tsv", help="where to write the counts")


def run(namespace: argparse.Namespace) -> int:
    """Runs one of the verbs."""
    return {"keep": _keep, "near": _near, "count": _count}[namespace.verb](namespace)


def _keep(namespace: argparse.Namespace) -> int:
    from clipjax.data.filters import Filtered

    if not (namespace.where or namespace.keys or namespace.drop):
        raise ClipjaxError("give --where, --keys or --drop")
    source = _curated(namespace.source)
    filtered = Filtered(
        source,
        keep=namespace.keys,
        drop=namespace.drop,
        where=tuple(namespace.where),
        table=namespace.table,
    )
    records = source.open()
    kept = filtered.choose(records)
    _write(namespace.out, "".join(f"{key}\n" for key in _keys(kept)))
    say(f"{len(kept):,} of {len(records):,} records")
    return 0


def _curated(name: str) -> Source:
    """The source of a name; a folder of pictures need not have folders of classes in it."""
    from clipjax.data import ClassFolder, PictureFolder
    from clipjax.data.named import named_source

    source = named_source(name)
    if isinstance(source, ClassFolder):
        inner = Path(source.root).expanduser().iterdir()
        if not any(place.is_dir() and not place.name.startswith(".") for place in inner):
            return PictureFolder(source.root)
    return source


def _keys(records: Any) -> Iterator[str]:
    if callable(own := getattr(records, "keys", None)):
        yield from own()
        return
    read = getattr(records, "facts", records.__getitem__)
    for index in range(len(records)):
        yield read(index)["key"]


def _near(namespace: argparse.Namespace) -> int:
    from clipjax.data.vectors import read_vectors
    from clipjax.embeddings.near import near_rows

    keys, vectors = read_vectors(namespace.vectors, namespace.column)
    others, against = (
        read_vectors(namespace.against, namespace.column) if namespace.against else ([], None)
    )
    found = near_rows(vectors, namespace.threshold, against, namespace.approximate)
    left_out = {near.row for near in found}
    _write(namespace.out, "".join(f"{key}\n" for i, key in enumerate(keys) if i not in left_out))
    if namespace.pairs is not None:
        rows = [("key", "near", "of", "cosine")]
        for near in found:
            other, of = (others, "against") if near.of_other_set else (keys, "itself")
            rows.append((keys[near.row], other[near.other], of, f"{near.score:.4f}"))
        _write(namespace.pairs, "".join("\t".join(row) + "\n" for row in rows))
    overlap = sum(near.of_other_set for near in found)
    say(
        f"{len(keys) - len(found):,} of {len(keys):,} are left; {len(found) - overlap:,} were near an earlier one"
        + (f", {overlap:,} near one of {namespace.against}" if namespace.against else "")
    )
    return 0


def _count(namespace: argparse.Namespace) -> int:
    from clipjax.data.balance import count_entries, read_entries
    from clipjax.data.sources import UnreadableRecord

    records: Any = _curated(namespace.source).open()
    read = getattr(records, "facts", records.__getitem__)
    skipped = 0

    def captions() -> Iterator[tuple[str, ...]]:
        nonlocal skipped
        for index in range(len(records)):
            try:
                yield read(index)["captions"]
            except UnreadableRecord:
                skipped += 1

    counts = count_entries(captions(), read_entries(namespace.entries))
    rows = [("entry", "count"), *counts.most_common()]
    _write(namespace.out, "".join(f"{' '.join(str(name).split())}\t{n}\n" for name, n in rows))
    found = sum(count > 0 for count in counts.values())
    say(
        f"{found:,} of {len(counts):,} entries are in {len(records) - skipped:,} records"
        + (f"; {skipped:,} records cannot be read" if skipped else "")
    )
    return 0


def _write(path: str, text: str) -> None:
    try:
        replace_file(path, text)
    except OSError as error:
        raise ClipjaxError(f"{path}: {error.strerror or error}") from error
    print(path)
