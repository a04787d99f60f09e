"""Calibration: is a model that says 80 % right in 80 % of the cases?"""

from __future__ import annotations

import numpy as np

BINS = 15
_SEED = 0  # of the halves that the temperature is fitted and judged on


def expected_calibration_error(
    confidence: np.ndarray, right: np.ndarray, bins: int = BINS
) -> float:
    """Mean of |accuracy - mean confidence| over bins of equal width, weighted by their size.

    Naeini et al. 2015; Guo et al. 2017 (arXiv:1706.04599). A bin holds (low, high].

    Args:
      confidence: [n] in [0, 1], the probability of the predicted class.
      right: [n] bool, whether that class is the true one.
      bins: how many.
    """
    index = np.clip(np.ceil(np.asarray(confidence, np.float64) * bins) - 1, 0, bins - 1)
    index = index.astype(np.int64)
    gap = np.bincount(index, weights=right.astype(np.float64) - confidence, minlength=bins)
    return float(np.abs(gap).sum() / len(confidence))


def best_temperature(logits: np.ndarray, label: np.ndarray) -> float:
    """What logits are best divided by: the least mean cross-entropy, between 1/100 and 100.

    Guo et al. 2017 (arXiv:1706.04599). The cross-entropy is convex in 1 / temperature.

    Args:
      logits: [n, C].
      label: [n] int.
    """
    from scipy.optimize import minimize_scalar

    found = minimize_scalar(
        lambda log: cross_entropy(logits / np.exp(log), label),
        bounds=(np.log(0.01), np.log(100.0)),
        method="bounded",
        options={"xatol": 1e-4},
    )
    return float(np.exp(found.x))


def cross_entropy(logits: np.ndarray, label: np.ndarray) -> float:
    """Mean -log softmax(logits)[label], in nats."""
    return float(-log_softmax(logits)[np.arange(len(label)), label].mean())


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """[n, C] log-probabilities."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def calibration(logits: np.ndarray, label: np.ndarray) -> dict[str, float]:
    """How far a classifier's probabilities can be trusted.

    Args:
      logits: [n, C], as the model scales them; a sigmoid model's bias cancels in the softmax.
      label: [n] int.

    Returns:
      `ece`, the expected calibration error of softmax(logits) in 15 bins; `nll`, the mean
      cross-entropy; and after dividing the logits by the `temperature` that a random half of the
      images asks for, `ece_scaled` and `nll_scaled`, on the other half.
    """
    half = np.zeros(len(label), bool)
    half[np.random.default_rng(_SEED).permutation(len(label))[: len(label) // 2]] = True
    temperature = best_temperature(logits[half], label[half]) if half.any() else 1.0
    scaled = logits[~half] / temperature
    return {
        "ece": _ece(logits, label),
        "nll": cross_entropy(logits, label),
        "ece_scaled": _ece(scaled, label[~half]),
        "nll_scaled": cross_entropy(scaled, label[~half]),
        "temperature": temperature,
    }


def _ece(logits: np.ndarray, label: np.ndarray) -> float:
    probability = np.exp(log_softmax(logits))
    predicted = probability.argmax(axis=1)
    return expected_calibration_error(probability.max(axis=1), predicted == label)
