"""Labeled features: what linear probe, k-NN and few-shot classification work on."""

from __future__ import annotations

import dataclasses

import numpy as np
from jax.sharding import Mesh

from clipjax.data import EvalSet, Source, load_eval
from clipjax.errors import ClipjaxError
from clipjax.evals import metrics
from clipjax.evals.base import Evaluator, Runner
from clipjax.evals.embed import embed_images
from clipjax.predictor import Predictor


@dataclasses.dataclass(frozen=True)
class Labeled:
    """Features [n, E] float32 of unit norm, and their labels [n] int in [0, C)."""

    x: np.ndarray
    y: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureEvaluator(Evaluator):
    """Base of the evaluators that learn from the frozen image embeddings of labeled pictures."""

    train: Source
    """Split to learn from."""
    source: Source
    """Split to judge by."""
    limit: int | None = None
    """Most records of each split to use; None: all."""

    def __post_init__(self):
        if self.limit is not None and self.limit < 1:
            raise ClipjaxError(f"{self.name}: limit={self.limit} must be at least 1")

    def measure(
        self, train: Labeled, test: Labeled, classes: int, mesh: Mesh | None
    ) -> dict[str, float]:
        """The figures, without the evaluator's name; for subclasses."""
        raise NotImplementedError

    def run(self, predictor: Predictor) -> dict[str, float]:
        return self.build()(predictor)

    def build(self) -> FeatureRunner:
        return FeatureRunner(self)


class FeatureRunner(Runner):
    """A `FeatureEvaluator` at work: keeps the pictures of small splits between evaluations."""

    evaluator: FeatureEvaluator

    def __init__(self, evaluator: FeatureEvaluator):
        super().__init__(evaluator)
        self._loaded_for: int | None = None

    def load(self, predictor: Predictor) -> None:
        if self._loaded_for == predictor.image_size:
            return
        config = self.evaluator
        self._train, self._test = (
            load_eval(source, predictor.image_size, config.limit, predictor.resize)
            for source in (config.train, config.source)
        )
        self._labels = _aligned(config, self._train, self._test)
        self.classes = 1 + max(int(labels.max()) for labels in self._labels)
        self._loaded_for = predictor.image_size

    def evaluate(self, predictor: Predictor) -> dict[str, float]:
        train, test = (
            _labeled(predictor, data, labels)
            for data, labels in zip((self._train, self._test), self._labels, strict=True)
        )
        figures = self.evaluator.measure(train, test, self.classes, predictor.mesh)
        return {f"{self.evaluator.name}/{key}": value for key, value in figures.items()}

    def chance(self) -> dict[str, float]:
        """What a random order of the classes would score, where figures are top-k; once loaded."""
        name, classes = self.evaluator.name, self.classes
        return {f"{name}/top{k}": metrics.recall_by_chance(k, classes) for k in (1, 5)}


def accuracies(score: np.ndarray, label: np.ndarray) -> dict[str, float]:
    """`top1`, `top5` and `mean_per_class` of scores [n, C]; a tie counts against the classifier."""
    own = score[np.arange(len(label)), label]
    ranks = (score >= own[:, None]).sum(axis=1)
    return {
        "top1": metrics.recall_at(ranks, 1),
        "top5": metrics.recall_at(ranks, 5),
        "mean_per_class": metrics.mean_per_class_accuracy(ranks, label),
    }


def _labeled(predictor: Predictor, data: EvalSet, labels: np.ndarray) -> Labeled:
    rows = np.flatnonzero(labels >= 0)
    x = embed_images(predictor, data.images, rows)
    seen = ~data.images.unreadable[rows]
    if not np.isfinite(x[seen]).all():
        raise ClipjaxError("image embeddings are not finite: the model has diverged")
    return Labeled(x[seen], labels[rows[seen]])


def _aligned(config: FeatureEvaluator, train: EvalSet, test: EvalSet) -> tuple[np.ndarray, ...]:
    """The labels of both splits, with one meaning.

    Raises:
      ClipjaxError: a split has no labels, or one names classes that the other lacks.
    """
    for data, source in ((train, config.train), (test, config.source)):
        if data.labels is None:
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
            f"{config.source} has {len(unknown)} classes that {config.train} lacks, such as "
            f"{unknown[0]!r}: both must have the same classes"
        )
    moved = np.array([place.get(name, -1) for name in named])
    return train.labels, np.where(test.labels >= 0, moved[test.labels], -1)
