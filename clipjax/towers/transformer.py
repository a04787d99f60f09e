"""Pre-norm transformer blocks, stacked along a leading layer axis and scanned."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from clipjax.component import Component
from clipjax.towers import layers
from clipjax.towers.attention import KINDS, attend, attention
from clipjax.towers.base import (
    Tower,
    require,
    require_choice,
    require_positive,
    require_rate,
)
from clipjax.towers.quantized import Quantize, check_quantized, chosen
from clipjax.towers.remat import check_remat, rematerialized

DTYPES = ("float32", "bfloat16")

Cache = dict[str, jax.Array]
"""Keys and values of the positions up to now, every leaf [layers, B, ...]."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Transformer(Component):
    """The settings of a stack of blocks."""

    width: int = 512
    """Channels of every token, D."""
    depth: int = 12
    """Number of blocks."""
    heads: int = 8
    """Attention heads; must divide the width."""
    mlp_dim: int | None = None
    """Hidden channels of each block's MLP; None is 4 times the width."""
    norm: str = "layernorm"
    """layernorm or rmsnorm."""
    activation: str = "gelu"
    """gelu (exact), gelu_tanh, or quick_gelu (OpenAI's CLIP)."""
    dropout: float = 0.0
    """Probability of dropping an element of what each sub-layer adds, and of the embeddings."""
    qkv_bias: bool = True
    """Whether the query, key and value projections have a bias."""
    eps: float = 1e-5
    """Added to the variance by every norm."""
    attention: str = "auto"
    """auto (what suits the devices), xla (plain, keeps scores for the backward pass), lean (makes them
    again), cudnn (NVIDIA, bfloat16) or splash (TPU); the last two are lean where there is a mask."""
    dtype: str = "float32"
    """Compute dtype, float32 or bfloat16; parameters, norms and softmax stay float32."""
    scan: bool = True
    """Compile one block and loop over it, instead of compiling every block."""
    scan_unroll: int = 1
    """Blocks in one turn of the loop."""
    remat: str = "norms"
    """Recomputed in the backward pass: norms, none, lean (norms and activations), activation, dots
    (all but matrix products), full; or what is kept instead, by name: "q,k,v,hidden"."""
    offload: str = ""
    """Of what is kept, the names that wait for the backward pass in the host's memory: "hidden"."""
    quantize: tuple[Quantize, ...] = ()
    """Matrices of the blocks whose products are of 8-bit numbers in training and after: the first rule that
    matches a matrix counts; none: no matrix (needs the extra `quantized`)."""
    reduce_dtype: str | None = None
    """What gradients of the blocks' matrices are until the devices have added them up, float32 or bfloat16;
    None: the compute dtype. Half the bytes in bfloat16, rounded on each device."""

    def __post_init__(self) -> None:
        require_positive(self, "width", "heads", "scan_unroll")
        if self.depth != 0 or not self._may_be_empty:
            require_positive(self, "depth")
        if self.mlp_dim is not None:
            require_positive(self, "mlp_dim")
        name = type(self).__name__
        require(
            self.width % self.heads == 0,
            f"{name}.heads={self.heads} does not divide {name}.width={self.width}",
        )
        require_choice(self, "norm", layers.NORMS)
        require_choice(self, "activation", layers.ACTIVATIONS)
        require_choice(self, "dtype", DTYPES)
        require_choice(self, "attention", KINDS)
        require(
            self.attention != "cudnn" or self.dtype == "bfloat16",
            f"{name}.attention='cudnn' computes in bfloat16: set {name}.dtype to 'bfloat16', or "
            f"{name}.attention to 'auto'",
        )
        check_remat(self)
        check_quantized(self.quantize, name)
        if self.reduce_dtype is not None:
            require_choice(self, "reduce_dtype", DTYPES)
        require_rate(self, "dropout")
        require(self.eps > 0, f"{name}.eps={self.eps!r} must be above 0")

    @property
    def _may_be_empty(self) -> bool:
        """Whether no blocks at all make sense."""
        return False

    @property
    def hidden(self) -> int:
        """Hidden channels of the MLP."""
        return 4 * self.width if self.mlp_dim is None else self.mlp_dim


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerTower(Transformer, Tower):
    """What the transformer towers have in common."""


