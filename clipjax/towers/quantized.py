"""Products of 8-bit numbers in training: a tower's matrices chosen by their paths, through Qwix.

As SwitchBack (arXiv:2304.13013): what is multiplied forward, and the gradient that goes on to the layer
before, are rounded to 8 bits row by row; a weight's own gradient, a sum over all tokens, is not. Weights and
optimizer stay float32. Qwix is an extra: pip install 'clipjax[quantized]'.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any, Literal

import jax
import jax.numpy as jnp

from clipjax.component import Component
from clipjax.errors import ClipjaxError

FORMATS = {
    # forward (values), backward (gradients, whose range is wider)
    "int8": (jnp.int8, jnp.int8),
    "fp8": (jnp.float8_e4m3fn, jnp.float8_e5m2),
}


@dataclasses.dataclass(frozen=True)
class Quantize(Component):
    """The matrices of a tower's blocks whose products are of 8-bit numbers."""

    pattern: str = r"(q|k|v|out|fc1|fc2)$"
    """Regular expression, searched in a matrix' path within its block (attn/q, cross/out, mlp/fc1)."""
    format: Literal["int8", "fp8"] = "int8"
    """int8 (TPU v5e and later, A100 and later), or fp8: e4m3 forward and e5m2 backward (H100 and later)."""

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ClipjaxError(
                f"Quantize.pattern={self.pattern!r} is no regular expression: {error}"
            ) from error


def chosen(rules: tuple[Quantize, ...], path: str) -> str:
    """The format of a matrix: of the first rule that its path matches; empty for none."""
    return next((rule.format for rule in rules if re.search(rule.pattern, path)), "")


def check_quantized(rules: tuple[Quantize, ...], owner: str) -> None:
    """Refuses rules where Qwix is not installed.

    Raises:
      ClipjaxError: says what to install.
    """
    if rules:
        try:
            import qwix  # noqa: F401
        except ImportError as error:
            raise ClipjaxError(
                f"{owner}.quantize needs Qwix: pip install 'clipjax[quantized]' ({error})"
            ) from error


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def product(x: jax.Array, kernel: jax.Array, format: str, dtype: Any) -> jax.Array:
    """x [..., D_in] times kernel [D_in, D_out] in 8 bits, a scale for each row of either.

    Args:
      x: in the compute dtype, and so is the gradient.
      kernel: float32 or the compute dtype.
      format: one of `FORMATS`.
      dtype: of the result.

    Returns:
      [..., D_out].
    """
    return _multiply(x, kernel, FORMATS[format][0], FORMATS[format][0], dtype)


def _forward(x, kernel, format, dtype):
    return product(x, kernel, format, dtype), (x, kernel)


def _backward(format, dtype, kept, g):
    x, kernel = kept
    values, gradients = FORMATS[format]
    dx = _multiply(g, kernel.T, gradients, values, x.dtype)
    rows = tuple(range(x.ndim - 1))
    g = g.astype(x.dtype)
    dkernel = jnp.tensordot(x, g, (rows, rows), preferred_element_type=jnp.float32)
    return dx, dkernel.astype(kernel.dtype)


product.defvjp(_forward, _backward)


def _multiply(x: jax.Array, matrix: jax.Array, left: Any, right: Any, dtype: Any) -> jax.Array:
    """The product of both, rounded along what is summed over."""
    import qwix

    rows = tuple(range(x.ndim - 1))
    sums = (((x.ndim - 1,), (0,)), ((), ()))
    factors = (
        qwix.quantize(x.astype(jnp.float32), left, channelwise_axes=rows),
        qwix.quantize(matrix.astype(jnp.float32), right, channelwise_axes=(1,)),
    )
    return qwix.dot_general(*factors, sums, preferred_element_type=jnp.float32).astype(dtype)
