"""ViT: the vision transformer (arXiv:2010.11929) and the variants that CLIP and SigLIP use."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat
from flax import nnx

from clipjax.errors import ClipjaxError, did_you_mean
from clipjax.towers import layers
from clipjax.towers.base import (
    everything,
    require,
    require_choice,
    require_positive,
    require_rate,
)
from clipjax.towers.pixels import normalize, require_images, require_normalization
from clipjax.towers.pooling import AttentionPool, mean_pool
from clipjax.towers.rotary import GRIDS, THETA, Rotation, grid_rotation
from clipjax.towers.transformer import Block, TransformerTower, apply_stack, stack

SIZES = {
    # name: (width, depth, heads, mlp_dim)
    "Ti": (192, 12, 3, 768),  # DeiT, arXiv:2012.12877
    "S": (384, 12, 6, 1536),
    "B": (768, 12, 12, 3072),  # ViT, arXiv:2010.11929
    "L": (1024, 24, 16, 4096),
    "H": (1280, 32, 16, 5120),
    "g": (1408, 40, 16, 6144),  # "Scaling Vision Transformers", arXiv:2106.04560
    "G": (1664, 48, 16, 8192),
    "So400m": (1152, 27, 16, 4304),  # "shape-optimized", arXiv:2305.13035
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViT(TransformerTower):
    """Vision transformer: images to tokens, one a patch, after the class token if there is one."""

    width: int = 768
    """Channels of every token, D."""
    heads: int = 12
    """Attention heads; must divide the width."""
    patch_size: int = 16
    """Side of the square patches, in pixels."""
    image_size: int | tuple[int, int] = 224
    """Side of the images in pixels, or (height, width); a multiple of the patch size."""
    pool: str = "class"
    """class (the class token), mean (of all tokens but that and registers), or map (attention pooling)."""
    class_token: bool | None = None
    """Whether there is a class token, first of all; None: for pool="class"."""
    registers: int = 0
    """Learned tokens before the patches (arXiv:2309.16588), after the class token; they have no position."""
    pool_heads: int | None = None
    """Heads of pool="map"; None: as the blocks."""
    pool_mlp_dim: int | None = None
    """Hidden channels of its MLP; None: as the blocks."""
    class_position: bool = True
    """Whether the class token has a learned position of its own (CLIP); big_vision's has none."""
    positions: str = "learned"
    """What is added to patches: learned, sincos2d (fixed), or none."""
    rope: str = "none"
    """How queries and keys of patches are turned by their place (2D RoPE): none, eva02, pe or dinov3."""
    rope_theta: float | None = None
    """Base of its frequencies; None: 10,000, and 100 for dinov3."""
    rope_grid: tuple[int, int] | None = None
    """(rows, columns) that places are stretched to (eva02, pe): the grid of pretraining; None: the image's."""
    patch_dropout: float = 0.0
    """Share of the patches left out in training, drawn anew for every image (FLIP)."""
    pre_norm: bool = False
    """A norm before the first block, as in CLIP."""
    patch_bias: bool = True
    """Whether the patch embedding has a bias; CLIP's has none."""
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Subtracted from pixels in 0..1."""
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Divides them after that."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "patch_size")
        require_choice(self, "pool", ("class", "mean", "map"))
        require_choice(self, "positions", ("learned", "sincos2d", "none"))
        require_choice(self, "rope", GRIDS)
        require(
            self.class_token is not False or self.pool != "class",
            "ViT.pool='class' needs a class token: leave ViT.class_token at None",
        )
        require(
            isinstance(self.registers, int) and self.registers >= 0,
            f"ViT.registers={self.registers!r} must be a whole number of at least 0",
        )
        require(
            self.rope == "none" or self.head_width % 4 == 0,
            f"ViT.rope={self.rope!r} turns pairs of channels by rows and by columns: heads of "
            f"{self.head_width} channels are no multiple of 4",
        )
        require_rate(self, "patch_dropout")
        require_normalization(self)
        for side in self.image_shape:
            require(
                isinstance(side, int) and side >= 1 and side % self.patch_size == 0,
                f"ViT.image_size={self.image_size} is no multiple of "
                f"ViT.patch_size={self.patch_size}",
            )
        require(
            self.positions != "sincos2d" or self.width % 4 == 0,
            f"ViT.width={self.width} must be a multiple of 4 for ViT.positions='sincos2d'",
        )

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> ViT:
        """A published size: "B/16" is ViT-Base with 16-pixel patches, "So400m/14" and so on.

        Args:
          name: "<size>/<patch size>", the size one of Ti, S, B, L, H, g, G, So400m.
          **overrides: any other fields, or these.

        Raises:
          ClipjaxError: the name is of another form, or names no known size.
        """
        match = re.fullmatch(r"([A-Za-z0-9]+)/([1-9][0-9]*)", name)
        if match is None:
            raise ClipjaxError(f"ViT preset {name!r} is not of the form 'B/16' (size/patch size)")
        if match[1] not in SIZES:
            raise ClipjaxError(
                f"ViT preset {name!r}: unknown size {match[1]!r}{did_you_mean(match[1], SIZES)}"
            )
        width, depth, heads, mlp_dim = SIZES[match[1]]
        fields = {"width": width, "depth": depth, "heads": heads, "mlp_dim": mlp_dim}
        return cls(**(fields | {"patch_size": int(match[2])} | overrides))

    @property
    def has_class(self) -> bool:
        """Whether there is a class token."""
        return self.pool == "class" if self.class_token is None else self.class_token

    @property
    def image_shape(self) -> tuple[int, int]:
        """(height, width) of the images in pixels."""
        size = self.image_size
        return size if isinstance(size, tuple) else (size, size)

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of patches."""
        return self.image_shape[0] // self.patch_size, self.image_shape[1] // self.patch_size

    def build(self, rngs: nnx.Rngs) -> ViTModule:
        return ViTModule(self, rngs)


