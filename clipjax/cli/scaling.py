"""`clipjax eval --fit-scaling RUN...`: a power law through the results of several runs."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from clipjax.cli.arguments import import_files
from clipjax.errors import ClipjaxError, did_you_mean

if TYPE_CHECKING:
    from clipjax.config import Run

METRIC = "retrieval/image_to_text/R@1"


def fit_scaling(options: argparse.Namespace) -> int:
    """Reads every run's `run.json` and `results.json`, fits, prints, draws."""
    import numpy as np

    from clipjax.config import load_run
    from clipjax.evals.scaling import AXES, as_error, draw_power_law, fit_power_law

    metric, axis = options.metric or METRIC, options.x or "examples"
    resamples = 200 if options.resamples is None else options.resamples
    if axis not in AXES:
        raise ClipjaxError(f"--x: no axis {axis!r}{did_you_mean(axis, AXES)}")
    if resamples < 0:
        raise ClipjaxError(f"--resamples {resamples}: must be at least 0")
    import_files(options.imports)
    points = []
    for folder in options.models:
        results = _results(folder)
        if metric not in results:
            names = [name for name in results if name not in ("step", "seconds")]
            raise ClipjaxError(f"{folder} has no figure {metric!r}{did_you_mean(metric, names)}")
        run = load_run(folder / "run.json")
        size = _scale(run, int(results["step"]), axis)
        points.append((size, as_error(metric, results[metric]), str(folder)))
    points.sort()
    x, error = np.array([p[0] for p in points]), np.array([p[1] for p in points])
    law = fit_power_law(x, error, resamples)
    falls = f"1 - {metric}" if as_error(metric, 0.0) else metric
    print(f"{falls} = a x^-b + c over {AXES[axis]}, {len(points)} runs")
    for value, fitted, (_, found, name) in zip(x, law(x), points, strict=True):
        print(f"  {value:.4g}  {found:.4f}  (fit {fitted:.4f})  {name}")
    for name in "abc":
        between = "  95 % [{:.4g}, {:.4g}]".format(*law.intervals[name]) if law.intervals else ""
        print(f"  {name} = {getattr(law, name):.4g}{between}")
    print(f"  root mean square of the log residuals: {law.residual:.4g}")
    if options.plot:
        try:
            draw_power_law(options.plot, law, x, error, (AXES[axis], falls))
        except (OSError, ValueError) as failure:
            raise ClipjaxError(f"--plot {options.plot} cannot be written: {failure}") from failure
    if options.json:
        facts = {
            "metric": metric,
            "x": axis,
            "points": [{"run": n, "x": float(v), "error": float(e)} for v, e, n in points],
            "fit": {"a": law.a, "b": law.b, "c": law.c},
            "interval_95": law.intervals,
            "residual": law.residual,
        }
        print(json.dumps(facts))
    return 0


def _results(folder: Path) -> dict[str, float]:
    path = folder / "results.json"
    if not path.is_file():
        raise ClipjaxError(
            f"{folder} holds no results.json: a scaling law is fitted to finished runs"
        )
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ClipjaxError(f"{path} is not JSON ({error})") from error


def _scale(run: Run, step: int, axis: str) -> float:
    """Examples seen, parameters, or FLOPs of training (three times those of the forward pass)."""
    import math

    import jax
    from flax import nnx

    from clipjax.evals.flops import forward_flops
    from clipjax.params import abstract

    examples = float(step * run.data.batch_size)
    if axis == "examples":
        return examples
    if axis == "params":
        params = abstract(lambda: run.model.build(nnx.Rngs(0)))[1]
        return float(sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)))
    return 3 * examples * forward_flops(run.model, run.data.image_size, run.data.context_length)
