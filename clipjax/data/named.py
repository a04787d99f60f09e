"""Sources by a short name, for commands: a TFDS data set and its split, or a path."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from clipjax.data.folder import ClassFolder, ImageFolder
from clipjax.data.sources import Source, Tfds
from clipjax.data.webdataset import WebDataset
from clipjax.errors import ClipjaxError

TABLES = ("captions.csv", "captions.tsv", "captions.jsonl")


_OF_TARS = {"image_key": "image_keys", "caption_key": "caption_keys", "label_key": "label_key"}
_OF_TABLES = {
    "image_key": "image_column",
    "caption_key": "caption_columns",
    "label_key": "label_column",
}


def _renamed(given: dict[str, Any], name: str, fields: dict[str, str]) -> dict[str, Any]:
    """The keys that the user gave as the fields that a source of this kind has for them."""
    for key in given:
        if key not in fields:
            known = f"only {', '.join(fields)}" if fields else "none"
            raise ClipjaxError(f"{key}: {name!r} has no such thing to name ({known})")
    # Several captions or suffixes come with commas between them.
    return {
        fields[key]: tuple(value.split(",")) if fields[key].endswith("s") else value
        for key, value in given.items()
    }


def named_source(name: str, default_split: str = "test", **fields: str | None) -> Source:
    """The source that a name on the command line means.

    Args:
      name: `cifar10:test`, `my_data/my_config:1.0.0:validation` (a TFDS data set, its version if
        wanted, its split); a folder with a table captions.csv, .tsv or .jsonl; a folder with one
        folder per class; the path or pattern of WebDataset's .tar files.
      default_split: of a TFDS data set without one.
      **fields: of `Tfds` (`data_dir`, `label_key`, `caption_key`, `language_key`, `image_key`); None leaves the
        default. Of tars and tables, the keys name suffixes and columns.

    Raises:
      ClipjaxError: there is nothing of that name, or fields are given that it does not have.
    """
    given: dict[str, Any] = {key: value for key, value in fields.items() if value is not None}
    path = Path(name).expanduser()
    if name.endswith(".tar") or path.is_dir():
        if name.endswith(".tar"):
            return WebDataset(name, **_renamed(given, name, _OF_TARS))
        table = next((table for table in TABLES if (path / table).is_file()), None)
        if table:
            return ImageFolder(str(path), table, **_renamed(given, name, _OF_TABLES))
        return ClassFolder(str(path), **_renamed(given, name, {}))
    if path.is_absolute() or name.startswith("."):
        raise ClipjaxError(f"there is no folder {name!r}")
    if path.exists():
        raise ClipjaxError(
            f"{name!r} is a file: give a folder, .tar files, or a TFDS data set; a table is named by "
            f"its folder ({', '.join(TABLES)} in it)"
        )
    # A split may hold colons within brackets: test[:50%].
    base, bracket, rest = name.partition("[")
    *parts, last = base.split(":")
    if not parts or re.fullmatch(r"\d+(\.\d+)*", last):
        if bracket:
            raise ClipjaxError(
                f"{name!r}: name the split before its slice, as in {base}:test[{rest}"
            )
        return Tfds(base, default_split, **given)
    return Tfds(":".join(parts), last + bracket + rest, **given)
