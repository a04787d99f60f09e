"""Pre-norm transformer blocks, stacked along a leading layer axis and scanned."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from clipjax.component import Component
from clipjax.layout import platform, row_major
from clipjax.towers import layers
from clipjax.towers.attention import KINDS, Causal, Mask
from clipjax.towers.base import (
    Tower,
    require,
    require_choice,
    require_positive,
    require_rate,
)
from clipjax.towers.quantized import Quantize, check_quantized, chosen
from clipjax.towers.remat import check_remat, rematerialized
from clipjax.towers.rotary import Local, Rotation
from clipjax.towers.sublayers import Attention, Mlp

DTYPES = ("float32", "bfloat16")
NORM_PLACES = ("pre", "post", "both", "out")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Transformer(Component):
    """The settings of a stack of blocks."""

    width: int = 512
    """Channels of every token, D."""
    depth: int = 12
    """Number of blocks."""
    heads: int = 8
    """Attention heads; must divide the width."""
    kv_heads: int | None = None
    """Heads of keys and values, each shared by heads / kv_heads queries (arXiv:2305.13245); None: heads."""
    head_dim: int | None = None
    """Channels of a head; None is width / heads."""
    attention_scale: float | None = None
    """What scores are multiplied by; None is head_dim ** -0.5 (T5 has 1)."""
    mlp_dim: int | None = None
    """Hidden channels of each block's MLP; None is 4 times the width."""
    gated: bool = False
    """Whether the MLP's hidden channels are `activation(gate(x)) * fc1(x)` (arXiv:2002.05202; SwiGLU with
    activation="silu")."""
    norm: str = "layernorm"
    """layernorm, rmsnorm, or layernorm_no_bias (ModernBERT)."""
    norms: str = "pre"
    """Where: pre (before each sub-layer), post (after each sum, as BERT), both (before, and of what the
    sub-layer gives, as Gemma 3), or out (of what it gives alone, as EVA-02 E)."""
    bare_first: bool = False
    """Whether the first block's attention sees its input without a norm (ModernBERT)."""
    qk_norm: bool = False
    """A norm of every head's queries and keys (arXiv:2302.05442)."""
    inner_norms: bool = False
    """A norm of what attention gathers, and of the MLP's hidden channels (EVA-02, arXiv:2303.11331)."""
    activation: str = "gelu"
    """gelu (exact), gelu_tanh, quick_gelu (OpenAI's CLIP), silu, or relu."""
    dropout: float = 0.0
    """Probability of dropping an element of what each sub-layer adds, and of the embeddings."""
    drop_path: float = 0.0
    """Probability that the last block's sub-layers add nothing to an example (stochastic depth,
    arXiv:1603.09382); falls evenly to 0 at the first."""
    layer_scale: float | None = None
    """Learned factors of what each sub-layer adds, a channel each, start here (arXiv:2103.17239); None: none."""
    qkv_bias: bool = True
    """Whether the query, key and value projections have a bias."""
    key_bias: bool = True
    """Whether that of the keys does, where the others do."""
    out_bias: bool = True
    """Whether attention's output and the MLP's maps have a bias."""
    eps: float = 1e-5
    """Added to the variance by every norm."""
    attention: str = "auto"
    """auto (what suits the devices), xla (plain, keeps scores for the backward pass), lean (makes them
    again), cudnn (NVIDIA, bfloat16) or splash (TPU); the last two are lean where there is a mask."""
    dtype: str = "float32"
    """Compute dtype, float32 or bfloat16; parameters, norms and softmax stay float32."""
    scan: bool | None = None
    """Compile one block and loop over it, instead of compiling every block. None: loop, but not on a
    GPU, where the loop copies all that is kept for the backward pass."""
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
        if self.head_dim is None:
            require(
                self.width % self.heads == 0,
                f"{name}.heads={self.heads} does not divide {name}.width={self.width}",
            )
        else:
            require_positive(self, "head_dim")
        if self.kv_heads is not None:
            require_positive(self, "kv_heads")
            require(
                self.heads % self.kv_heads == 0,
                f"{name}.kv_heads={self.kv_heads} does not divide {name}.heads={self.heads}",
            )
        for field in ("attention_scale", "layer_scale"):
            value = getattr(self, field)
            require(value is None or value > 0, f"{name}.{field}={value!r} must be above 0")
        require_choice(self, "norm", layers.NORMS)
        require_choice(self, "norms", NORM_PLACES)
        require_choice(self, "activation", layers.ACTIVATIONS)
        require_choice(self, "dtype", DTYPES)
        require_choice(self, "attention", KINDS)
        require(
            self.attention != "cudnn" or self.dtype == "bfloat16",
            f"{name}.attention='cudnn' computes in bfloat16: set {name}.dtype to 'bfloat16', or "
            f"{name}.attention to 'auto'",
        )
        check_remat(self)
        require_rate(self, "dropout", "drop_path")
        check_quantized(self.quantize, name)
        if self.reduce_dtype is not None:
            require_choice(self, "reduce_dtype", DTYPES)
        require(self.eps > 0, f"{name}.eps={self.eps!r} must be above 0")

    @property
    def _may_be_empty(self) -> bool:
        """Whether no blocks at all make sense."""
        return False

    @property
    def hidden(self) -> int:
        """Hidden channels of the MLP."""
        return 4 * self.width if self.mlp_dim is None else self.mlp_dim

    @property
    def head_width(self) -> int:
        """Channels of a head."""
        return self.width // self.heads if self.head_dim is None else self.head_dim

    def of_pool(self, heads: int | None = None, mlp_dim: int | None = None) -> Transformer:
        """The settings of a pool behind the blocks, plain attention and a plain MLP; None: as the blocks."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(Transformer)}
        sizes = {"heads": heads, "mlp_dim": mlp_dim}
        given = {name: size for name, size in sizes.items() if size is not None}
        return Transformer(**(own | _PLAIN | given))


_PLAIN: dict[str, Any] = {
    "kv_heads": None, "head_dim": None, "attention_scale": None, "qk_norm": False,
    "inner_norms": False, "gated": False, "key_bias": True, "out_bias": True,
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerTower(Transformer, Tower):
    """What the transformer towers have in common."""


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

        self.dropout, self.norms = config.dropout, config.norms
        self.norm1 = norm(config.width)
        self.attn = Attention(config, rngs, out_std=out_std)
        self.norm2 = norm(config.width)
        self.mlp = Mlp(config, rngs, out_std=out_std)
        both, first = config.norms == "both", config.layer_scale
        self.norm1_out = norm(config.width) if both else None
        self.norm2_out = norm(config.width) if both else None
        self.scale1 = None if first is None else nnx.Param(jnp.full(config.width, first))
        self.scale2 = None if first is None else nnx.Param(jnp.full(config.width, first))
        self.cross: Attention | None
        self.cross_mlp: Mlp | None
        if memory_width is None:
            self.cross = self.cross_mlp = None
        else:
            require(
                config.norms == "pre" and config.layer_scale is None,
                f"{type(config).__name__}.norms={config.norms!r} with "
                f"layer_scale={config.layer_scale}: a block with cross-attention has norms='pre' and "
                "no layer_scale",
            )
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
        mask: Mask = None,
        memory: jax.Array | None = None,
        rotation: Rotation | None = None,
        bias: jax.Array | None = None,
        bare: jax.Array | None = None,
        drop: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """[B, N, D] -> [B, N, D].

        Args:
          mask: as in `Attention`, and so `rotation` and `bias`.
          memory: [B, M, D_memory] to look at; None leaves that out.
          bare: bool []; True leaves the norm before attention out.
          drop: [], the probability of leaving a sub-layer out for an example.
          key: for dropout and `drop`.
        """
        y = self._before(self.norm1, x)
        y = y if bare is None else jnp.where(bare, x, y)
        look = None
        if memory is not None:
            assert self.cross is not None, "a block without cross-attention has no memory"
            seen = self._normed(self.norm_memory, memory)
            look = functools.partial(self.cross, memory=seen)
        return self._after_attention(x, self.attn(y, y, mask, rotation, bias), look, key, drop)

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
        y = self._before(self.norm1, x)
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

    def _after_attention(self, x, attended, look, key, drop=None):
        """The rest of the block, given what self-attention adds and how queries see the memory."""
        keys = layers.keys(key, 2 if look is None else 4)
        own = (self.norm1, self.norm1_out, self.scale1, drop)
        x = self._add(x, attended, keys[0], *own)
        if look is None:
            return self._add_mlp(x, keys[1], drop)
        if self.cross_mlp is None:
            x = self._add(x, look(self._normed(self.norm_cross, x)), keys[2], drop=drop)
            return self._add_mlp(x, keys[1], drop)
        x = self._add_mlp(x, keys[1], drop)
        x = self._add(x, look(self._normed(self.norm_cross, x)), keys[2], drop=drop)
        y = self.cross_mlp(self._normed(self.norm_cross_mlp, x))
        return self._add(x, y, keys[3], drop=drop)

    def _add_mlp(self, x, key, drop):
        y = self.mlp(self._before(self.norm2, x))
        return self._add(x, y, key, self.norm2, self.norm2_out, self.scale2, drop)

    def _add(self, x, sublayer, key, norm=None, norm_out=None, scale=None, drop=None):
        """The stream with what a sub-layer made, after the norms that are not before it."""
        if self.norms == "out" and norm is not None:
            sublayer = norm(sublayer)
        if norm_out is not None:
            sublayer = norm_out(sublayer)
        if scale is not None:
            sublayer = sublayer * scale[...].astype(sublayer.dtype)
        if drop is not None:
            sublayer = layers.drop_path(sublayer, drop, key)
        x = x + layers.dropout(sublayer, self.dropout, key)
        if self.norms == "post" and norm is not None:
            x = norm(x)
        return checkpoint_name(x, "residual")

    def _before(self, norm, x):
        return self._normed(norm, x) if self.norms in ("pre", "both") else x

    def _normed(self, norm, x):
        return checkpoint_name(norm(x), "normed")


def looped(config: Transformer) -> bool:
    """Whether a stack with these settings is a loop, on the devices at hand."""
    return platform() != "gpu" if config.scan is None else config.scan


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
    mask: Mask = None,
    memory: jax.Array | None = None,
    rotation: Rotation | None = None,
    bias: jax.Array | None = None,
    local: Local | None = None,
    key: jax.Array | None = None,
) -> jax.Array:
    """Runs stacked blocks one after another, scanned or unrolled as `config` says.

    Args:
      blocks: what `stack` made.
      x: [B, N, D].
      mask: the same for all blocks (but those that `local` names), as `rotation` and `bias`.
      memory: [B, M, D_memory] for their cross-attention, the same for all blocks; None: without.
      rotation: of queries and keys.
      bias: added to scores, [1, heads, N, N].
      local: what some of the blocks have in place of mask and rotation.
      key: for dropout; every block gets its own.
    """
    if blocks is None:
        return x
    graphdef, state = nnx.split(blocks)
    each: dict[str, Any] = {}
    if key is not None and (config.dropout or config.drop_path):
        each["key"] = jax.random.split(key, config.depth)
        if config.drop_path:
            each["drop"] = jnp.linspace(0.0, config.drop_path, config.depth)
    if config.bare_first:
        each["bare"] = jnp.arange(config.depth) == 0
    if local is not None:
        each["local"] = jnp.asarray(local.layers)
        mask = mask.array(x.shape[1]) if isinstance(mask, Causal) else mask
        mask = jnp.ones_like(local.mask) if mask is None else mask

    def step(x, layer):
        state, own = layer
        places: dict[str, Any] = {"mask": mask, "rotation": rotation}
        if local is not None:
            near = own.pop("local")
            others = {"mask": local.mask, "rotation": local.rotation}
            places = jax.tree.map(lambda a, b: jnp.where(near, a, b), others, places)
        return nnx.merge(graphdef, state)(x, memory=memory, bias=bias, **places, **own), None

    step = rematerialized(step, config, looped(config) and config.scan_unroll < config.depth)
    if looped(config):
        return jax.lax.scan(step, x, (state, each), unroll=config.scan_unroll)[0]
    for i in range(config.depth):
        # A GPU's compiler would store the stream with the batch last, as suits the sums that are biases'
        # gradients, and write a transposed copy for every product.
        x, _ = step(row_major(x), layer_of((state, each), i))
    return x


def layer_of(stacked: Any, i: int) -> Any:
    """Layer `i` of stacked arrays."""
    return jax.tree.map(lambda leaf: leaf[i], stacked)
