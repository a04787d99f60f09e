"""Accumulation through the real training step equals the big batch, for every objective."""

import functools
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from jax import jit
from linear import assert_close, make_batch, one_step

from clipjax.mesh import MeshShape
from clipjax.objectives import (
    Decoupled,
    DecoupledSoftmax,
    Grouped,
    MovingAverage,
    MultiPositive,
    Sigmoid,
    Softmax,
    SoftTarget,
    Weighted,
)

OBJECTIVES = {
    "smoothed": Softmax(label_smoothing=0.2, image_weight=0.75),
    "sigmoid": Sigmoid(positives_by_id=True),
    "dclw": Decoupled(sigma=0.5),
    "multi": MultiPositive(),
    "xmc": DecoupledSoftmax(),
    "cwcl": Weighted(),
    "cwcl sharp": Weighted(locked="text", sharpness=4.0),
    "albef": SoftTarget(teacher=MovingAverage(0.9)),
}


@functools.cache
def big_batch():
    return one_step(OBJECTIVES, jit)


@pytest.mark.parametrize("accumulate,devices", [(1, 8), (2, 1), (4, 4), (8, 2)])
def test_every_objective_equals_the_big_batch(accumulate, devices):
    got = one_step(OBJECTIVES, jit, devices, accumulate)
    assert_close(got, big_batch())
    for name, (_, grads) in got.items():
        assert abs(grads["logit_scale"]) > 1e-4, name  # k times too large would show, 0 would not
    assert abs(got["sigmoid"][1]["logit_bias"]) > 1e-4


def test_grouped_with_accumulation():
    """M2-Encoder's grouped loss with batch accumulation: the mean over groups of the loss on all
    rows that a group sees in all its micro-batches."""
    objectives = {k: OBJECTIVES[k] for k in ("smoothed", "multi")}
    got = one_step(objectives, jit, 4, 2, MeshShape(group=2), Grouped())
    batch = make_batch()
    halves = [
        one_step(objectives, jit, batch={k: np.split(v, 2)[i] for k, v in batch.items()})
        for i in range(2)
    ]
    assert_close(
        got,
        {
            name: (
                np.mean([half[name][0] for half in halves]),
                {
                    path: np.mean([half[name][1][path] for half in halves], 0)
                    for path in halves[0][name][1]
                },
            )
            for name in objectives
        },
    )
