"""Sources by a short name, for commands: a TFDS data set and its split, or a path."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clipjax.data.columns import Columns
from clipjax.data.folder import ImageFolder
from clipjax.data.found import HOLDS, found_source
from clipjax.data.records import Examples
from clipjax.data.sources import Source, Tfds
from clipjax.data.webdataset import WebDataset
from clipjax.errors import ClipjaxError


def named_source(name: str, default_split: str = "test", **fields: str | None) -> Source:
    """The source that a name on the command line means.

    Args:
      name: `cifar10:test`, `tfds:cifar10:test`, `my_data/my_config:1.0.0:validation` (a TFDS data set, its version if
        wanted, its split); or a path, or a pattern of several (`found_source` says of what).
      default_split: of a TFDS data set without one.
      **fields: of `Tfds` (`data_dir`, `label_key`, `caption_key`, `language_key`, `image_key`); None leaves the
        default. `label_key`, `caption_key` and `image_key` also name columns, or extensions in tars.

    Raises:
      ClipjaxError: fields are given that are for TFDS alone.
    """
    given: dict[str, Any] = {key: value for key, value in fields.items() if value is not None}
    if name.startswith("tfds:"):
        return _of_tfds(name.removeprefix("tfds:"), default_split, given)
    path = Path(name).expanduser()
    found = found_source(name, captions=True)
    if found is not None:
        return with_keys(found, name, fields)
    if not path.exists() and _NO_TFDS.search(name):
        raise ClipjaxError(f"there is no file or folder {name!r}")
    if not path.exists() and name.startswith(("/", ".", "~")):
        raise ClipjaxError(f"there is no folder {name!r}")
    if path.exists():
        raise ClipjaxError(f"{name!r} is no file of data: give {HOLDS}, or a TFDS data set")
    return _of_tfds(name, default_split, given)


_NO_TFDS = re.compile(
    r"[*?{]|\.(csv|tsv|jsonl?|txt|tar|gz|zip|parquet|arrow|tfrecords?|array_?records?)\b[^:]*$",
    re.I,
)
"""Of a name that is no data set's: a pattern, or a file's end."""


def _of_tfds(name: str, default_split: str, given: dict[str, Any]) -> Tfds:
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


def with_keys(found: Source, name: str, keys: Mapping[str, str | None]) -> Source:
    """A source found at a path, with what the command says of its columns or extensions."""
    given = {key: value for key, value in keys.items() if value is not None}
    image, caption = given.get("image_key"), given.get("caption_key")
    if isinstance(found, WebDataset):
        fields = {
            "label_key": given.get("label_key"),
            "image_keys": image and (image,),
            "caption_keys": caption and (caption,),
        }
    elif isinstance(found, (ImageFolder, Columns)):
        fields = {
            "label_column": given.get("label_key"),
            "image_column": image,
            "caption_columns": caption and (caption,),
        }
    elif isinstance(found, Examples):
        fields = {
            "label_key": given.get("label_key"),
            "image_key": image,
            "caption_keys": caption and (caption,),
        }
    else:
        fields = {}
    known = {"label_key", "image_key", "caption_key"} if fields else set()
    if left := sorted(set(given) - known):
        raise ClipjaxError(
            f"{', '.join(left)}: not for what is at {name!r}, a {type(found).__name__}"
        )
    return dataclasses.replace(found, **{k: v for k, v in fields.items() if v is not None})
