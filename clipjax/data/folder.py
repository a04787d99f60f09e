"""Pictures in a folder: with a table of captions, or with one folder per class."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import logging
import math
import os
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from clipjax.data.captions import as_texts
from clipjax.data.reading import read_file
from clipjax.data.sources import RandomAccess, Record, Source, UnreadableRecord
from clipjax.errors import ClipjaxError, did_you_mean

logger = logging.getLogger(__name__)

PICTURE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib"),
    *(".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".avif", ".jp2", ".j2k", ".jpx"),
)
"""Ends of the names of pictures: of every format that is decoded."""
MAX_FIELD = 1 << 27
"""Characters of a table's field, at most."""


@dataclasses.dataclass(frozen=True)
class ImageFolder(Source):
    """Picture files, with captions in a .csv, .tsv or .jsonl table.

    Rows that name the same picture are one record with several captions. The picture's identity is
    its order of first appearance. Other columns are entries of the record, for the fields of a
    batch: where a picture has several rows, the list of their values unless all are equal. A path
    that leads out of `root` (`../`, an absolute one, a link) makes its record unreadable: a table
    must not choose what else is read.
    """

    root: str
    """Folder that the pictures' paths are relative to."""
    table: str = "captions.csv"
    """Table, relative to root: .csv or .tsv with a header line, or .jsonl."""
    image_column: str = "image"
    """Column with the picture's path."""
    caption_columns: tuple[str, ...] = ("caption",)
    """Columns with captions; in .jsonl a value may be a list of them."""
    languages: tuple[str, ...] = ()
    """Language code of each caption column, where known."""
    label_column: str | None = None
    """Column with the name of the picture's class."""

    def __post_init__(self):
        if self.languages and len(self.languages) != len(self.caption_columns):
            raise ClipjaxError(
                f"ImageFolder: {len(self.languages)} languages for {len(self.caption_columns)} "
                "caption columns; give one each"
            )

    def open(self) -> RandomAccess:
        root = Path(self.root).expanduser()
        table = root / self.table
        if not table.is_file():
            here = table.parent.iterdir() if table.parent.is_dir() else ()
            near = sorted(p.name for p in here if p.suffix in (".csv", ".tsv", ".jsonl"))
            raise ClipjaxError(f"there is no table {str(table)!r}{did_you_mean(table.name, near)}")
        images: dict[str, dict[str, Any]] = {}
        used = {self.image_column, *self.caption_columns, self.label_column}
        for line, row in table_rows(table):
            self._check_columns(table, line, row)
            place = f"{str(table)!r}, line {line}"
            path = _text(row[self.image_column])
            if not path:
                raise ClipjaxError(f"{place}, names no picture")
            path = os.path.normpath(path)
            image = images.setdefault(
                path, {"captions": [], "languages": [], "label": None, "others": {}}
            )
            for column, value in row.items():
                if column not in used:
                    image["others"].setdefault(str(column), []).append(value)
            for i, column in enumerate(self.caption_columns):
                texts = as_texts(row[column], f"{place}: {column!r}")
                image["captions"] += texts
                image["languages"] += [self.languages[i]] * len(texts) if self.languages else []
            if self.label_column:
                image["label"] = _text(row[self.label_column]) or None
        if not images:
            raise ClipjaxError(f"the table {str(table)!r} has no rows")
        return _OpenFolder(root, images, labeled=self.label_column is not None)

    def _check_columns(self, table: Path, line: int, row: dict[str, Any]) -> None:
        asked = [(self.image_column, "image_column")]
        asked += [(column, "caption_columns") for column in self.caption_columns]
        asked += [(self.label_column, "label_column")] if self.label_column else []
        for column, option in asked:
            if column not in row:
                raise ClipjaxError(
                    f"{str(table)!r}, line {line}, has no column {column!r}"
                    f"{did_you_mean(column, map(str, row))} ({option} says which)"
                )


