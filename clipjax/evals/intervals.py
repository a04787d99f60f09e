"""How far figures can be trusted: bootstrap intervals, and differences between models on the same examples."""

from __future__ import annotations

import dataclasses

import numpy as np

from clipjax.errors import ClipjaxError

_BLOCK = 2**24  # drawn indices at a time


@dataclasses.dataclass(frozen=True)
class Difference:
    """What one model scores more than another on the same examples.

    Attributes:
      mean: of the differences.
      low, high: of the 95 % interval.
      p: two-sided, that there is no difference: twice the share of resamples on the other side of 0.
    """

    mean: float
    low: float
    high: float
    p: float


def interval(values: np.ndarray, resamples: int, seed: int = 0) -> tuple[float, float]:
    """(low, high) of the 95 % percentile bootstrap interval of the mean of [n] values."""
    means = _means(np.asarray(values, np.float64), resamples, seed)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def difference(first: np.ndarray, second: np.ndarray, resamples: int, seed: int = 0) -> Difference:
    """How much more the second model scores than the first, example by example.

    The examples are drawn in pairs, so that what is hard for both counts for neither.

    Args:
      first: [n] values, of one model.
      second: [n] values of the same examples, of the other.
      resamples: how often they are drawn anew.
      seed: of the draws.

    Raises:
      ClipjaxError: they are not of the same examples.
    """
    if np.shape(first) != np.shape(second):
        raise ClipjaxError(
            f"{len(first)} and {len(second)} examples are not the same ones: only models that were "
            "evaluated on the same pictures compare"
        )
    change = np.asarray(second, np.float64) - np.asarray(first, np.float64)
    means = _means(change, resamples, seed)
    low, high = np.quantile(means, [0.025, 0.975])
    beyond = min((means <= 0).mean(), (means >= 0).mean())
    p = min(1.0, max(2 * beyond, 2 / resamples))
    return Difference(float(change.mean()), float(low), float(high), float(p))


def _means(values: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """[resamples] means of n values drawn from n with replacement."""
    if resamples < 1:
        raise ClipjaxError(f"resamples={resamples} must be at least 1")
    rng = np.random.default_rng(seed)
    n = len(values)
    rows = max(1, _BLOCK // n)
    blocks = [min(rows, resamples - start) for start in range(0, resamples, rows)]
    return np.concatenate([values[rng.integers(0, n, (k, n))].mean(axis=1) for k in blocks])
