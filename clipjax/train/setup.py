"""From a configuration and a folder to everything the loop works with, or to one clear refusal.

Nothing is written before everything has been found to fit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import tempfile
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from clipjax.checkpoint import FORMAT, Checkpoints, latest_step, pack_tokenizer, unpack_tokenizer
from clipjax.component import to_json
from clipjax.config import Run
from clipjax.data import Data, TokenizerModel, load_tokenizer
from clipjax.data.placement import process_rows
from clipjax.errors import ClipjaxError, did_you_mean
from clipjax.evals.base import Evaluator, Runner, build_runners
from clipjax.generation.generate import special_tokens
from clipjax.objectives.pairs import PairEngine
from clipjax.optim import Scale
from clipjax.predictor import Predictor
from clipjax.train.folder import claim
from clipjax.train.state import Blueprint, Leaves, TrainState
from clipjax.train.step import Step, check_batch, jit_step, make_step

log = logging.getLogger(__name__)


@dataclasses.dataclass
class Session:
    """A run that is set up: what the loop works with.

    Attributes:
      start: the checkpoint to continue from; None for a fresh run.
    """

    run: Run
    workdir: Path
    mesh: Mesh
    loader: Any
    scale: Scale
    total_steps: int
    blueprint: Blueprint
    step: Step
    meta: dict[str, Any]
    evaluators: list[tuple[Evaluator, Runner]]
    predictor: Predictor
    start: int | None
    start_leaves: tuple[Leaves, Leaves]

    def due(self, step: int | None) -> list[Runner]:
        """The evaluators due after `step`; all of them when `step` is None."""
        return [
            runner
            for evaluator, runner in self.evaluators
            if step is None or (evaluator.every is not None and evaluator.every.due(step))
        ]

    def evaluate(self, state: TrainState, step: int | None) -> dict[str, float]:
        """The figures of the evaluators due after `step`."""
        results: dict[str, float] = {}
        if due := self.due(step):
            predictor = self.predictor_for(state)
            for runner in due:
                results |= runner(predictor)
        return results

    def predictor_for(self, state: TrainState) -> Predictor:
        """The model as evaluators see it: with averaged weights where the run asks for them."""
        ema = self.run.ema
        params = self.blueprint.averaged(state) if ema and ema.evaluate else state.params
        return self.predictor.with_params(params, state.model_state)

    def restore_or_init(self) -> TrainState:
        """The state to begin with, laid out on the mesh.

        Raises:
          ClipjaxError: the checkpoint is of another model, or cannot be read.
        """
        if self.start is None:
            return self.blueprint.init(self.start_leaves)
        log.info("continuing from step %d of %s", self.start, self.workdir)
        with contextlib.closing(Checkpoints(self.workdir)) as checkpoints:
            return checkpoints.restore(self.start, self.blueprint.target())


def setup(run: Run, workdir: Path) -> Session:
    """Opens everything a run needs.

    Raises:
      ClipjaxError: something does not fit together.
    """
    claim(run, workdir)
    mesh = run.mesh.build()
    check_batch(run.data.batch_size, mesh, run.accumulate)
    run.sharding.check_heads(run.model, mesh)
    check_best(run)
    for tracker in run.trackers:
        tracker.check()
    start = latest_step(workdir)
    tokenizer = (
        run.data.tokenizer.build(run.data.iter_captions())
        if start is None
        else saved_tokenizer(workdir, start)
    )
    check_vocabulary(run, tokenizer)
    loader = run.data.build(tokenizer, run.seed, *process_rows(mesh))
    scale = Scale(run.data.batch_size, loader.num_examples)
    total_steps = run.duration.steps(scale)
    if total_steps < 1:
        raise ClipjaxError(
            f"duration={run.duration.amount} {run.duration.unit}: there is nothing to train"
        )
    if start is not None and start > total_steps:
        raise ClipjaxError(
            f"{workdir} is at step {start} already, and duration={run.duration.amount:g} "
            f"{run.duration.unit} ends at step {total_steps}: lengthen it, or give another --workdir"
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
        run.data.spec(),
    )
    log.info(run.sharding.describe(blueprint.abstract, blueprint.shardings, mesh))
    engine = PairEngine(mesh, run.exchange, run.pair_chunk, run.pair_dtype, run.pair_tile_mb)
    log.info(engine.describe(run.data.batch_size, getattr(run.model, "embed_dim", 0)))
    step = make_step(
        blueprint,
        run.objective,
        engine,
        mesh,
        run.accumulate,
        run.ema,
        special_tokens(tokenizer),
    )
    compiled = compiled_step(blueprint, step, run.data)
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
    begin = run.start if start is None else None
    return Session(
        run=run,
        workdir=workdir,
        mesh=mesh,
        loader=loader,
        scale=scale,
        total_steps=total_steps,
        blueprint=blueprint,
        step=compiled,
        meta={"format": FORMAT, "run": to_json(run), "tokenizer": pack_tokenizer(tokenizer)},
        evaluators=evaluators,
        predictor=predictor,
        start=start,
        start_leaves=blueprint.start_leaves(begin) if begin else ({}, {}),
    )


def compiled_step(blueprint: Blueprint, step: Step, data: Data) -> Step:
    """The step as the loop calls it, (state, batch) -> (state, metrics), traced once.

    Raises:
      ClipjaxError: the objective asks the model or the batch for something that they do not have.
    """
    jitted = jit_step(step, blueprint)
    teachers = (blueprint.frozen_weights,) if blueprint.frozen else ()
    batch = {
        name: jax.ShapeDtypeStruct((data.batch_size, *row.shape), row.dtype)
        for name, row in data.spec().items()
    }
    jitted.eval_shape(blueprint.abstract, batch, *teachers)  # the first call uses the same trace
    return lambda state, batch: jitted(state, batch, *teachers)


def saved_tokenizer(workdir: Path, step: int) -> TokenizerModel:
    """The tokenizer of a checkpoint: the run goes on with the one it began with."""
    with contextlib.closing(Checkpoints(workdir)) as checkpoints:
        files = checkpoints.meta(step)["tokenizer"]
    with tempfile.TemporaryDirectory() as scratch:
        unpack_tokenizer(files, Path(scratch))
        return load_tokenizer(scratch)


def check_best(run: Run) -> None:
    """Refuses a `checkpoint.best` of an evaluator that the run does not have."""
    best, names = run.checkpoint.best, [evaluator.name for evaluator in run.evals]
    if best and best.split("/")[0] not in names:
        raise ClipjaxError(
            f"checkpoint.best={best!r} is a figure of no evaluator in evals"
            + did_you_mean(best.split("/")[0], names)
        )


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
