"""Matrix products of a tile: operands in one dtype, sums in float32, both ways."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def dot(dtype: str, platform: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """a @ b.T [R, C] in float32, of operands in `dtype`; `platform` of the devices it runs on."""
    return _contract(dtype, a, b, 1, 1)


def _forward(dtype, platform, a, b):
    return dot(dtype, platform, a, b), (a, b)


def _backward(dtype, platform, residuals, d):
    # The cotangent is narrowed too: all three products run at the operands' speed.
    a, b = residuals
    if platform == "cpu":  # d.T @ a is a quarter faster with d.T laid out first
        return _contract(dtype, d, b, 1, 0), _contract(
            dtype, lax.optimization_barrier(d.T), a, 1, 0
        )
    return _contract(dtype, d, b, 1, 0), _contract(dtype, d, a, 0, 0)


dot.defvjp(_forward, _backward)


def _contract(dtype, a, b, a_axis, b_axis):
    return lax.dot_general(
        a.astype(dtype),
        b.astype(dtype),
        (((a_axis,), (b_axis,)), ((), ())),
        precision=lax.Precision.HIGHEST if dtype == "float32" else None,
        preferred_element_type=jnp.float32,
    )
