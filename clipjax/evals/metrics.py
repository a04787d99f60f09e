"""Metric functions: arrays in, numbers out, nothing of models or data.

Two rules make every figure reproducible.

*Ties count against the model.* A rank is 1 + the number of wrong candidates that score as high as
the right one, less `TIE`. A collapsed model, whose candidates all tie, scores 0 and not 1. `TIE` is
several times what float32 rounding does to a score, so that pictures or captions that are the same
tie on every mesh and at every batch size.

*Scores are exact.* A tie is only a tie if equal embeddings give equal scores, and a floating-point
dot product does not promise that: its rounding depends on how the matrix product is cut up. So
embeddings are first rounded to multiples of 2^-26. The products are then multiples of 2^-52 and,
for vectors of norm at most 1, every partial sum stays below 2 (Cauchy-Schwarz): all of them fit the
53 bits of a float64, no addition ever rounds, and a score is the same number at any tile size, on
any machine. The rounding itself moves a score by about 1e-8, less than a float32 product would.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from clipjax.errors import ClipjaxError, RunFailed

TIE = 2.0**-20
"""Cosine similarities closer than this (about 1e-6) count as equal."""

_STEP = 2.0**-26


@dataclasses.dataclass(frozen=True)
class RetrievalRanks:
    """Ranks, from 1, of the right answers in both directions.

    Attributes:
      image_to_text: [n] int64, rank of the best of the image's own captions among all other images'
        captions (COCO's convention: a hit at k if any own caption is within the first k).
      text_to_image: [m] int64, rank of the caption's own image among all images.
    """

    image_to_text: np.ndarray
    text_to_image: np.ndarray


def retrieval_ranks(
    image: np.ndarray, text: np.ndarray, owner: np.ndarray, *, tile: int = 2048
) -> RetrievalRanks:
    """Ranks in both directions from one pass over the similarities, never held all at once.

    Args:
      image: [n, E] embeddings.
      text: [m, E] embeddings of captions, m >= n.
      owner: [m] int, the image that each caption belongs to; every image needs at least one.
      tile: rows and columns of a tile; memory is O(tile^2 + (n + m) E), the result does not depend
        on it.

    Raises:
      ClipjaxError: shapes disagree, an embedding is not finite, or an image has no caption.
    """
    owner = np.asarray(owner)
    _check_pair("image", image, "text", text)
    if owner.shape != text.shape[:1]:
        raise ClipjaxError(f"owner has shape {owner.shape}, but there are {len(text)} captions")
    without = np.setdiff1d(np.arange(len(image)), owner)
    if without.size or owner.min(initial=0) < 0 or owner.max(initial=0) >= len(image):
        raise ClipjaxError(
            f"retrieval needs a caption for each of {len(image)} images and an image for each "
            f"caption: {without.size} images have none (the first: {without[:1].tolist()})"
        )
    u, v = _fixed_point("image", image), _fixed_point("text", text)
    own = _own_scores(u, v, owner, tile)
    best = np.full(len(u), -np.inf)
    np.maximum.at(best, owner, own)

    best, own_to_beat = best - TIE, own - TIE

    # Candidates that reach the right answer, itself included; those of the image's own captions
    # that do are no competitors of its best one, and are taken off at the end.
    above_best = np.zeros(len(u), np.int64)
    above_own = np.zeros(len(v), np.int64)
    for rows in _tiles(len(u), tile):
        for cols in _tiles(len(v), tile):
            score = u[rows] @ v[cols].T
            above_best[rows] += (score >= best[rows, None]).sum(axis=1)
            above_own[cols] += (score >= own_to_beat[None, cols]).sum(axis=0)
    own_above = np.bincount(owner, weights=own >= best[owner], minlength=len(u)).astype(np.int64)
    return RetrievalRanks(image_to_text=above_best - own_above + 1, text_to_image=above_own)


def class_ranks(
    image: np.ndarray, classes: np.ndarray, label: np.ndarray, *, tile: int = 2048
) -> np.ndarray:
    """[n] int64: rank, from 1, of each image's true class among all classes.

    Args:
      image: [n, E] embeddings.
      classes: [C, E] embeddings.
      label: [n] int in [0, C).
      tile: rows and columns of a tile; the result does not depend on it.

    Raises:
      ClipjaxError: shapes disagree, an embedding is not finite, or a label is out of range.
    """
    label = np.asarray(label)
    _check_pair("image", image, "classes", classes)
    if label.shape != image.shape[:1]:
        raise ClipjaxError(f"label has shape {label.shape}, but there are {len(image)} images")
    if label.min(initial=0) < 0 or label.max(initial=0) >= len(classes):
        raise ClipjaxError(
            f"labels run from {label.min()} to {label.max()}, but there are {len(classes)} classes"
        )
    u, v = _fixed_point("image", image), _fixed_point("classes", classes)
    to_beat = _own_scores(v, u, label, tile) - TIE
    above = np.zeros(len(u), np.int64)
    for rows in _tiles(len(u), tile):
        for cols in _tiles(len(v), tile):
            above[rows] += (u[rows] @ v[cols].T >= to_beat[rows, None]).sum(axis=1)
    return above


def rank_of_best(query: np.ndarray, candidates: np.ndarray, right: np.ndarray) -> int:
    """The rank, from 1, of the best right candidate among the wrong ones, for a single query.

    Args:
      query: [E] embedding.
      candidates: [m, E] embeddings.
      right: [m] bool, at least one of them true.
    """
    score = (_fixed_point("query", query[None]) @ _fixed_point("candidates", candidates).T)[0]
    return 1 + int((score[~right] >= score[right].max() - TIE).sum())


def top_k(query: np.ndarray, candidates: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest candidates of each query, best first; equal scores in order of index.

    Args:
      query: [q, E] embeddings, few of them (the [q, m] scores are held at once).
      candidates: [m, E] embeddings.
      k: how many, cut down to m.

    Returns:
      (index [q, k] int64, score [q, k] float64: dot products).
    """
    _check_pair("query", query, "candidates", candidates)
    score = _fixed_point("query", query) @ _fixed_point("candidates", candidates).T
    index = np.argsort(-score, axis=1, kind="stable")[:, :k]
    picked = np.asarray(candidates, np.float64)[index]
    return index, np.einsum("qe,qke->qk", np.asarray(query, np.float64), picked)


def recall_at(ranks: np.ndarray, k: int) -> float:
    """Share of ranks within the first k: R@k, and top-k accuracy."""
    return float(np.mean(np.asarray(ranks) <= k))


def summarize_ranks(ranks: np.ndarray) -> dict[str, float]:
    """R@1, R@5, R@10, median rank and mean reciprocal rank of [n] ranks."""
    return {
        "R@1": recall_at(ranks, 1),
        "R@5": recall_at(ranks, 5),
        "R@10": recall_at(ranks, 10),
        "median_rank": float(np.median(ranks)),
        "mean_reciprocal_rank": float(np.mean(1.0 / np.asarray(ranks, np.float64))),
    }


def mean_per_class_accuracy(ranks: np.ndarray, label: np.ndarray) -> float:
    """Top-1 accuracy averaged within each class that occurs, then over those classes.

    Args:
      ranks: [n] rank of the true class.
      label: [n] int.
    """
    counts = np.bincount(label)
    hits = np.bincount(label, weights=np.asarray(ranks) == 1)
    return float(np.mean(hits[counts > 0] / counts[counts > 0]))


def recall_by_chance(k: int, candidates: int, right: int = 1) -> float:
    """R@k of a random order with `right` right answers among `candidates`.

    1 - C(candidates - right, k) / C(candidates, k), as a product so that nothing overflows.
    """
    k = min(k, candidates)
    if k > candidates - right:
        return 1.0
    drawn = np.arange(k)
    return float(1.0 - np.prod((candidates - right - drawn) / (candidates - drawn)))


def _check_pair(a_name: str, a: np.ndarray, b_name: str, b: np.ndarray) -> None:
    if np.ndim(a) != 2 or np.ndim(b) != 2 or a.shape[1] != b.shape[1] or not len(a) or not len(b):
        raise ClipjaxError(
            f"{a_name} {np.shape(a)} and {b_name} {np.shape(b)} must both be non-empty [n, E] "
            "embeddings of one width E"
        )


def _fixed_point(name: str, x: np.ndarray) -> np.ndarray:
    """[n, E] float64 multiples of 2^-26, norms at most about 1 (see the module's docstring)."""
    x = np.asarray(x, np.float64)
    finite = np.isfinite(x).all(axis=1)
    if not finite.all():
        raise RunFailed(
            f"{int((~finite).sum())} of {len(x)} {name} embeddings are not finite (the first is "
            f"number {int(np.argmin(finite))}): the model has diverged, or its input is broken"
        )
    # A common power of two: it shifts exponents, so it changes no order and makes no rounding.
    norm = np.sqrt((x * x).sum(axis=1).max())
    scale = 2.0 ** -np.ceil(np.log2(norm) - 1e-6) if norm > 0 else 1.0
    return np.round(x * (scale / _STEP)) * _STEP


def _own_scores(u: np.ndarray, v: np.ndarray, owner: np.ndarray, tile: int) -> np.ndarray:
    """[m]: the score of row `owner[j]` of u with row j of v."""
    own = np.empty(len(v))
    for cols in _tiles(len(v), tile):
        own[cols] = np.einsum("ne,ne->n", u[owner[cols]], v[cols])
    return own


def _tiles(size: int, tile: int) -> Iterator[slice]:
    for start in range(0, size, tile):
        yield slice(start, min(start + tile, size))
