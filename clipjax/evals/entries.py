"""Files of entries: what probes ask about pictures that lie in a folder."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from clipjax.data import Source
from clipjax.data.folder import PICTURE_SUFFIXES
from clipjax.data.images import decode
from clipjax.data.sources import RandomAccess, UnreadableRecord
from clipjax.errors import ClipjaxError, did_you_mean
from clipjax.evals.base import Evaluator, Runner, require_at_least
from clipjax.plain_text import lines, read_json, read_text
from clipjax.predictor import Predictor

Box = tuple[int, int, int, int]
"""Left, top, width, height, in pixels."""
View = tuple[str, "Box | None"]
"""A picture's path, relative to the folder, and what to see of it."""


@dataclasses.dataclass(frozen=True)
class EntryEvaluator(Evaluator):
    """Base of the evaluators that read files of entries, JSON (a list, or an object) or JSONL."""

    mark: ClassVar[str] = ""
    """What an entry has by which it is known to be of this evaluator's kind; "" where nothing tells."""
    files: tuple[str, ...]
    """Files of entries."""
    images: str
    """Folder that the pictures' paths are relative to; the ends of their names may be left out."""
    limit: int | None = None
    """Most entries of each file to use; None: all."""

    def __post_init__(self):
        if not self.files:
            raise ClipjaxError(f"{self.name}: files is empty; name at least one")
        require_at_least(self, 1, "limit")


class EntryRunner(Runner):
    """An `EntryEvaluator` at work: keeps tokens, and few pictures, between evaluations."""

    evaluator: EntryEvaluator

    def items(self) -> list[tuple[str, str, Any]]:
        """(where it is, the stem of its file, the entry) of all files."""
        config = self.evaluator
        paths = [Path(file).expanduser() for file in config.files]
        return [
            (where, path.stem, item)
            for path in paths
            for where, item in read_items(path)[: config.limit]
        ]

    def look(self, predictor: Predictor, views: Iterable[View]) -> dict[View, int]:
        """Reads pictures into `self._data`; by view, its row there, of those that can be read."""
        folder = Path(self.evaluator.images).expanduser()
        found = {view: find_picture(folder, view[0]) for view in dict.fromkeys(views)}
        missing = [view[0] for view, path in found.items() if path is None]
        if missing:
            raise ClipjaxError(
                f"{len(missing)} of {len(found)} pictures are not there, such as "
                f"{str(folder / missing[0])!r}: images names the folder that the files' paths are "
                "relative to"
            )
        shown = {view: (str(path), view[1]) for view, path in found.items()}
        source = PictureFiles(tuple(dict.fromkeys(shown.values())))
        self._data = self.once.split(source, predictor)
        row = {key: i for i, key in enumerate(self._data.keys)}
        keys = {view: _key(*path) for view, path in shown.items()}
        return {view: row[key] for view, key in keys.items() if key in row}


@dataclasses.dataclass(frozen=True)
class PictureFiles(Source):
    """Pictures by their paths, whole or a box of each."""

    views: tuple[View, ...]

    def open(self) -> RandomAccess:
        return _OpenFiles(self.views)


class _OpenFiles(Sequence):
    def __init__(self, views: tuple[View, ...]):
        self._views = views

    def __len__(self) -> int:
        return len(self._views)

    def __getitem__(self, index: Any) -> Any:
        path, box = self._views[index]
        image: Any = path
        key = _key(path, box)
        if box is not None:
            left, top, width, height = box
            image = decode(path, key)[max(top, 0) : top + height, max(left, 0) : left + width]
            if not image.size:
                raise UnreadableRecord(f"{key}: the box lies outside of the picture")
        return {"image": image, "captions": (), "id": index, "key": key}


def _key(path: str, box: Box | None) -> str:
    return path if box is None else f"{path} {list(box)}"


def read_items(path: Path) -> list[tuple[str, Any]]:
    """The entries of a file, each with where it stands.

    Raises:
      ClipjaxError: it is missing, empty, or no JSON.
    """
    if not path.is_file():
        raise ClipjaxError(f"there is no file {str(path)!r}")
    items: list[tuple[Any, Any]]
    if path.suffix == ".jsonl":
        numbered = enumerate(lines(read_text(path)), start=1)
        items = [_json_line(path, i, line) for i, line in numbered if line]
    else:
        content = read_json(path)
        if not isinstance(content, (list, dict)):
            raise ClipjaxError(f"{path}: expected a list or an object of entries")
        items = list(content.items()) if isinstance(content, dict) else list(enumerate(content))
    if not items:
        raise ClipjaxError(f"{path} has no entries")
    found = [(f"{path}, entry {key}", item) for key, item in items]
    for where, item in found:
        if not isinstance(item, dict):
            raise ClipjaxError(f"{where} is not an object")
    return found


def _json_line(path: Path, number: int, line: str) -> tuple[int, Any]:
    try:
        return number, json.loads(line)
    except ValueError as error:
        raise ClipjaxError(f"{path}, line {number}, is not JSON ({error})") from error


def required(where: str, item: dict[str, Any], name: str, *keys: str) -> Any:
    """What an entry has under the first of some keys that it has.

    Raises:
      ClipjaxError: it has none of them, or nothing there; the message calls it `name`.
    """
    value = next((item[key] for key in keys if key in item), None)
    if value is None or value == "" or value == []:
        raise ClipjaxError(f"{where} has no {name!r}{did_you_mean(name, map(str, item))}")
    return value


def find_picture(folder: Path, name: str) -> Path | None:
    """The file of a picture whose name's end may be left out."""
    exact = folder / name
    if exact.is_file():
        return exact
    for end in PICTURE_SUFFIXES:
        if (found := folder / f"{name}{end}").is_file():
            return found
    return None


def box_of(where: str, item: dict[str, Any]) -> Box | None:
    """What an entry says of its picture's part: `box`, or ARO's `bbox_x`, `bbox_y`, `bbox_w`, `bbox_h`."""
    aro = [item.get(f"bbox_{side}") for side in "xywh"]
    box = item.get("box", aro if None not in aro else None)
    if box is None:
        return None
    try:
        left, top, width, height = (int(x) for x in box)
    except (TypeError, ValueError):
        raise ClipjaxError(f"{where}: the box {box!r} is no left, top, width, height") from None
    return left, top, width, height


def seen_rows(data: Any, rows: np.ndarray) -> np.ndarray:
    """bool, of [..., k] rows: whether all k pictures could be read."""
    return ~data.images.unreadable[rows].any(axis=-1)
