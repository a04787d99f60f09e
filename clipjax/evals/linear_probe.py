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

ALL_FOLDS = 50_000
"""Training examples up to which C is cross-validated; beyond, one held-out part says enough."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearProbe(FeatureEvaluator):
    """Multinomial logistic regression on the image embeddings, as in CLIP (arXiv:2103.00020, A.3).

    Fitted by L-BFGS on the devices. The strength of its penalty is the one that does best on parts
    of the training split that are held out in turn (on one of them where the split has more than
    50,000 examples); with it the fit is made again on all of the split. Figures: `{name}/top1`,
    `{name}/top5`, `{name}/mean_per_class`, and `{name}/log10_C`, C being what scikit-learn calls it.
    """

    name: str = "linear_probe"
    """First part of the figures' names."""
    folds: int = 5
    """Parts of the training split of which each is held out to choose C on."""
    log10_c: float | None = None
    """Fix C at this power of ten instead of choosing it."""
    seed: int = 0
    """How the training split is parted."""

    def __post_init__(self):
        super().__post_init__()
        if self.folds < 2:
            raise ClipjaxError(f"{self.name}: folds={self.folds} must be at least 2")

    def measure(
        self, train: Labeled, test: Labeled, classes: int, mesh: Mesh | None
    ) -> dict[str, float]:
        examples = Examples.place(train.x, train.y, mesh)
        if self.log10_c is None:
            fold = deal_folds(train.y, self.folds, self.seed)
            judges = range(self.folds if len(fold) <= ALL_FOLDS else 1)
            power, start = choose_c(examples, train, [fold == j for j in judges], classes)
        else:
            power, start = self.log10_c, None
        classifier = fit(examples, classes, 10.0**power, start=start)
        return accuracies(classifier(test.x), test.y) | {"log10_C": power}


def choose_c(
    examples: Examples, train: Labeled, judges: list[np.ndarray], classes: int
) -> tuple[float, Classifier]:
    """(log10 C, a fit at it): C does best on the held-out parts, fitted on what is left.

    Of equal accuracies the smaller cross-entropy counts.

    Args:
      examples: `train` on the devices.
      train: the same on the host.
      judges: the held-out parts, each bool [n].
      classes: how many.
    """
    fits: dict[float, list[Classifier]] = {}
    merits: dict[float, tuple[float, float]] = {}

    def attempt(power: float) -> None:
        below = [p for p in fits if p < power]
        starts: list[Classifier | None] = [None] * len(judges)
        starts = list(fits[max(below)]) if below else starts
        fits[power] = [
            fit(examples, classes, 10.0**power, used=~judge, start=start)
            for judge, start in zip(judges, starts, strict=True)
        ]
        found = [
            _merit(classifier(train.x[judge]), train.y[judge])
            for judge, classifier in zip(judges, fits[power], strict=True)
        ]
        size = sum(judge.sum() for judge in judges)
        merits[power] = (sum(m[0] for m in found) / size, sum(m[1] for m in found) / size)

    for power in COARSE:
        attempt(power)
    step = COARSE[1] - COARSE[0]
    for _ in range(2):
        step /= 2
        best = max(merits, key=merits.__getitem__)
        for power in (best - step, best + step):
            if power not in merits:
                attempt(power)
    best = max(merits, key=merits.__getitem__)
    return best, fits[best][0]


def deal_folds(label: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """[n] int in [0, folds): parts that have about the same share of every class."""
    if len(label) < folds:
        raise ClipjaxError(
            f"{len(label)} training examples are too few to part in {folds}: fix log10_c"
        )
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(len(label))
    by_class = shuffled[np.argsort(label[shuffled], kind="stable")]
    fold = np.empty(len(label), np.int64)
    fold[by_class] = np.arange(len(label)) % folds
    return fold


def _merit(logits: np.ndarray, label: np.ndarray) -> tuple[float, float]:
    """How many are right; minus the summed cross-entropy."""
    right = int((logits.argmax(axis=1) == label).sum())
    return right, -len(label) * cross_entropy(logits, label)