@dataclasses.dataclass(frozen=True)
class ClassFolder(Source):
    """Picture files in one folder per class; the caption of a picture is its class's name."""

    root: str
    """Folder that holds the classes' folders."""

    def open(self) -> RandomAccess:
        root = Path(self.root).expanduser()
        if not root.is_dir():
            raise ClipjaxError(f"there is no folder {self.root!r}")
        # Hidden folders (.ipynb_checkpoints) and what macOS adds to archives are no classes.
        classes = sorted(
            folder.name
            for folder in root.iterdir()
            if folder.is_dir() and not folder.name.startswith(".") and folder.name != "__MACOSX"
        )
        images: dict[str, dict[str, Any]] = {}
        for name in classes:
            found, refused = find_pictures(root / name)
            for reason in refused:
                logger.warning("left out: %s/%s", name, reason)
            if not found:
                # It keeps its number: the classes after it must not be taken for one another.
                logger.warning("the class %r in %r holds no picture", name, self.root)
            for path in found:
                facts = {"captions": [name.replace("_", " ")], "languages": [], "label": name}
                images[f"{name}/{path}"] = facts
        if not images:
            raise ClipjaxError(f"no folder in {self.root!r} holds a picture")
        return _OpenFolder(root, images, labeled=True, classes=classes)


@dataclasses.dataclass(frozen=True)
class PictureFolder(Source):
    """All picture files in a folder and the folders in it."""

    root: str
    """Folder with the pictures."""
    texts: bool = False
    """Whether the .txt file beside a picture holds its caption (img2dataset's `files`); without, there
    are no captions."""

    def open(self) -> RandomAccess:
        names, refused = find_pictures(self.root)
        for reason in refused:
            logger.warning("left out: %s", reason)
        if not names:
            raise ClipjaxError(
                f"the folder {self.root!r} holds no picture ({', '.join(PICTURE_SUFFIXES)})"
            )
        images: dict[str, dict[str, Any]] = {
            name: {"captions": [], "languages": [], "label": None} for name in names
        }
        root = Path(self.root).expanduser()
        return (_OpenPairs if self.texts else _OpenFolder)(root, images, labeled=False)


def find_pictures(root: str | Path) -> tuple[list[str], list[str]]:
    """The picture files in a folder and the folders in it, by the ends of their names.

    Hidden files and folders (".cache") are left out. Links to folders are not followed, and links
    to files only within `root`.

    Returns:
      (sorted paths relative to `root`, one message for each picture or link that is left out).

    Raises:
      ClipjaxError: there is no such folder, or it cannot be read.
    """
    top = os.path.realpath(Path(root).expanduser())
    if not os.path.isdir(top):
        raise ClipjaxError(f"there is no folder {str(root)!r}")
    found, refused, folders = [], [], [""]
    while folders:
        inner = folders.pop()
        try:
            with os.scandir(os.path.join(top, inner)) as listing:
                entries = list(listing)
        except OSError as error:
            if not inner:
                raise ClipjaxError(f"{str(root)!r}: {error.strerror}") from error
            refused.append(f"{inner}: {error.strerror}")
            continue
        for entry in entries:
            name = os.path.join(inner, entry.name)
            pictured = entry.name.lower().endswith(PICTURE_SUFFIXES)
            if entry.name.startswith("."):
                continue
            if any(unicodedata.category(c) in ("Cc", "Cs") for c in entry.name):
                # They would steer the terminal they are printed on, or could not be printed at all.
                refused.append(f"{name!a}: a name with control characters, or not UTF-8")
                continue
            if entry.is_dir(follow_symlinks=False):
                folders.append(name)
            elif entry.is_file(follow_symlinks=False):
                found += [name] * pictured
            elif entry.is_symlink() and entry.is_dir():
                refused.append(f"{name}: a link to a folder, which is not followed")
            elif pictured and not stays_inside(top, name):
                refused.append(f"{name}: a link out of the folder")
            elif pictured and not entry.is_file():
                refused.append(f"{name}: no regular file")
            else:
                found += [name] * pictured
    return sorted(found), sorted(refused)


def stays_inside(root: str, path: str | Path) -> bool:
    """Whether `path`, relative to `root` or absolute, leads to something in `root`, links resolved.

    Args:
      root: a folder as `os.path.realpath` gives it.
      path: need not exist.
    """
    try:
        target = os.path.realpath(os.path.join(root, path))
    except ValueError:  # a NUL in the name
        return False
    return target == root or target.startswith(root.rstrip(os.sep) + os.sep)


