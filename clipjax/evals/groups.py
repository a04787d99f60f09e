"""Figures by group: how a classifier fares with some pictures and with others."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from clipjax.data import EvalSet
from clipjax.errors import ClipjaxError
from clipjax.evals.figure import Figure

MOST = 1000
"""Groups that are reported at most: more are an identity, and no group."""


def by_group(
    ranks: np.ndarray, groups: Sequence[Any], ks: Sequence[int] = (1, 5)
) -> dict[str, float]:
    """Top-k within each group, of the worst of them, and of the best less the worst.

    Args:
      ranks: [n], of the true classes.
      groups: n values that texts or numbers say; a picture without one (None, "") has no part.
      ks: which top-k.

    Returns:
      `group/{value}/top1`, in the order of the values, `worst_group/top1`, `group_gap/top1`, ...

    Raises:
      ClipjaxError: no picture has a group, or nearly every one another.
    """
    texts = [_text(group) for group in groups]
    rows = np.array([i for i, text in enumerate(texts) if text], np.int64)
    names, index = np.unique([texts[i] for i in rows], return_inverse=True)
    if not len(names) or len(names) > MOST:
        raise ClipjaxError(
            f"{len(names)} groups: groups_key must name an entry that says what group a picture is of"
        )
    figures: dict[str, float] = {}
    for k in ks:
        hits = ranks[rows] <= k
        for i, name in enumerate(names.tolist()):
            figures[f"group/{name}/top{k}"] = Figure(hits[index == i])
        together = np.stack([hits, index], axis=1)
        figures[f"worst_group/top{k}"] = Figure(together, _worst)
        figures[f"group_gap/top{k}"] = Figure(together, _gap)
    return figures


def groups_of(data: EvalSet, key: str) -> list[Any]:
    """The group of each record: an entry, or with "npy[2]" a number of an array in one.

    Raises:
      ClipjaxError: there is no such entry, or no array in it.
    """
    match = re.fullmatch(r"(.+)\[(\d+)\]", key)
    if match is None:
        return data.entries(key)
    name, place = match[1], int(match[2])
    found = []
    for value in data.entries(name):
        if isinstance(value, bytes):
            try:
                value = np.load(io.BytesIO(value), allow_pickle=False)
            except (ValueError, EOFError, OSError) as error:
                raise ClipjaxError(
                    f"groups_key={key!r}: {name} is no .npy file ({error})"
                ) from error
        array = np.ravel(value)
        if place >= len(array):
            raise ClipjaxError(f"groups_key={key!r}: {name} has {len(array)} numbers")
        found.append(array[place].item())
    return found


def macro_f1(values: np.ndarray, weights: np.ndarray | None = None) -> float:
    """F1 of each class that occurs, averaged over classes.

    Args:
      values: int [n, 2], the predicted class and the true one.
      weights: [n], how often each counts.
    """
    predicted, label = values.T
    size = int(values.max()) + 1
    right = predicted == label
    weights = np.ones(len(label)) if weights is None else weights
    hits, true, taken = (
        np.bincount(x, weights=w, minlength=size)
        for x, w in ((label[right], weights[right]), (label, weights), (predicted, weights))
    )
    occurs = true > 0
    return float((2 * hits[occurs] / (true + taken)[occurs]).mean())


def _text(value: Any) -> str:
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    return "" if value is None else str(value).strip().replace("/", "_")


def _shares(values: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
    """The share of hits in each group that occurs, of [n, 2], a hit and its group."""
    counts = np.bincount(values[:, 1], weights=weights)
    hits = values[:, 0] if weights is None else values[:, 0] * weights
    return (np.bincount(values[:, 1], weights=hits) / np.maximum(counts, 1e-300))[counts > 0]


def _worst(values: np.ndarray, weights: np.ndarray | None) -> float:
    return float(_shares(values, weights).min())


def _gap(values: np.ndarray, weights: np.ndarray | None) -> float:
    found = _shares(values, weights)
    return float(found.max() - found.min())
