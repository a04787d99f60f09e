"""The trainer: a run and a folder in, a trained model with its figures out.

Evaluation, logging and saving hang on the step number, so a resumed run does them where an uninterrupted one
would have.
"""

from __future__ import annotations

import collections
import contextlib
import json
import logging
import math
import time
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from clipjax.checkpoint import Checkpointing
from clipjax.config import Run
from clipjax.data.placement import to_global
from clipjax.errors import Preempted, RunFailed
from clipjax.optim import Scale
from clipjax.restore import Opened
from clipjax.tracking import Progress, Tracking
from clipjax.train.setup import Session, replace_file, setup
from clipjax.train.signals import StopRequest
from clipjax.train.state import TrainState

log = logging.getLogger(__name__)
IN_FLIGHT = (
    2  # steps dispatched ahead of the device; simulated devices deadlock when it is unbounded
)


def train(run: Run, workdir: Path) -> dict[str, float]:
    """Trains `run` in `workdir`, or continues what is there; returns the final evaluation.

    Leaves in the folder: `run.json`, `tokenizer/`, `checkpoints/`, `metrics.jsonl`, what the trackers write, and at
    the end `results.json` and `report.html`.

    Raises:
      ClipjaxError: something does not fit; nothing was written.
      RunFailed: the loss diverged, or too many records cannot be read.
      Preempted: a signal asked to stop; the state is saved.
    """
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(StopRequest())
        session, start = setup(run, Path(workdir))
        stack.callback(session.checkpoints.close)
        state = session.restore_or_init(start)
        session.write_run_files()
        tracking = Tracking(session.workdir, run.trackers, session.meta["run"], resume_step=start)
        stack.enter_context(tracking)
        progress = stack.enter_context(
            Progress(session.total_steps, run.data.batch_size, start or 0)
        )
        state = steps(session, state, start or 0, tracking, progress, stop)
        results = session.evaluate(state, None)
        tracking.write(session.total_steps, results)
        progress.evaluated(session.total_steps, results)
        session.save(session.total_steps, state, results)
        session.checkpoints.wait()
        finish(session, state, results, time.monotonic() - began)
    return results


def steps(
    session: Session,
    state: TrainState,
    start: int,
    tracking: Tracking,
    progress: Progress,
    stop: StopRequest,
) -> TrainState:
    """The loop. Returns the state after the last step."""
    run, total = session.run, session.total_steps
    in_flight: collections.deque[tuple[int, dict[str, jax.Array]]] = collections.deque()

    def retire(at_most: int) -> None:
        """Waits until no more than so many steps are under way; logs and checks those that are done."""
        while len(in_flight) > at_most:
            done, metrics = in_flight.popleft()
            stop_if_diverged(session, done, metrics)
            due = done % run.log_every == 0 or done in (1, total)
            if due:
                tracking.write(done, jax.device_get(metrics))
            progress.update(done, metrics if due else None)

    saving = SaveClock(run.checkpoint, session.scale)
    with contextlib.closing(session.loader.iterate(start)) as batches:
        for step in range(start + 1, total + 1):
            state, metrics = session.step(state, to_global(next(batches), session.mesh))
            in_flight.append((step, metrics))
            retire(IN_FLIGHT)
            if step == total:
                break
            results = session.evaluate(state, step)
            if results:
                retire(0)
                tracking.write(step, results)
                progress.evaluated(step, results)
            stopped_by = stop.signal_name or (
                "preemption" if session.checkpoints.preempted(step) else None
            )
            if stopped_by or saving.due(step, may_ask=step % run.log_every == 0):
                retire(0)
                session.save(step, state, results)
            if stopped_by:
                session.checkpoints.wait()
                raise Preempted(
                    f"stopped by {stopped_by} after step {step} of {total}; saved in {session.workdir}: "
                    "the same command continues"
                )
        retire(0)
    return state


class SaveClock:
    """When the next checkpoint is due. All processes agree: the first one's clock decides."""

    def __init__(self, config: Checkpointing, scale: Scale):
        self._every = config.every.steps(scale) if config.every else 0
        self._seconds = config.minutes * 60 if config.minutes else math.inf
        self._last = time.monotonic()

    def due(self, step: int, may_ask: bool) -> bool:
        """Whether to save after `step`; the clock is looked at only where `may_ask` (it costs a message)."""
        due = bool(self._every) and step % self._every == 0
        if not due and may_ask and self._seconds < math.inf:
            late = np.asarray(time.monotonic() - self._last >= self._seconds)
            due = (
                bool(multihost_utils.broadcast_one_to_all(late))
                if jax.process_count() > 1
                else bool(late)
            )
        if due:
            self._last = time.monotonic()
        return due


def stop_if_diverged(session: Session, step: int, metrics: dict[str, jax.Array]) -> None:
    """Ends the run after too many skipped steps in a row."""
    streak = int(metrics["bad_streak"])
    if streak < session.run.max_bad_steps:
        if streak:
            log.warning(
                "step %d: loss or gradient is not finite%s; skipped (%d in a row)",
                step,
                _broken(metrics),
                streak,
            )
        return
    session.checkpoints.wait()
    last = session.checkpoints.latest()
    good = (
        f"the last good checkpoint is {session.checkpoints.folder / str(last)}"
        if last
        else "nothing was saved yet"
    )
    raise RunFailed(
        f"{streak} steps in a row up to step {step} had a loss or gradient that is not finite"
        f"{_broken(metrics)}; {good}. "
        "Lower optimizer.lr, lengthen the warm-up, or set optimizer.clip_norm"
    )


def _broken(metrics: dict[str, jax.Array]) -> str:
    """Whose embeddings of this step were not finite, in words; nothing if all were."""
    counts = {name: int(metrics.get(f"broken_rows/{name}", 0)) for name in ("image", "text")}
    named = " and ".join(f"{count} {name} embeddings" for name, count in counts.items() if count)
    return f" ({named} hold NaN or infinity)" if named else ""


def finish(session: Session, state: TrainState, results: dict[str, float], seconds: float) -> None:
    """`results.json` and `report.html`."""
    if jax.process_index() == 0:
        summary = {"step": session.total_steps, "seconds": round(seconds, 1)} | results
        replace_file(session.workdir / "results.json", json.dumps(summary, indent=2))
    if jax.process_count() == 1:
        predictor = session.predictor_for(state)
        opened = Opened(
            session.workdir, session.total_steps, session.run, predictor, session.evaluators
        )
        log.info("wrote %s", opened.report(results))
