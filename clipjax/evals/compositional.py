"""Compositional probes: does a picture prefer its caption to one with the words mixed up?"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import numpy as np

from clipjax.errors import ClipjaxError
from clipjax.evals import metrics
from clipjax.evals.entries import EntryEvaluator, EntryRunner, View, box_of, required
from clipjax.evals.figure import Figure, mean_by_class
from clipjax.predictor import Predictor

IMAGE_KEYS = ("image", "filename", "image_path")
CAPTION_KEYS = ("caption", "true_caption")
NEGATIVE_KEYS = ("negative_caption", "negative_captions", "false_caption")
CATEGORY_KEYS = ("category", "relation_name", "attributes")


@dataclasses.dataclass(frozen=True)
class Compositional(EntryEvaluator):
    """Hard negatives from a file, as in SugarCrepe (arXiv:2306.14610) and ARO (arXiv:2210.01936).

    Each entry has a picture (`image`, `filename` or `image_path`), a `caption`, a `negative_caption` (or
    a list `negative_captions`) and, if it likes, a `category`; without one the name of its file counts.
    ARO's `true_caption` and `false_caption`, its `relation_name` and `attributes` for a category, its
    `bbox_x` to `bbox_h` (only that box of the picture is seen) and its `caption_options`, the first of
    which is right, do as well.

    Figures: `{name}/accuracy`, the share of entries whose caption scores above all its negatives;
    `{name}/{category}/accuracy`; `{name}/mean_per_category`.
    """

    name: str = "compositional"
    """First part of the figures' names."""
    ties: Literal["against", "first"] = "against"
    """What a caption and a negative of equal score count as: "against" the model, as in SugarCrepe's
    and ARO's figures of relations and attributes, or the caption as the "first", as in ARO's of order."""

    def __post_init__(self):
        super().__post_init__()
        metrics.require_ties(self.ties)

    def build(self) -> CompositionalRunner:
        return CompositionalRunner(self)


@dataclasses.dataclass(frozen=True)
class _Entry:
    view: View
    texts: tuple[str, ...]  # the caption, then its negatives
    category: str


class CompositionalRunner(EntryRunner):
    """`Compositional` at work."""

    evaluator: Compositional

    def load(self, predictor: Predictor) -> None:
        entries = [_entry(where, stem, item) for where, stem, item in self.items()]
        row = self.look(predictor, (entry.view for entry in entries))
        self._entries = [entry for entry in entries if entry.view in row]
        self._row = np.array([row[entry.view] for entry in self._entries])
        self._tokens = predictor.tokenize([text for e in self._entries for text in e.texts])

    def evaluate(self, predictor: Predictor) -> dict[str, float]:
        image = self.once.images(predictor, self._data)
        text = self.once.texts(predictor, self._tokens)
        sizes = np.array([len(e.texts) for e in self._entries])
        first = np.cumsum(sizes) - sizes
        score = metrics.pair_scores(image[np.repeat(self._row, sizes)], text)
        own = score[first]
        score[first] = -np.inf
        best = np.maximum.reduceat(score, first)  # of the negatives
        right = best <= own if self.evaluator.ties == "first" else best < own - metrics.TIE
        seen = ~self._data.images.unreadable[self._row]
        return {
            f"{self.evaluator.name}/{key}": value
            for key, value in by_category(
                "accuracy",
                right[seen],
                [e.category for e, s in zip(self._entries, seen, strict=True) if s],
            ).items()
        }

    def chance(self) -> dict[str, float]:
        """What a random order would score; once loaded."""
        one_in = np.mean([1 / len(e.texts) for e in self._entries])
        return {f"{self.evaluator.name}/accuracy": float(one_in)}


def by_category(figure: str, values: np.ndarray, categories: list[str]) -> dict[str, float]:
    """The mean of values [n], in each category, and over categories: `mean_per_category`."""
    names = list(dict.fromkeys(categories))
    index = np.array([names.index(category) for category in categories], np.int64)
    found: dict[str, float] = {
        figure: Figure(values),
        "mean_per_category": Figure(np.stack([values, index], axis=1), mean_by_class),
    }
    return found | {f"{name}/{figure}": Figure(values[index == i]) for i, name in enumerate(names)}


def _entry(where: str, stem: str, item: dict[str, Any]) -> _Entry:
    image = str(required(where, item, "image", *IMAGE_KEYS))
    if "caption_options" in item:
        texts = item["caption_options"]
        if not isinstance(texts, list) or len(texts) < 2:
            raise ClipjaxError(f"{where}: 'caption_options' is no list of two captions or more")
    else:
        caption = required(where, item, "caption", *CAPTION_KEYS)
        negative = required(where, item, "negative_caption", *NEGATIVE_KEYS)
        texts = [caption, *([negative] if isinstance(negative, str) else negative)]
    named: Any = next((item[key] for key in CATEGORY_KEYS if key in item), stem)
    named = "_".join(map(str, named)) if isinstance(named, list) else str(named)
    category = named.replace("/", "_")
    return _Entry((image, box_of(where, item)), tuple(map(str, texts)), category)
