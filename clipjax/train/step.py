"""One training step: a pure function of (state, batch), meant for one donated `jax.jit`.

With `accumulate = k` the step is the cached-gradient kind (GradCache, arXiv:2101.06983): embed all micro-batches,
take the loss and its cotangents once on the full batch (for scale and bias too), then back-propagate one
micro-batch at a time with the same dropout keys. It equals the big batch, in the memory of one micro-batch.

Objectives that see each example alone (captions) need no cache: they ride in the second pass, whose micro-batches
sum to the whole since what they divide by is known before. The first pass does not ask the model for what they need.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from clipjax.batch import SHARED, Batch, Encoded
from clipjax.errors import ClipjaxError
from clipjax.layout import on_mesh
from clipjax.mesh import BATCH_AXES, batch_shards
from clipjax.objectives.base import Metrics, Objective
from clipjax.objectives.diagnostics import broken_rows
from clipjax.objectives.pairs import PairEngine
from clipjax.optim import Ema
from clipjax.params import join, select, split
from clipjax.train.state import Blueprint, TrainState

Step = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


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
) -> Step:
    """The step function.

    Returns:
      `step(state, batch) -> (state, metrics)`. A step whose loss or gradient is not finite leaves everything but
      the step and the counters as it was.
    """

    _check_offer(blueprint, objective)

    def forward(params, model_state, batch, key, needs=frozenset()):
        module = blueprint.module(params, model_state)
        with on_mesh(mesh):
            encoded = module(batch, key=key, **dict.fromkeys(needs, True))
        return encoded, split(module)[2]

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        moving, frozen = select(blueprint.trainable, state.params)
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        objective_state, batch = objective.prepare(
            state.objective_state,
            state.params,
            batch,
            lambda params, batch: _encode(
                forward, params, state.model_state, batch, mesh, accumulate
            ),
        )
        loss_and_grads = _whole_batch if accumulate == 1 else _accumulated(mesh, accumulate)
        loss, grads, metrics, model_state = loss_and_grads(
            lambda moving, *rest: forward(join(moving, frozen), state.model_state, *rest),
            objective,
            engine,
            moving,
            batch,
            key,
        )
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        updates, opt_state = blueprint.transform.update(grads, state.opt_state, moving)
        moving = optax.apply_updates(moving, updates)
        average = ema.update(state.ema, moving, state.step) if ema else state.ema

        proposed = dataclasses.replace(
            state,
            params=join(moving, frozen),
            model_state=model_state,
            opt_state=opt_state,
            ema=average,
            objective_state=objective_state,
        )
        # What the optimizer's own counter says: skipped steps do not advance the schedule.
        applied = state.step - state.bad_steps
        metrics = {
            "loss": loss,
            **metrics,
            "grad_norm": grad_norm,
            "lr": blueprint.learning_rate(applied),
        }
        bad = 1 - finite.astype(jnp.int32)
        kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), proposed, state)
        state = dataclasses.replace(
            kept,
            step=state.step + 1,
            bad_steps=state.bad_steps + bad,
            bad_streak=(state.bad_streak + 1) * bad,
        )
        return state, metrics | {"bad_steps": state.bad_steps, "bad_streak": state.bad_streak}

    return step


def _whole_batch(forward, objective, engine, moving, batch, key):
    def loss_fn(moving):
        encoded, model_state = forward(moving, batch, key, objective.needs)
        loss, metrics = _compare(objective, encoded, batch, engine)
        return loss, (metrics, model_state)

    (loss, (metrics, model_state)), grads = jax.value_and_grad(loss_fn, has_aux=True)(moving)
    return loss, grads, metrics, model_state


def _accumulated(mesh: Mesh, k: int):
    def loss_and_grads(forward, objective, engine, moving, batch, key):
        coupled, local = objective.split()
        totals = local.totals(batch)
        micro = jax.tree.map(lambda x: _to_micro(x, mesh, k), batch)
        keys = jax.random.split(key, k)

        def first_pass():
            """The coupled part of the loss, its metrics, and its cotangents for each micro-batch."""

            def embed(_, inputs):
                return None, forward(moving, *inputs, coupled.needs)[0]

            def loss_fn(encoded):
                return _compare(coupled, encoded, batch, engine)

            _, stacked = jax.lax.scan(embed, None, (micro, keys))
            full = _join_micro(stacked, mesh, k)
            (loss, metrics), cotangent = jax.value_and_grad(loss_fn, has_aux=True)(full)
            return loss, metrics, _split_cotangent(cotangent, mesh, k)

        def second_pass(cotangents):
            """The per-example part of the loss, its metrics, all gradients, and the model's new state."""

            def backward(grads, inputs):
                batch_i, key_i, cotangent_i = inputs

                def outputs(moving):
                    encoded, model_state = forward(moving, batch_i, key_i, objective.needs)
                    loss, metrics = local.local(encoded, batch_i, totals, engine)
                    return (_only(encoded, cotangent_i), loss), (metrics, model_state)

                (_, loss), vjp, (metrics, model_state) = jax.vjp(outputs, moving, has_aux=True)
                (grads_i,) = vjp((cotangent_i, jnp.ones_like(loss)))
                return jax.tree.map(jnp.add, grads, grads_i), (loss, metrics, model_state)

            zeros = jax.tree.map(jnp.zeros_like, moving)
            grads, parts = jax.lax.scan(backward, zeros, (micro, keys, cotangents))
            losses, metrics, model_states = parts
            model_state = jax.tree.map(lambda x: x.mean(0), model_states)
            return losses.sum(), jax.tree.map(lambda x: x.sum(0), metrics), grads, model_state

        loss, metrics, cotangents = first_pass() if coupled is not None else (0.0, {}, None)
        local_loss, local_metrics, grads, model_state = second_pass(cotangents)
        return loss + local_loss, grads, metrics | local_metrics, model_state

    return loss_and_grads


