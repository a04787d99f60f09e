"""Model: what a run asks of whatever joins towers, and what the modules of models have in common."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from clipjax.batch import PAIR, Batch, Encoded, parse
from clipjax.component import Component
from clipjax.errors import ClipjaxError, did_you_mean
from clipjax.params import Tree
from clipjax.towers.base import describe


@dataclasses.dataclass(frozen=True)
class Model(Component):
    """Configuration of a model; `build` makes the module.

    The module has `__call__(batch, key=None, needs=PAIR) -> Encoded`, which makes the rows that are
    asked for by name; `shared()`, the scale (and bias) of similarities; and, for inference,
    `encode(name, inputs, output="embedding")` with its shorthands `encode_image` and `encode_text`.
    `Encoders` has all of these. `key` is a PRNG key in training and None in inference.
    """

    def build(self, rngs: nnx.Rngs) -> Any:
        """Makes the module, drawing its parameters from `rngs.params()`."""
        raise NotImplementedError

    def folded(self, params: Tree) -> tuple[Model, Tree]:
        """The same model without what only training needs (`Lora` adds its updates to the kernels)."""
        return self, params


def tower_of(model: Any, name: str) -> Any:
    """The tower of that name ("image", "text") of a model; None where it has none."""
    if hasattr(model, name):
        return getattr(model, name)
    towers = getattr(model, "towers", ())
    return next((one.tower for one in towers if one.name == name), None)


def with_tower(model: Any, name: str, tower: Any) -> Any:
    """The model with another tower of that name."""
    if hasattr(model, name):
        return dataclasses.replace(model, **{name: tower})
    towers = tuple(
        dataclasses.replace(one, tower=tower) if one.name == name else one for one in model.towers
    )
    return dataclasses.replace(model, towers=towers)


class Encoders(nnx.Module):
    """A module with some encoders, each for one kind of input: say `encoders` and `outputs`, have the rest.

    An input goes to the encoder that its name begins with: `image_2` to `image`, `text_hard` to
    `text`. An input with one axis more than usual (texts int32 [B, K, L], pictures [B, K, H, W, 3])
    holds K of them a row, and what is made of it has that axis too.
    """

    @property
    def encoders(self) -> tuple[str, ...]:
        """The names of the encoders, such as ("image", "text")."""
        raise NotImplementedError

    def outputs(
        self, encoder: str, inputs: jax.Array, key: jax.Array | None, wanted: frozenset[str]
    ) -> dict[str, Any]:
        """What an encoder makes of inputs [B, ...].

        Args:
          encoder: one of `encoders`.
          inputs: what it takes.
          key: PRNG key in training, None in inference.
          wanted: what is asked for, by name; more may be returned.

        Returns:
          `embedding` [B, E] float32, unit norm; `pooled` [B, D]; `tokens`, a dict of `values` [B, N, D],
          `mask` bool [B, N] and `places` int32 [B, N] (see `Tower`); and others
          by name. What it does not make is not in it.
        """
        raise NotImplementedError

    def width(self, encoder: str, output: str) -> int:
        """Dimensions of an output of an encoder: the last axis of `outputs(...)[output]`."""
        raise NotImplementedError

    def shared(self) -> dict[str, jax.Array]:
        """What belongs to no example: `logit_scale` [], and `logit_bias` [] if there is one."""
        raise NotImplementedError

    def encode(
        self, name: str, inputs: jax.Array, key: jax.Array | None = None, output: str = "embedding"
    ) -> Any:
        """What the encoder of that name makes of inputs.

        Args:
          name: of an encoder, or of an input that begins with it.
          inputs: [B, ...], or [B, K, ...] for K of them a row.
          key: PRNG key in training, None in inference.
          output: "embedding" [B, E], "pooled" [B, D], "tokens" {"values" [B, N, D], "mask" [B, N],
            "places" [B, N]}, "token_embeddings", the same with "values" [B, N, E], each token embedded as
            if it were the only one, or another that the encoder has.

        Raises:
          ClipjaxError: there is no such encoder, or it has no such output.
        """
        return self._outputs_of(name, inputs, key, frozenset({output}))[output]

    def encode_image(self, image: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """[B, H, W, 3] uint8 (or float in 0..1) -> [B, E] float32, unit norm."""
        return self.encode("image", image, key)

    def encode_text(self, text: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """int32 [B, L] -> [B, E] float32, unit norm."""
        return self.encode("text", text, key)

    def __call__(
        self, batch: Batch, key: jax.Array | None = None, needs: frozenset[str] = PAIR
    ) -> Encoded:
        """Encodes what is asked for.

        Args:
          batch: has an input for each of `needs`.
          key: PRNG key in training, None in inference. An input's randomness depends on nothing but
            the key and its name.
          needs: names of inputs, for their embeddings; with `_pooled` or `_tokens` behind them, for these.

        Raises:
          ClipjaxError: the batch lacks an input, or the model an encoder or output; it is named.
        """
        asked: dict[str, dict[str, str]] = {}
        for need in sorted(needs):
            name, output = parse(need, batch)
            asked.setdefault(name, {})[need] = output
        rows: dict[str, Any] = {}
        for name, own in asked.items():
            wanted = frozenset(own.values())
            made = self._outputs_of(name, batch[name], key_for(key, name), wanted)
            rows |= {need: made[output] for need, output in own.items()}
        return Encoded(rows, self.shared())

    def _outputs_of(self, name, inputs, key, wanted: frozenset[str]) -> dict[str, Any]:
        encoder = encoder_of(name, self.encoders)
        if encoder is None:
            raise ClipjaxError(
                f"the model has no encoder for {name!r}: the name of an input begins with that of its encoder "
                f"({', '.join(self.encoders)}), as image_2 and text_hard do"
            )
        many = _many(inputs)
        flat = rearrange(inputs, "b k ... -> (b k) ...") if many else inputs
        made = self.outputs(encoder, flat, key, wanted)
        for output in wanted - made.keys():
            raise ClipjaxError(
                f"{name}_{output} is asked for, and the model makes no {output!r} of "
                f"{name!r}{did_you_mean(output, made)}. If `{name}_{output}` is an input, add a field of "
                "that name to data.fields; if it is a head's, wrap the model in Headed with that head"
            )
        if not many:
            return made
        return jax.tree.map(lambda x: rearrange(x, "(b k) ... -> b k ...", k=many), made)


def encoder_of(name: str, encoders: Iterable[str]) -> str | None:
    """The encoder for an input: that of its name, or the longest that the name begins with."""
    fitting = [one for one in encoders if name == one or name.startswith(one + "_")]
    return max(fitting, key=len, default=None)


def key_for(key: jax.Array | None, name: str) -> jax.Array | None:
    """A key of its own for each name; None stays None."""
    return None if key is None else jax.random.fold_in(key, zlib.crc32(name.encode()) & 0x7FFFFFFF)


def as_tokens(
    tower: Any, inputs: jax.Array, tokens: jax.Array, key: jax.Array | None
) -> dict[str, jax.Array]:
    """A tower's tokens, `values` [B, N, D], with what it knows of them: `mask` and `places` [B, N]."""
    return {"values": tokens} | describe(tower, inputs, tokens, key=key)


def _many(inputs: jax.Array) -> int:
    """K of inputs that hold K texts or pictures a row, else 0."""
    texts = inputs.ndim == 3 and jnp.issubdtype(inputs.dtype, jnp.integer)
    return inputs.shape[1] if texts or inputs.ndim == 5 else 0
