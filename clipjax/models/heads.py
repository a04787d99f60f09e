"""Heads: what a model gets beside its embeddings for the sake of an objective.

    Headed(DualEncoder(...), heads=(MlpHead("projected", of="image"),))

makes `image_projected`, and `image_2_projected` of a second view: an objective names them like any
other output (`SimCLR("image_projected", "image_2_projected")`). A head that joins several inputs
(a fusion encoder) is called by the objective itself, with `context.head(name, ...)`.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from clipjax.batch import PAIR, Batch, Encoded
from clipjax.component import Component
from clipjax.errors import ClipjaxError, did_you_mean
from clipjax.layout import batch_first
from clipjax.models.base import Encoders, Model, encoder_of, key_for
from clipjax.params import Tree
from clipjax.towers import layers
from clipjax.towers.base import require, require_choice


@dataclasses.dataclass(frozen=True)
class Head(Component):
    """Configuration of a head; `build` makes the module."""

    name: str = "head"
    """What it makes is called `<input>_<name>`; or, of a head called by an objective, the head itself."""
    of: str | None = "image"
    """The encoder whose output it reads; None: an objective calls it."""
    reads: str = "pooled"
    """The output that it reads: embedding, pooled, tokens, or another head's name."""

    def build(self, rngs: nnx.Rngs, base: Any) -> Any:
        """Makes the module, called as `module(output, key=None)`.

        Args:
          rngs: draws its parameters.
          base: the model's module; `base.width(self.of, self.reads)` is the width of what it reads.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class MlpHead(Head):
    """Linear layers with a norm and a ReLU between them: the projector of SimCLR and its kin."""

    name: str = "projected"
    """What it makes is called `<input>_<name>`."""
    widths: tuple[int, ...] = (512, 128)
    """Outputs of each layer; the last is the head's."""
    norm: str = "layernorm"
    """Between the layers: layernorm, rmsnorm or none."""
    unit: bool = True
    """Whether its output is scaled to unit norm."""

    def __post_init__(self):
        require(bool(self.widths), "MlpHead.widths is empty: name at least one width")
        for width in self.widths:
            require(width >= 1, f"MlpHead.widths={self.widths} must all be at least 1")
        require_choice(self, "norm", (*layers.NORMS, "none"))

    def build(self, rngs, base):
        return MlpHeadModule(self, rngs, base.width(self.of, self.reads))


class MlpHeadModule(nnx.Module):
    """The module of `MlpHead`."""

    def __init__(self, config: MlpHead, rngs: nnx.Rngs, width: int):
        self.config, self.width = config, config.widths[-1]
        edges = (width, *config.widths)
        self.layers = nnx.List(layers.Linear(a, b, rngs) for a, b in itertools.pairwise(edges))
        self.norms = nnx.List(
            layers.Norm(config.norm, b, 1e-5) for b in config.widths[:-1] if config.norm != "none"
        )

    def __call__(self, x: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        """[..., D] -> [..., widths[-1]] float32."""
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if i + 1 < len(self.layers):
                x = self.norms[i](x) if len(self.norms) else x
                x = jax.nn.relu(x)
        x = batch_first(x.astype(jnp.float32))
        if not self.config.unit:
            return x
        return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-24))


@dataclasses.dataclass(frozen=True)
class Headed(Model):
    """A model with heads beside its embeddings, which only training needs: exports leave them out.

    The model's parameters are under `base/`, the heads' under `heads/<of>_<name>/`. To begin with trained
    weights of the model: `start=StartFrom(path, into="base", fresh="^heads/")`.
    """

    base: Model
    """The model."""
    heads: tuple[Head, ...]
    """Its heads."""

    def __post_init__(self) -> None:
        names = [_key(head) for head in self.heads]
        for name in names:
            require(
                names.count(name) == 1,
                f"Headed.heads has two heads {name!r}: give one of them another name",
            )

    def __getattr__(self, name: str) -> Any:
        # What others ask of a model's configuration (its towers, embed_dim) is the base's.
        if name.startswith("_") or name == "base":
            raise AttributeError(name)
        return getattr(self.base, name)

    def build(self, rngs: nnx.Rngs) -> HeadedModule:
        """Makes the module.

        Raises:
          ClipjaxError: a head reads of an encoder that the model has not.
        """
        return HeadedModule(self, rngs)

    def folded(self, params: Tree) -> tuple[Model, Tree]:
        return self.base.folded(params["base"])


