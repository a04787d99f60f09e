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
from jax.ad_checkpoint import checkpoint_name

from clipjax.layout import batch_first, gathered
from clipjax.towers import quantized

Dtype = Any


class Linear(nnx.Module):
    """`x @ kernel + bias`, kernel [D_in, D_out], drawn from N(0, std²); the bias starts at zero."""

    def __init__(
        self, d_in: int, d_out: int, rngs: nnx.Rngs, *, bias: bool = True, std: float | None = None
    ):
        std = d_in**-0.5 if std is None else std
        self.kernel = nnx.Param(std * jax.random.normal(rngs.params(), (d_in, d_out)))
        self.bias = nnx.Param(jnp.zeros(d_out)) if bias else None
        self.format = ""  # of quantized.FORMATS; empty: products in the dtype of the input
        self.reduce_dtype: str | None = (
            None  # of the kernel's gradient until it is added up; None: the input's
        )

    def __call__(self, x: jax.Array, dtype: Dtype = None) -> jax.Array:
        """[..., D_in] -> [..., D_out]: the factors in the dtype of `x`, the result in it or `dtype`.

        With dtype=float32 the sums of a bfloat16 product are not rounded: for what is normalized.
        """
        dtype = x.dtype if dtype is None else dtype
        kernel = self.kernel[...]
        if self.format:
            y = quantized.product(x, kernel.astype(x.dtype), self.format, dtype)
        elif self.reduce_dtype is not None:
            y = _product(x, kernel, dtype, self.reduce_dtype)
        else:
            y = _matmul(x, kernel, dtype)
        return batch_first(y if self.bias is None else y + self.bias[...].astype(dtype))


def _matmul(x, kernel, dtype):
    return jnp.matmul(x, kernel.astype(x.dtype), preferred_element_type=dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _product(x, kernel, dtype, reduce_dtype):
    return _matmul(x, kernel, dtype)


def _product_forward(x, kernel, dtype, reduce_dtype):
    return _matmul(x, kernel, dtype), (x, kernel)


def _product_backward(dtype, reduce_dtype, kept, g):
    x, kernel = kept
    (dx,) = jax.vjp(lambda x: _matmul(x, kernel, dtype), x)[1](g)
    # Tokens are split over the devices: this product is what they add up, in the dtype that it comes in.
    rows = tuple(range(x.ndim - 1))
    dkernel = jnp.tensordot(x, g.astype(x.dtype), (rows, rows), preferred_element_type=reduce_dtype)
    return dx, dkernel.astype(kernel.dtype)


_product.defvjp(_product_forward, _product_backward)


class Norm(nnx.Module):
    """LayerNorm (arXiv:1607.06450) or RMSNorm (arXiv:1910.07467) over the last axis, in float32."""

    def __init__(self, kind: str, width: int, eps: float):
        self.eps, self.centers = eps, kind == "layernorm_no_bias"
        self.scale = nnx.Param(jnp.ones(width))
        self.bias = nnx.Param(jnp.zeros(width)) if kind == "layernorm" else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] -> [..., D] in the dtype of `x`."""
        bias = None if self.bias is None else self.bias[...]
        if self.centers:
            bias = jnp.zeros_like(self.scale[...])
        return _norm(x, self.scale[...], bias, self.eps)


# Left to automatic differentiation, a norm keeps three float32 arrays as large as its input for the
# backward pass, and exact GELU four. What follows keeps the input alone.


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _norm(x, scale, bias, eps):
    return _norm_forward(x, scale, bias, eps)[0]


def _norm_forward(x, scale, bias, eps):
    y = x.astype(jnp.float32)
    mean = y.mean(-1, keepdims=True) if bias is not None else None
    y = y if mean is None else y - mean
    rate = jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + eps)
    y = y * rate * scale
    rate = checkpoint_name(rate, "moments")
    mean = None if mean is None else checkpoint_name(mean, "moments")
    return (y if bias is None else y + bias).astype(x.dtype), (x, scale, mean, rate)


def _norm_backward(eps, kept, g):
    x, scale, mean, rate = kept
    y = x.astype(jnp.float32)
    y = (y if mean is None else y - mean) * rate
    g = g.astype(jnp.float32)
    rows = tuple(range(g.ndim - 1))
    dy = g * scale
    means = [(dy * y).mean(-1, keepdims=True)]
    if mean is not None:
        means.append(dy.mean(-1, keepdims=True))
    # Without the barrier, XLA's GPU compiler makes one pass of sums and `dx`, and writes a float32
    # array as large as `x` between the two.
    means = jax.lax.optimization_barrier(means)
    dx = dy - y * means[0]
    if mean is not None:
        dx = dx - means[1]
    dbias = None if mean is None else g.sum(rows)
    return (dx * rate).astype(x.dtype), (g * y).sum(rows), dbias


_norm.defvjp(_norm_forward, _norm_backward)

NORMS = ("layernorm", "rmsnorm", "layernorm_no_bias")


def _gelu_and_slope(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x Phi(x) and its derivative Phi(x) + x phi(x), Phi by `erf` as in PyTorch.

    jax.nn.gelu goes by `erfc`, whose two series and three divisions a GPU waits for longer than for
    the memory: 0.92 ms against 0.26 for 310 million bfloat16 elements on an H200.
    """
    phi = 0.5 * (1 + jax.lax.erf(x * 0.5**0.5))
    return x * phi, phi + x * jnp.exp(-0.5 * x * x) * (2 * jnp.pi) ** -0.5