class _OpenFolder(Sequence):
    def __init__(
        self,
        root: Path,
        images: dict[str, dict[str, Any]],
        labeled: bool,
        classes: list[str] | None = None,
    ):
        self._root, self._images = root, list(images.items())
        self._real_root = os.path.realpath(root)
        found = {image["label"] for image in images.values()} - {None}
        names = (classes or sorted(found)) if labeled else []
        self.class_names = tuple(names) or None
        self._label_of = {name: i for i, name in enumerate(names)}

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index):
        path, image = self._images[index]
        if not stays_inside(self._real_root, path):
            raise UnreadableRecord(
                f"{path}: leads out of the folder {str(self._root)!r}; make root a folder that holds "
                "all pictures"
            )
        record = Record(
            image=self._root / path,
            captions=tuple(image["captions"]),
            languages=tuple(image["languages"]),
            id=index,
            key=path,
        )
        if self._label_of:
            record["label"] = self._label_of.get(image["label"], -1)
        others = {
            column: values[0] if all(v == values[0] for v in values) else values
            for column, values in image.get("others", {}).items()
        }
        return others | record

    def keys(self) -> list[str]:
        """The keys of all records."""
        return [path for path, _ in self._images]


class _OpenPairs(_OpenFolder):
    """Pictures with a text file beside each; one without has no caption."""

    def __getitem__(self, index):
        record = super().__getitem__(index)
        file = os.path.splitext(record["image"])[0] + ".txt"
        if os.path.isfile(file) and stays_inside(self._real_root, file):
            try:
                text = read_file(file, record["key"]).decode("utf-8-sig")
            except UnicodeDecodeError as error:
                raise UnreadableRecord(f"{record['key']}: its text is not UTF-8") from error
            record["captions"] = (text.strip(),)
        return record


def table_rows(table: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, row) for each row of a table."""
    if table.suffix not in (".csv", ".tsv", ".jsonl"):
        raise ClipjaxError(f"{str(table)!r} is no table: its name must end in .csv, .tsv or .jsonl")
    csv.field_size_limit(MAX_FIELD)
    try:
        with table.open(encoding="utf-8-sig", newline="") as lines:
            if table.suffix == ".jsonl":
                yield from _json_rows(table, lines)
            else:
                yield from _table_rows(table, lines)
    except UnicodeDecodeError as error:
        raise ClipjaxError(f"{str(table)!r} is not UTF-8 text ({error})") from error


def _table_rows(table: Path, lines: Iterable[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Of a .tsv, in which a quote is text and a line a row; or of a .csv, in which quotes may hold commas
    and line breaks, and must be used as the format says."""
    lines = iter(lines)
    first = next(lines, "")
    lines = itertools.chain([first], lines)
    if table.suffix == ".tsv":
        reader = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
    else:  # OpenCLIP's .csv has tabs
        tabs = "\t" in first and "," not in first
        reader = csv.reader(lines, delimiter="\t" if tabs else ",", strict=True)
    header: list[str] | None = None
    start = 0
    try:
        for row in reader:
            line, start = start + 1, reader.line_num
            if not row:
                continue
            if header is None:
                header = row
                for name in header:
                    if header.count(name) > 1:
                        raise ClipjaxError(f"{str(table)!r} has two columns called {name!r}")
                continue
            if len(row) > len(header):
                raise ClipjaxError(
                    f"{str(table)!r}, line {line}, has {len(row)} fields for {len(header)} columns: "
                    "put a text with commas in double quotes"
                    if table.suffix == ".csv"
                    else f"{str(table)!r}, line {line}, has {len(row)} fields for {len(header)} columns"
                )
            yield line, dict(zip(header, [*row, *[None] * (len(header) - len(row))], strict=True))
    except csv.Error as error:
        raise ClipjaxError(f"{str(table)!r}, line {start + 1}, cannot be read ({error})") from error


def _json_rows(table: Path, lines) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ClipjaxError(f"{str(table)!r}, line {number}, is not JSON ({error})") from error
        if not isinstance(row, dict):
            raise ClipjaxError(f"{str(table)!r}, line {number}, is not a JSON object")
        yield number, row


def _text(value: Any) -> str:
    """A value of a table as one text, "" where it is none."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return str(value).strip()
