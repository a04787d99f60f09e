"""Pre-norm transformer blocks, stacked along a leading layer axis and scanned."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from clipjax.towers import layers
from clipjax.towers.base import (
    Tower,
    require,
    require_choice,
    require_positive,
    require_rate,
)

DTYPES = ("float32", "bfloat16")
REMAT = ("none", "activation", "dots", "full")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerTower(Tower):
    """What the transformer towers have in common."""

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
    dtype: str = "float32"
    """Compute dtype, float32 or bfloat16; parameters, norms and softmax stay float32."""
    scan: bool = True
    """Compile one block and loop over it, instead of compiling every block."""
    scan_unroll: int = 1
    """Blocks in one turn of the loop."""
    remat: str = "none"
    """Recomputed in the backward pass: none, activation, dots (all but matrix products), full."""

    def __post_init__(self) -> None:
        require_positive(self, "width", "depth", "heads", "scan_unroll")
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
        require_choice(self, "remat", REMAT)
        require_rate(self, "dropout")
        require(self.eps > 0, f"{name}.eps={self.eps!r} must be above 0")

    @property
    def hidden(self) -> int:
        """Hidden channels of the MLP."""
        return 4 * self.width if self.mlp_dim is None else self.mlp_dim


class Attention(nnx.Module):
    """Multi-head attention (arXiv:1706.03762) with separate projections."""

    def __init__(self, config: TransformerTower, rngs: nnx.Rngs, *, out_std: float | None = None):
        width, std, bias = config.width, config.width**-0.5, config.qkv_bias
        self.heads = config.heads
        self.q = layers.Linear(width, width, rngs, bias=bias, std=std)
        self.k = layers.Linear(width, width, rngs, bias=bias, std=std)
        self.v = layers.Linear(width, width, rngs, bias=bias, std=std)
        self.out = layers.Linear(width, width, rngs, std=std if out_std is None else out_std)

    def __call__(self, x: jax.Array, memory: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Queries from `x` [B, N, D], keys and values from `memory` [B, M, D]; returns [B, N, D].

        Args:
          mask: bool, broadcastable to [B, heads, N, M]; False is not attended to. Every query must
            be left at least one key.
        """
        q, k, v = self._heads(self.q(x)), self._heads(self.k(memory)), self._heads(self.v(memory))
        scores = jnp.einsum("bnhd,bmhd->bhnm", q, k, preferred_element_type=jnp.float32)
        scores = scores * q.shape[-1] ** -0.5
        if mask is not None:
            scores = jnp.where(mask, scores, -jnp.inf)
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        return self.out(jnp.einsum("bhnm,bmhd->bnhd", weights, v).reshape(x.shape))

    def _heads(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:-1], self.heads, -1)


class Mlp(nnx.Module):
    """`fc2(activation(fc1(x)))`."""

    def __init__(self, config: TransformerTower, rngs: nnx.Rngs, *, out_std: float | None = None):
        self.activation = config.activation
        self.remat = config.remat == "activation"
        self.fc1 = layers.Linear(config.width, config.hidden, rngs, std=(2 * config.width) ** -0.5)
        self.fc2 = layers.Linear(config.hidden, config.width, rngs, std=out_std)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] -> [..., D]."""
        activation = layers.ACTIVATIONS[self.activation]
        if self.remat:
            activation = jax.checkpoint(activation)
        return self.fc2(activation(self.fc1(x)))


class Block(nnx.Module):
    """`x + attn(norm1(x))`, then `x + mlp(norm2(x))`."""

    def __init__(self, config: TransformerTower, rngs: nnx.Rngs):
        # As in GPT-2 and CLIP: what 2 * depth sub-layers add together has the variance of one.
        out_std = config.width**-0.5 * (2 * config.depth) ** -0.5
        self.dropout = config.dropout
        self.norm1 = layers.Norm(config.norm, config.width, config.eps)
        self.attn = Attention(config, rngs, out_std=out_std)
        self.norm2 = layers.Norm(config.norm, config.width, config.eps)
        self.mlp = Mlp(config, rngs, out_std=out_std)

    def __call__(
        self, x: jax.Array, *, mask: jax.Array | None = None, key: jax.Array | None = None
    ) -> jax.Array:
        """[B, N, D] -> [B, N, D]; `mask` as in `Attention`, `key` for dropout."""
        key1, key2 = layers.keys(key, 2)
        y = self.norm1(x)
        x = x + layers.dropout(self.attn(y, y, mask), self.dropout, key1)
        return x + layers.dropout(self.mlp(self.norm2(x)), self.dropout, key2)


def stack(make: Callable[[nnx.Rngs], nnx.Module], depth: int, rngs: nnx.Rngs) -> Any:
    """`depth` modules as one, whose every parameter has a leading layer axis."""
    return nnx.split_rngs(splits=depth)(nnx.vmap(make))(rngs)


def apply_stack(
    blocks: nnx.Module,
    x: jax.Array,
    config: TransformerTower,
    *,
    mask: jax.Array | None = None,
    key: jax.Array | None = None,
) -> jax.Array:
    """Runs stacked blocks one after another, scanned or unrolled as `config` says.

    Args:
      blocks: what `stack` made.
      x: [B, N, D].
      mask: the same for all blocks.
      key: for dropout; every block gets its own.
    """
    graphdef, state = nnx.split(blocks)
    block_keys = jax.random.split(key, config.depth) if key is not None and config.dropout else None

    def step(x, layer):
        state, key = layer
        return nnx.merge(graphdef, state)(x, mask=mask, key=key), None

    step = _rematerialized(step, config)
    if config.scan:
        return jax.lax.scan(step, x, (state, block_keys), unroll=config.scan_unroll)[0]
    for i in range(config.depth):
        x, _ = step(x, jax.tree.map(lambda leaf, i=i: leaf[i], (state, block_keys)))
    return x


def _rematerialized(step: Callable[..., Any], config: TransformerTower) -> Callable[..., Any]:
    if config.remat in ("none", "activation"):
        return step
    policy = (
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable if config.remat == "dots" else None
    )
    # Inside a loop the compiler cannot undo the recomputation: no barriers against that needed.
    looped = config.scan and config.scan_unroll < config.depth
    return jax.checkpoint(step, policy=policy, prevent_cse=not looped)
