"""The two halves of a block: attention with its projections, and the MLP."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
from einops import rearrange, repeat
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from clipjax.layout import row_major
from clipjax.towers import layers
from clipjax.towers.attention import Mask, attend, attention, before_projection, resolve
from clipjax.towers.rotary import Rotation

if TYPE_CHECKING:
    from clipjax.towers.transformer import Transformer


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
        self.heads, self.kind, self.size = config.heads, config.attention, config.head_width
        self.shared = config.heads // (config.kv_heads or config.heads)
        inner = self.heads * self.size
        kv = inner // self.shared
        self.q = layers.Linear(width, inner, rngs, bias=bias, std=std)
        key_bias = bias and config.key_bias
        self.k = layers.Linear(d_in, kv, rngs, bias=key_bias, std=d_in**-0.5)
        self.v = layers.Linear(d_in, kv, rngs, bias=bias, std=d_in**-0.5)
        std = std if out_std is None else out_std
        self.out = layers.Linear(inner, width, rngs, bias=config.out_bias, std=std)
        kind, eps = config.norm, config.eps
        self.q_norm = layers.Norm(kind, self.size, eps) if config.qk_norm else None
        self.k_norm = layers.Norm(kind, self.size, eps) if config.qk_norm else None
        self.norm = layers.Norm(kind, inner, eps) if config.inner_norms else None
        scale = config.attention_scale
        self.stretch = None if scale is None else scale * self.size**0.5

    def __call__(
        self,
        x: jax.Array,
        memory: jax.Array,
        mask: Mask = None,
        rotation: Rotation | None = None,
        bias: jax.Array | None = None,
    ) -> jax.Array:
        """Queries from `x` [B, N, D], keys and values from `memory` [B, M, D]; returns [B, N, D].

        Args:
          mask: who may be attended to.
          rotation: of queries and keys, where N and M are the same tokens.
          bias: added to scores, broadcastable to [B, heads, N, M].
        """
        kind = resolve(self.kind, self.size, x, memory, mask, bias)
        n, m = x.shape[1], memory.shape[1]
        if rotation is None:
            x, memory = before_projection(kind, x, memory)
        q, k, v = self.q(x), self.k(memory), self.v(memory)
        if kind == "splash":
            # As the kernel reads them: the TPU's compiler would keep them for the backward pass with tokens
            # side by side, 197 of them rounded up to 256.
            kv_heads = self.heads // self.shared
            q, k, v = row_major(q, self.heads), row_major(k, kv_heads), row_major(v, kv_heads)
        q, k, v = checkpoint_name(q, "q"), checkpoint_name(k, "k"), checkpoint_name(v, "v")
        q = self._ready(q, self.q_norm, rotation, self.stretch)
        k = self._shared(self._ready(k, self.k_norm, rotation))
        v = self._shared(v)
        attended = attention(q, k, v, mask, self.heads, kind, bias, tokens=(n, m))
        return self._out(checkpoint_name(attended, "attended"))[:, :n]

    def keys_values(self, memory: jax.Array) -> tuple[jax.Array, jax.Array]:
        """[B, M, D] -> keys and values [B, heads, M, head_dim]: what a cache keeps.

        Heads come first, as the products need them: a cache is read many times and laid out once.
        """
        k = self._ready(self.k(memory), self.k_norm)
        return self._heads(self._shared(k)), self._heads(self._shared(self.v(memory)))

    def attend(
        self, x: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None = None
    ) -> jax.Array:
        """`__call__` with the keys and values of a cache at hand."""
        q = self._ready(self.q(x), self.q_norm, stretch=self.stretch)
        return self._out(attend(self._heads(q), k, v, mask))

    def _ready(self, x, norm, rotation=None, stretch=None):
        """Queries or keys [B, N, heads * head_dim] as they go into scores."""
        if norm is None and rotation is None:
            return x if stretch is None else x * stretch
        each = rearrange(x, "b n (h d) -> b n h d", d=self.size)
        each = each if norm is None else norm(each)
        each = each if rotation is None else rotation(each)
        each = each if stretch is None else each * stretch
        return rearrange(each, "b n h d -> b n (h d)")

    def _shared(self, x: jax.Array) -> jax.Array:
        """[B, M, kv_heads * head_dim] -> [B, M, heads * head_dim]: each head as often as it is used."""
        if self.shared == 1:
            return x
        return repeat(x, "b m (h d) -> b m (h r d)", d=self.size, r=self.shared)

    def _out(self, attended: jax.Array) -> jax.Array:
        return self.out(attended if self.norm is None else self.norm(attended))

    def _heads(self, x: jax.Array) -> jax.Array:
        return rearrange(x, "b n (h d) -> b h n d", h=self.heads)


class Mlp(nnx.Module):
    """`fc2(activation(fc1(x)))`, or with a gate `fc2(activation(gate(x)) * fc1(x))`."""

    def __init__(self, config: Transformer, rngs: nnx.Rngs, *, out_std: float | None = None):
        self.activation = config.activation
        std, bias = (2 * config.width) ** -0.5, config.out_bias
        self.fc1 = layers.Linear(config.width, config.hidden, rngs, bias=bias, std=std)
        self.fc2 = layers.Linear(config.hidden, config.width, rngs, bias=bias, std=out_std)
        hidden, gated, inner = config.hidden, config.gated, config.inner_norms
        self.gate = layers.Linear(config.width, hidden, rngs, bias=bias, std=std) if gated else None
        self.norm = layers.Norm(config.norm, hidden, config.eps) if inner else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] -> [..., D]."""
        activate = layers.ACTIVATIONS[self.activation]
        hidden = checkpoint_name(self.fc1(x), "hidden")
        gate = None if self.gate is None else checkpoint_name(self.gate(x), "hidden")
        hidden = activate(hidden) if gate is None else activate(gate) * hidden
        hidden = hidden if self.norm is None else self.norm(hidden)
        return self.fc2(checkpoint_name(hidden, "activated"))