def _compare(objective: Objective, encoded: Encoded, batch: Batch, engine: PairEngine):
    """Loss and metrics, the model's scale and bias among them."""
    if encoded.text is None and objective.split()[0] is not None:
        raise ClipjaxError(
            f"{type(objective).__name__} compares images with texts, and this model only captions: it has no "
            "embeddings of texts. Give the model a text tower, or take Caption alone as the objective"
        )
    loss, metrics = objective(encoded, batch, engine)
    scalars = {name: getattr(encoded, name) for name in ("logit_scale", "logit_bias")}
    scalars = {name: x for name, x in scalars.items() if x is not None}
    return loss, metrics | broken_rows(encoded) | scalars


def _check_offer(blueprint: Blueprint, objective: Objective) -> None:
    """Refuses an objective that needs what the model does not offer."""
    module = blueprint.module(blueprint.abstract.params, blueprint.abstract.model_state)
    offered = inspect.signature(module.__call__).parameters
    for need in sorted(objective.needs - offered.keys()):
        if not any(p.kind is p.VAR_KEYWORD for p in offered.values()):
            raise ClipjaxError(
                f"the objective needs {need}, which {type(module).__name__} does not offer (its __call__ takes "
                f"no {need!r}): choose a model that does, such as CoCa, or another objective"
            )


def _encode(forward, params, model_state, batch, mesh, accumulate) -> Encoded:
    """Embeddings in inference mode, a micro-batch at a time."""
    if accumulate == 1:
        return forward(params, model_state, batch, None)[0]
    micro = jax.tree.map(lambda x: _to_micro(x, mesh, accumulate), batch)
    _, stacked = jax.lax.scan(
        lambda _, b: (None, forward(params, model_state, b, None)[0]), None, micro
    )
    return _join_micro(stacked, mesh, accumulate)


def _to_micro(x: jax.Array, mesh: Mesh, k: int) -> jax.Array:
    """[B, ...] -> [k, B/k, ...]; every device keeps its own rows, so nothing travels."""
    shards = batch_shards(mesh)
    rest = x.shape[1:]
    x = x.reshape(shards, k, -1, *rest).swapaxes(0, 1).reshape(k, -1, *rest)
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(None, BATCH_AXES)))


def _from_micro(x: jax.Array, mesh: Mesh, k: int) -> jax.Array:
    """The inverse of `_to_micro`."""
    shards = batch_shards(mesh)
    rest = x.shape[2:]
    x = x.reshape(k, shards, -1, *rest).swapaxes(0, 1).reshape(-1, *rest)
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(BATCH_AXES)))


def _join_micro(stacked: Encoded, mesh: Mesh, k: int) -> Encoded:
    """Micro-batches' outputs as one: rows are joined, what belongs to the batch is the same in all."""
    return _map_fields(lambda x: _from_micro(x, mesh, k), lambda x: x[0], stacked)


def _split_cotangent(cotangent: Encoded, mesh: Mesh, k: int) -> Encoded:
    """For each micro-batch its rows, and the k-th part of the one cotangent of scale and bias."""
    return _map_fields(
        lambda g: _to_micro(g, mesh, k),
        lambda g: jnp.broadcast_to(g / k, (k, *g.shape)),
        cotangent,
    )


def _map_fields(rows: Callable, shared: Callable, encoded: Encoded) -> Encoded:
    fields = {f.name: getattr(encoded, f.name) for f in dataclasses.fields(encoded)}
    return dataclasses.replace(
        encoded,
        **{
            name: (shared if name in SHARED else rows)(x)
            for name, x in fields.items()
            if x is not None
        },
    )


def _only(encoded: Encoded, like: Encoded | None) -> Encoded | None:
    """`encoded` without the fields that `like` has not; None for None."""
    if like is None:
        return None
    names = [f.name for f in dataclasses.fields(like) if getattr(like, f.name) is None]
    without: dict[str, Any] = dict.fromkeys(names)
    return dataclasses.replace(encoded, **without)


def jit_step(step: Step, blueprint: Blueprint) -> Step:
    """`step` compiled with the state's layout fixed and its buffers donated."""
    layout = blueprint.shardings
    return jax.jit(
        step, in_shardings=(layout, None), out_shardings=(layout, None), donate_argnums=0
    )
