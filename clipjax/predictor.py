"""Predictor: pictures and texts in, embeddings out, in batches of one shape, on any mesh."""

from __future__ import annotations

import collections
import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from clipjax.data.augment import Resize
from clipjax.data.tokenizers import TokenizerModel
from clipjax.errors import ClipjaxError
from clipjax.layout import on_mesh
from clipjax.mesh import batch_sharding, batch_shards, replicated
from clipjax.params import Tree, merge, split

PER_SHARD = 64
"""Default rows a device embeds at once. On a CPU, 256 take twice the time a row that 64 do."""
_IN_FLIGHT = 2  # batches dispatched ahead of the device; simulated devices deadlock without a bound


class Predictor:
    """A model with weights, ready to embed.

    Each of the two encoders is compiled once, for one batch shape: the last batch is padded, and
    its padding dropped again. Parameters are arguments of the compiled functions, so that
    `with_params` swaps them for free. Embeddings depend on neither the batch size nor the mesh,
    up to float32 rounding.

    With several processes every process makes the same calls with the same inputs, and gets all of
    the embeddings.

    Attributes:
      image_size: pixels, height and width of what the image encoder sees.
      context_length: tokens of a text, special tokens counted.
      batch_size: pictures or texts per call of the model.
      tokenizer: turns texts into tokens; None for a model that is only given tokens.
      resize: how pictures of another size are brought to `image_size`.
    """

    def __init__(
        self,
        graphdef: nnx.GraphDef,
        params: Tree,
        model_state: Tree,
        *,
        tokenizer: TokenizerModel | None,
        context_length: int,
        image_size: int,
        mesh: Mesh | None = None,
        batch_size: int | None = None,
        resize: Resize = Resize(),  # noqa: B008 (frozen)
    ):
        """Compiles nothing yet.

        Args:
          graphdef: static structure of the model, from `clipjax.params.split` or `abstract`.
          params: parameters, laid out on `mesh` in any way.
          model_state: the model's other arrays (batch statistics), or `{}`.
          tokenizer: for `encode_text` of strings.
          context_length: tokens of a text.
          image_size: pixels.
          mesh: batches are split over its axes group and data; None: the default device.
          batch_size: rounded up to a multiple of the mesh's batch shards; default: 64 a shard.
          resize: how pictures of another size are brought to `image_size`.

        Raises:
          ClipjaxError: `batch_size` is below 1.
        """
        shards = 1 if mesh is None else batch_shards(mesh)
        if batch_size is None:
            batch_size = PER_SHARD * shards
        if batch_size < 1:
            raise ClipjaxError(f"Predictor: batch_size={batch_size} must be at least 1")
        self.batch_size = -(-batch_size // shards) * shards
        self.tokenizer, self.context_length, self.image_size = tokenizer, context_length, image_size
        self.resize = resize
        self._params, self._model_state = params, model_state
        self._mesh = mesh
        out = None if mesh is None else replicated(mesh)  # None: wherever the parameters are
        self._image = jax.jit(
            lambda p, s, x: merge(graphdef, p, s).encode_image(x), out_shardings=out
        )
        self._text = jax.jit(
            lambda p, s, x: merge(graphdef, p, s).encode_text(x), out_shardings=out
        )
        self._scale_and_bias = jax.jit(
            # The towers' work is dead code here, which the compiler drops.
            lambda p, s, x: _scale_and_bias(merge(graphdef, p, s)(x)),
            out_shardings=out,
        )

    @classmethod
    def from_module(cls, module: nnx.Module, **settings: Any) -> Predictor:
        """A predictor of a module that holds its weights.

        Args:
          module: has `encode_image`, `encode_text` and `__call__`, as `Model.build` makes it.
          **settings: keyword arguments of `Predictor`.
        """
        return cls(*split(module), **settings)

    def with_params(self, params: Tree, model_state: Tree | None = None) -> Predictor:
        """The same predictor with other weights; shares the compiled functions.

        Args:
          params: like the present ones in structure and shapes.
          model_state: None keeps the present one.
        """
        other = copy.copy(self)
        other._params = params
        other._model_state = self._model_state if model_state is None else model_state
        return other

    def encode_image(self, image: np.ndarray | Sequence[np.ndarray]) -> np.ndarray:
        """Embeds pictures; those of another size are resized first.

        Args:
          image: uint8 [n, H, W, 3], or n pictures uint8 [H, W, 3] of any sizes.

        Returns:
          float32 [n, E], unit norm.

        Raises:
          ClipjaxError: not uint8 RGB pictures.
        """
        size = self.image_size
        if isinstance(image, np.ndarray) and image.shape[1:] != (size, size, 3):
            image = list(image)
        if not isinstance(image, np.ndarray):
            image = self._resized(image)
        if image.dtype != np.uint8:
            raise ClipjaxError(
                f"encode_image takes uint8 pixels (0 to 255), not {image.dtype}: the model "
                "normalizes them itself"
            )
        return self._run(self._image, image)

    def encode_text(self, text: Sequence[str] | np.ndarray) -> np.ndarray:
        """Embeds texts.

        Args:
          text: n strings, or tokens int32 [n, L] as `tokenize` makes them.

        Returns:
          float32 [n, E], unit norm.

        Raises:
          ClipjaxError: a single string, or tokens of another length.
        """
        tokens = text if isinstance(text, np.ndarray) else self.tokenize(text)
        if tokens.ndim != 2 or tokens.shape[1] != self.context_length or tokens.dtype != np.int32:
            raise ClipjaxError(
                f"encode_text takes strings or tokens int32 [n, {self.context_length}], not "
                f"{tokens.dtype} {list(tokens.shape)}"
            )
        return self._run(self._text, tokens)

    def tokenize(self, texts: Sequence[str]) -> np.ndarray:
        """Tokens int32 [n, L] of n strings, worth keeping where texts are embedded again and again.

        Raises:
          ClipjaxError: a single string, or a predictor without a tokenizer.
        """
        if isinstance(texts, str):
            raise ClipjaxError(f"expected a list of texts, not one string: [{texts!r}]")
        if self.tokenizer is None:
            raise ClipjaxError("this predictor has no tokenizer: give it tokens, int32 [n, L]")
        return np.asarray(self.tokenizer.encode(list(texts), self.context_length), np.int32)

    @property
    def logit_scale(self) -> float:
        """What similarities are multiplied by, already exponentiated."""
        return self._scalars()[0]

    @property
    def logit_bias(self) -> float | None:
        """What is added to scaled similarities; None for a model without it."""
        return self._scalars()[1]

    def _scalars(self) -> tuple[float, float | None]:
        batch = {
            "image": np.zeros((1, self.image_size, self.image_size, 3), np.uint8),
            "text": np.zeros((1, self.context_length), np.int32),
        }
        scale, bias = self._scale_and_bias(self._params, self._model_state, batch)
        return float(scale), None if bias is None else float(bias)

    def _resized(self, images: Sequence[np.ndarray]) -> np.ndarray:
        size = self.image_size
        out = np.empty((len(images), size, size, 3), np.uint8)
        for i, image in enumerate(images):
            if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
                raise ClipjaxError(
                    f"encode_image takes uint8 pictures [H, W, 3]; number {i} is {image.dtype} "
                    f"{list(image.shape)}"
                )
            out[i] = self.resize(image, size)
        return out

    def _run(self, function: Callable[..., jax.Array], rows: np.ndarray) -> np.ndarray:
        """Applies a compiled encoder to all rows, batch by batch."""
        if not len(rows):
            shape = jax.ShapeDtypeStruct((self.batch_size, *rows.shape[1:]), rows.dtype)
            width = jax.eval_shape(function, self._params, self._model_state, shape).shape[1]
            return np.zeros((0, width), np.float32)
        done: list[np.ndarray] = []
        running: collections.deque[jax.Array] = collections.deque()
        for batch in self._batches(rows):
            with on_mesh(self._mesh):
                running.append(function(self._params, self._model_state, batch))
            if len(running) >= _IN_FLIGHT:
                done.append(np.asarray(running.popleft(), np.float32))
        done.extend(np.asarray(output, np.float32) for output in running)
        return np.concatenate(done)[: len(rows)]

    def _batches(self, rows: np.ndarray) -> Iterator[Any]:
        for start in range(0, len(rows), self.batch_size):
            batch = rows[start : start + self.batch_size]
            if len(batch) < self.batch_size:
                # Copies of a real row, since zeros need not be a valid input.
                padding = np.repeat(batch[-1:], self.batch_size - len(batch), axis=0)
                batch = np.concatenate([batch, padding])
            yield batch if self._mesh is None else _spread(batch, self._mesh)


def _spread(batch: np.ndarray, mesh: Mesh) -> jax.Array:
    """A global array of which each process provides the rows of its own devices."""
    return jax.make_array_from_callback(
        batch.shape, batch_sharding(mesh), lambda index: batch[index]
    )


def _scale_and_bias(encoded: Any) -> tuple[jax.Array, jax.Array | None]:
    return encoded.logit_scale, encoded.logit_bias