class HeadedModule(Encoders):
    """The module of `Headed`: the base's outputs, and one more for each head."""

    def __init__(self, config: Headed, rngs: nnx.Rngs):
        self.config = config
        self.base = config.base.build(rngs)
        if not isinstance(self.base, Encoders):
            raise ClipjaxError(
                f"Headed.base: the module of {type(config.base).__name__} has no named outputs for heads "
                "to read: derive it from clipjax.models.Encoders"
            )
        made: dict[str, Any] = {}
        for head in config.heads:
            if head.of is not None and head.of not in self.base.encoders:
                raise ClipjaxError(
                    f"the head {head.name!r} reads of {head.of!r}, and the model encodes "
                    f"{', '.join(self.base.encoders)}{did_you_mean(head.of, self.base.encoders)}"
                )
            made[_key(head)] = head.build(rngs, _Widths(self.base, made))
        self.heads = nnx.Dict(made)

    @property
    def encoders(self) -> tuple[str, ...]:
        return self.base.encoders

    def outputs(
        self, encoder: str, inputs: jax.Array, key: jax.Array | None, wanted: frozenset[str]
    ) -> dict[str, Any]:
        own = {head.name: head for head in self.config.heads if head.of == encoder}
        base_key, head_key = layers.keys(key, 2)
        read = frozenset(own[name].reads for name in wanted if name in own)
        read |= {own[name].reads for name in read if name in own}
        made = self.base.outputs(encoder, inputs, base_key, (wanted | read) - own.keys())
        for head in self.config.heads:  # in order: one may read of those before it
            if head.of == encoder and head.name in wanted | read:
                made[head.name] = self.heads[_key(head)](made[head.reads], key=head_key)
        return made

    def __call__(
        self, batch: Batch, key: jax.Array | None = None, needs: frozenset[str] = PAIR
    ) -> Encoded:
        """As the base's, with the heads' outputs among those that can be asked for."""
        base_needs, todo = set(needs), []
        for head in reversed(self.config.heads):  # one may read of those before it
            for need in sorted(base_needs):
                name = need.removesuffix(f"_{head.name}")
                if name in batch and name != need and head.of == encoder_of(name, self.encoders):
                    base_needs.remove(need)
                    base_needs.add(name if head.reads == "embedding" else f"{name}_{head.reads}")
                    todo.append((need, name, head))
        base_key, head_key = layers.keys(key, 2)
        encoded = self.base(batch, key=base_key, needs=frozenset(base_needs))
        rows = dict(encoded.rows)
        for need, name, head in reversed(todo):
            read = rows[name if head.reads == "embedding" else f"{name}_{head.reads}"]
            rows[need] = self.heads[_key(head)](read, key=key_for(head_key, need))
        return Encoded({need: rows[need] for need in needs}, encoded.shared)

    def width(self, encoder: str, output: str) -> int:
        return _Widths(self.base, self.heads).width(encoder, output)

    def shared(self) -> dict[str, jax.Array]:
        return self.base.shared()

    def head(self, name: str, *arrays: Any, key: jax.Array | None = None) -> Any:
        """Applies a head that joins several inputs.

        Raises:
          ClipjaxError: there is no such head.
        """
        if name not in self.heads:
            raise ClipjaxError(
                f"the objective calls the head {name!r}, which the model lacks"
                f"{did_you_mean(name, self.heads)}: add it to Headed.heads"
            )
        return self.heads[name](*arrays, key=key)

    def __getattr__(self, name: str) -> Any:
        # What the base can do besides: captioning.
        if name.startswith("_") or name in ("base", "heads", "config"):
            raise AttributeError(name)
        return getattr(self.base, name)


@dataclasses.dataclass(frozen=True)
class _Widths:
    """Widths of the base's outputs, and of the heads that are made so far."""

    base: Any
    heads: Any

    def width(self, encoder: str, output: str) -> int:
        key = f"{encoder}_{output}"
        return self.heads[key].width if key in self.heads else self.base.width(encoder, output)


def _key(head: Head) -> str:
    return head.name if head.of is None else f"{head.of}_{head.name}"
