"""A step in micro-batches: two passes over them, with the loss on the whole batch between (GradCache).

Where nothing in the model ties examples of different devices together, each device runs its micro-batches by
itself and the gradients are added up over devices once a step, however many micro-batches there are; weights that
FSDP splits are gathered once as well, if whole weights and gradients fit. Else the compiler reduces and gathers for
each micro-batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from clipjax.batch import Batch, Encoded, field
from clipjax.mesh import BATCH_AXES, batch_shards, replicated
from clipjax.objectives.base import (
    Aux,
    Chosen,
    Context,
    Leaf,
    Metrics,
    PerExample,
    add_up,
    named,
    needs_of,
    union,
)
from clipjax.objectives.diagnostics import broken_rows
from clipjax.sharding import per_device_bytes
from clipjax.train.state import Blueprint


@dataclasses.dataclass(frozen=True)
class Model:
    """The model as a function of the parameters that move.

    Attributes:
      forward: (moving, batch, key, needs) -> (Encoded, model state).
      heads: (moving, key) -> what `Context.head` is, as keywords.
    """

    forward: Callable[..., tuple[Encoded, Any]]
    heads: Callable[..., dict[str, Any]]


def apart(blueprint: Blueprint, mesh: Mesh, gather_gb: float) -> bool:
    """Whether devices take their micro-batches by themselves.

    Not if the model has a state of its own (batch statistics are those of a whole micro-batch), if layers are
    split over devices, or if weights that are split do not fit whole, with their gradients, in `gather_gb`.
    """
    if batch_shards(mesh) == 1 or mesh.shape["tensor"] > 1:
        return False
    if jax.tree.leaves(blueprint.abstract.model_state):
        return False
    held, whole = per_device_bytes(blueprint.abstract.params, blueprint.shardings.params)
    return held == whole or 2 * whole <= gather_gb * 1e9


def accumulated(mesh: Mesh, k: int, apart: bool, dtype: str) -> Callable[..., tuple]:
    """Loss and gradients of a step in `k` micro-batches.

    Args:
      mesh: the device mesh.
      k: micro-batches.
      apart: whether devices take their micro-batches by themselves.
      dtype: of the gradients as they are reduced then.
    """
    rows, parts_of = P(None, BATCH_AXES), P(BATCH_AXES)
    shards = batch_shards(mesh) if apart else 1

    def each(function, in_specs, out_specs):
        """`function` on every device, or on all together."""
        if not apart:
            return function
        return jax.shard_map(
            function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
        )

    def own(keys):
        """Keys of a device's own draws."""
        if not apart:
            return keys
        device = jax.lax.axis_index(BATCH_AXES)
        return jax.vmap(lambda key: jax.random.fold_in(key, device))(keys)

    def cut(tree):
        return jax.tree.map(lambda x: to_micro(x, mesh, k), tree)

    def whole(tree):
        return jax.tree.map(lambda x: from_micro(x, mesh, k), tree)

    def one_each(tree):
        """A leading axis for the devices."""
        return jax.tree.map(lambda x: x[None], tree) if apart else tree

    def summed(tree):
        return jax.tree.map(lambda x: x.sum(0), tree) if apart else tree

    def reduced(grads):
        def over_devices(x):
            # `sum` would widen what it adds up, and so what travels.
            narrow = x.astype(dtype)
            return jax.lax.reduce(narrow, narrow.dtype.type(0), jax.lax.add, (0,)).astype(x.dtype)

        return jax.tree.map(over_devices, grads) if apart else grads

    def loss_and_grads(model, parts, moving, context, aux, key):
        coupled = [p for p in parts if not _alone(p)]
        alone = [p for p in parts if _alone(p)]
        totals = {p.name: p.objective.totals(p.own(context, aux)) for p in alone}
        first_needs = union(p.objective.needs for p in parts if p not in alone or _chooses(p))
        second_needs = first_needs | union(
            p.objective.needs | p.objective.fuse_needs for p in alone
        )
        micro, keys = cut(context.batch), jax.random.split(key, k)
        aux_rows = {p.name: cut(aux[p.name].rows) for p in alone}
        weights = jax.lax.with_sharding_constraint(moving, replicated(mesh)) if apart else moving

        def embeddings(weights, micro, keys):
            def embed(_, inputs):
                return None, model.forward(weights, *inputs, first_needs)[0]

            _, stacked = jax.lax.scan(embed, None, (micro, own(keys)))
            return stacked.rows, jax.tree.map(lambda x: x[0], stacked.shared)

        def first_pass():
            """The coupled part of the loss, its metrics, facts and results, chosen rows; cotangents by micro-batch,
            and the gradient that comes of heads which the objectives call themselves."""

            def loss_fn(encoded, moving):
                seen = dataclasses.replace(context, **model.heads(moving, key))
                outcomes = [p.objective(encoded, p.own(seen, aux)) for p in coupled]
                loss, metrics, results = add_up(coupled, context, outcomes)
                return loss, (metrics, facts(encoded), results)

            stacked, shared = each(embeddings, (P(), rows, P()), (rows, P()))(weights, micro, keys)
            full = Encoded(whole(stacked), shared)
            (loss, (metrics, seen, results)), (cotangent, grads) = jax.value_and_grad(
                loss_fn, argnums=(0, 1), has_aux=True
            )(full, moving)
            still = jax.lax.stop_gradient(full)
            chosen = {
                p.name: {
                    name: cut(_inputs_at(context, name, index))
                    for name, index in p.objective.choose(still, p.own(context, aux)).items()
                }
                for p in alone
                if _chooses(p)
            }
            # Scale and bias belong to the batch: each micro-batch of a device passes on its part.
            shared = jax.tree.map(
                lambda g: jnp.broadcast_to(g / (k * shards), (k, *g.shape)), cotangent.shared
            )
            cotangents = Encoded(cut(cotangent.rows), shared)
            return loss, metrics, seen, results, cotangents, grads, chosen

        def gradients(weights, inputs, aux_shared, totals):
            """The per-example part of the loss, its metrics and results, gradients, the model's new state."""
            inputs = inputs[0], own(inputs[1]), *inputs[2:]

            def backward(grads, inputs):
                batch_i, key_i, cotangent_i, aux_i, chosen_i = inputs

                def outputs(weights):
                    encoded, model_state = model.forward(weights, batch_i, key_i, second_needs)
                    engine = context.engine
                    if apart:
                        engine = dataclasses.replace(engine, mesh=None)
                    seen = dataclasses.replace(
                        context, batch=batch_i, engine=engine, **model.heads(weights, key_i)
                    )

                    def outcome(p: Leaf):
                        own = p.own(seen, {p.name: Aux(aux_i[p.name], aux_shared[p.name])})
                        if own.key is not None:
                            own = dataclasses.replace(
                                own, key=jax.random.fold_in(own.key, jax.random.bits(key_i))
                            )
                        if not isinstance(p.objective, Chosen):
                            return p.objective.local(encoded, own, totals[p.name])
                        beside = {
                            name: model.forward(
                                weights, inputs, key_i, needs_of(p.objective, name, context.batch)
                            )[0]
                            for name, inputs in chosen_i[p.name].items()
                        }
                        return p.objective.fuse(encoded, beside, own, totals[p.name])

                    loss, metrics, results = add_up(alone, context, [outcome(p) for p in alone])
                    return (_only(encoded, cotangent_i), loss), (metrics, model_state, results)

                (_, loss), vjp, (metrics, model_state, results) = jax.vjp(
                    outputs, weights, has_aux=True
                )
                (grads_i,) = vjp((cotangent_i, jnp.ones_like(loss)))
                return (
                    jax.tree.map(jnp.add, grads, grads_i),
                    (loss, metrics, model_state, results),
                )

            zeros = jax.tree.map(jnp.zeros_like, weights)
            grads, (losses, metrics, states, results) = jax.lax.scan(backward, zeros, inputs)
            sums = one_each((losses.sum(), jax.tree.map(lambda x: x.sum(0), metrics)))
            return sums, one_each(grads), results, jax.tree.map(_joined, states)

        if first_needs:
            loss, metrics, seen, results, cotangents, direct, chosen = first_pass()
        else:
            loss, metrics, seen, results, cotangents, chosen = 0.0, {}, {}, {}, None, {}
            direct = None
        inputs = micro, keys, cotangents, aux_rows, chosen
        aux_shared = {p.name: aux[p.name].shared for p in alone}
        of_cotangents = None if cotangents is None else Encoded(rows, P())  # type: ignore[arg-type]
        specs = P(), (rows, P(), of_cotangents, rows, rows), P(), P()
        outs = parts_of, parts_of, rows, P()
        sums, grads, local_results, model_state = each(gradients, specs, outs)(
            weights, inputs, aux_shared, totals
        )
        (local_loss, local_metrics), grads = summed(sums), reduced(grads)
        if direct is not None:
            grads = jax.tree.map(jnp.add, grads, direct)
        return (
            loss + local_loss,
            grads,
            named(metrics | local_metrics) | seen,
            model_state,
            results | whole(local_results),
        )

    return loss_and_grads


