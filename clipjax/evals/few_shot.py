"""Few-shot classification: a linear classifier from n pictures a class."""

from __future__ import annotations

import dataclasses

import numpy as np
from jax.sharding import Mesh

from clipjax.errors import ClipjaxError
from clipjax.evals.features import FeatureEvaluator, Labeled, accuracies
from clipjax.evals.figure import Figure, mean_by_class
from clipjax.evals.logistic import ROUGH, Examples, fit


@dataclasses.dataclass(frozen=True, kw_only=True)
class FewShot(FeatureEvaluator):
    """Logistic regression on the image embeddings of a few pictures of each class.

    Figures for each number of shots n, over several draws of the pictures: `{name}/{n}_shot/top1`,
    its standard deviation over the draws `{name}/{n}_shot/top1_std`, and
    `{name}/{n}_shot/mean_per_class`. A class with fewer than n pictures gives all it has.
    """

    name: str = "few_shot"
    """First part of the figures' names."""
    shots: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Pictures of each class to learn from."""
    draws: int = 5
    """How often they are drawn."""
    log10_c: float = 2.0
    """Power of ten of scikit-learn's C. Too few pictures are left to choose it on."""
    seed: int = 0
    """Of the first draw; the others follow."""

    def __post_init__(self):
        super().__post_init__()
        if not self.shots or min(self.shots) < 1:
            raise ClipjaxError(f"{self.name}: shots={self.shots}: give numbers from 1")
        if self.draws < 1:
            raise ClipjaxError(f"{self.name}: draws={self.draws} must be at least 1")

    def measure(
        self, train: Labeled, test: Labeled, classes: int, mesh: Mesh | None
    ) -> dict[str, float]:
        figures: dict[str, float] = {}
        rows = max(self.shots) * classes  # one shape for all of them: compiled once
        for shots in self.shots:
            found = []
            for draw in range(self.draws):
                chosen = draw_shots(train.y, shots, self.seed + draw)
                examples = Examples.place(train.x[chosen], train.y[chosen], mesh, rows)
                classifier = fit(examples, classes, 10.0**self.log10_c, ending=ROUGH)
                found.append(accuracies(classifier(test.x), test.y))
            hits = np.stack([each["top1"].values for each in found], axis=1)
            classed = np.concatenate([hits, test.y[:, None]], axis=1)
            figures |= {
                f"{shots}_shot/top1": Figure(hits, _mean_of_draws),
                f"{shots}_shot/top1_std": Figure(hits, _spread_of_draws),
                f"{shots}_shot/mean_per_class": Figure(classed, _mean_by_class),
            }
        return figures


def _by_draw(hits: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
    return np.average(hits, axis=0, weights=weights)


def _mean_of_draws(hits: np.ndarray, weights: np.ndarray | None) -> float:
    """The mean accuracy of [n, draws]."""
    return float(_by_draw(hits, weights).mean())


def _spread_of_draws(hits: np.ndarray, weights: np.ndarray | None) -> float:
    """The standard deviation of the draws' accuracies, 0 for a single draw."""
    return float(np.std(_by_draw(hits, weights), ddof=1)) if hits.shape[1] > 1 else 0.0


def _mean_by_class(classed: np.ndarray, weights: np.ndarray | None) -> float:
    """The mean over draws of `mean_by_class`, of [n, draws + 1], the class last."""
    draws = range(classed.shape[1] - 1)
    return float(np.mean([mean_by_class(classed[:, [i, -1]], weights) for i in draws]))


def draw_shots(label: np.ndarray, shots: int, seed: int) -> np.ndarray:
    """Rows of `shots` examples of each class, all of a class that has fewer.

    With one seed, fewer shots are among the more.
    """
    rng = np.random.default_rng(seed)
    drawn = [rng.permutation(np.flatnonzero(label == c))[:shots] for c in np.unique(label)]
    return np.concatenate(drawn)
