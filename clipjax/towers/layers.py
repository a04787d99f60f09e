"""The smallest pieces: linear maps, norms, activations, dropout.

Parameters are float32 and cast to the compute dtype where they are used. Modules here hold no
random state and no functions, so two builds of one configuration have equal graph definitions.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from clipjax.layout import batch_first, gathered

Dtype = Any


class Linear(nnx.Module):
    """`x @ kernel + bias`, kernel [D_in, D_out], drawn from N(0, std²); the bias starts at zero."""

    def __init__(
        self, d_in: int, d_out: int, rngs: nnx.Rngs, *, bias: bool = True, std: float | None = None
    ):
        std = d_in**-0.5 if std is None else std
        self.kernel = nnx.Param(std * jax.random.normal(rngs.params(), (d_in, d_out)))
        self.bias = nnx.Param(jnp.zeros(d_out)) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D_in] -> [..., D_out], computed in the dtype of `x`."""
        y = x @ self.kernel[...].astype(x.dtype)
        return batch_first(y if self.bias is None else y + self.bias[...].astype(x.dtype))


class Norm(nnx.Module):
    """LayerNorm (arXiv:1607.06450) or RMSNorm (arXiv:1910.07467) over the last axis, in float32."""

    def __init__(self, kind: str, width: int, eps: float):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(width))
        self.bias = nnx.Param(jnp.zeros(width)) if kind == "layernorm" else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] -> [..., D] in the dtype of `x`."""
        y = x.astype(jnp.float32)
        if self.bias is not None:
            y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps) * self.scale[...]
        return (y if self.bias is None else y + self.bias[...]).astype(x.dtype)


NORMS = ("layernorm", "rmsnorm")

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}
"""GELU (arXiv:1606.08415): exact (erf), its tanh approximation, and its sigmoid approximation,
which OpenAI's CLIP was trained with."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def lookup(table: jax.Array, ids: jax.Array, dtype: Dtype) -> jax.Array:
    """`table[ids].astype(dtype)`, the table cast before devices that share it gather it.

    Args:
      table: [V, D] float32.
      ids: integers of any shape.
      dtype: of the result.

    Returns:
      [..., D]. The gradient adds up in float32 whatever the dtype: a frequent token has thousands
      of terms.
    """
    return gathered(table.astype(dtype))[ids]


def _lookup_forward(table, ids, dtype):
    return lookup(table, ids, dtype), (table, ids)


def _lookup_backward(dtype, kept, g):
    table, ids = kept
    return jnp.zeros_like(table).at[ids].add(g.astype(table.dtype)), None


lookup.defvjp(_lookup_forward, _lookup_backward)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeroes elements with probability `rate` and scales the rest; the identity without a key."""
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros_like(x))


def keys(key: jax.Array | None, n: int) -> list[jax.Array | None]:
    """`n` keys out of one, or `n` times None in inference."""
    return [None] * n if key is None else list(jax.random.split(key, n))


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], std: float) -> nnx.Param:
    """A parameter drawn from N(0, std²)."""
    return nnx.Param(std * jax.random.normal(rngs.params(), shape))


def fan_in(shape: tuple[int, ...]) -> int:
    """The number of inputs of each output of a kernel whose last axis is the output."""
    return math.prod(shape[:-1])
