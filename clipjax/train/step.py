"""One training step: a pure function of (state, batch), meant for one donated `jax.jit`.

With `accumulate = k` the step is the cached-gradient kind (GradCache, arXiv:2101.06983): embed all micro-batches,
take the loss and its cotangents once on the full batch (for scale and bias too), then back-propagate one
micro-batch at a time with the same dropout keys. It equals the big batch, in the memory of one micro-batch.

Objectives that see each example alone (captions) need no cache: they ride in the second pass, whose micro-batches
sum to the whole since what they divide by is known before. The first pass does not ask the model for what they need.
Rows that an objective chose for an example (`Chosen`) are encoded again beside it in that pass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from clipjax.batch import Batch, Encoded, SpecialTokens
from clipjax.errors import ClipjaxError
from clipjax.layout import on_mesh
from clipjax.mesh import batch_shards
from clipjax.objectives.base import (
    Context,
    Metrics,
    Objective,
    add_up,
    leaves,
    named,
    union,
)
from clipjax.objectives.pairs import PairEngine
from clipjax.objectives.teachers import Itself, MovingAverage
from clipjax.optim import Ema, SpikeGuard
from clipjax.params import join, select, split
from clipjax.sharding import Sharding, to_devices
from clipjax.train.accumulate import Model, accumulated, apart, facts, from_micro, to_micro
from clipjax.train.state import Blueprint, TrainState

Step = Callable[..., tuple[TrainState, Metrics]]

IN_FLIGHT = 2
"""Steps that wait behind the one under way, each with its batch; without a bound simulated devices deadlock."""


def check_batch(batch_size: int, mesh: Mesh, accumulate: int) -> None:
    """Refuses a global batch that the mesh or the micro-batches do not divide."""
    shards = batch_shards(mesh)
    if accumulate < 1:
        raise ClipjaxError(f"accumulate={accumulate}: must be at least 1")
    if batch_size % (shards * accumulate):
        raise ClipjaxError(
            f"data.batch_size={batch_size} does not divide over {shards} batch shards "
            f"(mesh group x data) times accumulate={accumulate}: use a multiple of {shards * accumulate}"
        )


def make_step(
    blueprint: Blueprint,
    objective: Objective,
    engine: PairEngine,
    mesh: Mesh,
    accumulate: int = 1,
    ema: Ema | None = None,
    tokens: SpecialTokens | None = None,
    spikes: SpikeGuard | None = None,
    sharding: Sharding = Sharding(),  # noqa: B008
) -> Step:
    """The step function.

    Args:
      sharding: the run's, for what travels between micro-batches.
      spikes: skips steps that are finite and yet out of proportion.
      tokens: of the run's tokenizer, for objectives that read tokens.

    Returns:
      `step(state, batch, frozen_teachers={}) -> (state, metrics)`. A step whose loss or gradient is not finite
      leaves everything but the step and the counters as it was.
    """
    parts = leaves(objective)

    def forward(params, model_state, batch, key, needs):
        module = blueprint.module(params, model_state)
        with on_mesh(mesh):
            encoded = module(batch, key=key, needs=needs)
        return encoded, split(module)[2]

    def heads(params, model_state, key) -> dict[str, Any]:
        """What `context.head` is, as keywords for a context."""
        module = blueprint.module(params, model_state)
        if not hasattr(module, "head"):
            return {}

        def head(name, *arrays):
            with on_mesh(mesh):
                return module.head(name, *arrays, key=key)

        return {"head": head}

    def step(state: TrainState, batch: Batch, frozen_teachers=None) -> tuple[TrainState, Metrics]:
        moving, frozen = select(blueprint.trainable, state.params)
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        context = Context(
            engine=engine,
            batch=batch,
            step=state.step,
            key=jax.random.fold_in(key, 1),
            tokens=tokens,
        )

        def encode(teacher, needs):
            if isinstance(teacher, Itself):
                encoder = forward, state.params, state.model_state
            elif isinstance(teacher, MovingAverage):
                average = state.averages[blueprint.name_of(teacher)]
                encoder = forward, join(average, frozen), state.model_state
            else:
                encoder = blueprint.frozen_encoder(teacher, frozen_teachers, mesh)
            try:
                found = _encode(*encoder, teacher.view(batch), needs, mesh, accumulate)
            except ClipjaxError as error:
                raise ClipjaxError(f"the teacher {teacher}: {error}") from error
            return jax.lax.stop_gradient(found)

        own_state = state.objective_state
        aux = {
            leaf.name: leaf.objective.prepare(
                own_state.get(leaf.name, {}),
                dataclasses.replace(leaf.own(context), encode=encode),
            )
            for leaf in parts
        }
        model = Model(
            lambda moving, *rest: forward(join(moving, frozen), state.model_state, *rest),
            lambda moving, key: heads(join(moving, frozen), state.model_state, key),
        )
        loss_and_grads = _whole_batch
        if accumulate > 1:
            by_device = apart(blueprint, mesh, sharding.gather_gb)
            loss_and_grads = accumulated(mesh, accumulate, by_device, sharding.reduce_dtype)
        loss, grads, metrics, model_state, results = loss_and_grads(
            model, parts, moving, context, aux, key
        )
        grad_norm = optax.tree.norm(grads)
        good = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        guard = state.guard
        if spikes is not None:
            spike, guard = spikes.check(guard, loss, grad_norm)
            good &= ~spike

        updates, opt_state = blueprint.transform.update(grads, state.opt_state, moving)
        moved = optax.apply_updates(moving, updates)
        averages = {
            name: teacher.follow(state.averages[name], moved)
            for name, teacher in blueprint.averages.items()
        }
        average, ema_state = state.ema, state.ema_state
        if ema is not None:
            average = ema.update(average, moved, state.step)
            ema_state = ema.update(ema_state, model_state, state.step)
        advanced = {
            leaf.name: leaf.objective.advance(
                own_state[leaf.name], results.get(leaf.name, {}), leaf.own(context, aux)
            )
            for leaf in parts
            if leaf.name in own_state
        }
        before = moving, state.opt_state, state.averages, state.ema, state.ema_state
        after = moved, opt_state, averages, average, ema_state
        # Selected element by element, in the pass that makes them: what a `cond` chose would be copied to
        # its place on GPUs and TPUs.
        (moving, opt_state, averages, average, ema_state), model_state, advanced = jax.tree.map(
            lambda new, old: jax.lax.select(
                good, new, old
            ),  # of one shape and dtype, or it refuses
            (after, model_state, advanced),
            (before, state.model_state, own_state),
        )
        # What the optimizer's own counter says: skipped steps do not advance the schedule.
        applied = state.step - state.bad_steps
        metrics = {
            "loss": loss,
            **metrics,
            "grad_norm": grad_norm,
            "lr": blueprint.learning_rate(applied),
        }
        if spikes is not None:
            metrics["spikes"] = guard["spikes"]
        bad = 1 - good.astype(jnp.int32)
        state = dataclasses.replace(
            state,
            params=join(moving, frozen),
            model_state=model_state,
            opt_state=opt_state,
            ema=average,
            ema_state=ema_state,
            averages=averages,
            objective_state=advanced,
            guard=guard,
            step=state.step + 1,
            bad_steps=state.bad_steps + bad,
            bad_streak=(state.bad_streak + 1) * bad,
        )
        return state, metrics | {"bad_steps": state.bad_steps, "bad_streak": state.bad_streak}

    return step


def _whole_batch(model, parts, moving, context, aux, key):
    needs = union(leaf.objective.needs | leaf.objective.fuse_needs for leaf in parts)

    def loss_fn(moving):
        encoded, model_state = model.forward(moving, context.batch, key, needs)
        seen = dataclasses.replace(context, **model.heads(moving, key))
        outcomes = [leaf.objective(encoded, leaf.own(seen, aux)) for leaf in parts]
        loss, metrics, results = add_up(parts, context, outcomes)
        return loss, (named(metrics) | facts(encoded), model_state, results)

    (loss, (metrics, model_state, results)), grads = jax.value_and_grad(loss_fn, has_aux=True)(
        moving
    )
    return loss, grads, metrics, model_state, results


def _encode(forward, params, model_state, batch, needs, mesh, accumulate) -> Encoded:
    """Embeddings in inference mode, a micro-batch at a time."""
    if accumulate == 1:
        return forward(params, model_state, batch, None, needs)[0]
    micro = jax.tree.map(lambda x: to_micro(x, mesh, accumulate), batch)
    _, stacked = jax.lax.scan(
        lambda _, b: (None, forward(params, model_state, b, None, needs)[0]), None, micro
    )
    rows = jax.tree.map(lambda x: from_micro(x, mesh, accumulate), stacked.rows)
    return Encoded(rows, jax.tree.map(lambda x: x[0], stacked.shared))


def jit_step(take: Step, blueprint: Blueprint) -> Any:
    """A step compiled with the state's layout fixed and its buffers donated.

    Takes (state, batch), and as a third argument the weights of frozen teachers where the objective has any.
    """
    layout = blueprint.shardings

    def step(state: TrainState, *others):
        return take(to_devices(state, layout), *others)

    inputs = (layout, None, None) if blueprint.frozen else (layout, None)
    return jax.jit(step, in_shardings=inputs, out_shardings=(layout, None), donate_argnums=0)
