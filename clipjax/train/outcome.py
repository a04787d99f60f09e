"""How a run ends: what it leaves when it is done, and in which words it fails."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from clipjax.checkpoint import Checkpoints, latest_step
from clipjax.errors import RunFailed, Unavailable
from clipjax.files import replace_file
from clipjax.restore import Opened
from clipjax.tracking import read_metrics
from clipjax.tracking.goodput import goodput, read_attempts
from clipjax.train.setup import Session
from clipjax.train.state import TrainState
from clipjax.train.watch import Watch

log = logging.getLogger(__name__)
METRICS_FILE = "metrics.jsonl"
RESULTS_FILE = "results.json"


def logged(workdir: Path, step: int) -> set[str]:
    """The names of the figures that this attempt or an earlier one wrote for a step."""
    lines = read_metrics(workdir / METRICS_FILE)
    return {name for line in lines if line["step"] == step for name in line}


def diverged(
    session: Session, checkpoints: Checkpoints, step: int, metrics: dict[str, jax.Array]
) -> RunFailed | None:
    """Names a step that was skipped; after too many in a row, the failure that this is.

    Raises:
      Unavailable: the save under way cannot be written.
    """
    streak = int(metrics["bad_streak"])
    if not streak:
        return None
    values = [float(metrics[name]) for name in ("loss", "grad_norm")]
    what = (
        f"a loss or gradient out of proportion (loss {values[0]:.4g}, gradient norm {values[1]:.4g})"
        if np.isfinite(values).all()
        else "a loss or gradient that is not finite"
    ) + _broken(metrics)
    if streak < session.run.max_bad_steps:
        log.warning("step %d has %s; skipped (%d in a row)", step, what, streak)
        return None
    checkpoints.wait()  # a save under way is the last good one
    return RunFailed(
        f"{streak} steps in a row up to step {step} had {what}; {checkpoints.describe_latest()}. Lower "
        "optimizer.lr, lengthen the warm-up, or set optimizer.clip_norm"
    )


def _broken(metrics: dict[str, jax.Array]) -> str:
    """Whose embeddings of this step were not finite, in words; nothing if all were."""
    counts = {
        name.split("/")[1]: int(value)
        for name, value in metrics.items()
        if name.startswith("broken_rows/")
    }
    named = " and ".join(f"{count} {name} embeddings" for name, count in counts.items() if count)
    return f" ({named} hold NaN or infinity)" if named else ""


@contextlib.contextmanager
def unwritable_fails(workdir: Path) -> Iterator[None]:
    """A full disk and the like end the run in one message that says what is safe."""
    try:
        yield
    except OSError as error:
        last = latest_step(workdir)
        saved = "nothing was saved yet" if last is None else f"step {last} is saved"
        raise Unavailable(
            f"{error}; {saved} in {workdir}: mend that, and the same command continues"
        ) from error


def finish(
    session: Session, state: TrainState, results: dict[str, float], seconds: float, watch: Watch
) -> None:
    """`results.json` and `report.html`; all processes evaluate, the first one writes."""
    if jax.process_index() == 0:
        summary: dict[str, Any] = {"step": session.total_steps, "seconds": round(seconds, 1)}
        # What has happened since the last line counts too.
        rest = {"time": time.time()} | watch.figures()
        lines = [*read_metrics(session.workdir / METRICS_FILE), rest]
        if spent := goodput(lines, read_attempts(session.workdir)):
            summary |= spent.to_json()
        summary |= results
        replace_file(session.workdir / RESULTS_FILE, json.dumps(summary, indent=2) + "\n")
    predictor = session.predictor_for(state)
    opened = Opened(
        session.workdir, session.total_steps, session.run, predictor, session.evaluators
    )
    path = opened.report(results)
    if jax.process_index() == 0:
        log.info("wrote %s", path)
