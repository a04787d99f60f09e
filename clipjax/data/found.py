"""What a path holds: the one rule by which every command recognizes other people's files."""

from __future__ import annotations

import csv
import json
import os
import re
from pathlib import Path

from clipjax.data import crossmodal
from clipjax.data.columns import Parquet, SavedDataset
from clipjax.data.folder import (
    PICTURE_SUFFIXES,
    ClassFolder,
    ImageFolder,
    PictureFolder,
    table_rows,
)
from clipjax.data.reading import is_address
from clipjax.data.records import ArrayRecord, TFRecord
from clipjax.data.sources import Source
from clipjax.data.webdataset import WebDataset, expand
from clipjax.errors import ClipjaxError

TABLES = tuple(
    f"{stem}.{end}" for stem in ("captions", "metadata") for end in ("csv", "tsv", "jsonl")
)
"""Tables that are looked for in a folder; metadata.* is Hugging Face's imagefolder."""
PATH_COLUMNS = ("image", "filepath", "file_name", "filename", "image_path", "path", "file")
TEXT_COLUMNS = ("caption", "title", "text", "captions", "sentences", "description")
HOLDS = (
    f"a folder with one of {', '.join(TABLES)}, a saved Hugging Face data set, a folder of pictures, a "
    "table (.csv, .tsv, .jsonl), .parquet, .tar, .tfrecord or .array_record files"
)
_FILES = re.compile(r"\.(tar|parquet|tfrecords?|array_?records?)([-*][^/]*)?$")
"""The end of files of records, or of a pattern of them; TFDS adds -00000-of-00004."""


def files_source(pattern: str) -> Source | None:
    """The source that reads files of records, by the end of their names; None for other names."""
    match = _FILES.search(pattern)
    if match is None or (match[2] and match[1] in ("tar", "parquet")):
        return None
    if match[1] == "tar":
        return WebDataset(pattern)
    if match[1] == "parquet":
        return Parquet(files=pattern)
    return (TFRecord if match[1].startswith("tf") else ArrayRecord)(pattern)


def found_source(path: str, captions: bool) -> Source | None:
    """The source that a path, or a pattern of paths, holds; None where there is nothing.

    * `*.tar`: WebDataset. `*.parquet`: Parquet. `*.tfrecord`, `*.array_record` (and TFDS's `-00000-of-00004` after
      these): files of `tf.train.Example`s. All of them at an address, too.
    * `.csv`, `.tsv`, `.jsonl`: a table of pictures, or of captions by language (`Crossmodal`).
    * A folder with such a table in it, by the names in `TABLES`; a folder that `save_to_disk` wrote; one
      of .tar, .tfrecord, .array_record or .parquet files, in this order.
    * A folder of pictures with a .txt beside each (img2dataset's `files`); else of one folder per class, or
      of pictures without captions.

    Args:
      path: as on the command line.
      captions: whether a folder without captions is one of classes (True), or just of pictures.

    Raises:
      ClipjaxError: it holds something that cannot be used.
    """
    of_files = files_source(path)
    if of_files is not None and not os.path.isdir(os.path.expanduser(path)):
        there = is_address(path) or any(map(os.path.isfile, expand(path)))
        return of_files if there or isinstance(of_files, WebDataset) else None
    if is_address(path):
        raise ClipjaxError(
            f"{path!r}: at an address there are .tar, .parquet, .tfrecord and .array_record files only"
        )
    place = Path(path).expanduser()
    if place.is_file() and place.suffix in (".csv", ".tsv", ".jsonl"):
        return table_source(place)
    if not place.is_dir():
        return None
    for name in TABLES:
        if (place / name).is_file():
            return table_source(place / name)
    if (place / "state.json").is_file() and (place / "dataset_info.json").is_file():
        return SavedDataset(folder=path)
    if (place / "dataset_dict.json").is_file():
        splits = json.loads((place / "dataset_dict.json").read_text())["splits"]
        if len(splits) > 1:
            raise ClipjaxError(
                f"{path!r} holds the splits {', '.join(splits)}: name the folder of one of them"
            )
        return SavedDataset(folder=path, split=splits[0])
    # Parquet last: beside tars, TFRecord files and folders of pictures, img2dataset's has the facts alone.
    for end in ("tar", "tfrecord", "array_record", "parquet"):
        found = [file for file in place.glob(f"*.{end}") if not file.with_suffix("").is_dir()]
        if found:
            return files_source(os.path.join(path, f"*.{end}"))
    if _texts_beside(place):
        return PictureFolder(path, texts=True)
    return ClassFolder(path) if captions else PictureFolder(path)


def table_source(table: Path) -> Source:
    """A table of pictures, by the usual names of its columns.

    Paths are relative to the table; or, as OpenCLIP has it, to the working folder, if the first picture is
    there alone and the table within it.

    Raises:
      ClipjaxError: no column has a usual name.
    """
    names = _header(table)
    if crossmodal.KEY in names:
        return crossmodal.Crossmodal(str(table))
    image = next((name for name in PATH_COLUMNS if name in names), None)
    if image is None:
        raise ClipjaxError(
            f"{str(table)!r} has the columns {', '.join(names)}, of which none is called "
            f"{', '.join(PATH_COLUMNS)}"
        )
    texts = tuple(name for name in TEXT_COLUMNS if name in names)[:1]
    root, name = table.parent, table.name
    here, first = Path.cwd(), _first(table, image)
    inside = table.resolve().is_relative_to(here)
    if first and inside and not os.path.isfile(root / first) and os.path.isfile(here / first):
        root, name = Path(), str(table.resolve().relative_to(here))
    return ImageFolder(str(root), name, image_column=image, caption_columns=texts)


def _first(table: Path, column: str) -> str:
    """The first row's entry; nothing where the table is damaged, which says so when it is opened."""
    try:
        row = next((row for _, row in table_rows(table)), {})
    except (ClipjaxError, OSError):
        return ""
    path = row.get(column)
    return path if isinstance(path, str) else ""


def _header(table: Path) -> list[str]:
    try:
        with table.open(encoding="utf-8-sig", newline="") as lines:
            line = next((line for line in lines if line.strip()), "")
        if table.suffix == ".jsonl":
            row = json.loads(line)
            return list(row) if isinstance(row, dict) else []
    except ValueError as error:
        raise ClipjaxError(f"{str(table)!r} cannot be read ({error})") from error
    tabs = table.suffix == ".tsv" or ("\t" in line and "," not in line)
    return next(csv.reader([line], delimiter="\t" if tabs else ","), [])


def _texts_beside(folder: Path) -> bool:
    """Whether the first picture that is found has a .txt beside it."""
    for inner, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            stem, end = os.path.splitext(name)
            if end.lower() in PICTURE_SUFFIXES and not name.startswith("."):
                return os.path.isfile(os.path.join(inner, f"{stem}.txt"))
    return False