def facts(encoded: Encoded) -> Metrics:
    """Scale and bias, and how many embeddings are broken."""
    scalars = {name: x for name, x in encoded.shared.items() if x.ndim == 0}
    return broken_rows(encoded) | scalars


def _alone(leaf: Leaf) -> bool:
    """Whether it sees one example at a time, and so may be taken a micro-batch at a time."""
    return isinstance(leaf.objective, PerExample | Chosen)


def _chooses(leaf: Leaf) -> bool:
    return isinstance(leaf.objective, Chosen)


def _inputs_at(context: Context, name: str, index: jax.Array) -> Batch:
    """One input of the batch at the chosen places."""
    return context.engine.rows_at({name: field(context.batch, name)}, index)


def _joined(x: jax.Array) -> jax.Array:
    """Micro-batches' model state as one: the mean of what was measured, the last of what was counted."""
    return x.mean(0) if jnp.issubdtype(x.dtype, jnp.inexact) else x[-1]


def _only(encoded: Encoded, like: Encoded | None) -> Encoded | None:
    """`encoded` without what `like` has not; None for None."""
    if like is None:
        return None
    return Encoded(
        {name: encoded.rows[name] for name in like.rows},
        {name: encoded.shared[name] for name in like.shared},
    )


def to_micro(x: jax.Array, mesh: Mesh, k: int) -> jax.Array:
    """[B, ...] -> [k, B/k, ...]; every device keeps its own rows, so nothing travels."""
    x = rearrange(x, "(shard k row) ... -> k (shard row) ...", shard=batch_shards(mesh), k=k)
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(None, BATCH_AXES)))


def from_micro(x: jax.Array, mesh: Mesh, k: int) -> jax.Array:
    """The inverse of `to_micro`."""
    x = rearrange(x, "k (shard row) ... -> (shard k row) ...", shard=batch_shards(mesh), k=k)
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(BATCH_AXES)))
