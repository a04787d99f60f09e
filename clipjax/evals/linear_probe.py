"""Linear probe: how well a linear classifier on frozen features does."""

from __future__ import annotations

import dataclasses

import numpy as np
from jax.sharding import Mesh

from clipjax.errors import ClipjaxError
from clipjax.evals.calibration import cross_entropy
from clipjax.evals.features import FeatureEvaluator, Labeled, accuracies
from clipjax.evals.logistic import ROUGH, Classifier, Examples, fit

COARSE = (-2.0, 0.0, 2.0, 4.0, 6.0)
"""Powers of ten of C that are tried first; then half as far apart around the best, twice."""

ALL_FOLDS = 50_000
"""Training examples up to which C is cross-validated; beyond, one held-out part says enough."""

MAX_DEALINGS = 4
"""How often a split is parted anew at most."""

JUDGEMENTS = 5_000
"""Examples that C is judged on, where so many are to be had: a smaller split is parted anew, up to
`MAX_DEALINGS` times, for the choice to hang less on how it was parted."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearProbe(FeatureEvaluator):
    """Multinomial logistic regression on the image embeddings, as in CLIP (arXiv:2103.00020, A.3).

    Fitted by L-BFGS on the devices. The strength of its penalty is the one that does best on parts
    of the training split that are held out in turn (on one of them where the split has more than
    50,000 examples, and over several partings where it has fewer than 2,500); with it the fit is
    made again on all of the split. Figures: `{name}/top1`,
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
            dealings = _judges(train.y, self.folds, self.seed)
            power, start = choose_c(examples, train, dealings, classes)
        else:
            power, start = self.log10_c, None
        classifier = fit(examples, classes, 10.0**power, start=start)
        return accuracies(classifier(test.x), test.y) | {"log10_C": power}


def choose_c(
    examples: Examples, train: Labeled, dealings: list[list[np.ndarray]], classes: int
) -> tuple[float, Classifier]:
    """(log10 C, a fit at it): C does best on the held-out parts, fitted on what is left.

    The first dealing alone finds the neighborhood; all of them choose in it. Of equal accuracies
    the smaller cross-entropy counts.

    Args:
      examples: `train` on the devices.
      train: the same on the host.
      dealings: ways to part `train`; each is its held-out parts, bool [n].
      classes: how many.
    """
    fits: dict[tuple[int, float], list[Classifier]] = {}
    merits: dict[tuple[int, float], np.ndarray] = {}

    def attempt(dealing: int, power: float) -> None:
        judges = dealings[dealing]
        below = [p for d, p in fits if d == dealing and p < power]
        starts: list[Classifier | None] = [None] * len(judges)
        starts = list(fits[dealing, max(below)]) if below else starts
        found = [
            fit(examples, classes, 10.0**power, used=~judge, start=start, ending=ROUGH)
            for judge, start in zip(judges, starts, strict=True)
        ]
        fits[dealing, power] = found
        merits[dealing, power] = np.mean(
            [_merit(c(train.x[j]), train.y[j]) for j, c in zip(judges, found, strict=True)], axis=0
        )

    def best(powers: tuple[float, ...], count: int) -> float:
        for dealing in range(count):
            for power in powers:
                if (dealing, power) not in merits:
                    attempt(dealing, power)
        tried = {p for d, p in merits if d == count - 1}
        return max(tried, key=lambda p: tuple(np.sum([merits[d, p] for d in range(count)], axis=0)))

    power = best(COARSE, 1)
    step = COARSE[1] - COARSE[0]
    for _ in range(2):
        step /= 2
        power = best((power - step, power, power + step), len(dealings))
    return power, fits[0, power][0]


def _judges(label: np.ndarray, folds: int, seed: int) -> list[list[np.ndarray]]:
    """The held-out parts, bool [n], of each dealing."""
    count = max(1, min(MAX_DEALINGS, JUDGEMENTS // max(1, len(label))))
    held_out = range(folds if len(label) <= ALL_FOLDS else 1)
    dealt = [deal_folds(label, folds, seed + i) for i in range(count)]
    return [[fold == j for j in held_out] for fold in dealt]


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
    """The share that is right; minus the mean cross-entropy."""
    return float((logits.argmax(axis=1) == label).mean()), -cross_entropy(logits, label)
