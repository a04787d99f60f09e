"""Tower: what a dual encoder asks of whatever turns images or texts into vectors."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from clipjax.component import Component
from clipjax.errors import ClipjaxError, did_you_mean


@dataclasses.dataclass(frozen=True)
class Tower(Component):
    """Configuration of a tower; `build` makes the module.

    The module is called as `module(inputs, *, key=None) -> (tokens [B, N, D], pooled [B, D])` and
    has the attribute `width` (D). Image towers take uint8 [B, H, W, 3], or float in 0..1, and
    normalize by themselves; text towers take int32 [B, L].

    Two methods are asked for only where somebody wants what they say:

    - `describe(inputs, *, key=None) -> {"mask": bool [B, N], "places": int32 [B, N]}`: of each token
      that the same call returns, whether it is one (False: padding), and where it was in the input:
      a text's position, a picture's patch counted row by row, -1 for a token that stands for the
      whole (a class token). `describe` below does for towers without it.
    - `embed(ids) -> float [B, L, D]` of a text tower: token embeddings without their positions. The
      module takes such an array in place of ids (prompt learning, soft prompts, noise), and beside
      it `valid`, bool [B, L], False for padding.

    `key` is a PRNG key in training and None in inference: that is the one switch for dropout, patch
    dropout and batch statistics. Modules know nothing of meshes, keep no `nnx.Rngs`, and have
    float32 parameters whatever they compute in. `clipjax.params.split` shows how they look from
    outside.
    """

    def build(self, rngs: nnx.Rngs) -> Any:
        """Makes the module, drawing its parameters from `rngs.params()`."""
        raise NotImplementedError


def with_fields(component: Any, **fields: Any) -> Any:
    """A model with these settings in every tower of it that has them all; a tower that refuses them keeps its own.

    Args:
      component: a model, or any component with towers in it.
      **fields: remat="lean", dtype="bfloat16".
    """
    changed: dict[str, Any] = {}
    for field in dataclasses.fields(component):
        value = getattr(component, field.name)
        if isinstance(value, Component):
            changed[field.name] = with_fields(value, **fields)
        elif isinstance(value, tuple) and any(isinstance(part, Component) for part in value):
            changed[field.name] = tuple(_in_part(part, fields) for part in value)
        elif isinstance(value, dict) and any(
            isinstance(part, Component) for part in value.values()
        ):
            changed[field.name] = {name: _in_part(part, fields) for name, part in value.items()}
    component = dataclasses.replace(component, **changed) if changed else component
    if not all(hasattr(component, name) for name in fields):
        return component
    try:
        return dataclasses.replace(component, **fields)
    except ClipjaxError:
        return component


def _in_part(part: Any, fields: dict[str, Any]) -> Any:
    return with_fields(part, **fields) if isinstance(part, Component) else part


def describe(module: Any, inputs: Any, tokens: Any, *, key: Any = None) -> dict[str, jax.Array]:
    """`module.describe(inputs, key=key)`; without that method, all are tokens, in their order.

    Args:
      module: a tower's.
      inputs: what it was called with.
      tokens: what it returned first, [B, N, D].
      key: what it was called with.

    Returns:
      mask, bool [B, N], and places, int32 [B, N].
    """
    if hasattr(module, "describe"):
        return module.describe(inputs, key=key)
    b, n = tokens.shape[:2]
    return everything(b, n)


def everything(rows: int, tokens: int) -> dict[str, jax.Array]:
    """What `describe` says where every token is one, and they come in the order of their places."""
    shape = (rows, tokens)
    places = jnp.broadcast_to(jnp.arange(tokens, dtype=jnp.int32), shape)
    return {"mask": jnp.ones(shape, bool), "places": places}


def require(condition: bool, message: str) -> None:
    """Raises `ClipjaxError(message)` unless the condition holds."""
    if not condition:
        raise ClipjaxError(message)


def require_choice(owner: object, field: str, choices: Iterable[str]) -> None:
    """The string field must be one of `choices`."""
    value = getattr(owner, field)
    require(
        value in choices,
        f"{type(owner).__name__}.{field}={value!r} is unknown{did_you_mean(str(value), choices)}",
    )


def require_positive(owner: object, *fields: str) -> None:
    """The integer fields must be at least 1."""
    for field in fields:
        value = getattr(owner, field)
        require(
            isinstance(value, int) and not isinstance(value, bool) and value >= 1,
            f"{type(owner).__name__}.{field}={value!r} must be a whole number of at least 1",
        )


def require_rate(owner: object, *fields: str) -> None:
    """The fields must be probabilities below 1."""
    for field in fields:
        value = getattr(owner, field)
        require(
            isinstance(value, (int, float)) and 0.0 <= value < 1.0,
            f"{type(owner).__name__}.{field}={value!r} must be at least 0 and below 1",
        )
