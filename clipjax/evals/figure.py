"""Figure: a number that knows the examples it was worked out from, so that it can be again from others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

By = Callable[[Any, "np.ndarray | None"], float]
"""(values [n, ...], weights [n] or None) -> the number; a weight says how often an example counts."""


def mean(values: np.ndarray, weights: np.ndarray | None = None) -> float:
    """The mean of [n] values."""
    return float(np.average(values, weights=weights))


def median(values: np.ndarray, weights: np.ndarray | None = None) -> float:
    """The median of [n] values, as NumPy has it: of an even number of them the mean of the middle two."""
    if weights is None:
        return float(np.median(values))
    order = np.argsort(values, kind="stable")
    reached = np.cumsum(weights[order])
    below, above = (reached[-1] - 1) // 2, reached[-1] // 2  # whole numbers of examples
    places = np.searchsorted(reached, [below, above], side="right")
    return float(np.asarray(values)[order[places]].mean())


def mean_by_class(values: np.ndarray, weights: np.ndarray | None = None) -> float:
    """The mean of values within each class that occurs, then over those classes.

    Args:
      values: [n, 2], a value and its class.
      weights: [n].
    """
    label = values[:, 1].astype(np.int64)
    counts = np.bincount(label, weights=weights)
    sums = np.bincount(label, weights=values[:, 0] if weights is None else values[:, 0] * weights)
    return float(np.mean(sums[counts > 0] / counts[counts > 0]))


class Figure(float):
    """A number with what it was worked out from; to everyone else a float.

    Attributes:
      values: [n, ...], of each example.
      by: what makes the number of them.
    """

    values: Any
    by: By

    def __new__(cls, values: Any, by: By = mean) -> Figure:
        made = super().__new__(cls, by(values, None))
        made.values, made.by = values, by
        return made

    def again(self, weights: np.ndarray) -> float:
        """The number if each example counted as often as `weights` [n] says."""
        return float(self.by(self.values, weights))
