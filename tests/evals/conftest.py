"""A data set and a model small enough to work out by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from clipjax.data import Resize, Source


class Opened(list):
    """Records in memory, counting how often they are read."""

    reads = 0
    class_names = None

    def __getitem__(self, index):
        Opened.reads += 1
        return super().__getitem__(index)


@dataclasses.dataclass(frozen=True)
class Shades(Source):
    """Picture i is a square of gray value i (times 10), with the captions given."""

    captions: tuple[tuple[str, ...], ...]
    languages: tuple[str, ...] = ()
    ids: tuple[int, ...] = ()
    labels: tuple[int, ...] = ()
    class_names: tuple[str, ...] = ()

    def open(self):
        records = Opened()
        for i, captions in enumerate(self.captions):
            record = {
                "image": np.full((8, 8, 3), 10 * i, np.uint8),
                "captions": captions,
                "languages": self.languages[: len(captions)],
                "id": self.ids[i] if self.ids else i,
                "key": f"shade {i}",
            }
            records.append(record | ({"label": self.labels[i]} if self.labels else {}))
        records.class_names = self.class_names or None
        return records


class TablePredictor:
    """Embeddings from tables: of the shade of a picture, of the text itself."""

    image_size, context_length, resize, mesh = 8, 4, Resize(), None
    logit_scale = 10.0

    def __init__(self, images, texts):
        self.images = np.asarray(images, np.float32)
        self.texts, self.table = list(texts), np.asarray(list(texts.values()), np.float32)
        self.tokenized = 0

    def tokenize(self, texts):
        self.tokenized += len(texts)
        return np.array([[self.texts.index(t)] * 4 for t in texts], np.int32)

    def encode_text(self, texts):
        tokens = texts if isinstance(texts, np.ndarray) else self.tokenize(texts)
        return self.table[tokens[:, 0]]

    def encode_image(self, image):
        return self.images[image[:, 0, 0, 0] // 10]

    def encode_image_rows(self, read, count):
        return self.encode_image(read(np.arange(count)))


@pytest.fixture
def shades():
    Opened.reads = 0
    return Shades


@pytest.fixture
def table():
    return TablePredictor


@pytest.fixture
def reads():
    return lambda: Opened.reads


class Linear(nnx.Module):
    """Pixels and tokens, each through a random matrix. With `depth` 1 all shades embed alike."""

    def __init__(self, rngs, depth=2):
        self.depth = depth
        self.image = nnx.Param(jax.random.normal(rngs.params(), (8 * 8 * 3, 5)))
        self.text = nnx.Param(jax.random.normal(rngs.params(), (30, 5)))

    def encode_image(self, image, key=None):
        x = (1 + image / 255.0).reshape(len(image), -1)
        x = x if self.depth == 1 else jnp.sin(x * jnp.arange(192))
        x = x @ self.image[...]
        return x / jnp.linalg.norm(x, axis=1, keepdims=True)

    def encode_text(self, text, key=None):
        x = self.text[...][text].mean(1)
        return x / jnp.linalg.norm(x, axis=1, keepdims=True)

    def shared(self):
        return {"logit_scale": jnp.float32(1.0)}


@pytest.fixture
def linear():
    return Linear(nnx.Rngs(0))


@pytest.fixture
def flat():
    """All pictures in one place, up to rounding."""
    return Linear(nnx.Rngs(0), 1)
