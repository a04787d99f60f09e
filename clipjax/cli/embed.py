"""`clipjax embed SOURCE --out x.parquet`: embeddings of a whole collection."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from clipjax.cli.arguments import new_parser
from clipjax.cli.models import add_model, open_model, say
from clipjax.errors import ClipjaxError
from clipjax.plain_text import lines, read_text

if TYPE_CHECKING:
    from clipjax.data import RandomAccess
    from clipjax.embeddings.parquet import Texts

KINDS = (
    "a folder of pictures, a table of pictures with captions (.csv, .tsv, .jsonl), Parquet files, a saved "
    'Hugging Face data set, WebDataset tars ("data/{0000..0099}.tar"), TFRecord and '
    "ArrayRecord files, tfds:NAME:SPLIT, or texts, one a line (.txt)"
)


def main(arguments: list[str]) -> int:
    """Writes the files that are not there yet."""
    parser = new_parser(
        "embed",
        "Write the embeddings of pictures or texts to Parquet. Started again after a kill, it keeps "
        "the files that are finished and makes the others.",
    )
    parser.add_argument("source", metavar="SOURCE", help=KINDS.replace("%", "%%"))
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE.parquet",
        help="with several files, FILE-00000-of-00005.parquet and so on",
    )  # fmt: skip
    parser.add_argument(
        "--captions", action="store_true",
        help="embed the first caption of each picture, too (columns caption, caption_embedding)",
    )  # fmt: skip
    parser.add_argument(
        "--shard-size", type=int, default=20_000, metavar="N",
        help="records a file, and what a kill can cost; default 20000",
    )  # fmt: skip
    parser.add_argument(
        "--batch-size", type=int, metavar="N",
        help="pictures or texts per call of the model; default 64 a device",
    )  # fmt: skip
    add_model(parser)
    namespace = parser.parse_intermixed_args(arguments)
    if not namespace.out.absolute().parent.is_dir():
        raise ClipjaxError(f"--out {namespace.out}: there is no folder to write it into")
    from clipjax.embeddings.parquet import Shards, Texts, write_shards

    Shards(namespace.out, 0, namespace.shard_size)  # refuses bad ones before anything is opened
    source, mark = open_source(namespace.source)
    if namespace.captions and isinstance(source, Texts):
        raise ClipjaxError("--captions is for pictures: the source is texts already")
    _, pretrained = open_model(namespace)
    from clipjax.cli.counting import Counting

    shards = Shards(namespace.out, len(source), namespace.shard_size)
    facts = {"source": mark, "model": pretrained.fingerprint()}
    predictor = pretrained.predictor(batch_size=namespace.batch_size)
    what = "texts" if isinstance(source, Texts) else "pictures"
    with Counting(len(source), what) as counting:
        finished = write_shards(predictor, source, shards, facts, counting, namespace.captions)
    say(counting.summary())
    if finished:
        say(f"{finished} of {len(shards)} files were finished already")
    for index in range(len(shards)):
        print(shards.path(index))
    return 0


def open_source(text: str) -> tuple[RandomAccess | Texts, str]:
    """What SOURCE names, opened, and a mark that changes when its files do.

    Raises:
      ClipjaxError: it is nothing that can be embedded.
    """
    from clipjax.data import (
        ArrayRecord,
        Crossmodal,
        ImageFolder,
        Parquet,
        PictureFolder,
        SavedDataset,
        Tfds,
        TFRecord,
        WebDataset,
        found_source,
    )
    from clipjax.data.webdataset import expand
    from clipjax.embeddings.parquet import Texts

    if text.startswith("tfds:"):
        # The name may end in a version, and the split hold colons: tfds:coco:1.1.0:val[:10%]
        parts = re.fullmatch(r"tfds:([^:\[]+(?::\d+\.\d+\.\d+)?):([^:]+(?:\[.*\])?)", text)
        if parts is None:
            raise ClipjaxError(f"{text!r}: write tfds:NAME:SPLIT, such as tfds:twemoji:test")
        return Tfds(parts[1], split=parts[2]).open(), text
    path = Path(text).expanduser()
    source = found_source(text, captions=False)
    if source is not None:
        opened = source.open()
        if isinstance(source, PictureFolder):
            files = [str(opened[i]["image"]) for i in range(len(opened))]
            return opened, _mark(files, path)
        if isinstance(source, ImageFolder):
            return opened, _mark([os.path.join(source.root, source.table)])
        if isinstance(source, SavedDataset):
            return opened, _mark([str(f) for f in sorted(path.rglob("*.arrow"))], path)
        if isinstance(source, Crossmodal):
            return opened, _mark([source.table])
        if isinstance(source, WebDataset):
            return opened, _mark(expand(source.shards))
        assert isinstance(source, (Parquet, TFRecord, ArrayRecord))
        return opened, _mark(expand(source.files))
    if not path.is_file():
        raise ClipjaxError(f"{text!r}: there is no such file or folder; SOURCE is {KINDS}")
    if path.suffix != ".txt":
        raise ClipjaxError(f"{text!r}: SOURCE is {KINDS}")
    found = lines(read_text(path))
    spoken = [(str(i), line) for i, line in enumerate(found, start=1) if line]
    if not spoken:
        raise ClipjaxError(f"{text!r} holds no text")
    keys, texts = zip(*spoken, strict=True)
    return Texts(keys, texts), _mark([str(path)])


def _mark(files: list[str], root: Path | None = None) -> str:
    """Digest of files' names (relative to `root`), sizes and times of modification, or what a store has instead."""
    from clipjax.data.reading import state_of

    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        state = state_of(os.path.expanduser(file))
        name = os.path.relpath(file, root) if root else os.path.basename(file)
        digest.update(f"{name}\0{state.size}\0{state.mark}\n".encode(errors="replace"))
    return digest.hexdigest()
