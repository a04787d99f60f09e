"""Labeled features: what linear probe, k-NN and few-shot classification work on."""

from __future__ import annotations

import dataclasses

import numpy as np
from jax.sharding import Mesh

from clipjax.data import EvalSet, Source
from clipjax.errors import ClipjaxError, RunFailed
from clipjax.evals import metrics
from clipjax.evals.base import Evaluator, Runner, require_at_least
from clipjax.evals.embed import Output
from clipjax.evals.figure import Figure, mean_by_class
from clipjax.predictor import Predictor


@dataclasses.dataclass(frozen=True)
class Labeled:
    """Features [n, E] float32, and their labels [n] int in [0, C)."""

    x: np.ndarray
    y: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureEvaluator(Evaluator):
    """Base of the evaluators that learn from the frozen image embeddings of labeled pictures."""

    train: Source
    """Split to learn from."""
    source: Source
    """Split to judge by."""
    features: Output = "embedding"
    """What to learn from: the embeddings, of unit norm, or what the image tower makes before any
    projection ("pooled"), as it is: what CLIP's linear probes and DINO's neighbors are taken on."""
    limit: int | None = None
    """Most records of each split to use; None: all."""

    def __post_init__(self):
        if self.features not in ("embedding", "pooled"):
            raise ClipjaxError(
                f"{self.name}: features={self.features!r}: choose embedding or pooled"
            )
        require_at_least(self, 1, "limit")

    def measure(
        self, train: Labeled, test: Labeled, classes: int, mesh: Mesh | None
    ) -> dict[str, float]:
        """The figures, without the evaluator's name; for subclasses."""
        raise NotImplementedError

    def build(self) -> FeatureRunner:
        return FeatureRunner(self)


class FeatureRunner(Runner):
    """A `FeatureEvaluator` at work."""

    evaluator: FeatureEvaluator

    def load(self, predictor: Predictor) -> None:
        config = self.evaluator
        sources = (config.train, config.source)
        self._data = tuple(self.once.split(each, predictor, config.limit) for each in sources)
        self._labels = _aligned(sources, self._data)
        self.classes = 1 + max(int(labels.max()) for labels in self._labels)

    def evaluate(self, predictor: Predictor) -> dict[str, float]:
        train, test = (
            self._labeled(predictor, data, labels)
            for data, labels in zip(self._data, self._labels, strict=True)
        )
        figures = self.evaluator.measure(train, test, self.classes, predictor.mesh)
        return {f"{self.evaluator.name}/{key}": value for key, value in figures.items()}

    def chance(self) -> dict[str, float]:
        """What a random order of the classes would score, where figures are top-k; once loaded."""
        name, classes = self.evaluator.name, self.classes
        return {f"{name}/top{k}": metrics.recall_by_chance(k, classes) for k in (1, 5)}

    def _labeled(self, predictor: Predictor, data: EvalSet, labels: np.ndarray) -> Labeled:
        rows = np.flatnonzero(labels >= 0)
        x = self.once.images(predictor, data, rows, self.evaluator.features)
        seen = ~data.images.unreadable[rows]
        if not np.isfinite(x[seen]).all():
            raise RunFailed("image embeddings are not finite: the model has diverged")
        return Labeled(x[seen], labels[rows[seen]])


def accuracies(score: np.ndarray, label: np.ndarray) -> dict[str, float]:
    """`top1`, `top5` and `mean_per_class` of scores [n, C]; a tie counts against the classifier."""
    own = score[np.arange(len(label)), label]
    ranks = (score >= own[:, None]).sum(axis=1)
    return class_figures(ranks, label)


def class_figures(ranks: np.ndarray, label: np.ndarray) -> dict[str, float]:
    """`top1`, `top5` and `mean_per_class` of the ranks [n] of the true classes [n]."""
    return {
        "top1": Figure(ranks <= 1),
        "top5": Figure(ranks <= 5),
        "mean_per_class": Figure(np.stack([ranks <= 1, label], axis=1), mean_by_class),
    }


def _aligned(
    sources: tuple[Source, Source], data: tuple[EvalSet, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """The labels of both splits, with one meaning.

    Raises:
      ClipjaxError: a split has no labels, or one names classes that the other lacks.
    """
    train, test = data
    for split, source in zip((train, test), sources, strict=True):
        if split.labels is None:
            raise ClipjaxError(
                f"{source} has no labels: name the feature that holds them (label_key of a Tfds "
                "source)"
            )
    assert train.labels is not None and test.labels is not None
    known, named = train.class_names, test.class_names
    if not known or not named or known == named:
        return train.labels, test.labels
    place = {name: i for i, name in enumerate(known)}
    occurring = {named[label] for label in set(test.labels.tolist()) if label >= 0}
    if unknown := sorted(occurring - set(place)):
        raise ClipjaxError(
            f"{sources[1]} has {len(unknown)} classes that {sources[0]} lacks, such as "
            f"{unknown[0]!r}: both must have the same classes"
        )
    moved = np.array([place.get(name, -1) for name in named])
    return train.labels, np.where(test.labels >= 0, moved[test.labels], -1)
