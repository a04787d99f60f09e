"""The same model for pictures of another size or texts of another length."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from clipjax.errors import ClipjaxError
from clipjax.models.base import tower_of, with_tower
from clipjax.pretrained import Pretrained


def with_image_size(pretrained: Pretrained, size: int) -> Pretrained:
    """Resamples learned position embeddings to square pictures of `size` pixels.

    Bicubic and antialiased, as OpenCLIP does; a position without a place, that of a class token,
    stays.

    Raises:
      ClipjaxError: the image tower cannot take pictures of that size.
    """
    model: Any = pretrained.model
    tower = tower_of(model, "image")
    if tower is None:
        raise ClipjaxError(f"image_size={size}: this model sees no pictures")
    resized = dataclasses.replace(tower, image_size=size)
    params = pretrained.params
    if tower.grid != resized.grid:
        image = params["image"]
        owner = image if "positions" in image else image.get("pool") or {}
        if "positions" in owner:
            table = resample_positions(np.asarray(owner["positions"]), tower.grid, resized.grid)
            owner = owner | {"positions": table}
            image = owner if "positions" in image else image | {"pool": owner}
            params = params | {"image": image}
    model = with_tower(model, "image", resized)
    return dataclasses.replace(pretrained, model=model, params=params, image_size=size)


def resample_positions(
    table: np.ndarray, grid: tuple[int, int], new_grid: tuple[int, int]
) -> np.ndarray:
    """Position embeddings of one grid for another.

    Args:
      table: [extra + rows * columns, D]; the extra rows in front belong to no place.
      grid: (rows, columns) of the table.
      new_grid: (rows, columns) wanted.

    Returns:
      float32 [extra + new rows * new columns, D].
    """
    extra = table.shape[0] - math.prod(grid)
    places = table[extra:].astype(np.float64).reshape(*grid, -1)
    places = np.einsum("yr,rcd->ycd", _cubic(grid[0], new_grid[0]), places)
    places = np.einsum("xc,ycd->yxd", _cubic(grid[1], new_grid[1]), places)
    flat = places.reshape(-1, table.shape[1]).astype(np.float32)
    return np.concatenate([table[:extra].astype(np.float32), flat])


def _cubic(size: int, new_size: int) -> np.ndarray:
    """Weights [new_size, size] of antialiased cubic resampling (Keys 1981, a = -1/2).

    Samples lie at pixel centers. To a smaller size, the kernel is stretched to cover what falls
    between; at the border, what lies outside is left out and the rest scaled up.
    """
    stretch = max(size / new_size, 1.0)
    centers = (np.arange(new_size) + 0.5) * size / new_size - 0.5
    x = np.abs(np.arange(size) - centers[:, None]) / stretch
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    weights = np.where(x < 1, near, np.where(x < 2, far, 0.0))
    return weights / weights.sum(1, keepdims=True)


def with_context_length(pretrained: Pretrained, length: int) -> Pretrained:
    """Drops the positions of a text tower from `length` on; those that are no parameters may grow.

    Raises:
      ClipjaxError: the weights have no positions that far, or their texts must have their full length.
    """
    model: Any = pretrained.model
    tower = tower_of(model, "text")
    if tower is None:
        raise ClipjaxError(f"context_length={length}: this model reads no texts")
    if length == tower.context_length:
        return pretrained
    if length > tower.context_length and tower.positions == "learned":
        raise ClipjaxError(
            f"context_length={length}: the weights have positions for {tower.context_length} tokens, and "
            "none can be made up; import them as they are (longer texts lose their end)"
        )
    if tower.pool == "last" and tower.pad_id is None:
        raise ClipjaxError(
            f"context_length={length}: this text tower pools the last of exactly {tower.context_length} "
            "tokens, padding counted, so its texts must keep that length"
        )
    model = with_tower(model, "text", dataclasses.replace(tower, context_length=length))
    text, params = pretrained.params["text"], pretrained.params
    if "positions" in text:
        # A class token's position follows the last word's.
        kept = np.asarray(text["positions"])[: length + tower.class_position]
        params = params | {"text": text | {"positions": kept}}
    return dataclasses.replace(pretrained, model=model, params=params, context_length=length)
