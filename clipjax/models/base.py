"""Model: what a run asks of whatever joins towers."""

from __future__ import annotations

import dataclasses
from typing import Any

from flax import nnx

from clipjax.component import Component
from clipjax.params import Tree


@dataclasses.dataclass(frozen=True)
class Model(Component):
    """Configuration of a model; `build` makes the module.

    The module has `encode_image(image, key=None) -> [B, E]`, `encode_text(text, key=None)` the same
    (float32, unit norm), and `__call__(batch, key=None) -> Encoded`. `key` is a PRNG key in training
    and None in inference.
    """

    def build(self, rngs: nnx.Rngs) -> Any:
        """Makes the module, drawing its parameters from `rngs.params()`."""
        raise NotImplementedError

    def folded(self, params: Tree) -> tuple[Model, Tree]:
        """The same model without what only training needs (`Lora` adds its updates to the kernels)."""
        return self, params
