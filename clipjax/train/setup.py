"""From a configuration and a folder to everything the loop works with, or to one clear refusal.

Nothing is written before everything has been found to fit.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import json
import logging
import tempfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from clipjax.checkpoint import Checkpoints
from clipjax.component import to_json
from clipjax.config import Run
from clipjax.data import Data, TokenizerModel, load_tokenizer
from clipjax.data.placement import process_rows
from clipjax.errors import ClipjaxError, DamagedCheckpoint, did_you_mean
from clipjax.evals.base import Evaluator, Runner, build_runners
from clipjax.evals.flops import count
from clipjax.generation.generate import special_tokens
from clipjax.mesh import batch_sharding
from clipjax.meta import Meta, pack_tokenizer, unpack_tokenizer
from clipjax.objectives.base import leaves, union
from clipjax.optim import Scale
from clipjax.predictor import Predictor
from clipjax.train.agreement import decide, meeting, surroundings
from clipjax.train.folder import claim
from clipjax.train.resume import restore
from clipjax.train.state import Blueprint, Leaves, TrainState
from clipjax.train.step import Step, check_batch, jit_step, make_step
from clipjax.train.votes import Votes

log = logging.getLogger(__name__)


@dataclasses.dataclass
class Session:
    """A run that is set up: what the loop works with.

    Attributes:
      start: the checkpoint to continue from; None for a fresh run.
      between_batches: called before every batch that an evaluator embeds.
    """

    run: Run
    workdir: Path
    mesh: Mesh
    loader: Any
    scale: Scale
    total_steps: int
    blueprint: Blueprint
    step: Step
    meta: Meta
    evaluators: list[tuple[Evaluator, Runner]]
    predictor: Predictor
    start: int | None
    start_leaves: tuple[Leaves, Leaves]
    between_batches: Callable[[], None] | None = None

    def meta_at(self, step: int) -> Meta:
        """What a checkpoint of `step` holds beside the state."""
        return dataclasses.replace(self.meta, examples_seen=self.scale.examples(step))

    def flops_per_example(self) -> float | None:
        """Of the model for one example, forward and backward (twice the forward); None where it cannot be counted."""
        blueprint, needs = (
            self.blueprint,
            union(p.objective.needs for p in leaves(self.run.objective)),
        )
        one = {
            name: jax.ShapeDtypeStruct((1, *row.shape), row.dtype)
            for name, row in self.run.data.spec().items()
        }

        def forward(params, model_state, batch):
            return blueprint.module(params, model_state)(batch, needs=needs).rows

        try:
            traced = jax.make_jaxpr(forward)(
                blueprint.abstract.params, blueprint.abstract.model_state, one
            )
        except (
            Exception
        ) as error:  # a model that cannot be traced alone costs the figure, not the run
            log.info("no model FLOPs: %s", error)
            return None
        return 3 * count(traced.jaxpr)

    def evaluate(self, state: TrainState, runners: Sequence[Runner]) -> dict[str, float]:
        """The figures of some of the run's evaluators."""
        results: dict[str, float] = {}
        if runners:
            predictor = self.predictor_for(state)
            for runner in runners:
                results |= runner(predictor)
        return results

    def predictor_for(self, state: TrainState) -> Predictor:
        """The model as evaluators see it: with averaged weights where the run asks for them."""
        ema = self.run.ema
        averaged = ema is not None and ema.evaluate
        predictor = self.predictor.with_params(
            self.blueprint.averaged(state) if averaged else state.params,
            state.ema_state if averaged else state.model_state,
        )
        predictor.between_batches = self.between_batches
        return predictor

    def restore_or_init(self) -> TrainState:
        """The state to begin with, laid out on the mesh.

        Raises:
          ClipjaxError: the checkpoint is of another model, or cannot be read.
        """
        if self.start is None:
            return self.blueprint.init(self.start_leaves)
        log.info("continuing from step %d of %s", self.start, self.workdir)
        failure: DamagedCheckpoint | None = None
        state: Any = None
        with contextlib.closing(Checkpoints(self.workdir)) as checkpoints:
            try:
                target = self.blueprint.target()
                state = restore(checkpoints, self.start, target, self.run.optimizer)
            except DamagedCheckpoint as error:
                failure = error
        # One process may be alone in seeing the damage, and all must go on from the same step.
        if Votes(self.mesh).settle([failure is not None])[0] and failure is None:
            failure = DamagedCheckpoint(
                f"another process cannot read checkpoint {self.start}; its own message says why",
                self.start,
            )
        if failure is not None:
            raise failure
        return state


