"""Grouped aggregation deals its groups anew every step: by the loader's global shuffle alone."""

import dataclasses

import numpy as np
import pytest

from clipjax.data import BPE, Data, Source


@dataclasses.dataclass(frozen=True)
class Dots(Source):
    """Eight pictures of one pixel."""

    def open(self):
        return [
            {
                "image": np.zeros((1, 1, 3), np.uint8),
                "captions": ("dot",),
                "languages": (),
                "id": i,
                "key": str(i),
            }
            for i in range(8)
        ]


def test_any_two_examples_share_a_group_as_often_as_chance_has_it():
    n, groups, epochs = 8, 2, 60  # one batch an epoch
    data = Data(Dots(), image_size=1, batch_size=n, context_length=4, num_threads=1)
    loader = data.build(BPE(300).build(["dot"] * 300), seed=0)
    together = np.zeros((n, n))
    for step in range(epochs):
        batch = loader.batch(step)["id"]
        assert sorted(batch) == list(range(n))
        for group in batch.reshape(groups, -1):  # rows of a mesh group are neighbors in the batch
            together[np.ix_(group, group)] += 1
    share = together[~np.eye(n, dtype=bool)] / epochs
    chance = (n / groups - 1) / (n - 1)
    assert share.mean() == pytest.approx(chance)
    # 56 correlated binomials: five standard deviations
    assert np.abs(share - chance).max() < 5 * np.sqrt(chance * (1 - chance) / epochs)