class ViTModule(nnx.Module):
    """The module of `ViT`."""

    def __init__(self, config: ViT, rngs: nnx.Rngs):
        self.config, self.width = config, config.width
        width, patches = config.width, config.grid[0] * config.grid[1]
        self.patch = layers.Linear(3 * config.patch_size**2, width, rngs, bias=config.patch_bias)
        has_class = config.has_class
        self.class_token = layers.normal(rngs, (width,), width**-0.5) if has_class else None
        learned = config.positions == "learned"
        shape = (patches + (has_class and config.class_position), width)
        self.positions = layers.normal(rngs, shape, width**-0.5) if learned else None
        shape = (config.registers, width)
        self.registers = layers.normal(rngs, shape, width**-0.5) if config.registers else None
        self.pre_norm = layers.Norm(config.norm, width, config.eps) if config.pre_norm else None
        self.blocks = stack(lambda rngs: Block(config, rngs), config.depth, rngs)
        self.norm = layers.Norm(config.norm, width, config.eps)
        sizes = (config.pool_heads, config.pool_mlp_dim)
        self.pool = AttentionPool(config, rngs, *sizes) if config.pool == "map" else None

    def __call__(
        self, image: jax.Array, *, key: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Images to tokens and one vector.

        Args:
          image: [B, H, W, 3] uint8, or float in 0..1.
          key: for dropout and patch dropout in training; None in inference.

        Returns:
          tokens [B, N, D], the class token first if there is one, then registers (fewer patches under
          patch dropout), and pooled [B, D], both in the compute dtype.

        Raises:
          ClipjaxError: the images are of another shape.
        """
        config = self.config
        require_images(image, config.image_shape, "ViT")
        drop_key, patch_key, block_key = layers.keys(key, 3)
        x = self.patch(patchify(normalize(image, config), config.patch_size))
        x = self._add_positions(x)
        kept = kept_patches(x.shape[0], x.shape[1], config.patch_dropout, patch_key)
        if kept is not None:
            x = jnp.take_along_axis(x, kept[:, :, None], axis=1)
        if self.registers is not None:
            x = _prepended(self.registers[...], x)
        if self.class_token is not None:
            first = self.class_token[...]
            if self.positions is not None and config.class_position:
                first = first + self.positions[0]
            x = _prepended(first[None], x)
        x = layers.dropout(x, config.dropout, drop_key)
        if self.pre_norm is not None:
            x = self.pre_norm(x)
        rotation = self._rotation(kept)
        tokens = self.norm(apply_stack(self.blocks, x, config, rotation=rotation, key=block_key))
        if self.pool is not None:
            return tokens, self.pool(tokens)
        if config.pool == "class":
            return tokens, tokens[:, 0]
        return tokens, mean_pool(tokens[:, self._front :])

    @property
    def _front(self) -> int:
        """Tokens before the patches."""
        return self.config.registers + self.config.has_class

    def _rotation(self, kept: jax.Array | None) -> Rotation | None:
        config = self.config
        if config.rope == "none":
            return None
        theta = THETA[config.rope] if config.rope_theta is None else config.rope_theta
        rotation = grid_rotation(
            config.rope, config.grid, config.head_width, theta, config.rope_grid, self._front
        )
        if kept is None:
            return rotation
        front = jnp.broadcast_to(jnp.arange(self._front), (len(kept), self._front))
        places = jnp.concatenate([front, kept + self._front], axis=1)
        return dataclasses.replace(rotation, cos=rotation.cos[places], sin=rotation.sin[places])

    def alone(self, tokens: jax.Array) -> jax.Array:
        """Each of the tokens [B, N, D] of a call pooled as if it were the only one: [B, N, D]."""
        if self.pool is None:
            return tokens
        each = self.pool(rearrange(tokens, "b n d -> (b n) 1 d"))
        return rearrange(each, "(b n) d -> b n d", n=tokens.shape[1])

    def describe(self, image: jax.Array, *, key: jax.Array | None = None) -> dict[str, jax.Array]:
        """Where the tokens of the same call come from, as in `Tower`.

        Args:
          image: [B, H, W, 3].
          key: that of the call: it decides which patches are left under patch dropout.

        Returns:
          mask, bool [B, N], all True, and places, int32 [B, N]: the patch's index, row by row in
          `config.grid`; -1 for the class token and registers, which come first.
        """
        config, rows = self.config, len(image)
        patches = config.grid[0] * config.grid[1]
        kept = kept_patches(rows, patches, config.patch_dropout, layers.keys(key, 3)[1])
        found = everything(rows, patches) if kept is None else everything(*kept.shape)
        if kept is not None:
            found["places"] = kept
        front = (0, 0), (self._front, 0)
        first = {"mask": True, "places": -1}
        return {k: jnp.pad(v, front, constant_values=first[k]) for k, v in found.items()}

    def _add_positions(self, patches: jax.Array) -> jax.Array:
        """Adds the patches' own positions; the class token's, if learned, is the first row."""
        if self.config.positions == "none":
            return patches
        if self.positions is None:
            table = jnp.asarray(sincos2d(self.config.grid, self.width))
        else:
            table = self.positions[...][self.positions.shape[0] - patches.shape[1] :]
        return patches + table.astype(patches.dtype)


def _prepended(first: jax.Array, tokens: jax.Array) -> jax.Array:
    """The same [K, D] before the tokens [B, N, D] of every image."""
    first = repeat(first.astype(tokens.dtype), "k d -> b k d", b=len(tokens))
    return jnp.concatenate([first, tokens], axis=1)


def patchify(image: jax.Array, size: int) -> jax.Array:
    """[B, H, W, C] -> [B, N, size * size * C]: patches row by row, pixels row by row in each."""
    return rearrange(image, "b (h p) (w q) c -> b (h w) (p q c)", p=size, q=size)


def sincos2d(grid: tuple[int, int], width: int) -> np.ndarray:
    """Fixed positions, float32 [rows * columns, width] (MoCo v3, arXiv:2104.02057).

    A quarter of the channels each: sine and cosine of the column, sine and cosine of the row, at
    frequencies 10000^(-i / (width / 4)).
    """
    frequencies = 10000.0 ** (-np.arange(width // 4) / (width // 4))
    places = rearrange(np.mgrid[: grid[0], : grid[1]], "yx h w -> yx (h w) 1")
    row, column = places * frequencies
    parts = [np.sin(column), np.cos(column), np.sin(row), np.cos(row)]
    return np.concatenate(parts, axis=1).astype(np.float32)


def kept_patches(rows: int, patches: int, rate: float, key: jax.Array | None) -> jax.Array | None:
    """A random `round((1 - rate) * N)` (at least one) of each image's patches, in order.

    Patch dropout as in FLIP (arXiv:2212.00794): what is dropped costs nothing downstream.

    Args:
      rows: B.
      patches: N.
      rate: the share to leave out.
      key: None keeps all.

    Returns:
      int32 [B, kept], or None for all of them.
    """
    if key is None or rate == 0.0:
        return None
    kept = max(1, round((1.0 - rate) * patches))
    chosen = jnp.argsort(jax.random.uniform(key, (rows, patches)), axis=1)[:, :kept]
    return jnp.sort(chosen, axis=1).astype(jnp.int32)
