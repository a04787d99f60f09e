"""A data set and a model small enough to work out by hand."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from clipjax.cli import main
from clipjax.data import BPE, Resize, Source
from clipjax.models import DualEncoder
from clipjax.params import split
from clipjax.pretrained import Pretrained
from clipjax.towers import TextTransformer, ViT

COLORS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


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


def save_model(folder, seed, width=16):
    towers = {"width": width, "depth": 1, "heads": 2}
    model = DualEncoder(
        image=ViT(image_size=16, patch_size=8, pool="mean", **towers),
        text=TextTransformer(vocab_size=300, context_length=8, eos_id=2, **towers),
        embed_dim=8,
    )
    _, params, state = split(model.build(nnx.Rngs(seed)))
    tokenizer = BPE(vocab_size=300).build(["a red thing", "a green thing", "a blue thing"] * 20)
    Pretrained(model, params, state, tokenizer, 8, 16).save(folder)


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Two models, folders of colored pictures, the same with captions, and a file of entries."""
    root = tmp_path_factory.mktemp("world")
    save_model(root / "one", 0)
    save_model(root / "two", 1)
    rng = np.random.default_rng(0)
    for part, count in (("train", 6), ("test", 4)):
        rows = ["image,caption"]
        for name, color in COLORS.items():
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(rng.normal(size=(16, 16, 3)) * 20 + color, 0, 255)
                path = root / part / name / f"{i}.png"
                Image.fromarray(pixels.astype(np.uint8)).save(path)
                rows.append(f"{part}/{name}/{i}.png,a {name} thing {i}")
        shutil.copytree(root / part, root / f"{part}-pairs" / part)
        (root / f"{part}-pairs" / "captions.csv").write_text("\n".join(rows))
    entry = {"caption": "a red thing", "negative_caption": "a blue thing"}
    for name in ("swap", "add"):
        (root / f"{name}.json").write_text(json.dumps([entry | {"image": "red/0.png"}] * 2))
    return root


class OpenedOnce:
    """A model whose predictor is made once for each batch size, so that the tests compile it once."""

    def __init__(self, pretrained):
        self._pretrained, self._predictors = pretrained, {}

    def predictor(self, **settings):
        key = settings.get("batch_size")
        if key not in self._predictors:
            self._predictors[key] = self._pretrained.predictor(**settings)
        return self._predictors[key]


@pytest.fixture(scope="session")
def opened():
    return {}


@pytest.fixture
def one_device(opened, monkeypatch):
    from clipjax import restore

    devices, open_pretrained = jax.devices()[:1], restore.open_pretrained
    monkeypatch.setattr("clipjax.mesh.jax.devices", lambda: devices)

    def open_once(path):
        if path not in opened:
            opened[path] = OpenedOnce(open_pretrained(path))
        return opened[path]

    monkeypatch.setattr(restore, "open_pretrained", open_once)


@pytest.fixture
def evaluate(world, capsys, one_device):
    """`evaluate(models, options...)` -> what --json says."""

    def run(models, *options):
        models = [models] if isinstance(models, (str, Path)) else models
        arguments = ["eval", *(str(world / m) for m in models), *map(str, options), "--json"]
        assert main(arguments) == 0, capsys.readouterr().err
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return run


@pytest.fixture
def refused(world, capsys, one_device):
    def run(models, *options):
        models = [models] if isinstance(models, str) else models
        assert main(["eval", *(str(world / m) for m in models), *map(str, options)]) == 2
        return capsys.readouterr().err

    return run
