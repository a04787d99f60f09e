"""Captions in many languages, in the form of Crossmodal-3600's captions.jsonl."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clipjax.data.captions import as_texts
from clipjax.data.folder import PICTURE_SUFFIXES, stays_inside
from clipjax.data.sources import RandomAccess, Source, UnreadableRecord
from clipjax.errors import ClipjaxError

KEY = "image/key"


@dataclasses.dataclass(frozen=True)
class Crossmodal(Source):
    """Pictures with captions by language, as Crossmodal-3600 (XM3600, arXiv:2205.12522) has them.

    A line is a JSON object with `image/key`, the picture's name without its end, and for each language
    code an object whose `caption` is a list of captions.
    """

    table: str
    """The .jsonl file."""
    images: str = "images"
    """Folder of the pictures, relative to that of the table."""
    languages: tuple[str, ...] = ()
    """Keep the captions in these languages, in this order; () keeps all."""

    def open(self) -> RandomAccess:
        table = Path(self.table).expanduser()
        if not table.is_file():
            raise ClipjaxError(f"there is no table {str(table)!r}")
        rows = []
        with table.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    rows.append(_row(f"{str(table)!r}, line {number}", line, self.languages))
        return _OpenCrossmodal(rows, table.parent / Path(self.images).expanduser())


class _OpenCrossmodal(Sequence):
    def __init__(self, rows: list[tuple[str, dict[str, tuple[str, ...]]]], folder: Path):
        self._rows, self._folder = rows, folder

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        key, captions = self._rows[index]
        spoken = [(text, code) for code, texts in captions.items() for text in texts]
        return {
            "image": self._picture(key),
            "captions": tuple(text for text, _ in spoken),
            "languages": tuple(code for _, code in spoken),
            "id": index,
            "key": key,
        }

    def keys(self) -> list[str]:
        """The keys of all records."""
        return [key for key, _ in self._rows]

    def _picture(self, key: str) -> Path:
        for end in ("", *PICTURE_SUFFIXES):
            path = self._folder / f"{key}{end}"
            if stays_inside(str(self._folder.resolve()), f"{key}{end}") and path.is_file():
                return path
        raise UnreadableRecord(f"{key}: no picture of that name is in {str(self._folder)!r}")


def _row(
    where: str, line: str, languages: tuple[str, ...]
) -> tuple[str, dict[str, tuple[str, ...]]]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ClipjaxError(f"{where}, is not JSON ({error})") from error
    if not isinstance(row, dict) or not isinstance(row.get(KEY), str):
        raise ClipjaxError(f"{where}, has no {KEY!r}, the name of a picture")
    captions = {
        code: as_texts(value["caption"], f"{where}: the captions in {code!r}")
        for code, value in row.items()
        if isinstance(value, dict) and "caption" in value
    }
    return row[KEY], {code: captions.get(code, ()) for code in languages or captions}
