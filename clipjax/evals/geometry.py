"""Geometry: how the embeddings of pictures and texts lie on the sphere."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from clipjax.data import Source
from clipjax.errors import ClipjaxError
from clipjax.evals.base import Evaluator, Runner, require_at_least
from clipjax.evals.figure import Figure
from clipjax.predictor import Predictor

_TILE = 2048


@dataclasses.dataclass(frozen=True)
class Geometry(Evaluator):
    """Alignment, uniformity and modality gap over a whole split.

    `{name}/alignment`, mean ||x_i - y_i||^2 of a picture and its main caption, and
    `{name}/uniformity/image`, `{name}/uniformity/text`, log mean exp(-2 ||a_i - a_j||^2) over
    i != j (Wang & Isola 2020, arXiv:2005.10242); `{name}/uniformity/cross`, the same between x_i
    and y_j (arXiv:2405.18570); `{name}/modality_gap`, the distance of the two means (Liang et al.
    2022, arXiv:2203.02053). The objective `Diagnostics` gives the same of every batch.
    """

    source: Source
    """Split to look at; records without a caption are left out."""
    name: str = "geometry"
    """First part of the figures' names."""
    limit: int | None = 10_000
    """Most records to use (the time grows with the square); None: all."""

    def __post_init__(self):
        require_at_least(self, 2, "limit")

    def build(self) -> GeometryRunner:
        return GeometryRunner(self)


class GeometryRunner(Runner):
    """`Geometry` at work."""

    evaluator: Geometry

    def load(self, predictor: Predictor) -> None:
        config = self.evaluator
        data = self._data = self.once.split(config.source, predictor, config.limit)
        self._rows = np.array([i for i, texts in enumerate(data.captions) if texts], np.int64)
        if len(self._rows) < 2:
            raise ClipjaxError(f"{config.source} has {len(self._rows)} pictures with captions")
        self._tokens = predictor.tokenize([data.captions[i][0] for i in self._rows])

    def evaluate(self, predictor: Predictor) -> dict[str, float]:
        image = self.once.images(predictor, self._data, self._rows)
        text = self.once.texts(predictor, self._tokens)
        seen = ~self._data.images.unreadable[self._rows]
        figures = geometry(image[seen], text[seen])
        return {f"{self.evaluator.name}/{key}": value for key, value in figures.items()}


def geometry(image: np.ndarray, text: np.ndarray) -> dict[str, float]:
    """The figures of `Geometry` for n >= 2 pairs of unit vectors [n, E]."""
    x, y = np.asarray(image, np.float64), np.asarray(text, np.float64)
    return {
        "alignment": Figure(((x - y) ** 2).sum(axis=1)),
        "uniformity/image": Figure(_nearness(x, x), _uniformity),
        "uniformity/text": Figure(_nearness(y, y), _uniformity),
        "uniformity/cross": Figure(_nearness(x, y), _uniformity),
        "modality_gap": Figure(x - y, _gap),
    }


def uniformity(a: np.ndarray, b: np.ndarray) -> float:
    """log mean exp(-2 ||a_i - b_j||^2) over i != j, for unit rows [n, E]."""
    return _uniformity(_nearness(a, b), None)


def _nearness(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """[n, 2]: of each a_i the mean of exp(-2 ||a_i - b_j||^2) over j != i, and of each b_j over i."""
    totals = np.zeros((len(a), 2))
    for start in range(0, len(a), _TILE):
        # ||a - b||^2 = 2 - 2 a.b on the sphere; each term is at most 1, so nothing overflows.
        terms = np.exp(4 * (a[start : start + _TILE] @ b.T) - 4)
        own = np.arange(len(terms))
        terms[own, start + own] = 0.0
        totals[start : start + _TILE, 0] += terms.sum(axis=1)
        totals[:, 1] += terms.sum(axis=0)
    return totals / (len(a) - 1)


def _uniformity(nearness: np.ndarray, weights: np.ndarray | None) -> float:
    """The logarithm of the mean over pairs; with weights to first order (Hajek's projection).

    A pair's two members both move it, so that the mean of pairs moves by the sum of what the means
    of either side do. Where rows spread evenly over the sphere both hardly do, and an interval is too
    narrow.
    """
    whole = nearness[:, 0].mean()
    if weights is None:
        return math.log(whole)
    moved = np.average(nearness, axis=0, weights=weights).sum() - whole
    return math.log(max(moved, np.finfo(np.float64).tiny))


def _gap(apart: np.ndarray, weights: np.ndarray | None) -> float:
    """The length of the mean of x - y, [n, E]."""
    return float(np.linalg.norm(np.average(apart, axis=0, weights=weights)))
