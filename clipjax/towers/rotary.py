"""Where tokens are, told to attention: rotations of queries and keys, and biases of scores by distance."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat

GRIDS = ("none", "eva02", "pe", "dinov3")
"""How pictures' patches are rotated; see `grid_rotation`."""
THETA = {"eva02": 10_000.0, "pe": 10_000.0, "dinov3": 100.0}
"""Their base where none is given."""


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("cos", "sin"), meta_fields=("pairs",)
)
@dataclasses.dataclass(frozen=True)
class Rotation:
    """Turns pairs of channels by angles (RoPE, arXiv:2104.09864).

    Attributes:
      cos: [N, head_dim] or [B, N, head_dim], each pair's twice.
      sin: the same.
      pairs: "neighbors" (channels 2i and 2i + 1) or "halves" (i and i + head_dim / 2).
    """

    cos: jax.Array
    sin: jax.Array
    pairs: str

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, N, heads, head_dim] -> the same, turned; computed in float32."""
        y = x.astype(jnp.float32)
        if self.pairs == "halves":
            first, second = jnp.split(y, 2, axis=-1)
            turned = jnp.concatenate([-second, first], axis=-1)
        else:
            turned = jnp.stack([-y[..., 1::2], y[..., ::2]], axis=-1).reshape(y.shape)
        y = y * self.cos[..., None, :] + turned * self.sin[..., None, :]
        return y.astype(x.dtype)


class Local(NamedTuple):
    """What blocks with a window have in place of the others' mask and rotation.

    Attributes:
      mask: as the others'.
      rotation: as the others'; None where they have none.
      layers: bool [depth], whether a block is one of these.
    """

    mask: jax.Array
    rotation: Rotation | None
    layers: np.ndarray


def _rotation(angles: np.ndarray, pairs: str) -> Rotation:
    """Of angles [N, head_dim / 2]."""
    if pairs == "halves":
        angles = np.concatenate([angles, angles], axis=-1)
    else:
        angles = repeat(angles, "n f -> n (f two)", two=2)
    cos, sin = np.cos(angles), np.sin(angles)
    return Rotation(jnp.asarray(cos, jnp.float32), jnp.asarray(sin, jnp.float32), pairs)


def text_rotation(length: int, size: int, theta: float) -> Rotation:
    """Of tokens 0 to `length - 1`, whose heads have `size` channels: halves, as in Llama."""
    frequencies = theta ** (-np.arange(0, size, 2) / size)
    return _rotation(np.arange(length)[:, None] * frequencies, "halves")


def grid_rotation(
    kind: str,
    grid: tuple[int, int],
    size: int,
    theta: float,
    reference: tuple[int, int] | None,
    before: int,
) -> Rotation:
    """Of patches row by row; half of a head's channels turn with the row, half with the column.

    Args:
      kind: "eva02" (rows first, places from 0; arXiv:2303.11331), "pe" (columns first, places from 1;
        arXiv:2504.13181) or "dinov3" (rows first, centers of patches in -1..1; arXiv:2508.10104).
      grid: (rows, columns).
      size: channels of a head, a multiple of 4.
      theta: the slowest of the frequencies is about its inverse.
      reference: the grid that places are stretched to; None: `grid`.
      before: tokens in front of the patches, which are not turned.
    """
    frequencies = theta ** (-np.arange(0, size, 4) / size)
    places = [np.arange(n, dtype=np.float64) for n in grid]
    if kind == "dinov3":
        places = [2 * np.pi * (2 * (x + 0.5) / n - 1) for x, n in zip(places, grid, strict=True)]
    else:
        ends = grid if reference is None else reference
        first = 1.0 if kind == "pe" else 0.0
        places = [(x + first) / n * r for x, n, r in zip(places, grid, ends, strict=True)]
    rows, columns = np.meshgrid(*places, indexing="ij")
    axes = (columns, rows) if kind == "pe" else (rows, columns)
    angles = np.stack(axes, -1)[..., None] * frequencies
    angles = rearrange(angles, "h w two f -> (h w) (two f)")
    angles = np.concatenate([np.zeros((before, size // 2)), angles])
    return _rotation(angles, "halves" if kind == "dinov3" else "neighbors")


def sinusoids(length: int, width: int) -> np.ndarray:
    """Fixed positions of texts, float32 [length, width]: sines, then cosines (arXiv:1706.03762, as in
    tensor2tensor: frequencies from 1 to 1/10000, both reached)."""
    half = width // 2
    frequencies = np.exp(-math.log(10_000) * np.arange(half) / (half - 1))
    angles = np.arange(length)[:, None] * frequencies
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)


def distance_buckets(length: int, buckets: int, distance: int, causal: bool) -> np.ndarray:
    """T5's bucket of every key's distance from every query (arXiv:1910.10683), int32 [length, length].

    Near distances have a bucket each; from a half of the buckets on they widen with the logarithm, up to
    `distance`, beyond which all are one. Of two directions, each has half the buckets.
    """
    away = np.arange(length)[None, :] - np.arange(length)[:, None]
    offset, far = np.zeros_like(away), np.maximum(-away, 0)
    if not causal:
        buckets //= 2
        offset, far = (away > 0) * buckets, np.abs(away)
    exact = buckets // 2
    # float32, as in T5's own code: at the edges of a bucket rounding decides.
    ratio = np.log(np.maximum(far, 1).astype(np.float32) / np.float32(exact))
    ratio = ratio / np.float32(math.log(distance / exact)) * np.float32(buckets - exact)
    wide = np.minimum(exact + ratio.astype(np.int32), buckets - 1)
    return (offset + np.where(far < exact, far, wide)).astype(np.int32)
