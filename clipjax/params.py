"""A module as `(graphdef, params, model_state)`, and back.

Inside a module, parameters are `nnx.Variable`s; outside, everything (train state, sharding rules,
optimizers, checkpoints, importers) sees nested plain dicts of arrays with string keys. A leaf's
path is its keys joined by `/`: `image/blocks/attn/q/kernel`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from clipjax.errors import ClipjaxError

Tree = dict[str, Any]


def split(module: nnx.Module) -> tuple[nnx.GraphDef, Tree, Tree]:
    """Takes a module apart.

    Args:
      module: any `nnx.Module`.

    Returns:
      The static structure; the trainable parameters (`nnx.Param`); everything else that is an array
      (`nnx.BatchStat` and other variables). Both trees are nested dicts with string keys; items of
      `nnx.List` appear under "0", "1", ...

    Raises:
      ClipjaxError: the module keeps random state, or has a name that no path can hold.
    """
    graphdef, *states = nnx.split(module, nnx.Param, nnx.RngState, ...)
    params, rngs, rest = states
    if rngs:
        where = "/".join(str(k) for k in nnx.to_flat_state(rngs)[0][0])
        raise ClipjaxError(
            f"{type(module).__name__} keeps random state at {where!r}, which would repeat the same "
            "noise every step: do not store nnx.Rngs (or an nnx.Dropout made with one); draw from "
            "the `key` given to __call__"
        )
    return graphdef, _plain(nnx.to_pure_dict(params)), _plain(nnx.to_pure_dict(rest))


def merge(graphdef: nnx.GraphDef, params: Tree, model_state: Tree) -> Any:
    """The module that `split` took apart, holding these arrays (or tracers, inside `jax.jit`)."""
    return nnx.merge(graphdef, nnx.State(_keyed(params)), nnx.State(_keyed(model_state)))


def abstract(build: Callable[[], nnx.Module]) -> tuple[nnx.GraphDef, Tree, Tree]:
    """`split(build())` with `jax.ShapeDtypeStruct` leaves: nothing is computed or allocated.

    Args:
      build: makes the module, e.g. `lambda: model.build(nnx.Rngs(0))`.
    """
    return split(nnx.eval_shape(build))


def paths(tree: Any) -> list[tuple[str, Any]]:
    """All leaves with their paths, in the order of `jax.tree.leaves`."""
    return [(_join(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def map_with_path(function: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """`function(path, leaf, *leaves of rest)` for every leaf, as a tree of the same structure."""
    return jax.tree_util.tree_map_with_path(
        lambda path, *leaves: function(_join(path), *leaves), tree, *rest
    )


def count(tree: Any) -> int:
    """The number of scalars in a tree of arrays or `ShapeDtypeStruct`s."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def select(mask: Any, params: Any) -> tuple[Any, Any]:
    """(leaves where `mask`, leaves where not): two trees like `params` with None in the gaps."""
    chosen = jax.tree.map(lambda m, p: p if m else None, mask, params)
    others = jax.tree.map(lambda m, p: None if m else p, mask, params)
    return chosen, others


def join(chosen: Any, others: Any) -> Any:
    """The inverse of `select`."""
    return jax.tree.map(
        lambda c, o: o if c is None else c, chosen, others, is_leaf=lambda x: x is None
    )


def _join(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _plain(node: Any) -> Any:
    """String keys throughout. Only `nnx.List` makes integer keys, so digits can be read back."""
    if not isinstance(node, dict):
        return node
    for key in node:
        if isinstance(key, str) and (key.isdigit() or "/" in key or not key):
            raise ClipjaxError(
                f"a module names a parameter or submodule {key!r}: names must not be empty, hold a "
                "'/' or be all digits, because paths are built from them"
            )
    return {str(key): _plain(value) for key, value in node.items()}


def _keyed(node: Any) -> Any:
    if not isinstance(node, dict):
        return node
    return {int(key) if key.isdigit() else key: _keyed(value) for key, value in node.items()}
