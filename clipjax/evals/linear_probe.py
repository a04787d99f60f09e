"""Linear probe: how well a linear classifier on frozen features does."""

from __future__ import annotations

import dataclasses

import numpy as np
from jax.sharding import Mesh

from clipjax.errors import ClipjaxError
from clipjax.evals.calibration import cross_entropy
from clipjax.evals.features import FeatureEvaluator, Labeled, accuracies
from clipjax.evals.logistic import Classifier, Examples, fit

COARSE = (-2.0, 0.0, 2.0, 4.0, 6.0)
"""Powers of ten of C that are tried first; then half as far apart around the best, twice."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearProbe(FeatureEvaluator):
    """Multinomial logistic regression on the image embeddings, as in CLIP (arXiv:2103.00020, A.3).

    Fitted by L-BFGS on the devices. The strength of its penalty is the one that does best on a part
    of the training split that is held out; with it the fit is made again on all of the split.
    Figures: `{name}/top1`, `{name}/top5`, `{name}/mean_per_class`, and `{name}/log10_C`, C being
    what scikit-learn calls it.
    """

    name: str = "linear_probe"
    """First part of the figures' names."""
    held_out: float = 0.2
    """Share of the training split on which C is chosen."""
    log10_c: float | None = None
    """Fix C at this power of ten instead of choosing it."""
    seed: int = 0
    """Which part is held out."""

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.held_out < 1:
            raise ClipjaxError(f"{self.name}: held_out={self.held_out} must be between 0 and 1")

    def measure(
        self, train: Labeled, test: Labeled, classes: int, mesh: Mesh | None
    ) -> dict[str, float]:
        examples = Examples.place(train.x, train.y, mesh)
        power, start = (
            (self.log10_c, None)
            if self.log10_c is not None
            else choose_c(examples, train, held_out(train.y, self.held_out, self.seed), classes)
        )
        classifier = fit(examples, classes, 10.0**power, start=start)
        return accuracies(classifier(test.x), test.y) | {"log10_C": power}


def choose_c(
    examples: Examples, train: Labeled, judge: np.ndarray, classes: int
) -> tuple[float, Classifier]:
    """(log10 C, the fit at it): C does best on the examples `judge`, fitted on the others.

    Of equal accuracies the smaller cross-entropy counts.

    Args:
      examples: `train` on the devices.
      train: the same on the host.
      judge: bool [n].
      classes: how many.
    """
    fits: dict[float, Classifier] = {}
    merits: dict[float, tuple[float, float]] = {}

    def attempt(power: float) -> None:
        below = [p for p in fits if p < power]
        start = fits[max(below)] if below else None
        fits[power] = fit(examples, classes, 10.0**power, used=~judge, start=start)
        merits[power] = _merit(fits[power](train.x[judge]), train.y[judge])

    for power in COARSE:
        attempt(power)
    step = COARSE[1] - COARSE[0]
    for _ in range(2):
        step /= 2
        best = max(merits, key=merits.__getitem__)
        for power in (best - step, best + step):
            attempt(power)
    best = max(merits, key=merits.__getitem__)
    return best, fits[best]


def held_out(label: np.ndarray, share: float, seed: int) -> np.ndarray:
    """bool [n]: the same share of every class, at least one of it, unless it has but one."""
    chosen = np.zeros(len(label), bool)
    rng = np.random.default_rng(seed)
    for rows in _by_class(label):
        count = min(max(1, round(share * len(rows))), len(rows) - 1)
        chosen[rng.permutation(rows)[:count]] = True
    if not chosen.any():
        raise ClipjaxError(
            f"the training split has {len(label)} examples, one a class: too few to choose C on; "
            "set log10_c"
        )
    return chosen


def _by_class(label: np.ndarray) -> list[np.ndarray]:
    return [np.flatnonzero(label == c) for c in np.unique(label)]


def _merit(logits: np.ndarray, label: np.ndarray) -> tuple[float, float]:
    """Accuracy, then how small the cross-entropy is."""
    return float((logits.argmax(axis=1) == label).mean()), -cross_entropy(logits, label)
