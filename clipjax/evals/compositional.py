"""Compositional probes: does a picture prefer its caption to one with the words mixed up?"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from clipjax.data import Source
from clipjax.data.sources import RandomAccess
from clipjax.errors import ClipjaxError, did_you_mean
from clipjax.evals import metrics
from clipjax.evals.base import Evaluator, Runner, require_at_least
from clipjax.plain_text import lines, read_json, read_text
from clipjax.predictor import Predictor

IMAGE_KEYS = ("image", "filename")
NEGATIVE_KEYS = ("negative_caption", "negative_captions")


@dataclasses.dataclass(frozen=True)
class Compositional(Evaluator):
    """Hard negatives from a file, as in SugarCrepe (arXiv:2306.14610).

    Each entry has a picture (`image` or `filename`), a `caption`, a `negative_caption` (or a list
    `negative_captions`) and, if it likes, a `category`; without one the name of its file counts.
    A file is JSON (a list of entries, or an object of them, SugarCrepe's own form) or JSONL.

    Figures: `{name}/accuracy`, the share of entries whose caption scores above all its negatives (a
    tie counts against the model); `{name}/{category}/accuracy`; `{name}/mean_per_category`.
    """

    files: tuple[str, ...]
    """Files of entries."""
    images: str
    """Folder that the pictures' paths are relative to."""
    name: str = "compositional"
    """First part of the figures' names."""
    limit: int | None = None
    """Most entries of each file to use; None: all."""

    def __post_init__(self):
        if not self.files:
            raise ClipjaxError(f"{self.name}: files is empty; name at least one")
        require_at_least(self, 1, "limit")

    def build(self) -> CompositionalRunner:
        return CompositionalRunner(self)


@dataclasses.dataclass(frozen=True)
class _Entry:
    image: str
    caption: str
    negatives: tuple[str, ...]
    category: str


@dataclasses.dataclass(frozen=True)
class _Files(Source):
    """Pictures by their paths."""

    paths: tuple[str, ...]

    def open(self) -> RandomAccess:
        return [
            {"image": path, "captions": (), "id": i, "key": path}
            for i, path in enumerate(self.paths)
        ]


class CompositionalRunner(Runner):
    """`Compositional` at work: keeps tokens, and few pictures, between evaluations."""

    evaluator: Compositional

    def load(self, predictor: Predictor) -> None:
        config = self.evaluator
        entries = [
            e for file in config.files for e in read_entries(Path(file).expanduser(), config.limit)
        ]
        folder = Path(config.images).expanduser()
        paths = tuple(dict.fromkeys(str(folder / entry.image) for entry in entries))
        missing = [path for path in paths if not Path(path).is_file()]
        if missing:
            raise ClipjaxError(
                f"{len(missing)} of {len(paths)} pictures are not there, such as {missing[0]!r}: "
                "images names the folder that the files' paths are relative to"
            )
        data = self.once.split(_Files(tuple(paths)), predictor)
        place = {path: row for row, path in enumerate(data.keys)}
        entries = [e for e in entries if str(folder / e.image) in place]
        self._data, self._entries = data, entries
        self._row = np.array([place[str(folder / e.image)] for e in entries])
        texts = [text for e in entries for text in (e.caption, *e.negatives)]
        self._tokens = predictor.tokenize(texts)

    def evaluate(self, predictor: Predictor) -> dict[str, float]:
        image = self.once.images(predictor, self._data)
        text = self.once.texts(predictor, self._tokens)
        sizes = np.array([1 + len(e.negatives) for e in self._entries])
        first = np.cumsum(sizes) - sizes
        score = metrics.pair_scores(image[np.repeat(self._row, sizes)], text)
        own = score[first]
        score[first] = -np.inf
        right = np.maximum.reduceat(score, first) < own - metrics.TIE
        seen = ~self._data.images.unreadable[self._row]
        categories = np.array([e.category for e in self._entries])
        by_category = {
            category: float(right[seen & (categories == category)].mean())
            for category in dict.fromkeys(categories[seen].tolist())
        }
        name = self.evaluator.name
        self.samples = {f"{name}/accuracy": right[seen].astype(np.float64)}
        return {
            f"{name}/accuracy": float(right[seen].mean()),
            f"{name}/mean_per_category": float(np.mean(list(by_category.values()))),
        } | {f"{name}/{category}/accuracy": value for category, value in by_category.items()}

    def chance(self) -> dict[str, float]:
        """What a random order would score; once loaded."""
        one_in = np.mean([1 / (1 + len(e.negatives)) for e in self._entries])
        return {f"{self.evaluator.name}/accuracy": float(one_in)}


def read_entries(path: Path, limit: int | None = None) -> list[_Entry]:
    """The entries of a file.

    Raises:
      ClipjaxError: it is missing or empty, or an entry lacks a key; the entry is named.
    """
    if not path.is_file():
        raise ClipjaxError(f"there is no file {str(path)!r}")
    if path.suffix == ".jsonl":
        items = [_json_line(path, i, line) for i, line in _lines(path)]
    else:
        content = read_json(path)
        if not isinstance(content, (list, dict)):
            raise ClipjaxError(f"{path}: expected a list or an object of entries")
        items = list(content.items()) if isinstance(content, dict) else list(enumerate(content))
    if not items:
        raise ClipjaxError(f"{path} has no entries")
    return [_entry(f"{path}, entry {key}", path.stem, item) for key, item in items[:limit]]


def _lines(path: Path) -> list[tuple[int, str]]:
    return [(i, line) for i, line in enumerate(lines(read_text(path)), start=1) if line]


def _json_line(path: Path, number: int, line: str) -> tuple[int, Any]:
    try:
        return number, json.loads(line)
    except ValueError as error:
        raise ClipjaxError(f"{path}, line {number}, is not JSON ({error})") from error


def _entry(where: str, category: str, item: Any) -> _Entry:
    if not isinstance(item, dict):
        raise ClipjaxError(f"{where} is not an object")
    image = next((item[key] for key in IMAGE_KEYS if key in item), None)
    negative: Any = next((item[key] for key in NEGATIVE_KEYS if key in item), None)
    for key, value in (
        ("image", image),
        ("caption", item.get("caption")),
        ("negative_caption", negative),
    ):
        if not value:
            raise ClipjaxError(f"{where} has no {key!r}{did_you_mean(key, map(str, item))}")
    negatives = (negative,) if isinstance(negative, str) else tuple(negative)
    category = str(item.get("category", category)).replace("/", "_")
    return _Entry(str(image), str(item["caption"]), negatives, category)
