"""Near-duplicates among vectors, and vectors near those of an evaluation set; what is left is a list of keys.

Rows are taken in order: one that is as near as `threshold` (cosine) to an earlier row that was kept, or to any
row of the other set, is left out. Exactly so on JAX's devices, in blocks; with faiss the neighbors of each row are
looked for in a few cells of the space alone, which finds most of them in a small part of the time.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from clipjax.errors import ClipjaxError

BLOCK = 4096
"""Rows compared with as many at a time."""
PER_CELL = 2000
"""Rows of a cell of the space, about, in which faiss looks for neighbors."""


class Near(NamedTuple):
    """A row that is left out.

    Attributes:
      row: which.
      other: the row it is near to.
      of_other_set: whether that is one of the other set.
      score: the cosine of the two.
    """

    row: int
    other: int
    of_other_set: bool
    score: float


def near_rows(
    vectors: np.ndarray,
    threshold: float,
    against: np.ndarray | None = None,
    approximate: bool = False,
) -> list[Near]:
    """The rows to leave out, in order.

    Args:
      vectors: float [n, E], of any lengths.
      threshold: cosine from which two rows are near.
      against: float [m, E], the other set.
      approximate: with faiss.

    Raises:
      ClipjaxError: the threshold is no cosine, the widths differ, or faiss is not installed.
    """
    if not 0 < threshold <= 1:
        raise ClipjaxError(f"the threshold {threshold} must be above 0 and at most 1, a cosine")
    if against is not None and against.shape[1] != vectors.shape[1]:
        raise ClipjaxError(
            f"vectors of {vectors.shape[1]} numbers cannot be compared with those of {against.shape[1]}"
        )
    vectors = _unit(vectors)
    found: dict[int, Near] = {}
    if against is not None:
        best, score = _nearest(vectors, _unit(against))
        for row in np.flatnonzero(score >= threshold).tolist():
            found[row] = Near(row, int(best[row]), True, float(score[row]))
    left = np.setdiff1d(np.arange(len(vectors)), [*found])
    within = _by_faiss if approximate else _in_blocks
    for row, other, score_ in within(vectors[left], threshold):
        found[int(left[row])] = Near(int(left[row]), int(left[other]), False, score_)
    return [found[row] for row in sorted(found)]


def _in_blocks(vectors: np.ndarray, threshold: float) -> Iterator[tuple[int, int, float]]:
    kept: list[int] = []
    for first in range(0, len(vectors), BLOCK):
        block = vectors[first : first + BLOCK]
        best, score = _nearest(block, vectors[kept]) if kept else (None, np.full(len(block), -1.0))
        near_here = block @ block.T >= threshold
        here: list[int] = []  # of those kept, in this block
        for row in range(len(block)):
            if best is not None and score[row] >= threshold:
                yield first + row, kept[int(best[row])], float(score[row])
                continue
            earlier = np.flatnonzero(near_here[row, here])
            if len(earlier):
                other = here[int(earlier[0])]
                yield first + row, first + other, float(block[row] @ block[other])
            else:
                here.append(row)
        kept += [first + row for row in here]


def _nearest(rows: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(The nearest of `others`, its cosine) of each row; both are of unit length."""
    places = np.zeros(len(rows), np.int64)
    scores = np.full(len(rows), -np.inf, np.float32)
    for first in range(0, len(rows), BLOCK):
        part = slice(first, min(first + BLOCK, len(rows)))
        mine = _filled(rows[part])
        for start in range(0, len(others), BLOCK):
            theirs = others[start : start + BLOCK]
            place, score = map(np.asarray, _best()(mine, _filled(theirs), len(theirs)))
            better = score[: part.stop - first] > scores[part]
            places[part][better] = start + place[: part.stop - first][better]
            scores[part][better] = score[: part.stop - first][better]
    return places, scores


@functools.cache
def _best() -> Any:
    import jax
    import jax.numpy as jnp

    @jax.jit
    def best(rows, others, count):
        cosines = jnp.matmul(rows, others.T, precision=jax.lax.Precision.HIGHEST)
        cosines = jnp.where(jnp.arange(others.shape[0]) < count, cosines, -jnp.inf)
        return jnp.argmax(cosines, 1), jnp.max(cosines, 1)

    return best


def _filled(rows: np.ndarray) -> np.ndarray:
    """With rows of zeros up to a whole block, so that one program does for all."""
    return np.pad(rows, ((0, BLOCK - len(rows)), (0, 0)))


def _by_faiss(vectors: np.ndarray, threshold: float) -> Iterator[tuple[int, int, float]]:
    try:
        import faiss
    except ImportError as error:
        raise ClipjaxError("faiss is not installed: pip install 'clipjax[curation]'") from error
    cells = max(1, len(vectors) // PER_CELL)
    index: Any = faiss.index_factory(
        vectors.shape[1], f"IVF{cells},Flat", faiss.METRIC_INNER_PRODUCT
    )
    index.train(vectors[:: max(1, len(vectors) // (cells * 256))])
    index.add(vectors)
    index.nprobe = min(cells, 16)
    dropped = np.zeros(len(vectors), bool)
    for first in range(0, len(vectors), BLOCK):
        limits, scores, others = index.range_search(vectors[first : first + BLOCK], threshold)
        for row, (begin, end) in enumerate(itertools.pairwise(limits), first):
            at = others[begin:end]
            earlier = np.flatnonzero((at < row) & ~dropped[at])
            if len(earlier):
                nearest = earlier[np.argmax(scores[begin:end][earlier])]
                dropped[row] = True
                yield row, int(at[nearest]), float(scores[begin:end][nearest])


def _unit(vectors: np.ndarray) -> np.ndarray:
    vectors = np.asarray(vectors, np.float32)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.maximum(lengths, 1e-12)
