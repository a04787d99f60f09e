"""Labeled features: what linear probe, k-NN and few-shot classification work on."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Sequence

import numpy as np
from jax.sharding import Mesh

from clipjax.data import EvalSet, Source, load_eval
from clipjax.errors import ClipjaxError
from clipjax.evals import metrics
from clipjax.evals.base import Evaluator, Runner, require_at_least
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
        require_at_least(self, 1, "limit")

    def measure(
        self, train: Labeled, test: Labeled, classes: int, mesh: Mesh | None
    ) -> dict[str, float]:
        """The figures, without the evaluator's name; for subclasses."""
        raise NotImplementedError

    def build(self) -> FeatureRunner:
        return FeatureRunner(self)


class FeatureRunner(Runner):
    """A `FeatureEvaluator` at work; runners of the same splits embed them once between them."""

    evaluator: FeatureEvaluator

    def __init__(self, evaluator: FeatureEvaluator):
        super().__init__(evaluator)
        self.features = Features(evaluator.train, evaluator.source, evaluator.limit)

    def share(self, others: Sequence[Runner]) -> None:
        for other in others:
            if isinstance(other, FeatureRunner) and other.features.same_as(self.features):
                self.features = other.features
                self.features.users += 1
                return

    def load(self, predictor: Predictor) -> None:
        self.features.load(predictor)
        self.classes = self.features.classes

    def evaluate(self, predictor: Predictor) -> dict[str, float]:
        train, test = self.features.embedded(predictor)
        figures = self.evaluator.measure(train, test, self.classes, predictor.mesh)
        return {f"{self.evaluator.name}/{key}": value for key, value in figures.items()}

    def chance(self) -> dict[str, float]:
        """What a random order of the classes would score, where figures are top-k; once loaded."""
        name, classes = self.evaluator.name, self.classes
        return {f"{name}/top{k}": metrics.recall_by_chance(k, classes) for k in (1, 5)}


class Features:
    """Two labeled splits, of which small ones' pictures are kept, and their embeddings by one model.

    Attributes:
      classes: how many, once loaded.
      users: how many runners ask for the embeddings of each model. They are kept until the last
        one has.
    """

    def __init__(self, train: Source, test: Source, limit: int | None):
        self._sources, self._limit = (train, test), limit
        self.users = 1
        self._loaded_for: int | None = None
        self._embedded: tuple[Labeled, ...] = ()
        self._embedded_by: weakref.ref[Predictor] | None = None
        self._asked = 0

    def same_as(self, other: Features) -> bool:
        """Whether they are of the same records."""
        return (self._sources, self._limit) == (other._sources, other._limit)

    def load(self, predictor: Predictor) -> None:
        """Reads labels, and small splits' pictures, unless they are there."""
        if self._loaded_for == predictor.image_size:
            return
        self._data = tuple(
            load_eval(source, predictor.image_size, self._limit, predictor.resize)
            for source in self._sources
        )
        self._labels = _aligned(self._sources, self._data)
        self.classes = 1 + max(int(labels.max()) for labels in self._labels)
        self._loaded_for = predictor.image_size

    def embedded(self, predictor: Predictor) -> tuple[Labeled, ...]:
        """(of the training split, of the test split)."""
        if self._embedded_by is None or self._embedded_by() is not predictor:
            self._embedded = tuple(
                _labeled(predictor, data, labels)
                for data, labels in zip(self._data, self._labels, strict=True)
            )
            self._embedded_by, self._asked = weakref.ref(predictor), 0
        found = self._embedded
        self._asked += 1
        if self._asked == self.users:
            self._embedded, self._embedded_by = (), None
        return found


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
