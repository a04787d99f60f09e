"""Lora: any model with low-rank updates beside some of its weights."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from clipjax.batch import PAIR, Batch, Encoded
from clipjax.errors import ClipjaxError, did_you_mean
from clipjax.models.base import Model
from clipjax.params import Tree, map_with_path, merge, paths, split
from clipjax.towers import layers
from clipjax.towers.base import require_positive


@dataclasses.dataclass(frozen=True)
class Lora(Model):
    """`kernel + alpha / rank * a @ b` in place of every matching kernel (arXiv:2106.09685).

    The base's parameters are under `base/`, the factors under `lora/`. To train the factors alone:
    `optimizer.groups=(Group("^base/", frozen=True),)`, and `start=StartFrom(path, into="base",
    fresh="^lora/")` begins with a trained base. `b` starts at zero, so the model starts as its base.

    The updated kernels are formed once a step, whatever the tower looks like: optimizer state and
    gradients exist for the factors only, but the backward pass still forms each matching kernel's
    gradient on its way to them. Exports and `Pretrained.folded` add the update to the kernels.
    """

    base: Model
    """The model to adapt."""
    pattern: str = r"/attn/(q|v)/kernel$"
    """Regular expression, searched in the base's parameter paths; only matrices match."""
    rank: int = 8
    """Columns of a, rows of b."""
    alpha: float = 16.0
    """Scale of the update, times 1 / rank."""

    def __post_init__(self) -> None:
        require_positive(self, "rank")
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ClipjaxError(f"Lora.pattern={self.pattern!r}: {error}") from error

    def __getattr__(self, name: str) -> Any:
        # What others ask of a model's configuration (its towers, embed_dim) is the base's.
        if name.startswith("_") or name == "base":
            raise AttributeError(name)
        return getattr(self.base, name)

    def build(self, rngs: nnx.Rngs) -> LoraModule:
        """Makes the module.

        Raises:
          ClipjaxError: the pattern matches no matrix of the base.
        """
        return LoraModule(self, rngs)

    def folded(self, params: Tree) -> tuple[Model, Tree]:
        return self.base.folded(add_updates(params["base"], params["lora"], self.alpha / self.rank))


class LoraModule(nnx.Module):
    """The module of `Lora`: whatever the base's module can do, with the updated kernels."""

    def __init__(self, config: Lora, rngs: nnx.Rngs):
        self.factor = config.alpha / config.rank
        self.base = config.base.build(rngs)
        known = paths(split(self.base)[1])
        matching = [
            (name, leaf)
            for name, leaf in known
            if leaf.ndim >= 2 and re.search(config.pattern, name)
        ]
        if not matching:
            raise ClipjaxError(
                f"Lora.pattern={config.pattern!r} matches no matrix of the base"
                + did_you_mean(config.pattern, [name for name, _ in known])
            )
        self.lora = nnx.Dict(
            {
                # A path's slashes would make levels, which a list's numbers cannot name.
                name.replace("/", "."): Factors(leaf.shape, config.rank, rngs)
                for name, leaf in matching
            }
        )

    def __call__(
        self, batch: Batch, key: jax.Array | None = None, needs: frozenset[str] = PAIR
    ) -> Encoded:
        """As the base's."""
        updated = self.updated()
        encoded = updated(batch, key=key, needs=needs)
        nnx.update(self.base, nnx.state(updated, nnx.Not(nnx.Param)))  # batch statistics
        return encoded

    def updated(self) -> Any:
        """The base's module with the updates added to its kernels."""
        graphdef, params, model_state = split(self.base)
        factors = {name: {"a": f.a[...], "b": f.b[...]} for name, f in self.lora.items()}
        return merge(graphdef, add_updates(params, factors, self.factor), model_state)

    def __getattr__(self, name: str) -> Any:
        # What the base can do besides: encode, heads, captioning.
        if name.startswith("_") or name in ("base", "lora", "factor"):
            raise AttributeError(name)
        if not hasattr(self.base, name):
            raise AttributeError(f"{type(self.base).__name__} has no attribute {name!r}")
        return getattr(self.updated(), name)


class Factors(nnx.Module):
    """`a` [..., D_in, rank], random, and `b` [..., rank, D_out], zero."""

    def __init__(self, shape: tuple[int, ...], rank: int, rngs: nnx.Rngs):
        *stack, d_in, d_out = shape
        self.a = layers.normal(rngs, (*stack, d_in, rank), d_in**-0.5)
        self.b = nnx.Param(jnp.zeros((*stack, rank, d_out)))


def add_updates(params: Tree, factors: Tree, factor: float) -> Tree:
    """`params` with `factor * a @ b` added to the leaves that `factors` names (dots for slashes)."""

    def updated(path: str, leaf: jax.Array) -> jax.Array:
        name = path.replace("/", ".")
        if name not in factors:
            return leaf
        return leaf + factor * (factors[name]["a"] @ factors[name]["b"])

    return map_with_path(updated, params)
