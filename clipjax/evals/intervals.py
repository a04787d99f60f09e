"""How far figures can be trusted: bootstrap intervals, and differences between models on the same examples."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import numpy as np

from clipjax.errors import ClipjaxError
from clipjax.evals.figure import Figure, mean


@dataclasses.dataclass(frozen=True)
class Difference:
    """What one model scores more than another on the same examples.

    Attributes:
      value: the difference.
      low, high: of the 95 % interval.
      p: two-sided, that there is no difference: twice the share of resamples on the other side of 0.
      mcnemar: the p of McNemar's exact test, for shares of what is right or wrong; else None.
    """

    value: float
    low: float
    high: float
    p: float
    mcnemar: float | None = None


def intervals(
    figures: Mapping[str, float], resamples: int, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """By figure, (low, high) of its 95 % percentile bootstrap interval.

    Figures that are no `Figure` are left out: nothing is known of their examples.
    """
    known = {name: each for name, each in figures.items() if isinstance(each, Figure)}
    return {name: _middle(drawn) for name, drawn in _again(known, resamples, seed).items()}


def differences(
    first: Mapping[str, float], second: Mapping[str, float], resamples: int, seed: int = 0
) -> dict[str, Difference]:
    """How much more the second model scores than the first, by the figures that both have.

    The examples are drawn in pairs, so that what is hard for both counts for neither.

    Args:
      first: figures of one model.
      second: figures of the other, on the same examples.
      resamples: how often they are drawn anew.
      seed: of the draws.

    Raises:
      ClipjaxError: they are not of the same examples.
    """
    names = [
        name
        for name, each in first.items()
        if isinstance(each, Figure) and isinstance(second.get(name), Figure)
    ]
    for name in names:
        sizes = [len(each[name].values) for each in (first, second)]  # type: ignore[attr-defined]
        if sizes[0] != sizes[1]:
            raise ClipjaxError(
                f"{name}: {sizes[0]} and {sizes[1]} examples are not the same ones: only models that "
                "were evaluated on the same pictures compare"
            )
    a, b = ({name: each[name] for name in names} for each in (first, second))
    drawn = zip(
        _again(a, resamples, seed).items(), _again(b, resamples, seed).values(), strict=True
    )
    found = {}
    for (name, of_first), of_second in drawn:
        change = of_second - of_first
        beyond = min((change <= 0).mean(), (change >= 0).mean())
        p = min(1.0, max(2 * beyond, 2 / resamples))
        low, high = _middle(change)
        exact = mcnemar(a[name], b[name])  # type: ignore[arg-type]
        found[name] = Difference(float(b[name] - a[name]), low, high, float(p), exact)
    return found


def mcnemar(first: Figure, second: Figure) -> float | None:
    """The two-sided p of McNemar's exact test, that as many examples are gained as lost.

    None for figures that are not the share of the examples that are right.
    """
    from scipy.stats import binomtest

    a, b = np.asarray(first.values), np.asarray(second.values)
    for each, values in ((first, a), (second, b)):
        if each.by is not mean or values.ndim != 1 or not np.isin(values, (0, 1)).all():
            return None
    gained, lost = int((b > a).sum()), int((a > b).sum())
    return 1.0 if gained + lost == 0 else float(binomtest(gained, gained + lost, 0.5).pvalue)


def _again(figures: Mapping[str, float], resamples: int, seed: int) -> dict[str, np.ndarray]:
    """By figure, [resamples] values of it; figures of as many examples are drawn together."""
    if resamples < 1:
        raise ClipjaxError(f"resamples={resamples} must be at least 1")
    by_size: dict[int, dict[str, Figure]] = {}
    for name, each in figures.items():
        assert isinstance(each, Figure)
        by_size.setdefault(len(each.values), {})[name] = each
    found = {name: np.empty(resamples) for name in figures}
    for size, group in by_size.items():
        for i, weights in enumerate(_draws(size, resamples, seed)):
            for name, each in group.items():
                found[name][i] = each.again(weights)
    return found


def _draws(size: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each of `size` examples is drawn, `size` times with replacement, for each resample."""
    rng = np.random.default_rng(seed)
    for _ in range(resamples):
        yield np.bincount(rng.integers(0, size, size), minlength=size).astype(np.float64)


def _middle(drawn: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(low), float(high)
