"""Scaling laws: how an error falls with examples, parameters or compute, over several runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from clipjax.errors import ClipjaxError

DELTA = 1e-3
"""Where the Huber loss of the logarithms turns linear, as in Hoffmann et al. 2022."""
AXES = {"examples": "examples seen", "params": "parameters", "flops": "training FLOPs"}


@dataclasses.dataclass(frozen=True)
class PowerLaw:
    """error = a * x^-b + c, fitted to points.

    Attributes:
      a: factor, > 0.
      b: exponent.
      c: what no scale takes away, >= 0.
      intervals: for a, b and c, 95 % bootstrap intervals (low, high).
      residual: root mean square of log(error) - log(fit).
      curves: [bootstrap, 3] the resampled a, b and c.
    """

    a: float
    b: float
    c: float
    intervals: dict[str, tuple[float, float]]
    residual: float
    curves: np.ndarray

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """The error at x."""
        return self.a * np.asarray(x, np.float64) ** -self.b + self.c


def fit_power_law(
    x: np.ndarray, error: np.ndarray, resamples: int = 200, seed: int = 0
) -> PowerLaw:
    """Fits a power law with an irreducible term, robustly.

    The Huber loss of the residuals of log(error) is minimized by L-BFGS from a grid of starts, the
    best end wins (Hoffmann et al. 2022, arXiv:2203.15556, appendix D.2). Intervals are the 2.5 and
    97.5 percentiles over fits to points drawn with replacement.

    Args:
      x: [n] positive, at least four different ones.
      error: [n] positive.
      resamples: bootstrap fits.
      seed: of the resampling.

    Raises:
      ClipjaxError: too few points, or one that is not positive and finite.
    """
    x, error = np.asarray(x, np.float64), np.asarray(error, np.float64)
    if not (np.isfinite(x) & (x > 0) & np.isfinite(error) & (error > 0)).all():
        raise ClipjaxError(
            f"a power law needs positive, finite points: x={x.tolist()}, error={error.tolist()}"
        )
    if len(np.unique(x)) < 4:
        raise ClipjaxError(
            f"{len(np.unique(x))} different values of x are too few to fit three numbers: at least 4"
        )
    # Around the middle of the points, so that the numbers to be found are of order 1.
    middle = float(np.exp(np.log(x).mean()))
    starts = [
        (np.log(error.mean() * share), slope, np.log(error.min() * floor))
        for share in (0.3, 1.0)
        for slope in (0.1, 0.3, 0.7)
        for floor in (1e-3, 0.3, 0.9)
    ]
    ends = [_minimize(x / middle, error, start, 60) for start in starts]
    best = _minimize(x / middle, error, min(ends, key=lambda end: end.fun).x, 1000).x
    rng = np.random.default_rng(seed)
    drawn: list[np.ndarray] = []
    while len(drawn) < resamples:
        index = rng.integers(0, len(x), len(x))
        if len(np.unique(x[index])) < 4:
            continue
        drawn.append(_minimize(x[index] / middle, error[index], best, 200).x)
    curves = np.array([_natural(found, middle) for found in drawn]).reshape(-1, 3)
    a, b, c = _natural(best, middle)
    intervals = {
        name: (float(np.percentile(curves[:, i], 2.5)), float(np.percentile(curves[:, i], 97.5)))
        for i, name in enumerate("abc")
        if resamples
    }
    residual = float(np.sqrt(np.mean((np.log(error) - np.log(a * x**-b + c)) ** 2)))
    return PowerLaw(a, b, c, intervals, residual, curves)


def as_error(metric: str, value: float) -> float:
    """What falls as a model gets better: 1 - value for shares (R@k, accuracies), else the value."""
    last = metric.rsplit("/", 1)[-1]
    rises = last.startswith(("R@", "top")) or last in (
        "accuracy", "mean_per_class", "mean_per_category", "mean_reciprocal_rank",
    )  # fmt: skip
    return 1.0 - value if rises else value


def draw_power_law(
    path: Path, law: PowerLaw, x: np.ndarray, error: np.ndarray, labels: tuple[str, str]
) -> None:
    """A picture of the points, the law, its 95 % band and its irreducible term.

    Args:
      path: where, .png, .svg or .pdf.
      law: the fit.
      x: [n].
      error: [n].
      labels: of the two axes.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    line = np.geomspace(x.min() / 1.5, x.max() * 4, 200)
    if len(law.curves):
        a, b, c = law.curves.T
        band = np.percentile(a * line[:, None] ** -b + c, [2.5, 97.5], axis=1)
        axes.fill_between(line, *band, alpha=0.2, linewidth=0, label="95 % (bootstrap)")
    axes.plot(line, law(line), label=f"{law.a:.3g} x^-{law.b:.3g} + {law.c:.3g}")
    axes.plot(x, error, "o", color="black", label="runs")
    if law.c > 0.01 * error.min():
        axes.axhline(law.c, linestyle=":", color="gray")
    axes.set(xscale="log", yscale="log", xlabel=labels[0], ylabel=labels[1])
    axes.legend()
    figure.savefig(path, dpi=150)


def _minimize(x: np.ndarray, error: np.ndarray, start, steps: int):
    from scipy.optimize import minimize

    log_x, log_error = np.log(x), np.log(error)

    def loss(params):
        log_a, b, log_c = params
        terms = np.stack([log_a - b * log_x, np.full_like(log_x, log_c)])
        fitted = np.logaddexp(*terms)
        residual = fitted - log_error
        huber = np.where(
            np.abs(residual) <= DELTA, 0.5 * residual**2, DELTA * (np.abs(residual) - DELTA / 2)
        )
        slope = np.clip(residual, -DELTA, DELTA)
        share_a, share_c = np.exp(terms - fitted)
        gradient = np.array(
            [(slope * share_a).sum(), -(slope * share_a * log_x).sum(), (slope * share_c).sum()]
        )
        # In units of DELTA^2, for the optimizer's tolerances to mean something.
        return huber.sum() / DELTA**2, gradient / DELTA**2

    floor = np.log(error.min()) - 14
    bounds = [(None, None), (-1.0, 5.0), (floor, np.log(error.min()))]
    start = (start[0], float(np.clip(start[1], -1, 5)), float(np.clip(start[2], *bounds[2])))
    options = {"maxiter": steps, "ftol": 1e-12, "gtol": 1e-8}
    return minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds, options=options)


def _natural(found: np.ndarray, middle: float) -> tuple[float, float, float]:
    """(a, b, c) of log a, b, log c for x / middle."""
    return (
        float(np.exp(found[0] + found[1] * np.log(middle))),
        float(found[1]),
        float(np.exp(found[2])),
    )
