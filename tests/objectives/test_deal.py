"""Grouped aggregation deals its groups anew every step: by the loader's global shuffle alone."""

import numpy as np
import pytest

from clipjax.data.loader import _global_order


@pytest.mark.parametrize("groups", [2])
def test_any_two_examples_share_a_group_as_often_as_chance_has_it(groups):
    n, epochs = 8, 100  # one batch an epoch
    order = _global_order(n, 0, True)
    together = np.zeros((n, n))
    for epoch in range(epochs):
        batch = np.array([order[epoch * n + k] for k in range(n)])
        assert sorted(batch) == list(range(n))
        for group in batch.reshape(groups, -1):  # rows of a mesh group are neighbors in the batch
            together[np.ix_(group, group)] += 1
    share = together[~np.eye(n, dtype=bool)] / epochs
    chance = (n / groups - 1) / (n - 1)
    assert share.mean() == pytest.approx(chance)
    # 56 correlated binomials: five standard deviations
    assert np.abs(share - chance).max() < 5 * np.sqrt(chance * (1 - chance) / epochs)
