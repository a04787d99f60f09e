"""Matrix products of a tile: operands in one dtype, sums in float32, both ways."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class How(NamedTuple):
    """A product's operands and where it runs."""

    dtype: str
    """Of the operands; sums are float32."""
    platform: str
    """The kind of device: "cpu", "gpu", "tpu"."""
    precision: lax.Precision | None = None
    """Of float32 operands; None takes the device's own choice."""
    axis: int = 1
    """The axis of the second operand that is summed over."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def dot(how: How, a: jax.Array, b: jax.Array) -> jax.Array:
    """a @ b.T [R, C] for b [C, D], or a @ b for b [D, C] if `how.axis` is 0; float32."""
    return contract(how, a, b, 1, how.axis)


def _forward(how, a, b):
    return dot(how, a, b), (a, b)


def _backward(how, residuals, d):
    # The cotangent is narrowed too: all three products run at the operands' speed.
    a, b = residuals
    d_a = contract(how, d, b, 1, 1 - how.axis)
    first, second = (d, a) if how.axis == 1 else (a, d)
    if how.platform == "cpu":  # a quarter faster with the transpose laid out first
        return d_a, contract(how, lax.optimization_barrier(first.T), second, 1, 0)
    return d_a, contract(how, first, second, 0, 0)


dot.defvjp(_forward, _backward)


def contract(how: How, a: jax.Array, b: jax.Array, a_axis: int, b_axis: int) -> jax.Array:
    """The product of two matrices over these axes, float32."""
    return lax.dot_general(
        a.astype(how.dtype),
        b.astype(how.dtype),
        (((a_axis,), (b_axis,)), ((), ())),
        precision=how.precision,
        preferred_element_type=jnp.float32,
    )
