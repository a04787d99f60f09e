"""The scale and the bias of similarities, as every model that contrasts has them."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from clipjax.towers.base import require


def require_scale(config: Any) -> None:
    """`logit_scale_init` must be above 0, and not above `logit_scale_max`."""
    name = type(config).__name__
    require(
        config.logit_scale_init > 0,
        f"{name}.logit_scale_init={config.logit_scale_init} must be above 0: it is the scale "
        "itself, not its logarithm",
    )
    require(
        config.logit_scale_max is None or config.logit_scale_max >= config.logit_scale_init,
        f"{name}.logit_scale_max={config.logit_scale_max} is below "
        f"logit_scale_init={config.logit_scale_init}",
    )


def scale_and_bias(config: Any) -> tuple[nnx.Param, nnx.Param | None]:
    """The parameters to begin with: the scale's logarithm, as in CLIP, and the bias if there is one."""
    bias = config.logit_bias_init
    return (
        nnx.Param(jnp.asarray(math.log(config.logit_scale_init), jnp.float32)),
        None if bias is None else nnx.Param(jnp.asarray(bias, jnp.float32)),
    )


def scale_of(log_scale: jax.Array, maximum: float | None) -> jax.Array:
    """float32 []: `exp(log_scale)`, at most `maximum`."""
    return jnp.exp(log_scale if maximum is None else clamp_max(log_scale, math.log(maximum)))


@jax.custom_vjp
def clamp_max(x: jax.Array, maximum: float) -> jax.Array:
    """`min(x, maximum)` whose gradient can bring `x` back from above the maximum.

    CLIP clips the parameter after each step, so at the limit an update that would raise it has no
    effect and one that would lower it has. A pure function cannot write to the parameter, and the
    gradient of a plain minimum is zero above the limit: a parameter that a step carried past it
    would stay there for good. Here the gradient above the limit is zero only where descent would
    raise `x` further, and passes where descent would lower it.
    """
    return jnp.minimum(x, maximum)


def _clamp_max_forward(x, maximum):
    return clamp_max(x, maximum), (x, maximum)


def _clamp_max_backward(residuals, g):
    x, maximum = residuals
    return jnp.where((x >= maximum) & (g < 0), 0.0, g), None


clamp_max.defvjp(_clamp_max_forward, _clamp_max_backward)