def setup(run: Run, workdir: Path, start: int | None = None, new_data: bool = False) -> Session:
    """Opens everything a run needs.

    Args:
      run: the experiment.
      workdir: its folder.
      start: the checkpoint to continue from; None for a fresh run.
      new_data: whether the data may be other than they were when the checkpoint was written.

    Raises:
      ClipjaxError: something does not fit together, or the processes of the run differ.
      DamagedCheckpoint: the checkpoint cannot be read.
    """
    with meeting("setting the run up") as compare:
        claim(run, workdir)
        mesh = run.mesh.build()
        check_batch(run.data.batch_size, mesh, run.accumulate)
        run.sharding.check_heads(run.model, mesh)
        check_best(run)
        for tracker in run.trackers:
            tracker.check()
        saved = read_meta(workdir, start) if start is not None else None
        tokenizer = built_tokenizer(run.data) if saved is None else saved_tokenizer(saved)
        check_vocabulary(run, tokenizer)
        loader = run.data.build(tokenizer, run.seed, *process_rows(mesh))
        meta = Meta(
            run=to_json(run),
            tokenizer=pack_tokenizer(tokenizer),
            num_examples=loader.num_examples,
            fingerprint=loader.fingerprint(),
        )
        if saved is not None:
            check_data(saved, meta, workdir, new_data)
        seen = saved.examples(start or 0) if saved else 0
        shift = seen - (start or 0) * run.data.batch_size
        scale = Scale(run.data.batch_size, loader.num_examples, shift)
        if shift:
            log.info("%d examples were seen so far, in %d steps of other sizes", seen, start)
        total_steps = run.duration.last_step(scale)
        if run.duration.amount == 0:
            raise ClipjaxError(
                f"duration={run.duration.amount} {run.duration.unit}: there is nothing to train"
            )
        if start is not None and start > total_steps:
            raise ClipjaxError(
                f"{workdir} is at step {start} already, and duration={run.duration.amount:g} "
                f"{run.duration.unit} ends at step {total_steps}: lengthen it, or give another --workdir"
            )
        compare(
            surroundings(meta.run)
            | {
                "configuration": meta.run,
                "examples": meta.num_examples,
                "data": meta.fingerprint,
                "tokenizer": hashlib.sha256(json.dumps(meta.tokenizer).encode()).hexdigest()[:12],
                "last step": total_steps,
            }
        )
    blueprint = Blueprint.draw(
        run.model,
        run.objective,
        run.optimizer,
        run.ema,
        mesh,
        run.sharding,
        total_steps,
        # A run whose length is in steps goes by steps whatever their size.
        dataclasses.replace(scale, shift=0) if run.duration.unit == "steps" else scale,
        run.seed,
        run.data.spec(),
        run.spikes,
    )
    log.info(run.sharding.describe(blueprint.abstract, blueprint.shardings, mesh))
    engine = run.engine(mesh)
    log.info(engine.describe(run.data.batch_size, getattr(run.model, "embed_dim", 0)))
    step = make_step(
        blueprint,
        run.objective,
        engine,
        mesh,
        run.accumulate,
        run.ema,
        special_tokens(tokenizer),
        run.spikes,
        run.sharding.gather_gb,
    )
    compiled = compiled_step(blueprint, step, run.data, mesh)
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
        meta=meta,
        evaluators=evaluators,
        predictor=predictor,
        start=start,
        start_leaves=blueprint.start_leaves(begin) if begin else ({}, {}),
    )


def compiled_step(blueprint: Blueprint, step: Step, data: Data, mesh: Mesh) -> Step:
    """The step as the loop calls it, (state, batch) -> (state, metrics), traced once.

    Raises:
      ClipjaxError: the objective asks the model or the batch for something that they do not have.
    """
    jitted = jit_step(step, blueprint)
    teachers = (blueprint.frozen_weights,) if blueprint.frozen else ()
    split = batch_sharding(mesh)
    batch = {
        name: jax.ShapeDtypeStruct((data.batch_size, *row.shape), row.dtype, sharding=split)
        for name, row in data.spec().items()
    }
    jitted.eval_shape(blueprint.target(), batch, *teachers)  # the first call uses the same trace
    return lambda state, batch: jitted(state, batch, *teachers)


def read_meta(workdir: Path, step: int) -> Meta:
    """What a checkpoint of this run holds beside the state."""
    with contextlib.closing(Checkpoints(workdir)) as checkpoints:
        return checkpoints.meta(step)


def built_tokenizer(data: Data) -> TokenizerModel:
    """The tokenizer that a run begins with; one that must be trained is trained in process 0 alone."""
    if not data.tokenizer.trains or jax.process_count() == 1:
        return data.tokenizer.build(data.iter_captions())

    def train() -> str:
        files = pack_tokenizer(data.tokenizer.build(data.iter_captions()))
        # Small enough to be told: a vocabulary is text that repeats itself.
        return base64.b85encode(zlib.compress(json.dumps(files).encode(), 9)).decode()

    told = decide("the tokenizer", train)
    files = json.loads(zlib.decompress(base64.b85decode(told)))
    with tempfile.TemporaryDirectory() as scratch:
        unpack_tokenizer(files, Path(scratch))
        return load_tokenizer(scratch)


def saved_tokenizer(meta: Meta) -> TokenizerModel:
    """The tokenizer of a checkpoint: the run goes on with the one it began with."""
    with tempfile.TemporaryDirectory() as scratch:
        unpack_tokenizer(meta.tokenizer, Path(scratch))
        return load_tokenizer(scratch)


def check_data(saved: Meta, now: Meta, workdir: Path, new_data: bool) -> None:
    """Refuses to go on with other data under the same name: order, epochs and schedule would all change unseen.

    Raises:
      ClipjaxError: their number or their fingerprint is another, and nobody said that this is meant.
    """
    if saved.num_examples is None or now.num_examples == saved.num_examples:
        same = None in (saved.fingerprint, now.fingerprint) or saved.fingerprint == now.fingerprint
        if same:
            return
        what = f"the data are not those of {workdir}'s checkpoint, though as many"
    else:
        what = f"{workdir} began with {saved.num_examples} examples, and its data hold {now.num_examples} now"
    if new_data or saved.run["data"]["source"] != now.run["data"]["source"]:
        log.warning("%s: order, epochs and what hangs on them change from here on", what)
        return
    raise ClipjaxError(
        f"{what}: put the data back as they were, or say --new-data to go on with these (another order, "
        "another length of an epoch)"
    )


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