class Attention(nnx.Module):
    """Multi-head attention (arXiv:1706.03762) with separate projections."""

    def __init__(
        self,
        config: Transformer,
        rngs: nnx.Rngs,
        *,
        out_std: float | None = None,
        memory_width: int | None = None,
    ):
        width, std, bias = config.width, config.width**-0.5, config.qkv_bias
        d_in = width if memory_width is None else memory_width
        self.heads, self.kind = config.heads, config.attention
        self.q = layers.Linear(width, width, rngs, bias=bias, std=std)
        self.k = layers.Linear(d_in, width, rngs, bias=bias, std=d_in**-0.5)
        self.v = layers.Linear(d_in, width, rngs, bias=bias, std=d_in**-0.5)
        self.out = layers.Linear(width, width, rngs, std=std if out_std is None else out_std)

    def __call__(self, x: jax.Array, memory: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Queries from `x` [B, N, D], keys and values from `memory` [B, M, D]; returns [B, N, D].

        Args:
          mask: bool, broadcastable to [B, heads, N, M]; False is not attended to. Every query must
            be left at least one key.
        """
        q, k, v = (
            checkpoint_name(project(y), name)
            for name, project, y in (("q", self.q, x), ("k", self.k, memory), ("v", self.v, memory))
        )
        attended = attention(q, k, v, mask, self.heads, self.kind)
        return self.out(checkpoint_name(attended, "attended"))

    def keys_values(self, memory: jax.Array) -> tuple[jax.Array, jax.Array]:
        """[B, M, D] -> keys and values [B, heads, M, D / heads]: what a cache keeps.

        Heads come first, as the products need them: a cache is read many times and laid out once.
        """
        return self._heads(self.k(memory)), self._heads(self.v(memory))

    def attend(
        self, x: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None = None
    ) -> jax.Array:
        """`__call__` with the keys and values of a cache at hand."""
        return self.out(attend(self._heads(self.q(x)), k, v, mask))

    def _heads(self, x: jax.Array) -> jax.Array:
        return rearrange(x, "b n (h d) -> b h n d", h=self.heads)


class Mlp(nnx.Module):
    """`fc2(activation(fc1(x)))`."""

    def __init__(self, config: Transformer, rngs: nnx.Rngs, *, out_std: float | None = None):
        self.activation = config.activation
        self.fc1 = layers.Linear(config.width, config.hidden, rngs, std=(2 * config.width) ** -0.5)
        self.fc2 = layers.Linear(config.hidden, config.width, rngs, std=out_std)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] -> [..., D]."""
        activate = layers.ACTIVATIONS[self.activation]
        hidden = checkpoint_name(self.fc1(x), "hidden")
        return self.fc2(checkpoint_name(activate(hidden), "activated"))


class Block(nnx.Module):
    """`x + attn(norm1(x))`, then `x + mlp(norm2(x))`; in between, a decoder looks at its memory.

    With `memory_width`, `x + cross(norm_cross(x), norm_memory(memory))` comes between the two. With
    `cross_mlp` as well, it comes after both and has an MLP of its own (OpenCLIP's CoCa: a block
    that attends to the text, then one that attends to the image).
    """

    def __init__(
        self,
        config: Transformer,
        rngs: nnx.Rngs,
        *,
        memory_width: int | None = None,
        cross_mlp: bool = False,
    ):
        sublayers = 2 + (memory_width is not None) + cross_mlp
        # As in GPT-2 and CLIP: what all sub-layers of the stack add has the variance of one.
        out_std = config.width**-0.5 * (sublayers * config.depth) ** -0.5

        def norm(width: int) -> layers.Norm:
            return layers.Norm(config.norm, width, config.eps)

        self.dropout = config.dropout
        self.norm1 = norm(config.width)
        self.attn = Attention(config, rngs, out_std=out_std)
        self.norm2 = norm(config.width)
        self.mlp = Mlp(config, rngs, out_std=out_std)
        self.cross: Attention | None
        self.cross_mlp: Mlp | None
        if memory_width is None:
            self.cross = self.cross_mlp = None
        else:
            self.norm_cross, self.norm_memory = norm(config.width), norm(memory_width)
            self.cross = Attention(config, rngs, out_std=out_std, memory_width=memory_width)
            self.norm_cross_mlp = norm(config.width) if cross_mlp else None
            self.cross_mlp = Mlp(config, rngs, out_std=out_std) if cross_mlp else None
        for path, module in nnx.iter_modules(self):
            if isinstance(module, layers.Linear):
                module.format = chosen(config.quantize, "/".join(map(str, path)))
                module.reduce_dtype = config.reduce_dtype

    def __call__(
        self,
        x: jax.Array,
        *,
        mask: jax.Array | None = None,
        memory: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """[B, N, D] -> [B, N, D].

        Args:
          mask: as in `Attention`.
          memory: [B, M, D_memory] to look at; None leaves that out.
          key: for dropout.
        """
        y = self._normed(self.norm1, x)
        look = None
        if memory is not None:
            assert self.cross is not None, "a block without cross-attention has no memory"
            seen = self._normed(self.norm_memory, memory)
            look = functools.partial(self.cross, memory=seen)
        return self._after_attention(x, self.attn(y, y, mask), look, key)

    def memory(self, memory: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The memory's keys and values, as `Attention.keys_values`."""
        assert self.cross is not None, "a block without cross-attention has no memory"
        return self.cross.keys_values(self.norm_memory(memory))

    def decode(
        self,
        x: jax.Array,
        start: jax.Array,
        past: tuple[jax.Array, jax.Array],
        memory: tuple[jax.Array, jax.Array] | None,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """`__call__` under a causal mask, for positions whose past is in a cache.

        Args:
          x: [B, T, D], positions start to start + T - 1.
          start: int32 [].
          past: keys and values [B, heads, length, D / heads], of which those before `start` count.
          memory: what `memory` returned, or None.

        Returns:
          [B, T, D], and the new positions' keys and values [B, heads, T, D / heads].
        """
        y = self.norm1(x)
        new = self.attn.keys_values(y)
        k, v = (
            jax.lax.dynamic_update_slice_in_dim(a, b, start, 2)
            for a, b in zip(past, new, strict=True)
        )
        mask = jnp.arange(k.shape[2]) <= start + jnp.arange(x.shape[1])[:, None]
        look = None
        if memory is not None:
            assert self.cross is not None
            look = functools.partial(self.cross.attend, k=memory[0], v=memory[1])
        return self._after_attention(x, self.attn.attend(y, k, v, mask), look, None), new

    def _after_attention(self, x, attended, look, key):
        """The rest of the block, given what self-attention adds and how queries see the memory."""
        keys = layers.keys(key, 2 if look is None else 4)
        x = self._add(x, attended, keys[0])
        if look is None:
            return self._add_mlp(x, self.norm2, self.mlp, keys[1])
        if self.cross_mlp is None:
            x = self._add(x, look(self._normed(self.norm_cross, x)), keys[2])
            return self._add_mlp(x, self.norm2, self.mlp, keys[1])
        x = self._add_mlp(x, self.norm2, self.mlp, keys[1])
        x = self._add(x, look(self._normed(self.norm_cross, x)), keys[2])
        return self._add_mlp(x, self.norm_cross_mlp, self.cross_mlp, keys[3])

    def _add_mlp(self, x, norm, mlp, key):
        return self._add(x, mlp(self._normed(norm, x)), key)

    def _add(self, x, sublayer, key):
        return checkpoint_name(x + layers.dropout(sublayer, self.dropout, key), "residual")

    def _normed(self, norm, x):
        return checkpoint_name(norm(x), "normed")


def stack(make: Callable[[nnx.Rngs], nnx.Module], depth: int, rngs: nnx.Rngs) -> Any:
    """`depth` modules as one, whose every parameter has a leading layer axis; None for no module."""
    if depth == 0:
        return None
    return nnx.split_rngs(splits=depth)(nnx.vmap(make))(rngs)


def apply_stack(
    blocks: Any,
    x: jax.Array,
    config: Transformer,
    *,
    mask: jax.Array | None = None,
    memory: jax.Array | None = None,
    key: jax.Array | None = None,
) -> jax.Array:
    """Runs stacked blocks one after another, scanned or unrolled as `config` says.

    Args:
      blocks: what `stack` made.
      x: [B, N, D].
      mask: the same for all blocks.
      memory: [B, M, D_memory] for their cross-attention, the same for all blocks; None: without.
      key: for dropout; every block gets its own.
    """
    if blocks is None:
        return x
    graphdef, state = nnx.split(blocks)
    block_keys = jax.random.split(key, config.depth) if key is not None and config.dropout else None

    def step(x, layer):
        state, key = layer
        return nnx.merge(graphdef, state)(x, mask=mask, memory=memory, key=key), None

    step = rematerialized(step, config)
    if config.scan:
        return jax.lax.scan(step, x, (state, block_keys), unroll=config.scan_unroll)[0]
    for i in range(config.depth):
        x, _ = step(x, _layer((state, block_keys), i))
    return x


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
      `k` and `v` [layers, B, heads, length, D / heads] in the compute dtype, and `memory_k` and
      `memory_v` [layers, B, heads, M, D / heads] of the memory; `{}` for no blocks.
    """
    if blocks is None:
        return {}
    shape = (config.depth, rows, config.heads, length, config.width // config.heads)
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
    if config.scan:
        x, new = jax.lax.scan(step, x, stacked, unroll=config.scan_unroll)
    else:
        layers_new = []
        for i in range(config.depth):
            x, one = step(x, _layer(stacked, i))
            layers_new.append(one)
        new = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers_new)
    # Layers only read the cache, and all new positions are written at once: written layer by layer
    # inside the loop, the compiler would copy the whole cache for every layer.
    k, v = (
        jax.lax.dynamic_update_slice_in_dim(cache[name], leaf, start, 3)
        for name, leaf in zip(("k", "v"), new, strict=True)
    )
    return x, cache | {"k": k, "v": v}


def _layer(stacked: Any, i: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[i], stacked)
