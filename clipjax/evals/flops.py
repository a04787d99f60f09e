"""Floating-point operations of a model, counted in its program before any compiler sees it."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend import core

from clipjax.models import Model
from clipjax.params import abstract, merge


def forward_flops(model: Model, image_size: int, context_length: int) -> float:
    """Operations of the matrix products and convolutions in embedding one picture and one text.

    A multiplication and an addition count as two. What is element-wise is left out, as is usual.
    """
    graphdef, params, state = abstract(lambda: model.build(nnx.Rngs(0)))
    batch = {
        "image": jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.uint8),
        "text": jax.ShapeDtypeStruct((1, context_length), jnp.int32),
    }
    both = jax.make_jaxpr(lambda p, s, x: _encode(merge(graphdef, p, s), x))(params, state, batch)
    return count(both.jaxpr)


def count(jaxpr: Any) -> float:
    """Operations of the products in a jaxpr; a scan's body counts as often as it runs."""
    total = 0.0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        shapes = [v.aval.shape for v in equation.invars if hasattr(v.aval, "shape")]
        out = math.prod(equation.outvars[0].aval.shape) if equation.outvars else 0
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            total += 2 * out * math.prod(shapes[0][axis] for axis in contracted)
        elif name == "conv_general_dilated":
            kernel, features = shapes[1], params["dimension_numbers"].rhs_spec[0]
            total += 2 * out * math.prod(kernel) / kernel[features]
        inner = [count(sub) for sub in _inner(params)]
        if name == "cond":  # one branch runs
            total += max(inner, default=0.0)
        else:
            total += _times(name, params) * sum(inner)
        total += _cudnn(name, shapes)
    return total


def _times(name: str, params: dict[str, Any]) -> int:
    """How often what an equation calls is run, on all devices together."""
    if name == "scan":
        return params["length"]
    if name == "shard_map":
        return math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
    if name == "pallas_call":
        return math.prod(params["grid_mapping"].grid)
    return 1


def _cudnn(name: str, shapes: list[tuple[int, ...]]) -> float:
    """Products of cuDNN's attention, of q [B, N, heads, D] and k [B, M, heads, D]: 2, and 5 backward."""
    if not name.startswith("dot_product_attention_") or not name.endswith("_wrapper"):
        return 0.0
    products = 5 if "_bwd_" in name else 2
    return products * 2 * math.prod(shapes[0]) * shapes[1][1]


def _inner(params: dict[str, Any]) -> list[Any]:
    found = []
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, core.ClosedJaxpr):
                found.append(item.jaxpr)
            elif isinstance(item, core.Jaxpr):
                found.append(item)
    return found


def _encode(module: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
    return module.encode_image(batch["image"]), module.encode_text(batch["text"])
