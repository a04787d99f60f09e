"""One training step: a pure function of (state, batch), meant for one donated `jax.jit`.

With `accumulate = k` the step is the cached-gradient kind (GradCache, arXiv:2101.06983): embed all micro-batches,
take the loss and its cotangents once on the full batch (for scale and bias too), then back-propagate one
micro-batch at a time with the same dropout keys. It equals the big batch, in the memory of one micro-batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from clipjax.batch import Batch, Encoded
from clipjax.errors import ClipjaxError
from clipjax.layout import on_mesh
from clipjax.mesh import BATCH_AXES, batch_shards
from clipjax.objectives.base import Metrics, Objective
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

    def forward(params, model_state, batch, key):
        module = blueprint.module(params, model_state)
        with on_mesh(mesh):
            encoded = module(batch, key=key)
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
            lambda moving, batch, key: forward(join(moving, frozen), state.model_state, batch, key),
            lambda encoded, batch: objective(encoded, batch, engine),
            moving,
            batch,
            key,
        )
        grad_norm = optax.global_norm(grads)
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


def _whole_batch(forward, loss_of, moving, batch, key):
    def loss_fn(moving):
        encoded, model_state = forward(moving, batch, key)
        loss, metrics = loss_of(encoded, batch)
        return loss, (_with_scale(metrics, encoded), model_state)

    (loss, (metrics, model_state)), grads = jax.value_and_grad(loss_fn, has_aux=True)(moving)
    return loss, grads, metrics, model_state


def _accumulated(mesh: Mesh, k: int):
    def loss_and_grads(forward, loss_of, moving, batch, key):
        micro = jax.tree.map(lambda x: _to_micro(x, mesh, k), batch)
        keys = jax.random.split(key, k)

        def embed(_, inputs):
            return None, forward(moving, *inputs)[0]

        _, stacked = jax.lax.scan(embed, None, (micro, keys))
        full = _join_micro(stacked, mesh, k)

        def loss_fn(encoded):
            loss, metrics = loss_of(encoded, batch)
            return loss, _with_scale(metrics, encoded)

        (loss, metrics), cotangent = jax.value_and_grad(loss_fn, has_aux=True)(full)
        # Scale and bias have one cotangent for the whole batch: each micro-batch passes on its k-th part.
        per_micro = _split_cotangent(cotangent, mesh, k)

        def backward(grads, inputs):
            batch_i, key_i, cotangent_i = inputs
            _, vjp, model_state = jax.vjp(
                lambda m: forward(m, batch_i, key_i), moving, has_aux=True
            )
            (grads_i,) = vjp(cotangent_i)
            return jax.tree.map(jnp.add, grads, grads_i), model_state

        zeros = jax.tree.map(jnp.zeros_like, moving)
        grads, model_states = jax.lax.scan(backward, zeros, (micro, keys, per_micro))
        model_state = jax.tree.map(lambda x: x.mean(0), model_states)
        return loss, grads, metrics, model_state

    return loss_and_grads


def _encode(forward, params, model_state, batch, mesh, accumulate) -> Encoded:
    """Embeddings in inference mode, a micro-batch at a time."""
    if accumulate == 1:
        return forward(params, model_state, batch, None)[0]
    micro = jax.tree.map(lambda x: _to_micro(x, mesh, accumulate), batch)
    _, stacked = jax.lax.scan(
        lambda _, b: (None, forward(params, model_state, b, None)[0]), None, micro
    )
    return _join_micro(stacked, mesh, accumulate)


def _with_scale(metrics: Metrics, encoded: Encoded) -> Metrics:
    out = metrics | {"logit_scale": encoded.logit_scale}
    return out if encoded.logit_bias is None else out | {"logit_bias": encoded.logit_bias}


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


def _is_row_array(x: jax.Array, stacked: bool) -> bool:
    return x.ndim > int(stacked)


def _join_micro(stacked: Encoded, mesh: Mesh, k: int) -> Encoded:
    """Micro-batches' outputs as one: rows are joined, scalars (scale, bias) are the same in all."""
    return jax.tree.map(
        lambda x: _from_micro(x, mesh, k) if _is_row_array(x, stacked=True) else x[0], stacked
    )


def _split_cotangent(cotangent: Encoded, mesh: Mesh, k: int) -> Encoded:
    return jax.tree.map(
        lambda g: (
            _to_micro(g, mesh, k) if _is_row_array(g, stacked=False) else jnp.full((k,), g / k)
        ),
        cotangent,
    )


def jit_step(step: Step, blueprint: Blueprint) -> Step:
    """`step` compiled with the state's layout fixed and its buffers donated."""
    layout = blueprint.shardings
    return jax.jit(
        step, in_shardings=(layout, None), out_shardings=(layout, None), donate_argnums=0
    )
