"""From a configuration and a folder to everything the loop works with, or to one clear refusal.

Nothing is written before everything has been found to fit.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from clipjax.checkpoint import FORMAT, Checkpoints, latest_step, pack_tokenizer, unpack_tokenizer
from clipjax.component import to_json
from clipjax.config import Run
from clipjax.data import load_tokenizer
from clipjax.data.placement import process_rows
from clipjax.errors import ClipjaxError
from clipjax.evals.base import Evaluator, Runner, build_runners
from clipjax.objectives.pairs import PairEngine
from clipjax.optim import Scale
from clipjax.predictor import Predictor
from clipjax.train.state import Blueprint, Leaves, TrainState
from clipjax.train.step import Step, check_batch, jit_step, make_step

log = logging.getLogger(__name__)
RUN_FILE = "run.json"
TOKENIZER_FOLDER = "tokenizer"


@dataclasses.dataclass
class Session:
    """A run that is set up: what the loop works with."""

    run: Run
    workdir: Path
    mesh: Mesh
    loader: Any
    scale: Scale
    total_steps: int
    blueprint: Blueprint
    step: Step
    checkpoints: Checkpoints
    meta: dict[str, Any]
    evaluators: list[tuple[Evaluator, Runner]]
    predictor: Predictor
    start_leaves: tuple[Leaves, Leaves]

    def evaluate(self, state: TrainState, step: int | None) -> dict[str, float]:
        """The figures of the evaluators due at `step`; of all of them when `step` is None."""
        due = [
            runner
            for evaluator, runner in self.evaluators
            if step is None or (evaluator.every is not None and evaluator.every.due(step))
        ]
        if not due:
            return {}
        predictor = self.predictor_for(state)
        results: dict[str, float] = {}
        for runner in due:
            results |= runner(predictor)
        return results

    def predictor_for(self, state: TrainState) -> Predictor:
        """The model as evaluators see it: with averaged weights where the run asks for them."""
        ema = self.run.ema
        params = self.blueprint.averaged(state) if ema and ema.evaluate else state.params
        return self.predictor.with_params(params, state.model_state)

    def save(self, step: int, state: TrainState, metrics: dict[str, float] | None = None) -> None:
        """Starts saving the state after `step`, with the evaluation of that step if there is one."""
        self.checkpoints.save(step, state, self.meta, metrics)

    def restore_or_init(self, start: int | None) -> TrainState:
        """The state to begin with, laid out on the mesh; `start` is the checkpoint to continue from."""
        if start is None:
            return self.blueprint.init(self.start_leaves)
        log.info("continuing from step %d of %s", start, self.workdir)
        return self.checkpoints.restore(start, self.blueprint.target())

    def write_run_files(self) -> None:
        """`run.json` and `tokenizer/`."""
        if jax.process_index() == 0:
            self.workdir.mkdir(parents=True, exist_ok=True)
            unpack_tokenizer(self.meta["tokenizer"], self.workdir / TOKENIZER_FOLDER)
            text = json.dumps(self.meta["run"], indent=2, ensure_ascii=False)
            replace_file(self.workdir / RUN_FILE, text)


def setup(run: Run, workdir: Path) -> tuple[Session, int | None]:
    """Opens everything a run needs.

    Returns:
      The session, and the step of the checkpoint to continue from (None for a fresh run).

    Raises:
      ClipjaxError: something does not fit together.
    """
    claim(run, workdir)
    mesh = run.mesh.build()
    check_batch(run.data.batch_size, mesh, run.accumulate)
    saved = workdir / TOKENIZER_FOLDER
    tokenizer = (
        load_tokenizer(saved)
        if saved.is_dir()
        else run.data.tokenizer.build(run.data.iter_captions())
    )
    check_vocabulary(run, tokenizer)
    loader = run.data.build(tokenizer, run.seed, *process_rows(mesh))
    scale = Scale(run.data.batch_size, loader.num_examples)
    total_steps = run.duration.steps(scale)
    if total_steps < 1:
        raise ClipjaxError(
            f"duration={run.duration.amount} {run.duration.unit}: there is nothing to train"
        )
    blueprint = Blueprint.draw(
        run.model,
        run.objective,
        run.optimizer,
        run.ema,
        mesh,
        run.sharding,
        total_steps,
        scale,
        run.seed,
    )
    engine = PairEngine(mesh, run.exchange, run.pair_chunk, run.pair_dtype)
    log.info(engine.describe(run.data.batch_size, getattr(run.model, "embed_dim", 0)))
    step = make_step(blueprint, run.objective, engine, mesh, run.accumulate, run.ema)
    predictor = Predictor(
        blueprint.graphdef,
        params={},
        model_state={},
        tokenizer=tokenizer,
        context_length=run.data.context_length,
        image_size=run.data.image_size,
        mesh=mesh,
        resize=run.data.resize,
    )
    evaluators = build_runners(run.evals)
    for _, runner in evaluators:
        runner.prepare(predictor)
    fresh = latest_step(workdir) is None
    start_leaves = blueprint.start_leaves(run.start) if run.start and fresh else ({}, {})
    session = Session(
        run=run,
        workdir=workdir,
        mesh=mesh,
        loader=loader,
        scale=scale,
        total_steps=total_steps,
        blueprint=blueprint,
        step=jit_step(step, blueprint),
        checkpoints=Checkpoints(workdir, run.checkpoint),
        meta={"format": FORMAT, "run": to_json(run), "tokenizer": pack_tokenizer(tokenizer)},
        evaluators=evaluators,
        predictor=predictor,
        start_leaves=start_leaves,
    )
    return session, session.checkpoints.latest()


def claim(run: Run, workdir: Path) -> None:
    """Makes sure that `workdir` is free or holds a run, and says what has changed since it was started.

    Raises:
      ClipjaxError: the folder holds something else.
    """
    if workdir.exists() and not workdir.is_dir():
        raise ClipjaxError(f"{workdir} is a file: --workdir names a folder for the run")
    if not workdir.is_dir() or not any(workdir.iterdir()):
        return
    saved = workdir / RUN_FILE
    if not saved.is_file():
        raise ClipjaxError(
            f"{workdir} is not empty and holds no clipjax run (no {RUN_FILE}): give another --workdir"
        )
    try:
        before = json.loads(saved.read_text())
    except json.JSONDecodeError as error:
        raise ClipjaxError(
            f"{saved} is not JSON ({error}): restore it, or give another --workdir"
        ) from error
    for path, old, new in changes(before, to_json(run)):
        log.warning("continuing %s with %s = %s (was %s)", workdir, path, new, old)


def changes(before: Any, after: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    """(dotted path, old value, new value) for everything that differs between two runs as JSON."""
    if isinstance(before, dict) and isinstance(after, dict):
        names = list(dict.fromkeys([*before, *after]))
        return [
            c
            for n in names
            for c in changes(before.get(n), after.get(n), f"{path}.{n}".lstrip("."))
        ]
    return [] if before == after else [(path, before, after)]


def check_vocabulary(run: Run, tokenizer: Any) -> None:
    """Refuses a text tower (or decoder) that does not fit the tokenizer, where they say what they expect."""
    for part in ("text", "unimodal"):
        _check_part(run, part, getattr(run.model, part, None), tokenizer)


def _check_part(run: Run, part: str, text: Any, tokenizer: Any) -> None:
    size, length = getattr(text, "vocab_size", None), getattr(text, "context_length", None)
    if size is not None and tokenizer.vocab_size > size:
        raise ClipjaxError(
            f"model.{part}.vocab_size={size} is smaller than the tokenizer's {tokenizer.vocab_size} tokens"
        )
    if length is not None and run.data.context_length > length:
        raise ClipjaxError(
            f"data.context_length={run.data.context_length} is longer than model.{part}.context_length={length}"
        )
    for name in ("pad_id", "eos_id"):
        wanted, got = getattr(text, name, None), getattr(tokenizer, name)
        if wanted is not None and wanted != got:
            raise ClipjaxError(
                f"model.{part}.{name}={wanted}, but the tokenizer's is {got}: make them equal"
            )


def replace_file(path: Path, text: str) -> None:
    """Writes a file in one rename, so that a kill leaves the old one or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text + "\n", encoding="utf-8")
    os.replace(temporary, path)
