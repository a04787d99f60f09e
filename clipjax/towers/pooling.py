"""From tokens [B, N, D] to one vector [B, D]."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from einops import repeat
from flax import nnx

from clipjax.towers import layers
from clipjax.towers.sublayers import Attention, Mlp
from clipjax.towers.transformer import Transformer


def mean_pool(tokens: jax.Array, valid: jax.Array | None = None) -> jax.Array:
    """The mean over tokens, accumulated in float32.

    Args:
      tokens: [B, N, D].
      valid: bool [B, N], False for padding; at least one True in every row.
    """
    if valid is None:
        return tokens.mean(1, dtype=jnp.float32).astype(tokens.dtype)
    weights = valid / valid.sum(1, keepdims=True)
    return jnp.einsum("bnd,bn->bd", tokens, weights.astype(jnp.float32)).astype(tokens.dtype)


def last_valid(valid: jax.Array) -> jax.Array:
    """int32 [B]: the position of the last True of bool [B, N] (0 where there is none)."""
    return jnp.max(jnp.where(valid, jnp.arange(valid.shape[1]), 0), axis=1)


def take(tokens: jax.Array, position: jax.Array) -> jax.Array:
    """tokens [B, N, D] at one position [B] per row -> [B, D]."""
    return jnp.take_along_axis(tokens, position[:, None, None], axis=1)[:, 0]


class AttentionPool(nnx.Module):
    """Multi-head attention pooling ("MAP"): one learned query, then a residual MLP.

    From Set Transformer (arXiv:1810.00825), in the form of "Scaling Vision Transformers"
    (arXiv:2106.04560) and SigLIP (arXiv:2303.15343).
    """

    def __init__(
        self,
        config: Transformer,
        rngs: nnx.Rngs,
        heads: int | None = None,
        mlp_dim: int | None = None,
    ):
        config = config.of_pool(heads, mlp_dim)
        self.probe = layers.normal(rngs, (config.width,), config.width**-0.5)
        self.attn = Attention(config, rngs)
        self.norm = layers.Norm(config.norm, config.width, config.eps)
        self.mlp = Mlp(config, rngs)

    def __call__(self, tokens: jax.Array, valid: jax.Array | None = None) -> jax.Array:
        """[B, N, D] and bool [B, N] (False for padding) -> [B, D]."""
        probe = repeat(self.probe[...].astype(tokens.dtype), "d -> b 1 d", b=len(tokens))
        mask = None if valid is None else valid[:, None, None, :]
        x = self.attn(probe, tokens, mask)
        return (x + self.mlp(self.norm(x)))[:, 0]


class QueryPool(nnx.Module):
    """Attentional pooler of CoCa (arXiv:2205.01917): one cross-attention of learned queries.

    Unlike `AttentionPool` it makes as many tokens as it has queries, and has neither residual nor
    MLP. Queries and (with `norm_context`) tokens are normed first; with `norm_out`, what comes out.
    """

    def __init__(
        self,
        config: Transformer,
        rngs: nnx.Rngs,
        *,
        queries: int,
        context_width: int,
        norm_context: bool = True,
        norm_out: bool = False,
    ):
        def norm(width: int) -> layers.Norm:
            return layers.Norm(config.norm, width, config.eps)

        self.queries = layers.normal(rngs, (queries, config.width), 1.0)
        self.norm_queries = norm(config.width)
        self.norm_context = norm(context_width) if norm_context else None
        self.attn = Attention(config, rngs, memory_width=context_width)
        self.norm_out = norm(config.width) if norm_out else None

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """[B, N, D_context] -> [B, queries, D]."""
        queries = self.norm_queries(self.queries[...].astype(tokens.dtype))
        queries = repeat(queries, "q d -> b q d", b=len(tokens))
        context = tokens if self.norm_context is None else self.norm_context(tokens)
        pooled = self.attn(queries, context)
        return pooled if self.norm_out is None else self.norm_out(pooled)
