"""Stacked blocks one position at a time: keys and values of the past in a cache."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from clipjax.towers.transformer import Transformer, layer_of, looped

Cache = dict[str, jax.Array]
"""Keys and values of the positions up to now, every leaf [layers, B, ...]."""


def start_cache(
    blocks: Any,
    config: Transformer,
    rows: int,
    length: int,
    memory: jax.Array | None = None,
) -> Cache:
    """An empty cache for `decode_stack`.

    Args:
      blocks: what `stack` made.
      config: theirs.
      rows: B.
      length: positions to make room for.
      memory: [B, M, D_memory] for their cross-attention, or None.

    Returns:
      `k` and `v` [layers, B, heads, length, head_dim] in the compute dtype, and `memory_k` and
      `memory_v` [layers, B, heads, M, head_dim] of the memory; `{}` for no blocks.
    """
    if blocks is None:
        return {}
    shape = (config.depth, rows, config.heads, length, config.head_width)
    cache = {name: jnp.zeros(shape, config.dtype) for name in ("k", "v")}
    if memory is not None:
        graphdef, state = nnx.split(blocks)
        k, v = jax.lax.map(lambda layer: nnx.merge(graphdef, layer).memory(memory), state)
        cache |= {"memory_k": k, "memory_v": v}
    return cache


def decode_stack(
    blocks: Any, x: jax.Array, config: Transformer, start: jax.Array, cache: Cache
) -> tuple[jax.Array, Cache]:
    """`apply_stack` under a causal mask, for positions whose past is in the cache.

    Args:
      blocks: what `stack` made.
      x: [B, T, D], positions start to start + T - 1.
      config: theirs.
      start: int32 [].
      cache: what `start_cache` or the last call returned.

    Returns:
      [B, T, D], and the cache with these positions in it.
    """
    if blocks is None:
        return x, cache
    graphdef, state = nnx.split(blocks)
    memory = (cache["memory_k"], cache["memory_v"]) if "memory_k" in cache else None

    def step(x, layer):
        state, past, memory = layer
        return nnx.merge(graphdef, state).decode(x, start, past, memory)

    stacked = state, (cache["k"], cache["v"]), memory
    if looped(config):
        x, new = jax.lax.scan(step, x, stacked, unroll=config.scan_unroll)
    else:
        layers_new = []
        for i in range(config.depth):
            x, one = step(x, layer_of(stacked, i))
            layers_new.append(one)
        new = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers_new)
    # Layers only read the cache, and all new positions are written at once: written layer by layer
    # inside the loop, the compiler would copy the whole cache for every layer.
    k, v = (
        jax.lax.dynamic_update_slice_in_dim(cache[name], leaf, start, 3)
        for name, leaf in zip(("k", "v"), new, strict=True)
    )
    return x, cache | {"k": k, "v": v}
