"""What every image tower does to its input first: check the shape, normalize the pixels."""

from __future__ import annotations

from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from clipjax.towers.base import require


class ImageConfig(Protocol):
    """The fields of an image tower's configuration that say how pixels are normalized."""

    @property
    def mean(self) -> tuple[float, float, float]: ...
    @property
    def std(self) -> tuple[float, float, float]: ...
    @property
    def dtype(self) -> str: ...


def normalize(image: jax.Array, config: ImageConfig) -> jax.Array:
    """`(image - mean) / std` in the compute dtype.

    Args:
      image: [B, H, W, 3], uint8 (0..255) or float (0..1).
      config: has `mean` and `std` for pixels in 0..1, and `dtype`.
    """
    mean, std = np.asarray(config.mean, np.float32), np.asarray(config.std, np.float32)
    unit = np.float32(255.0 if jnp.issubdtype(image.dtype, jnp.integer) else 1.0)
    return (image.astype(jnp.float32) * (1.0 / (unit * std)) - mean / std).astype(config.dtype)


def require_images(image: Any, shape: tuple[int, int], tower: str) -> None:
    """The array must be uint8 or float [B, height, width, 3]."""
    require(
        image.ndim == 4 and image.shape[1:] == (*shape, 3),
        f"{tower} was configured for images [B, {shape[0]}, {shape[1]}, 3], got "
        f"{list(image.shape)}: set {tower}.image_size, or resize the images",
    )
    require(
        image.dtype == jnp.uint8 or jnp.issubdtype(image.dtype, jnp.floating),
        f"{tower} takes uint8 or float images, got {image.dtype}",
    )


def require_normalization(owner: Any) -> None:
    """`mean` and `std` must have three numbers, those of `std` above zero."""
    name = type(owner).__name__
    for field in ("mean", "std"):
        value = getattr(owner, field)
        require(len(value) == 3, f"{name}.{field}={value} must have three numbers, one a channel")
    require(min(owner.std) > 0, f"{name}.std={owner.std} must be above 0")
