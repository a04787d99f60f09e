"""What a step must hold, multiply and send, from shapes and settings alone: arithmetic, no compiler.

Here are the parts that a compiler's one number for temporary memory is made of, and the figures by which
`clipjax plan --search` chooses what to compile.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from clipjax.component import Component
from clipjax.config import Run
from clipjax.evals.flops import count
from clipjax.objectives import Grouped, Hierarchical, Ring
from clipjax.objectives.base import Pairwise, leaves, union
from clipjax.params import join, select

ROWS = 2  # of a traced batch; what does not grow with it is no activation


def components(component: Component, kind: Any) -> Iterator[Any]:
    """All components of a kind inside a component, itself included."""
    if isinstance(component, kind):
        yield component
    for field in dataclasses.fields(component):
        value = getattr(component, field.name)
        values = value.values() if isinstance(value, dict) else value
        for part in values if isinstance(values, Sequence | type({}.values())) else (value,):
            if isinstance(part, Component):
                yield from components(part, kind)


def compute_itemsize(run: Run) -> int:
    """Bytes of a number that the towers compute with."""
    dtypes = [getattr(part, "dtype", None) for part in components(run.model, Component)]
    return 2 if "bfloat16" in dtypes else 4


def embed_dim(run: Run) -> int:
    """Width of what is compared; 512 where the model does not say."""
    return int(getattr(run.model, "embed_dim", 512))


def forward_flops(run: Run, blueprint: Any) -> float:
    """Matrix products of the model in making, once, of all that the objective asks for and a whole batch."""
    state, batch = blueprint.abstract, _batch(run, run.data.batch_size)

    def encode(params, model_state, batch):
        return blueprint.module(params, model_state)(batch, key=None, needs=_needs(run)).rows

    return count(jax.make_jaxpr(encode)(state.params, state.model_state, batch).jaxpr)


def kept_per_row(run: Run, blueprint: Any) -> float:
    """Bytes that the towers keep of an example from the forward to the backward pass."""

    def size(rows: int) -> int:
        f, moving, rest = _forward(run, blueprint, rows)
        _, vjp = jax.eval_shape(
            lambda moving, rest: jax.vjp(lambda m: f(m, rest), moving), moving, rest
        )
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(vjp))

    return (size(2 * ROWS) - size(ROWS)) / ROWS


def flops_per_row(run: Run, blueprint: Any) -> float:
    """Matrix products of an example's forward and backward pass, what is made again included."""
    f, moving, rest = _forward(run, blueprint, ROWS)

    def total(moving, rest):
        return sum(jnp.sum(x.astype(jnp.float32)) for x in jax.tree.leaves(f(moving, rest)))

    return count(jax.make_jaxpr(jax.grad(total))(moving, rest).jaxpr) / ROWS


def weights(run: Run, blueprint: Any, shardings: Any = None) -> dict[str, float]:
    """Bytes of the parameters, from where they are.

    Returns:
      split and whole (float32, in all, of those that devices share and those that each holds), travel (of
      the split ones in the towers' dtype), tables (of these, tokens' embeddings, which the backward pass does not
      need), at_once (of these, what a device holds gathered at one time: two
      layers of each stack, and what is in none), gradients (float32, one device's).
    """
    found = dict.fromkeys(("split", "whole", "travel", "tables", "at_once", "gradients"), 0.0)
    item = compute_itemsize(run)
    state = blueprint.abstract
    shardings = blueprint.shardings.params if shardings is None else shardings
    named = jax.tree_util.tree_leaves_with_path(state.params)
    for (path, leaf), sharding in zip(named, jax.tree.leaves(shardings), strict=True):
        local = math.prod(sharding.shard_shape(leaf.shape))
        found["gradients"] += 4 * local
        if local == leaf.size:
            found["whole"] += 4 * leaf.size
            continue
        found["split"] += 4 * leaf.size
        found["travel"] += item * leaf.size
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        found["tables"] += item * leaf.size * name.endswith("/embedding")
        layers = leaf.shape[0] if "blocks/" in name else 2
        found["at_once"] += item * leaf.size * min(1.0, 2 / layers)
    return found


def loss_bytes(run: Run, group: int, data: int) -> tuple[float, float]:
    """Of the pairwise terms of a run's objective: (bytes held by a device, bytes that it sends).

    What is held are the columns at hand and their gradient, beside the device's own rows; a tile's size is
    of no account. Sent are units of one modality: the columns, and their gradient in float32.
    """
    shards, width = group * data, embed_dim(run)
    terms = [leaf for leaf in leaves(run.objective) if isinstance(leaf.objective, Pairwise)]
    rows = run.data.batch_size / shards
    item = 2 if run.pair_dtype == "bfloat16" else 4
    held = sent = 0.0
    own = 4 * 4 * rows * width  # both sides and their gradients
    for _ in terms:
        if isinstance(run.exchange, Ring):
            block, trips = rows, shards - 1
            held += own + 2 * (item + 4) * block * width
        elif isinstance(run.exchange, Hierarchical):
            block, trips = rows * data, group - 1
            held += own + 2 * (item + 4) * block * width
            sent += rows * (data - 1) * (item + 4) * width
        else:
            block, trips = rows * (data if isinstance(run.exchange, Grouped) else shards), 0
            held += own + (item + 4) * block * width
            sent += (block - rows) * (item + 4) * width
        # Columns go round twice, with their statistics and then with their gradient.
        sent += trips * (2 * item + 4) * rows * width
    return held, sent


def parts_of_temporary(run: Run, blueprint: Any, mesh: Any) -> dict[str, float]:
    """Of one device's temporary memory, what is to be expected of each kind, in bytes."""
    group, data = mesh.shape["group"], mesh.shape["data"]
    rows = run.data.batch_size / (group * data) / run.accumulate
    known = weights(run, blueprint)
    tensor = mesh.shape["tensor"]
    return {
        "activations": kept_per_row(run, blueprint) * rows / tensor,
        "gathered weights": known["at_once"],
        "gradients": known["gradients"],
        "loss": loss_bytes(run, group, data)[0],
    }


def whole_leaves(blueprint: Any, most: int = 5) -> list[tuple[str, int]]:
    """(path, bytes) of the largest arrays of the state that every device holds whole."""
    leaves = zip(
        jax.tree_util.tree_leaves_with_path(blueprint.abstract),
        jax.tree.leaves(blueprint.shardings),
        strict=True,
    )
    whole = [
        (jax.tree_util.keystr(path, simple=True, separator="/"), leaf.size * leaf.dtype.itemsize)
        for (path, leaf), sharding in leaves
        if sharding.is_fully_replicated and leaf.size > 1
    ]
    return sorted(whole, key=lambda entry: -entry[1])[:most]


def _needs(run: Run) -> frozenset[str]:
    return union(leaf.objective.needs for leaf in leaves(run.objective))


def _batch(run: Run, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
    return {
        key: jax.ShapeDtypeStruct((rows, *row.shape), row.dtype)
        for key, row in run.data.spec().items()
    }


def _forward(run: Run, blueprint: Any, rows: int) -> tuple[Any, Any, Any]:
    """The model in training as a function of the parameters that move and of the rest, and their shapes."""
    state = blueprint.abstract
    moving, frozen = select(blueprint.trainable, state.params)

    def f(moving, rest):
        frozen, model_state, batch = rest
        module = blueprint.module(join(moving, frozen), model_state)
        return module(batch, key=jax.random.key(0), needs=_needs(run)).rows

    return f, moving, (frozen, state.model_state, _batch(run, rows))
