"""Few-shot classification: a linear classifier from n pictures a class."""

from __future__ import annotations

import dataclasses

import numpy as np
from jax.sharding import Mesh

from clipjax.errors import ClipjaxError
from clipjax.evals.features import FeatureEvaluator, Labeled, accuracies
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
            top1 = [each["top1"] for each in found]
            figures |= {
                f"{shots}_shot/top1": float(np.mean(top1)),
                f"{shots}_shot/top1_std": float(np.std(top1, ddof=1)) if len(top1) > 1 else 0.0,
                f"{shots}_shot/mean_per_class": float(
                    np.mean([each["mean_per_class"] for each in found])
                ),
            }
        return figures


def draw_shots(label: np.ndarray, shots: int, seed: int) -> np.ndarray:
    """Rows of `shots` examples of each class, all of a class that has fewer.

    With one seed, fewer shots are among the more.
    """
    rng = np.random.default_rng(seed)
    drawn = [rng.permutation(np.flatnonzero(label == c))[:shots] for c in np.unique(label)]
    return np.concatenate(drawn)
