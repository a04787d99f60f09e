import numpy as np
import pytest

from clipjax.evals.calibration import (
    best_temperature,
    calibration,
    cross_entropy,
    expected_calibration_error,
)


def test_hand_made_bins():
    # Bins of 0.2: (0, .2] two at mean .15, one right; (.8, 1] two at .9 and 1.0, one right.
    confidence = np.array([0.1, 0.2, 0.9, 1.0])
    right = np.array([True, False, True, False])
    expected = 0.5 * abs(0.5 - 0.15) + 0.5 * abs(0.5 - 0.95)
    assert expected_calibration_error(confidence, right, bins=5) == pytest.approx(expected)


def test_agrees_with_a_loop_over_fifteen_bins():
    rng = np.random.default_rng(0)
    confidence, right = rng.random(500), rng.random(500) < 0.6
    expected = 0.0
    for i in range(15):
        inside = (confidence > i / 15) & (confidence <= (i + 1) / 15)
        if inside.any():
            expected += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert expected_calibration_error(confidence, right) == pytest.approx(expected, rel=1e-12)


def test_labels_drawn_from_the_probabilities_are_calibrated_and_three_times_the_logits_are_not():
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(20000, 4)) * 1.5
    probability = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    label = (probability.cumsum(axis=1) > rng.random((20000, 1))).argmax(axis=1)
    assert best_temperature(logits, label) == pytest.approx(1.0, abs=0.05)
    honest = calibration(logits, label)
    assert honest["ece"] < 0.02 and honest["temperature"] == pytest.approx(1.0, abs=0.05)
    bold = calibration(3 * logits, label)
    assert bold["ece"] > 0.1 and bold["ece_scaled"] < 0.02
    assert bold["temperature"] == pytest.approx(3.0, abs=0.15)
    assert bold["nll"] > bold["nll_scaled"]
    # what the definition says, without a stable softmax
    expected = -np.log(probability[np.arange(len(label)), label]).mean()
    assert cross_entropy(logits + 1000, label) == pytest.approx(expected, rel=1e-9)
