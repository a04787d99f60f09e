"""Predictor: pictures and texts in; embeddings, similarities, classes and captions out; on any mesh.

It is what `clipjax.load` returns and what evaluators are given.
"""

from __future__ import annotations

import collections
import copy
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from clipjax.batch import Encoded
from clipjax.batching import Batching, by_length, host_type
from clipjax.classifier import Classification, Classifier
from clipjax.data.augment import Resize
from clipjax.data.images import decode
from clipjax.data.tokenizers import TokenizerModel
from clipjax.errors import ClipjaxError
from clipjax.generation import Generated, Greedy, Strategy
from clipjax.generation.generate import (
    compiled,
    prompt_rows,
    require_decoder,
    row_length,
    special_tokens,
)
from clipjax.layout import on_mesh
from clipjax.mesh import replicated
from clipjax.params import Tree, merge, split

if TYPE_CHECKING:
    from PIL import Image

    Picture = str | os.PathLike[str] | bytes | Image.Image | np.ndarray

_READERS = min(8, os.cpu_count() or 1)  # threads; Pillow decodes without holding the interpreter


class Predictor:
    """A model with weights, its tokenizer and its preprocessing, ready to use.

    Wherever many pictures or texts go in and rows come out, a single one may go in and its row,
    without the leading axis, comes out.

    Each encoder is compiled for two batch shapes at most: `batch_size` rows, and a few rows for
    calls with fewer than that, so that one picture does not cost a whole batch. The last batch
    is padded, and its padding dropped again. Parameters are arguments of the compiled
    functions, so that `with_params` swaps them for free. Embeddings depend on neither the batch
    size nor the mesh, up to float32 rounding.

    With several processes every process makes the same calls with the same inputs, and gets all of
    the embeddings.

    Attributes:
      image_size: pixels, height and width of what the image encoder sees.
      context_length: tokens of a text, special tokens counted.
      batch_size: pictures or texts per call of the model.
      tokenizer: turns texts into tokens; None for a model that is only given tokens.
      resize: how pictures of another size are brought to `image_size`.
      params: the parameters, as `clipjax.params.split` makes them.
      model_state: the model's other arrays, or `{}`.
      between_batches: called before each batch, in all processes alike; what it raises ends the call. For
        trainers, which must not be deaf while they evaluate.
    """

    between_batches: Callable[[], None] | None = None

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
        self._batching = Batching.of(mesh, batch_size)
        self.batch_size = self._batching.size
        self.tokenizer, self.context_length, self.image_size = tokenizer, context_length, image_size
        self.resize = resize
        self.params, self.model_state = params, model_state
        self.mesh = mesh
        self._graphdef = graphdef
        self._encoders: dict[tuple[str, str], Callable[..., Any]] = {}
        self._shared = self._compiled(lambda module: module.shared())
        self._captioners: dict[Strategy, Callable[..., Any]] = {}
        self._known_scalars: tuple[float, float | None] | None = None

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
        other.params, other._known_scalars = params, None
        other.model_state = self.model_state if model_state is None else model_state
        return other

    def module(self) -> Any:
        """The model's module with the present weights."""
        return merge(self._graphdef, self.params, self.model_state)

    def encode(self, name: str, inputs: Any, output: str = "embedding") -> Any:
        """What one of the model's encoders makes of n inputs.

        Args:
          name: of the encoder, or of an input whose name begins with it: "image", "text", "audio", ...
          inputs: pictures as for `encode_image`, texts as for `encode_text`, or for any other encoder its
            arrays [n, ...].
          output: "embedding" float32 [n, E] of unit norm, "pooled" [n, D] as the tower makes it before any
            projection, "tokens", a dict of `values` [n, N, D] and `mask` bool [n, N], or what else the
            encoder makes (the name of a head). Tokens are large: give them a few inputs at a time.

        Returns:
          NumPy arrays; of a single picture or text, its row, without the leading axis.

        Raises:
          ClipjaxError: there is no such encoder, it has no such output, or the inputs do not fit.
        """
        if name == "image" or name.startswith("image_"):
            one = _is_one_picture(inputs)
            read, count = self._reader(inputs)
            like: Any = ((self.image_size,) * 2 + (3,), np.uint8)
        elif name == "text" or name.startswith("text_"):
            one = isinstance(inputs, str)
            tokens = self._tokens([inputs] if one else inputs)
            if output == "embedding" and len(tokens) > self.batch_size:
                return self._encode_by_length(name, tokens)
            read, count, like = tokens.__getitem__, len(tokens), (tokens.shape[1:], np.int32)
        else:
            one, rows = False, np.asarray(inputs)
            read, count, like = rows.__getitem__, len(rows), (rows.shape[1:], rows.dtype)
        made = self._stream(self._encoder(name, output), read, count, *like)
        return jax.tree.map(lambda x: x[0], made) if one else made

    def encode_image(self, images: Picture | Sequence[Picture] | np.ndarray) -> np.ndarray:
        """Embeds pictures: decodes what is encoded, resizes what is of another size.

        Args:
          images: n pictures, or one: paths, encoded bytes, Pillow pictures, or pixels, uint8
            [H, W, 3] (or gray [H, W], or with alpha [H, W, 4]); n pictures of one size may be an
            array [n, H, W, 3].

        Returns:
          float32 [n, E], unit norm; [E] for one picture.

        Raises:
          UnreadableRecord: a picture is missing, damaged, too large or none; it is named.
        """
        return self.encode("image", images)

    def encode_image_rows(
        self,
        read: Callable[[np.ndarray], np.ndarray],
        count: int,
        output: str = "embedding",
    ) -> Any:
        """Embeds pictures that are read while the ones before are being embedded.

        Args:
          read: takes indices [k], ascending within 0 .. count - 1; gives uint8 [k, S, S, 3], S the
            `image_size`. With several processes, each is asked for the rows of its own devices
            alone.
          count: how many there are.
          output: "embedding", or another, as for `encode`.

        Returns:
          float32 [count, E], unit norm, in every process; of "pooled", [count, D], and so on.
        """
        shape = (self.image_size,) * 2 + (3,)
        return self._stream(self._encoder("image", output), read, count, shape, np.uint8)

    def encode_text(self, texts: str | Sequence[str] | np.ndarray) -> np.ndarray:
        """Embeds texts.

        Args:
          texts: n strings, or one; or tokens int32 [n, L] as `tokenize` makes them.

        Returns:
          float32 [n, E], unit norm; [E] for one string.

        Raises:
          ClipjaxError: tokens of another length.
        """
        return self.encode("text", texts)

    def similarity(
        self,
        images: Picture | Sequence[Picture] | np.ndarray,
        texts: str | Sequence[str] | np.ndarray,
    ) -> np.ndarray:
        """Cosine similarities, float32 [n, m], of n pictures and m texts; -1 to 1, not scaled.

        One picture gives [m], one text [n], one of each a number.
        """
        return self.encode_image(images) @ self.encode_text(texts).T

    def classify(
        self,
        images: Picture | Sequence[Picture] | np.ndarray,
        labels: Sequence[str],
        templates: str | Sequence[str] = "{}",
    ) -> Classification:
        """Zero-shot classification: `classifier(labels, templates)(images)`, the labels embedded anew.

        Args:
          images: as for `encode_image`.
          labels: C distinct names.
          templates: as for `class_embeddings`.
        """
        return self.classifier(labels, templates)(images)

    def classifier(
        self, labels: Sequence[str], templates: str | Sequence[str] = "{}"
    ) -> Classifier:
        """A classifier that keeps the embeddings of its labels, for picture after picture.

        Args:
          labels: C distinct names.
          templates: as for `class_embeddings`.
        """
        return Classifier(self, labels, templates)

    def class_embeddings(
        self, labels: Sequence[str], templates: str | Sequence[str] = "{}"
    ) -> np.ndarray:
        """Embeddings of classes, float32 [C, E], unit norm: a class is the mean of its prompts.

        Args:
          labels: C distinct names.
          templates: prompts, or one: "{}" stands for the name, as in "a photo of a {}".

        Raises:
          ClipjaxError: no labels, a label twice, or a template without "{}".
        """
        labels = [labels] if isinstance(labels, str) else list(labels)
        templates = [templates] if isinstance(templates, str) else list(templates)
        if not labels:
            raise ClipjaxError("labels is empty: give at least one name")
        for label, count in collections.Counter(labels).items():
            if not label.strip():
                raise ClipjaxError("a label is empty: give each a name")
            if count > 1:
                raise ClipjaxError(f"the label {label!r} is given {count} times: give it once")
        if not templates:
            raise ClipjaxError('templates is empty: give at least one, such as "a photo of a {}"')
        for template in templates:
            if "{}" not in template:
                raise ClipjaxError(f"the template {template!r} has no {{}} where the label goes")
        prompts = self.encode_text([t.replace("{}", label) for label in labels for t in templates])
        return mean_direction(prompts.reshape(len(labels), len(templates), -1)).astype(np.float32)

    def read(self, image: Picture, name: str = "image") -> np.ndarray:
        """The model's preprocessing: a picture as the image encoder takes it, uint8 [S, S, 3].

        Args:
          image: as for `encode_image`.
          name: what to call it in an error.

        Raises:
          UnreadableRecord: it is missing, damaged, too large or no picture.
        """
        return self.resize(decode(image, name), self.image_size)

    def caption(
        self,
        images: Picture | Sequence[Picture] | np.ndarray,
        strategy: Strategy = Greedy(),  # noqa: B008 (frozen)
        prompt: str | Sequence[str] = "",
        seed: int = 0,
    ) -> Any:
        """Captions of pictures, for a model that has a captioning decoder.

        Args:
          images: as for `encode_image`.
          strategy: how the next token is chosen; `clipjax.generation` has them.
          prompt: what every caption, or each of them, begins with; it is part of the result.
          seed: for strategies that draw at random. A picture's draws depend on the seed and on its
            place among the pictures, not on batches or the mesh.

        Returns:
          n captions, a list of strings; for one picture, its caption.

        Raises:
          ClipjaxError: the model has no decoder or no tokenizer, or a prompt does not fit.
        """
        captions = self.decode(self.generate(images, strategy, prompt, seed))
        return captions[0] if _is_one_picture(images) else captions

    def caption_rows(
        self,
        read: Callable[[np.ndarray], np.ndarray],
        count: int,
        strategy: Strategy = Greedy(),  # noqa: B008 (frozen)
        prompt: str | Sequence[str] = "",
        seed: int = 0,
    ) -> list[str]:
        """`caption` of pictures that are read batch by batch, as by `encode_image_rows`."""
        return self.decode(self._generate(read, count, strategy, prompt, seed))

    def generate(
        self,
        images: Picture | Sequence[Picture] | np.ndarray,
        strategy: Strategy = Greedy(),  # noqa: B008 (frozen)
        prompt: str | Sequence[str] = "",
        seed: int = 0,
    ) -> Generated:
        """What `caption` decodes: tokens int32 [n, L] and scores float32 [n], as NumPy arrays."""
        return self._generate(*self._reader(images), strategy, prompt, seed)

    def _generate(self, read, count: int, strategy: Strategy, prompt, seed: int) -> Generated:
        if self.tokenizer is None:
            raise ClipjaxError("this predictor has no tokenizer, and captions cannot do without")
        special = special_tokens(self.tokenizer)
        length = row_length(strategy, special, self.context_length)
        prompts = prompt_rows(self.tokenizer, prompt, count, length)
        if strategy not in self._captioners:
            self._captioners[strategy] = compiled(self._graphdef, strategy, special, self.mesh)
        function = self._captioners[strategy]
        pixels = (self.image_size, self.image_size, 3)
        done: list[Any] = []
        for index in self._batching.indices(count):
            batch = (
                self._batching.place(read, index, pixels),
                *(
                    self._batching.place(rows.__getitem__, index, rows.shape[1:])
                    for rows in prompts
                ),
                self._batching.place(lambda rows: rows.astype(np.int32), index, ()),
            )
            with on_mesh(self.mesh):
                output = function(self.params, self.model_state, batch, np.uint32(seed % 2**32))
            done.append(jax.tree.map(np.asarray, output))
        empty = Generated(np.zeros((0, length), np.int32), np.zeros(0, np.float32))
        return jax.tree.map(lambda *parts: np.concatenate(parts)[:count], empty, *done)

    def require_decoder(self) -> None:
        """Refuses to caption before any picture is read.

        Raises:
          ClipjaxError: the model has no captioning decoder.
        """
        require_decoder(self.module())

    def decode(self, generated: Generated) -> list[str]:
        """The n captions that `generate` gave, as text."""
        if self.tokenizer is None:
            raise ClipjaxError("this predictor has no tokenizer to read captions with")
        return [text.strip() for text in self.tokenizer.decode(np.asarray(generated.tokens))]

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
        if self._known_scalars is None:
            encoded = Encoded({}, self._shared(self.params, self.model_state))
            bias = encoded.logit_bias
            self._known_scalars = float(encoded.logit_scale), None if bias is None else float(bias)
        return self._known_scalars

    def _compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function(module, *arrays)` as a compiled one of (params, model state, *arrays)."""
        graphdef = self._graphdef
        out = None if self.mesh is None else replicated(self.mesh)  # None: where the parameters are
        return jax.jit(lambda p, s, *x: function(merge(graphdef, p, s), *x), out_shardings=out)

    def _encoder(self, name: str, output: str = "embedding") -> Callable[..., Any]:
        key = name, output
        if key not in self._encoders:
            if output == "embedding" and name in ("image", "text"):  # all that every model has
                self._encoders[key] = self._compiled(
                    lambda module, x: getattr(module, f"encode_{name}")(x)
                )
            else:
                self._encoders[key] = self._compiled(
                    lambda module, x: module.encode(name, x, output=output)
                )
        return self._encoders[key]

    def _tokens(self, texts: Sequence[str] | np.ndarray) -> np.ndarray:
        tokens = texts if isinstance(texts, np.ndarray) else self.tokenize(texts)
        if tokens.ndim != 2 or tokens.shape[1] != self.context_length or tokens.dtype != np.int32:
            raise ClipjaxError(
                f"encode_text takes strings or tokens int32 [n, {self.context_length}], not "
                f"{tokens.dtype} {list(tokens.shape)}"
            )
        return tokens

    def _encode_by_length(self, name: str, tokens: np.ndarray) -> np.ndarray:
        """Embeddings of many texts, short ones in shorter rows where what follows them is unseen."""
        length = tokens.shape[1]
        embedded: np.ndarray | None = None
        for size, rows in by_length(self._used_lengths(name, tokens), length, self.batch_size):
            part = tokens[rows, :size]
            made = self._stream(self._encoder(name), part.__getitem__, len(part), (size,), np.int32)
            if len(rows) == len(tokens):
                return made
            if embedded is None:
                embedded = np.empty((len(tokens), made.shape[1]), made.dtype)
            embedded[rows] = made
        assert embedded is not None
        return embedded

    def _used_lengths(self, name: str, tokens: np.ndarray) -> np.ndarray:
        """[n]: how many tokens of each row are seen; all, where the tower's kind is not known."""
        from clipjax.models.base import encoder_of
        from clipjax.models.dual_encoder import JointModule
        from clipjax.towers import TextTransformer

        module = self.module()
        if isinstance(module, JointModule):
            tower = getattr(module, encoder_of(name, module.encoders) or "", None)
            config = getattr(tower, "config", None)
            if isinstance(config, TextTransformer):
                return config.used_lengths(tokens)
        return np.full(len(tokens), tokens.shape[1])

    def _read_numbered(self, numbered: tuple[int, Picture]) -> np.ndarray:
        number, image = numbered
        named = isinstance(image, (str, os.PathLike))
        return self.read(image, os.fspath(image) if named else f"image number {number}")  # type: ignore[arg-type]

    def _reader(
        self, images: Picture | Sequence[Picture] | np.ndarray
    ) -> tuple[Callable[[np.ndarray], np.ndarray], int]:
        """What gives the rows uint8 [k, S, S, 3] at indices [k] of some pictures; their number."""
        size = self.image_size
        if isinstance(images, jax.Array):
            images = np.asarray(images)
        if _is_one_picture(images):
            images = [images]  # type: ignore[list-item]
        if isinstance(images, np.ndarray):
            if images.dtype == np.uint8 and images.shape[1:] == (size, size, 3):
                return images.__getitem__, len(images)
            if images.ndim != 4:
                raise ClipjaxError(
                    "pictures are uint8 [n, H, W, 3] or [H, W, 3], not "
                    f"{images.dtype} {list(images.shape)}"
                )
        pictures: list[Any] = list(images)  # type: ignore[arg-type]

        def read(index: np.ndarray) -> np.ndarray:
            out = np.empty((len(index), size, size, 3), np.uint8)
            numbered = [(number, pictures[number]) for number in index.tolist()]
            for i, pixels in enumerate(_mapped(self._read_numbered, numbered)):
                out[i] = pixels
            return out

        return read, len(pictures)

    def _stream(
        self,
        function: Callable[..., jax.Array],
        read: Callable[[np.ndarray], np.ndarray],
        count: int,
        shape: tuple[int, ...],
        dtype: Any,
    ) -> Any:
        """Applies a compiled encoder to all rows, batch by batch, reading ahead of the device.

        Args:
          function: one of the encoders.
          read: gives the rows [k, *shape] at ascending indices [k].
          count: number of rows.
          shape: of one row.
          dtype: of the rows.
        """
        if not count:
            like = jax.ShapeDtypeStruct((self.batch_size, *shape), dtype)
            made = jax.eval_shape(function, self.params, self.model_state, like)
            return jax.tree.map(lambda x: np.zeros((0, *x.shape[1:]), host_type(x)), made)

        def dispatch(batch: Any) -> Any:
            with on_mesh(self.mesh):
                return function(self.params, self.model_state, batch)

        return self._batching.stream(dispatch, read, count, shape, self.between_batches)


def mean_direction(x: np.ndarray) -> np.ndarray:
    """[C, T, E] unit vectors -> [C, E] float64, the normalized mean over T."""
    mean = x.astype(np.float64).mean(axis=1)
    return mean / np.maximum(np.linalg.norm(mean, axis=1, keepdims=True), 1e-12)


def _is_one_picture(images: Any) -> bool:
    if isinstance(images, (np.ndarray, jax.Array)):
        return images.ndim in (2, 3)
    return isinstance(images, (str, os.PathLike, bytes)) or not hasattr(images, "__iter__")


def _mapped(function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
    if len(items) < 2:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(_READERS) as readers:
        yield from readers.map(function, items)
