"""MCL: later stages learn what the first suppressed, since their batches are of one cluster each.

Zhang et al. 2024, "Learning the Unlearned: Mitigating Feature Suppression in Contrastive Learning" (arXiv 2402.11816).
Status: the authors' code (MajorDavidZhang/MCL) read.

Stage 0 is plain contrast. After a stage its pictures' embeddings are clustered by k-means, K clusters. In the next
stage all of a batch is of one cluster of every stage before, so that what told clusters apart tells nothing in the
batch, and other features must. With c_r the cluster of stage r the group is the number sum of c_r K^(s - r). In the
end the embeddings of all stages are put side by side (`side_by_side`).

    clipjax train CONFIG                                        stage 0
    write_clusters(clipjax.load(RUN), source, "stage0.npy", clusters=10)
    clipjax train CONFIG --data.plan.stages stage0.npy          stage 1, and so on

What differs here: groups are true combinations of all stages, a batch never holds a record twice and is the same on
any number of processes (the code falls short in all three); k-means is plain, with k-means++, not in mini-batches.
Batches come in random order, not one group after another. As there, what does not fill a batch of its group is left
out of the epoch, and another part of it the next time; the share is logged.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from pathlib import Path
from typing import Any

import numpy as np

from clipjax.data import Order, Plan, RandomAccess, Source, UnreadableRecord, decode
from clipjax.data.fields import entry
from clipjax.errors import ClipjaxError
from clipjax.methods.registry import Method
from clipjax.predictor import Predictor

logger = logging.getLogger(__name__)

METHOD = Method(
    id="mcl_multistage",
    title="Learning the Unlearned: Mitigating Feature Suppression in Contrastive Learning",
    arxiv="2402.11816",
    status="official",
    summary="stages whose batches are of one cluster of the stages before",
)


@dataclasses.dataclass(frozen=True)
class OneCluster(Plan):
    """Batches of one group each: records of the same cluster in all stages so far."""

    stages: tuple[str, ...] = ()
    """For each stage a file of `write_clusters` (.npy), or an entry of the records, a whole number.
    (): all are one group."""

    def open(self, records, batch_size, seed, shuffle):
        codes = [_clusters(stage, records) for stage in self.stages]
        labels = combined(codes) if codes else np.zeros(len(records), np.int64)
        return _Grouped(labels, batch_size, seed, shuffle)


def combined(stages: list[np.ndarray], clusters: int | None = None) -> np.ndarray:
    """Groups int64 [n] of clusters int [n] by stage: digits of a number, the first stage's in front.

    Args:
      stages: clusters from 0, or -1 for records that have none and are in no group.
      clusters: K; None: what there are.
    """
    base = clusters or 1 + max(int(stage.max()) for stage in stages)
    group = np.zeros(len(stages[0]), np.int64)
    for stage in stages:
        group = group * base + stage
    return np.where(np.min(stages, axis=0) < 0, -1, group)


class _Grouped(Order):
    """Whole batches of each group, in random order, anew each epoch."""

    def __init__(self, labels: np.ndarray, batch_size: int, seed: int, shuffle: bool):
        self._batch_size, self._seed, self._shuffle = batch_size, seed, shuffle
        groups = [np.flatnonzero(labels == g) for g in np.unique(labels[labels >= 0])]
        self._groups = [rows for rows in groups if len(rows) >= batch_size]
        self._batches = sum(len(rows) // batch_size for rows in self._groups)
        if not self._batches:
            largest = max((len(rows) for rows in groups), default=0)
            raise ClipjaxError(
                f"OneCluster: the largest of {len(groups)} groups has {largest} records, fewer than "
                f"batch_size={batch_size}: lower it, or cluster into fewer"
            )
        logger.info(
            "%d groups make %d batches of %d; %.1f %% of %d records are left out of each epoch",
            len(groups),
            self._batches,
            batch_size,
            100 * (1 - self._batches * batch_size / len(labels)),
            len(labels),
        )
        self._epoch = functools.lru_cache(maxsize=2)(self._plan)

    def at(self, position: int, attempt: int) -> tuple[int, int]:
        """The replacement is of the same group, first of those that the epoch leaves out."""
        step, row = divmod(position, self._batch_size)
        epoch, batch = divmod(step, self._batches)
        orders, batches = self._epoch(epoch)
        group, first = batches[batch]
        order = orders[group]
        place = first + row if attempt == 0 else len(order) - 1 - (attempt - 1) % len(order)
        return int(order[place]), position

    def _plan(self, epoch: int) -> tuple[list[np.ndarray], np.ndarray]:
        """Each group's rows in their order, and the batches: [batches, 2], group and first place."""
        rng = np.random.Generator(np.random.Philox(key=[self._seed, epoch]))
        orders = [rng.permutation(g) if self._shuffle else g for g in self._groups]
        size = self._batch_size
        batches = np.array(
            [(i, k * size) for i, g in enumerate(orders) for k in range(len(g) // size)]
        )
        return orders, rng.permutation(batches) if self._shuffle else batches


def write_clusters(
    predictor: Predictor,
    source: Source,
    path: str | Path,
    clusters: int = 10,
    seed: int = 0,
) -> np.ndarray:
    """Clusters the pictures of a source by a model's embeddings, and writes int32 [n] to a .npy file.

    Records are in the order of the source; -1 stands for those that cannot be read. For one process.
    """
    records = source.open()
    read = np.ones(len(records), bool)
    size = predictor.image_size

    def pictures(rows: np.ndarray) -> np.ndarray:
        found = np.zeros((len(rows), size, size, 3), np.uint8)
        for i, row in enumerate(rows):
            try:
                record = records[int(row)]
                found[i] = predictor.resize(decode(record["image"], record["key"]), size)
            except UnreadableRecord:
                read[row] = False
        return found

    x = predictor.encode_image_rows(pictures, len(records))
    label = np.full(len(records), -1, np.int32)
    label[read] = kmeans(x[read], clusters, seed)
    np.save(path, label)
    return label


def kmeans(
    x: np.ndarray, clusters: int, seed: int = 0, steps: int = 100, tolerance: float = 1e-5
) -> np.ndarray:
    """Clusters int32 [n] of points [n, E]: Lloyd's steps from k-means++, until the centers rest.

    Raises:
      ClipjaxError: there are fewer points than clusters.
    """
    if not 1 <= clusters <= len(x):
        raise ClipjaxError(f"kmeans: clusters={clusters} of {len(x)} points: choose 1 to {len(x)}")
    rng = np.random.default_rng(seed)
    x = np.asarray(x, np.float32)
    centers = x[rng.integers(len(x))][None]
    nearest = np.full(len(x), np.inf)
    while len(centers) < clusters:
        nearest = np.minimum(nearest, np.square(x - centers[-1]).sum(1, dtype=np.float64))
        # Where all points are centers already, any will do.
        share = nearest / nearest.sum() if nearest.sum() > 0 else None
        centers = np.append(centers, x[rng.choice(len(x), p=share)][None], 0)
    label = np.zeros(len(x), np.int32)
    for _ in range(steps):
        label = np.argmin(np.square(centers).sum(1) - 2 * (x @ centers.T), 1).astype(np.int32)
        count = np.bincount(label, minlength=clusters)[:, None]
        sums = np.zeros_like(centers)
        np.add.at(sums, label, x)
        moved = np.where(count > 0, sums / np.maximum(count, 1), centers)
        rests = np.square(moved - centers).sum(1).max() <= tolerance
        centers = moved
        if rests:
            break
    return label


def side_by_side(stages: list[np.ndarray]) -> np.ndarray:
    """The embedding of all stages: unit vectors [n, E] of each, put together, of unit norm [n, S E]."""
    return np.concatenate(stages, -1) / np.sqrt(len(stages))


def _clusters(stage: str, records: RandomAccess) -> np.ndarray:
    if not stage.endswith(".npy"):
        return np.array([_entry(records, i, stage) for i in range(len(records))])
    try:
        found = np.load(stage, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ClipjaxError(f"OneCluster: {stage} cannot be read ({error})") from error
    if found.shape != (len(records),):
        raise ClipjaxError(
            f"OneCluster: {stage} has clusters {list(found.shape)}, and the source "
            f"{len(records)} records: write it anew for this source"
        )
    return found.astype(np.int64)


def _entry(records: Any, index: int, name: str) -> int:
    try:
        return int(entry(getattr(records, "facts", records.__getitem__)(index), name))
    except UnreadableRecord:
        return -1
