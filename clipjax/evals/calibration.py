"""Calibration: is a model that says 80 % right in 80 % of the cases?"""

from __future__ import annotations

import numpy as np

from clipjax.evals.figure import Figure

BINS = 15
_SEED = 0  # of the halves that the temperature is fitted and judged on


def expected_calibration_error(
    confidence: np.ndarray,
    right: np.ndarray,
    bins: int = BINS,
    weights: np.ndarray | None = None,
) -> float:
    """Mean of |accuracy - mean confidence| over bins of equal width, weighted by their size.

    Naeini et al. 2015; Guo et al. 2017 (arXiv:1706.04599). A bin holds (low, high].

    Args:
      confidence: [n] in [0, 1], the probability of the predicted class.
      right: [n] bool, whether that class is the true one.
      bins: how many.
      weights: [n], how often each counts; default: once.
    """
    index = np.clip(np.ceil(np.asarray(confidence, np.float64) * bins) - 1, 0, bins - 1)
    index = index.astype(np.int64)
    weights = np.ones(len(index)) if weights is None else weights
    apart = weights * (np.asarray(right, np.float64) - confidence)
    gap = np.bincount(index, weights=apart, minlength=bins)
    return float(np.abs(gap).sum() / weights.sum())


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
    figures: dict[str, float] = {}
    for kind, scores, true in (
        ("", logits, label),
        ("_scaled", logits[~half] / temperature, label[~half]),
    ):
        log_p = log_softmax(scores)
        right = log_p.argmax(axis=1) == true
        figures[f"ece{kind}"] = Figure(np.stack([np.exp(log_p.max(axis=1)), right], axis=1), _ece)
        figures[f"nll{kind}"] = Figure(-log_p[np.arange(len(true)), true])
    return figures | {"temperature": temperature}


def _ece(values: np.ndarray, weights: np.ndarray | None) -> float:
    """The calibration error of [n, 2], a confidence and whether it was right."""
    return expected_calibration_error(values[:, 0], values[:, 1], weights=weights)
