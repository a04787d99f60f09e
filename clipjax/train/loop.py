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
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from clipjax.checkpoint import Checkpointing, Checkpoints, latest_step
from clipjax.config import Run
from clipjax.data.placement import to_global
from clipjax.errors import ClipjaxError, Preempted, RunFailed
from clipjax.optim import Scale
from clipjax.report import read_metrics
from clipjax.restore import Opened
from clipjax.stores import place
from clipjax.tracking import Progress, Tracking
from clipjax.train.folder import hold, replace_file, write_run_files
from clipjax.train.setup import Session, setup
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
      RunFailed: the loss diverged, too many records cannot be read, or the disk is full.
      Preempted: a signal asked to stop; the state is saved.
    """
    began = time.monotonic()
    workdir = place(workdir)
    with contextlib.ExitStack() as stack:
        stack.enter_context(unwritable_fails(workdir))
        stop = stack.enter_context(StopRequest())
        session = setup(run, workdir)
        stack.enter_context(hold(workdir, session.start))
        state = session.restore_or_init()
        write_run_files(workdir, session.meta)
        checkpoints = stack.enter_context(contextlib.closing(Checkpoints(workdir, run.checkpoint)))
        tracking = stack.enter_context(
            Tracking(workdir, run.trackers, session.meta["run"], resume_step=session.start)
        )
        progress = stack.enter_context(
            Progress(session.total_steps, run.data.batch_size, session.start or 0)
        )
        state = steps(session, state, checkpoints, tracking, progress, stop)
        total = session.total_steps
        try:
            results = evaluate(session, checkpoints, state, None)
        except BaseException:
            checkpoints.save(total, state, session.meta, None)
            raise
        if results and not is_logged(workdir, total, results):
            tracking.write(total, results)
        checkpoints.save(total, state, session.meta, results)
        checkpoints.wait()
        progress.evaluated(total, results)
        finish(session, state, results, time.monotonic() - began)
    return results


def steps(
    session: Session,
    state: TrainState,
    checkpoints: Checkpoints,
    tracking: Tracking,
    progress: Progress,
    stop: StopRequest,
) -> TrainState:
    """The loop. Returns the state after the last step."""
    run, total, start = session.run, session.total_steps, session.start or 0
    in_flight: collections.deque[tuple[int, dict[str, jax.Array]]] = collections.deque()

    def retire(at_most: int) -> None:
        """Waits until no more than so many steps are under way; logs and checks those that are done."""
        while len(in_flight) > at_most:
            done, metrics = in_flight.popleft()
            stop_if_diverged(session, checkpoints, done, metrics)
            due = done % run.log_every == 0 or done in (1, total)
            if due:
                tracking.write(done, jax.device_get(metrics))
            progress.update(done, metrics if due else None)

    def evaluate_at(step: int) -> dict[str, float]:
        if not session.due(step):
            return {}
        retire(0)
        results = evaluate(session, checkpoints, state, step)
        tracking.write(step, results)
        progress.evaluated(step, results)
        return results

    if session.start is None:
        evaluate_at(0)
    saving = SaveClock(run.checkpoint, session.scale)
    with contextlib.closing(session.loader.iterate(start)) as batches:
        for step in range(start + 1, total + 1):
            state, metrics = session.step(state, to_global(next(batches), session.mesh))
            in_flight.append((step, metrics))
            retire(IN_FLIGHT)
            if step == total:
                break
            results = evaluate_at(step)
            stopped_by = stop.agreed(step)
            if stopped_by or saving.due(step, may_ask=step % run.log_every == 0):
                retire(0)
                # Weights that yield no finite loss must not push a good checkpoint out.
                if stopped_by or not int(metrics["bad_streak"]):
                    checkpoints.save(step, state, session.meta, results)
            if stopped_by:
                checkpoints.wait()
                raise Preempted(
                    f"stopped by {stopped_by} after step {step} of {total}; saved in {session.workdir}: "
                    "the same command continues"
                )
        retire(0)
    return state


def evaluate(
    session: Session, checkpoints: Checkpoints, state: TrainState, step: int | None
) -> dict[str, float]:
    """`session.evaluate`; what an evaluator refuses in the middle of a run fails the run."""
    try:
        return session.evaluate(state, step)
    except ClipjaxError as error:
        checkpoints.wait()
        raise RunFailed(f"{error}; {checkpoints.describe_latest()}") from error


def is_logged(workdir: Path, step: int, results: dict[str, float]) -> bool:
    """Whether a run that was killed at its very end has written its last evaluation already."""
    lines = read_metrics(workdir / "metrics.jsonl")
    return any(line["step"] == step and line.keys() & results.keys() for line in lines)


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


def stop_if_diverged(
    session: Session, checkpoints: Checkpoints, step: int, metrics: dict[str, jax.Array]
) -> None:
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
    checkpoints.wait()
    raise RunFailed(
        f"{streak} steps in a row up to step {step} had a loss or gradient that is not finite"
        f"{_broken(metrics)}; {checkpoints.describe_latest()}. Lower optimizer.lr, lengthen the warm-up, or set "
        "optimizer.clip_norm"
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
        raise RunFailed(
            f"{error}; {saved} in {workdir}: mend that, and the same command continues"
        ) from error


def finish(session: Session, state: TrainState, results: dict[str, float], seconds: float) -> None:
    """`results.json` and `report.html`; all processes evaluate, the first one writes."""
    if jax.process_index() == 0:
        summary = {"step": session.total_steps, "seconds": round(seconds, 1)} | results
        replace_file(session.workdir / "results.json", json.dumps(summary, indent=2))
    predictor = session.predictor_for(state)
    opened = Opened(
        session.workdir, session.total_steps, session.run, predictor, session.evaluators
    )
    path = opened.report(results)
    if jax.process_index() == 0:
        log.info("wrote %s", path)
