"""The same model in other parameters: what another library has no place for, moved to where it has."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from clipjax.pretrained import Pretrained
from clipjax.towers import ViT


def without_patch_bias(pretrained: Pretrained) -> Pretrained:
    """A ViT's patch bias added to the patches' learned positions: no output changes.

    CLIP's ViTs have no such bias. A model without one, or without learned positions to take it, and
    those whose families have it (SigLIP's pool by attention, EVA's keys have no bias), stay as they are.

    Args:
      pretrained: its params may be `{}`, for a model that has no weights yet.
    """
    model: Any = pretrained.model
    image = getattr(model, "image", None)
    if not isinstance(image, ViT) or not image.patch_bias:
        return pretrained
    if image.pool == "map" or not image.key_bias or image.positions != "learned":
        return pretrained
    model = dataclasses.replace(model, image=dataclasses.replace(image, patch_bias=False))
    params = pretrained.params
    if params:
        tower = params["image"]
        positions = np.array(tower["positions"])
        first = positions.shape[0] - image.grid[0] * image.grid[1]  # after the class token's own
        positions[first:] += np.asarray(tower["patch"]["bias"])
        patch = {name: leaf for name, leaf in tower["patch"].items() if name != "bias"}
        params = params | {"image": tower | {"positions": positions, "patch": patch}}
    return dataclasses.replace(pretrained, model=model, params=params)