def _activation(both: Callable[[jax.Array], tuple[jax.Array, jax.Array]]):
    """An elementwise function in float32, whose backward pass starts from its input."""

    def value(x):
        return both(x.astype(jnp.float32))[0].astype(x.dtype)

    def backward(x, g):
        slope = both(x.astype(jnp.float32))[1]
        return ((g.astype(jnp.float32) * slope).astype(x.dtype),)

    lean = jax.custom_vjp(value)
    lean.defvjp(lambda x: (value(x), x), backward)
    return lean


def _with_slope(f: Callable[[jax.Array], jax.Array]):
    """`f` and its derivative, for one that automatic differentiation does well."""
    return lambda x: jax.jvp(f, (x,), (jnp.ones_like(x),))


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": _activation(_gelu_and_slope),
    "gelu_tanh": _activation(_with_slope(functools.partial(jax.nn.gelu, approximate=True))),
    "quick_gelu": _activation(_with_slope(lambda x: x * jax.nn.sigmoid(1.702 * x))),
    "silu": _activation(_with_slope(jax.nn.silu)),
    "relu": jax.nn.relu,
}
"""GELU (arXiv:1606.08415): exact (erf), its tanh approximation, and its sigmoid approximation,
which OpenAI's CLIP was trained with; SiLU and ReLU."""


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
    # Whole on each device, or devices that share it would gather the gradients of all tokens of the batch.
    sums = gathered(jnp.zeros_like(table)).at[ids].add(g.astype(table.dtype))
    return gathered(sums), None


lookup.defvjp(_lookup_forward, _lookup_backward)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeroes elements with probability `rate` and scales the rest; the identity without a key."""
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros_like(x))


def drop_path(x: jax.Array, rate: jax.Array, key: jax.Array | None) -> jax.Array:
    """Zeroes whole examples of [B, ...] with probability `rate` and scales the rest; the identity without a key."""
    if key is None:
        return x
    shape = (x.shape[0],) + (1,) * (x.ndim - 1)
    keep = jax.random.bernoulli(jax.random.fold_in(key, 1), 1.0 - rate, shape)
    return jnp.where(keep, x / (1.0 - rate).astype(x.dtype), jnp.zeros_like(x))


def keys(key: jax.Array | None, n: int) -> list[jax.Array | None]:
    """`n` keys out of one, or `n` times None in inference."""
    return [None] * n if key is None else list(jax.random.split(key, n))


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], std: float) -> nnx.Param:
    """A parameter drawn from N(0, std²)."""
    return nnx.Param(std * jax.random.normal(rngs.params(), shape))


def fan_in(shape: tuple[int, ...]) -> int:
    """The number of inputs of each output of a kernel whose last axis is the output."""
    return math.prod(shape[:-1])
