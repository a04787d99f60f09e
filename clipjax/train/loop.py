"""The trainer: a run and a folder in, a trained model with its figures out.

Evaluation, logging and saving hang on the step number, so a resumed run does them where an uninterrupted one
would have.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import logging
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np

from clipjax.checkpoint import Checkpoints, latest_step
from clipjax.config import Run
from clipjax.data.placement import to_global
from clipjax.errors import ClipjaxError, DamagedCheckpoint, Preempted, RunFailed, Unavailable
from clipjax.evals.base import Runner
from clipjax.optim.duration import as_every
from clipjax.stores import place
from clipjax.tracking import Progress, Tracking, read_metrics
from clipjax.train.agreement import decide, meeting
from clipjax.train.cadence import Cadences
from clipjax.train.folder import (
    add_attempt,
    choose_start,
    hold,
    keep_compilations,
    make_way,
    write_run_files,
)
from clipjax.train.outcome import METRICS_FILE, diverged, finish, logged, unwritable_fails
from clipjax.train.resume import restore
from clipjax.train.setup import Session, setup
from clipjax.train.signals import Interrupted, StopRequest, name_of, nothing_lost
from clipjax.train.state import TrainState
from clipjax.train.step import IN_FLIGHT
from clipjax.train.votes import Votes
from clipjax.train.watch import Profile, Watch
from clipjax.train.watchdog import Watchdog

log = logging.getLogger(__name__)


def train(
    run: Run,
    workdir: Path,
    *,
    from_step: int | None = None,
    fallback: bool = False,
    new_data: bool = False,
    profile: tuple[int, int] | None = None,
) -> dict[str, float]:
    """Trains `run` in `workdir`, or continues what is there; returns the final evaluation.

    Leaves in the folder: `run.json`, `tokenizer/`, `checkpoints/`, `metrics.jsonl`, what the trackers write, and at
    the end `results.json` and `report.html`.

    Args:
      run: the experiment.
      workdir: its folder.
      from_step: the checkpoint to go back to; None: the newest.
      fallback: whether to go on from an earlier checkpoint where one is damaged.
      new_data: whether the data may be other than they were.
      profile: the first and the last step of a trace.

    Raises:
      ClipjaxError: something does not fit; nothing was written.
      RunFailed: the loss diverged, or too many records cannot be read.
      Unavailable: the folder is in use, or the disk is full.
      Preempted: a signal asked to stop; the state is saved.
    """
    began = time.time()
    workdir = place(workdir)
    with contextlib.ExitStack() as stack:
        stack.enter_context(unwritable_fails(workdir))
        stop = stack.enter_context(StopRequest())
        dog = Watchdog(run.stall_minutes and run.stall_minutes * 60)
        stack.enter_context(dog)
        try:
            session, state = start(run, workdir, stack, from_step, fallback, new_data)
            lines = read_metrics(workdir / METRICS_FILE)
            write_run_files(workdir, session.meta)
            restarts = add_attempt(workdir, session.start, from_step, began, lines)
            watch = Watch(
                run.data.batch_size,
                run.data.context_length,
                session.flops_per_example(),
                restarts,
                elapsed=time.time() - began,
            )
            tracking = stack.enter_context(
                Tracking(workdir, run.trackers, session.meta.run, resume_step=session.start)
            )
            checkpoints = stack.enter_context(
                contextlib.closing(Checkpoints(workdir, run.checkpoint, tracking.flush))
            )
            progress = stack.enter_context(
                Progress(session.total_steps, run.data.batch_size, session.start or 0)
            )
            trace = Profile(workdir, profile)
            stack.callback(trace.stop)
            loop = Loop(session, checkpoints, tracking, progress, stop, dog, watch, trace)
            state = loop.steps(state)
        except Interrupted as signal:
            raise Preempted(nothing_lost(signal.name)) from None
        results = loop.last_evaluation(state)
        with loop.stopping_after(session.total_steps):
            tracking.flush()
            finish(session, state, results, time.time() - began, watch)
    return results


def start(
    run: Run,
    workdir: Path,
    stack: contextlib.ExitStack,
    from_step: int | None,
    fallback: bool,
    new_data: bool,
) -> tuple[Session, TrainState]:
    """Sets the run up, takes hold of its folder (until `stack` is left) and reads or makes its state."""
    damaged: set[int] = set()
    while True:
        newest, at = decide(
            "the step to begin at",
            lambda: [latest_step(workdir), choose_start(workdir, from_step, damaged)],
        )
        with meeting(f"looking into {workdir}", Unavailable) as compare:
            compare({"the newest checkpoint": latest_step(workdir)})
        if damaged and at is None:
            raise ClipjaxError(
                f"no checkpoint in {workdir} can be read; move its checkpoints/ away to begin anew"
            )
        with contextlib.ExitStack() as held:
            try:
                session = setup(run, workdir, at, new_data)
                held.enter_context(hold(workdir, newest))
                keep_compilations(workdir)
                state = session.restore_or_init()
            except DamagedCheckpoint as error:
                if not fallback:
                    raise
                log.warning("%s", error)
                damaged.add(error.step)
                continue
            make_way(workdir, session.start)
            Votes(session.mesh).settle([0])  # nobody looks before it is done
            stack.enter_context(held.pop_all())
            return session, state


class Loop:
    """One attempt at a run at work."""

    def __init__(
        self,
        session: Session,
        checkpoints: Checkpoints,
        tracking: Tracking,
        progress: Progress,
        stop: StopRequest,
        dog: Watchdog,
        watch: Watch,
        trace: Profile,
    ):
        run = session.run
        self._session, self._checkpoints, self._tracking = session, checkpoints, tracking
        self._progress, self._stop, self._dog = progress, stop, dog
        self._watch, self._trace = watch, trace
        self._votes = Votes(session.mesh)
        milestones = run.checkpoint.milestones
        self._cadences = Cadences(
            session.scale,
            {
                "log": (as_every(run.log_every, "log_every"),),
                "save": run.checkpoint.cadences,
                "milestone": (milestones,) if milestones else (),
                **{
                    f"evals/{evaluator.name}": (evaluator.every,) if evaluator.every else ()
                    for evaluator, _ in session.evaluators
                },
            },
        )
        self._in_flight: collections.deque[tuple[int, dict[str, jax.Array], object]] = (
            collections.deque()
        )
        self._stopped_by = 0
        self._diverged: RunFailed | None = None
        self._went_back_to: int | None = None
        session.between_batches = self._between_batches

    def steps(self, state: TrainState) -> TrainState:
        """Trains to the end; returns the state after the last step."""
        session, total, start = self._session, self._session.total_steps, self._session.start or 0
        if start < total:
            # An evaluation that a stop or a kill cut short is made up for.
            seen = decide("the figures there are", lambda: sorted(logged(session.workdir, start)))
            self._evaluate_after(start, state, besides={name.split("/")[0] for name in seen})
        self._dog.beat("the first step", 4)
        with contextlib.closing(session.loader.iterate(start, session.scale.shift)) as batches:
            for step in range(start + 1, total + 1):
                with self._watch.doing("data"):
                    rows = next(batches)
                self._trace.before(step)
                with jax.profiler.StepTraceAnnotation("train", step_num=step):
                    state, metrics = session.step(state, to_global(rows, session.mesh))
                self._cast(step, metrics)
                if self._trace.ends_with(step):
                    self._retire(0)
                    self._trace.stop()
                self._retire(IN_FLIGHT)
                if self._diverged is not None:
                    state = self._go_back(step, state)
                    continue
                if step == total:
                    break
                figures = self._evaluate_after(step, state)
                self._save_after(step, state, metrics, figures)
                if self._stopped_by:
                    self._end_early(step)
            self._retire(0)
        if self._diverged is not None:  # too late to go back
            raise self._diverged
        return state

    def last_evaluation(self, state: TrainState) -> dict[str, float]:
        """All figures of the trained model, logged and saved with it."""
        session, total = self._session, self._session.total_steps
        milestone = self._cadences.due("milestone", total)
        self._stop.wait_for_steps()
        self._dog.beat("the last evaluation", 4)
        runners = [runner for _, runner in session.evaluators]
        try:
            results = self._evaluate(state, runners)
        except Interrupted:
            self._checkpoints.save(total, state, session.meta_at(total), None, milestone)
            self._end_early(total)
            raise
        except BaseException:
            self._checkpoints.save(total, state, session.meta_at(total), None, milestone)
            raise
        if results and not logged(session.workdir, total) & results.keys():
            # With the time it took, which no other line will tell.
            seconds = {n: v for n, v in self._watch.figures().items() if n.startswith("seconds/")}
            self._tracking.write(total, results | seconds)
        self._dog.beat("the last save", 4)
        with self._watch.doing("saving"):
            self._checkpoints.save(total, state, session.meta_at(total), results, milestone)
            self._checkpoints.wait()
        self._progress.evaluated(total, results)
        self._dog.beat("the report", 4)
        return results

    @contextlib.contextmanager
    def stopping_after(self, step: int) -> Iterator[None]:
        """In here a signal ends the run, whose `step` is saved."""
        try:
            with self._stop.at_once():
                yield
        except Interrupted:
            self._end_early(step)

    def _cast(self, step: int, metrics: dict[str, jax.Array]) -> None:
        first = jax.process_index() == 0  # the clock that counts
        vote = self._votes.cast([self._stop.number, *(n * first for n in self._cadences.late())])
        if isinstance(vote, np.ndarray):  # a single process: no need to wait
            self._hear(vote)
        self._in_flight.append((step, metrics, vote))

    def _hear(self, vote: np.ndarray) -> None:
        stopped_by, *late = (int(number) for number in vote)
        self._stopped_by = self._stopped_by or stopped_by
        self._cadences.tell(late)

    def _retire(self, at_most: int) -> None:
        """Waits until no more than so many steps are under way; logs and checks those that are done."""
        session = self._session
        while len(self._in_flight) > at_most:
            done, metrics, vote = self._in_flight.popleft()
            self._diverged = self._diverged or diverged(session, self._checkpoints, done, metrics)
            if self._diverged and not (session.run.spikes and session.run.spikes.rollback):
                raise self._diverged
            if not isinstance(vote, np.ndarray):
                self._hear(np.asarray(vote))
            if done == (session.start or 0) + 1:
                self._stop.wait_for_steps()
            self._dog.beat(f"step {done + 1}")
            self._watch.stepped()
            due = self._cadences.due("log", done) or done in (1, session.total_steps)
            figures = None
            if due:
                loader = session.loader
                skipped = {
                    "skipped_records": loader.skipped,
                    "unreachable_records": loader.unreachable,
                }
                figures = jax.device_get(metrics) | self._watch.figures() | skipped
                self._tracking.write(done, figures)
            self._progress.update(done, figures)

    def _evaluate_after(
        self, step: int, state: TrainState, besides: Collection[str] = ()
    ) -> dict[str, float]:
        """The figures of the evaluators that are due, `besides` those named."""
        due = [
            runner
            for evaluator, runner in self._session.evaluators
            if evaluator.name not in besides and self._cadences.due(f"evals/{evaluator.name}", step)
        ]
        if not due or self._stopped_by:
            return {}
        self._retire(0)
        self._dog.beat(f"the evaluation after step {step}", 4)
        try:
            figures = self._evaluate(state, due)
        except Interrupted as signal:
            if step == (self._session.start or 0):
                raise
            log.info("%s: the evaluation after step %d is given up", signal.name, step)
            self._stopped_by = self._stopped_by or self._stop.number
            return {}
        self._dog.beat(f"step {step + 1}")
        self._tracking.write(step, figures)
        self._progress.evaluated(step, figures)
        return figures

    def _evaluate(self, state: TrainState, runners: Sequence[Runner]) -> dict[str, float]:
        """What an evaluator refuses in the middle of a run fails the run."""
        try:
            with self._watch.doing("evaluation"), self._at_once():
                return self._session.evaluate(state, runners)
        except ClipjaxError as error:
            self._checkpoints.wait()
            kind = Unavailable if isinstance(error, Unavailable) else RunFailed
            raise kind(f"{error}; {self._checkpoints.describe_latest()}") from error

    def _at_once(self) -> contextlib.AbstractContextManager[None]:
        """One process may end what it does at any moment; several only together (`_between_batches`)."""
        return self._stop.at_once() if jax.process_count() == 1 else contextlib.nullcontext()

    def _between_batches(self) -> None:
        """An evaluation is alive, and ends when any process is asked to stop."""
        self._dog.beat("an evaluation", 4)
        if jax.process_count() > 1 and (number := int(self._votes.settle([self._stop.number])[0])):
            self._stopped_by = number
            raise Interrupted(name_of(number))

    def _go_back(self, step: int, state: TrainState) -> TrainState:
        """After too many skipped steps: the weights of an earlier checkpoint, with the data that come next.

        The steps in between count as skipped, so that schedules follow the weights.
        """
        self._retire(0)
        failure, self._diverged = self._diverged, None
        assert failure is not None
        steps = self._checkpoints.milestones() or self._checkpoints.steps()
        before = [s for s in steps if self._went_back_to is None or s < self._went_back_to]
        if not before:
            raise failure
        self._went_back_to = at = before[-1]
        log.warning(
            "%s. Going back to the weights of step %d, and on with the data after step %d",
            str(failure).split(";")[0], at, step,
        )  # fmt: skip
        target = self._session.blueprint.target()
        old = restore(self._checkpoints, at, target, self._session.run.optimizer)
        state = dataclasses.replace(
            old,
            step=state.step,
            bad_steps=old.bad_steps + (step - at),
            bad_streak=jax.device_put(np.int32(0), target.bad_streak.sharding),
            guard=state.guard,
        )
        with self._watch.doing("saving"):
            self._checkpoints.save(step, state, self._session.meta_at(step))
        return state

    def _save_after(
        self,
        step: int,
        state: TrainState,
        metrics: dict[str, jax.Array],
        figures: dict[str, float],
    ) -> None:
        milestone = self._cadences.due("milestone", step)
        due = self._cadences.due("save", step) or milestone or self._checkpoints.is_best(figures)
        if not due and not self._stopped_by:
            return
        self._retire(0)
        # Weights that yield no finite loss must not push a good checkpoint out.
        if self._stopped_by or not int(metrics["bad_streak"]):
            self._dog.beat(f"the save of step {step}", 4)
            meta = self._session.meta_at(step)
            with self._watch.doing("saving"):
                self._checkpoints.save(step, state, meta, figures, milestone)
            self._dog.beat(f"step {step + 1}")

    def _end_early(self, step: int) -> None:
        self._dog.beat(f"the save of step {step}", 4)
        self._checkpoints.wait()
        name = name_of(self._stopped_by or self._stop.number)
        raise Preempted(
            f"stopped by {name} after step {step} of {self._session.total_steps}; saved in "
            f"{self._session.workdir}: the same command continues"
        )
