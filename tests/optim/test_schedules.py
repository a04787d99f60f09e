"""Schedules against their closed forms, durations in every unit."""

import math

import numpy as np
import pytest

from clipjax.errors import ClipjaxError
from clipjax.optim import (
    Constant,
    Cosine,
    Duration,
    Linear,
    ReciprocalSqrt,
    Scale,
    WarmupStableDecay,
)

SCALE = Scale(batch_size=50, num_examples=1000)


def values(schedule, total, steps):
    factor = schedule.build(total, SCALE)
    return [float(factor(s)) for s in steps]


@pytest.mark.parametrize(
    ("duration", "steps"),
    [
        (Duration(7), 7),
        (Duration(500, "examples"), 10),
        (Duration(1.5, "epochs"), 30),
        (Duration(1, "examples"), 1),
        (Duration(0, "epochs"), 0),
    ],
)
def test_durations_in_steps(duration, steps):
    assert duration.steps(SCALE) == steps


@pytest.mark.parametrize("amount", [-1, math.nan, math.inf])
def test_amounts_that_are_no_length_are_refused(amount):
    with pytest.raises(ClipjaxError, match="must be finite and not negative"):
        Duration(amount)


def test_warmup_is_linear_and_never_zero():
    got = values(Constant(warmup=Duration(4)), 10, range(6))
    np.testing.assert_allclose(got, [0.25, 0.5, 0.75, 1, 1, 1])


def test_cosine():
    got = values(Cosine(warmup=Duration(100, "examples"), final=0.1), 12, [2, 7, 12])
    np.testing.assert_allclose(got, [1.0, 0.1 + 0.9 * 0.5, 0.1], atol=1e-6)


def test_linear():
    got = values(Linear(final=0.2), 10, [0, 5, 10])
    np.testing.assert_allclose(got, [1.0, 0.6, 0.2], atol=1e-6)


def test_reciprocal_square_root_with_cooldown():
    schedule = ReciprocalSqrt(warmup=Duration(10), timescale=Duration(20), cooldown=Duration(10))
    got = values(schedule, 100, [10, 30, 70, 95, 100])
    expected = [1, math.sqrt(20 / 40), math.sqrt(20 / 80), math.sqrt(20 / 105) * 0.5, 0]
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_reciprocal_square_root_does_not_depend_on_the_length_of_the_run():
    schedule = ReciprocalSqrt(warmup=Duration(5), timescale=Duration(20))
    assert values(schedule, 100, range(50)) == values(schedule, 1000, range(50))


@pytest.mark.parametrize(("sqrt", "middle"), [(True, 1 - math.sqrt(0.5)), (False, 0.5)])
def test_warmup_stable_decay(sqrt, middle):
    schedule = WarmupStableDecay(warmup=Duration(5), cooldown=Duration(20), sqrt=sqrt)
    got = values(schedule, 100, [4, 50, 80, 90, 100])
    np.testing.assert_allclose(got, [1, 1, 1, middle, 0], atol=1e-6)


@pytest.mark.parametrize(
    "schedule",
    [Cosine(warmup=Duration(11)), WarmupStableDecay(warmup=Duration(6), cooldown=Duration(6))],
)
def test_phases_that_do_not_fit_are_refused(schedule):
    with pytest.raises(ClipjaxError, match="do(es)? not fit"):
        schedule.build(10, SCALE)


def test_bad_durations_are_refused():
    with pytest.raises(ClipjaxError, match="-1"):
        Duration(-1)
    with pytest.raises(ClipjaxError, match="'days'"):
        Duration(1, "days")
