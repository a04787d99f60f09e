"""Metric functions: arrays in, numbers out, nothing of models or data.

Two rules make every figure reproducible.

*Ties count against the model*, unless `ties="first"` is asked for. A rank is 1 + the number of wrong
candidates that score as high as the right one, less `TIE`. A collapsed model, whose candidates all
tie, scores 0 and not 1. `TIE` is several times what float32 rounding does to a score, so that
pictures or captions that are the same tie on every mesh and at every batch size. With "first",
candidates of exactly equal score rank in order of index, as an argmax or a stable sort has them: how
most published figures were taken.

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
from typing import Literal

import numpy as np

from clipjax.errors import ClipjaxError, RunFailed

TIE = 2.0**-20
"""Cosine similarities closer than this (about 1e-6) count as equal."""

_STEP = 2.0**-26

Ties = Literal["against", "first"]


def require_ties(ties: str) -> None:
    """Refuses a name of no rule for ties."""
    if ties not in ("against", "first"):
        raise ClipjaxError(f"ties={ties!r}: choose 'against' or 'first'")


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
    image: np.ndarray,
    text: np.ndarray,
    owner: np.ndarray,
    *,
    tile: int = 2048,
    ties: Ties = "against",
) -> RetrievalRanks:
    """Ranks in both directions from one pass over the similarities, never held all at once.

    Args:
      image: [n, E] embeddings.
      text: [m, E] embeddings of captions, m >= n.
      owner: [m] int, the image that each caption belongs to; every image needs at least one.
      tile: rows and columns of a tile; the result does not depend on it. Besides its arguments this
        holds a few tiles of float64, about 3 tile^2 + 2 tile E numbers (150 MB at most by default
        for E = 1024), and 4 numbers a row.
      ties: what equal scores count as (see the module's docstring).

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
    u, v = _FixedPoint("image", image), _FixedPoint("text", text)
    own = _own_scores(u, v, owner, tile)
    best = np.full(len(u), -np.inf)
    np.maximum.at(best, owner, own)

    if ties == "first":
        return _ranks_in_order(u, v, owner, own, best, tile)
    best, own_to_beat = best - TIE, own - TIE

    # Candidates that reach the right answer, itself included; those of the image's own captions
    # that do are no competitors of its best one, and are taken off at the end.
    above_best = np.zeros(len(u), np.int64)
    above_own = np.zeros(len(v), np.int64)
    for rows in _tiles(len(u), tile):
        fixed = u[rows]
        for cols in _tiles(len(v), tile):
            score = fixed @ v[cols].T
            above_best[rows] += (score >= best[rows, None]).sum(axis=1)
            above_own[cols] += (score >= own_to_beat[None, cols]).sum(axis=0)
    own_above = np.bincount(owner, weights=own >= best[owner], minlength=len(u)).astype(np.int64)
    return RetrievalRanks(image_to_text=above_best - own_above + 1, text_to_image=above_own)


def _ranks_in_order(
    u: _FixedPoint, v: _FixedPoint, owner: np.ndarray, own: np.ndarray, best: np.ndarray, tile: int
) -> RetrievalRanks:
    """`retrieval_ranks` where equal scores rank in order of index."""
    # Of the image's own captions that score best, the first.
    first = np.full(len(u), len(v))
    at_best = np.flatnonzero(own == best[owner])
    np.minimum.at(first, owner[at_best], at_best)
    by_image, by_text = np.ones(len(u), np.int64), np.ones(len(v), np.int64)
    for rows in _tiles(len(u), tile):
        fixed, i = u[rows], np.arange(rows.start, rows.stop)
        for cols in _tiles(len(v), tile):
            score, j = fixed @ v[cols].T, np.arange(cols.start, cols.stop)
            before = j[None] < first[rows, None]
            by_image[rows] += _ahead(score, best[rows, None], before).sum(axis=1)
            before = i[:, None] < owner[None, cols]
            by_text[cols] += _ahead(score, own[None, cols], before).sum(axis=0)
    return RetrievalRanks(image_to_text=by_image, text_to_image=by_text)


def _ahead(score: np.ndarray, right: np.ndarray, before: np.ndarray) -> np.ndarray:
    """Which candidates come ahead of the right one: a higher score, or an equal one further ahead."""
    return (score > right) | ((score == right) & before)


def classified(
    image: np.ndarray,
    classes: np.ndarray,
    label: np.ndarray,
    *,
    group: np.ndarray | None = None,
    tile: int = 2048,
    ties: Ties = "against",
) -> tuple[np.ndarray, np.ndarray]:
    """The rank of each image's true class, and the class it is taken for, of one pass over the scores.

    Args:
      image: [n, E] embeddings.
      classes: [C, E] embeddings.
      label: [n] int in [0, C), or in [0, G) with groups.
      group: [C] int in [0, G): several rows of `classes` stand for one class, which scores as its
        best row does; every group needs at least one.
      tile: images at a time, [tile, C] scores; the result does not depend on it.
      ties: what equal scores count as (see the module's docstring).

    Returns:
      ([n] int64 ranks, from 1; [n] int64 classes: the true one only where its rank is 1).

    Raises:
      ClipjaxError: shapes disagree, an embedding is not finite, or a label is out of range.
    """
    label = np.asarray(label)
    ranks, predicted = np.empty(len(image), np.int64), np.empty(len(image), np.int64)
    for rows, score, own in _class_scores(image, classes, label, group, tile):
        if ties == "first":
            before = np.arange(score.shape[1])[None] < label[rows, None]
            ranks[rows] = 1 + _ahead(score, own[:, None], before).sum(axis=1)
            predicted[rows] = score.argmax(axis=1)
            continue
        ranks[rows] = (score >= own[:, None] - TIE).sum(axis=1)
        wrong = score
        wrong[np.arange(len(score)), label[rows]] = -np.inf
        best = wrong.argmax(axis=1)
        lost = wrong[np.arange(len(score)), best] >= own - TIE
        predicted[rows] = np.where(lost, best, label[rows])
    return ranks, predicted


def class_scores(
    image: np.ndarray, classes: np.ndarray, *, group: np.ndarray | None = None, tile: int = 2048
) -> np.ndarray:
    """[n, C] float64 scores of every image with every class ([n, G] with groups), all held at once.

    Arguments and errors as in `classified`.
    """
    anything = np.zeros(len(image), np.int64)
    tiles = _class_scores(image, classes, anything, group, tile)
    return np.concatenate([score for _, score, _ in tiles])


def confusion_matrix(predicted: np.ndarray, label: np.ndarray, classes: int) -> np.ndarray:
    """int64 [C, C]: how many images of a class (row) were taken for a class (column)."""
    index = np.asarray(label, np.int64) * classes + np.asarray(predicted, np.int64)
    return np.bincount(index, minlength=classes * classes).reshape(classes, classes)


def rank_of_best(query: np.ndarray, candidates: np.ndarray, right: np.ndarray) -> int:
    """The rank, from 1, of the best right candidate among the wrong ones, for a single query.

    Args:
      query: [E] embedding.
      candidates: [m, E] embeddings.
      right: [m] bool, at least one of them true.
    """
    score = _all_scores(query[None], candidates)[0]
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
    score = _all_scores(query, candidates)
    index = np.argsort(-score, axis=1, kind="stable")[:, :k]
    picked = np.asarray(candidates)[index].astype(np.float64)
    return index, np.einsum("qe,qke->qk", np.asarray(query, np.float64), picked)


def pair_scores(a: np.ndarray, b: np.ndarray, *, tile: int = 8192) -> np.ndarray:
    """[n] float64: the exact score of each row of a [n, E] with the same row of b [n, E]."""
    _check_pair("a", a, "b", b)
    return _own_scores(_FixedPoint("a", a), _FixedPoint("b", b), np.arange(len(b)), tile)


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


class _FixedPoint:
    """Embeddings in multiples of 2^-26 (see the module's docstring), made where they are used.

    `fixed[rows]` is float64 [k, E], norms at most about 1. The embeddings themselves stay as they
    are, in float32: a million of them need no second copy.
    """

    def __init__(self, name: str, x: np.ndarray):
        self._x = np.asarray(x)
        largest, broken, first = 0.0, 0, None
        for rows in _tiles(len(self._x), 8192):
            block = np.asarray(self._x[rows], np.float64)
            finite = np.isfinite(block).all(axis=1)
            if not finite.all():
                broken += int((~finite).sum())
                first = rows.start + int(np.argmin(finite)) if first is None else first
            largest = max(largest, float((block[finite] ** 2).sum(axis=1).max(initial=0.0)))
        if broken:
            raise RunFailed(
                f"{broken} of {len(self._x)} {name} embeddings are not finite (the first is "
                f"number {first}): the model has diverged, or its input is broken"
            )
        # A common power of two: it shifts exponents, so it changes no order and makes no rounding.
        norm = np.sqrt(largest)
        self._scale = 2.0 ** -np.ceil(np.log2(norm) - 1e-6) if norm > 0 else 1.0

    def __len__(self) -> int:
        return len(self._x)

    def __getitem__(self, rows) -> np.ndarray:
        x = np.asarray(self._x[rows], np.float64)
        return np.round(x * (self._scale / _STEP)) * _STEP


def _all_scores(query: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """[q, m] exact scores."""
    u, v = _FixedPoint("query", query)[:], _FixedPoint("candidates", candidates)
    return np.concatenate([u @ v[cols].T for cols in _tiles(len(v), 8192)], axis=1)


def _own_scores(u: _FixedPoint, v: _FixedPoint, owner: np.ndarray, tile: int) -> np.ndarray:
    """[m]: the score of row `owner[j]` of u with row j of v."""
    own = np.empty(len(v))
    for cols in _tiles(len(v), tile):
        own[cols] = np.einsum("ne,ne->n", u[owner[cols]], v[cols])
    return own


def _class_scores(
    image: np.ndarray, classes: np.ndarray, label: np.ndarray, group: np.ndarray | None, tile: int
) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """(rows, their scores [t, G], the scores of their own classes [t]), tile by tile."""
    label = np.asarray(label)
    _check_pair("image", image, "classes", classes)
    if label.shape != image.shape[:1]:
        raise ClipjaxError(f"label has shape {label.shape}, but there are {len(image)} images")
    group = np.arange(len(classes)) if group is None else np.asarray(group)
    order = np.argsort(group, kind="stable")
    present, starts = np.unique(group[order], return_index=True)
    if not np.array_equal(present, np.arange(len(present))) or len(group) != len(classes):
        raise ClipjaxError(f"group must number {len(classes)} rows from 0, leaving none out")
    if label.min(initial=0) < 0 or label.max(initial=0) >= len(present):
        raise ClipjaxError(
            f"labels run from {label.min()} to {label.max()}, but there are {len(present)} classes"
        )
    u, v = _FixedPoint("image", image), _FixedPoint("classes", classes)[order]
    for rows in _tiles(len(u), tile):
        score = u[rows] @ v.T
        if len(present) < len(group):
            score = np.maximum.reduceat(score, starts, axis=1)
        yield rows, score, score[np.arange(len(score)), label[rows]]


def _tiles(size: int, tile: int) -> Iterator[slice]:
    for start in range(0, size, tile):
        yield slice(start, min(start + tile, size))
