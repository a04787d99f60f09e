import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from clipjax.batching import Batching, by_length
from clipjax.data import Resize
from clipjax.errors import ClipjaxError
from clipjax.mesh import MeshShape
from clipjax.models.dual_encoder import DualEncoder
from clipjax.params import split
from clipjax.predictor import Predictor
from clipjax.sharding import Sharding
from clipjax.towers.text import TextTransformer
from clipjax.towers.vit import ViT

SIZE, LENGTH, VOCAB = 16, 8, 50


class Bytes:
    """A tokenizer of one token a character."""

    def encode(self, texts, context_length):
        rows = np.zeros((len(texts), context_length), np.int32)
        for row, text in zip(rows, texts, strict=True):
            ids = [1 + ord(c) % (VOCAB - 1) for c in text[:context_length]]
            row[: len(ids)] = ids
        return rows


class Plain(nnx.Module):
    """A user's model: pixels and token embeddings, averaged; counts how often it is traced."""

    traces = 0

    def __init__(self, rngs):
        self.pixels = nnx.Param(jax.random.normal(rngs.params(), (3, 4)))
        self.tokens = nnx.Param(jax.random.normal(rngs.params(), (VOCAB, 4)))
        self.scale = nnx.Param(jnp.float32(2.0))

    def encode_image(self, image, key=None):
        Plain.traces += 1
        return _unit((image / 255.0).mean((1, 2)) @ self.pixels[...])

    def encode_text(self, text, key=None):
        return _unit(self.tokens[...][text].mean(1))

    def shared(self):
        return {"logit_scale": jnp.exp(self.scale[...])}


def _unit(x):
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def plain(**settings):
    settings = {"tokenizer": Bytes(), "context_length": LENGTH, "image_size": SIZE} | settings
    return Predictor.from_module(Plain(nnx.Rngs(0)), **settings)


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (21, SIZE, SIZE, 3), np.uint8)


TEXTS = [f"text number {i}" for i in range(21)]


def test_embeddings_agree_with_numpy_for_any_batch_size(images):
    module = Plain(nnx.Rngs(0))
    kernel = np.asarray(module.pixels[...], np.float64)
    expected = (images / 255.0).mean((1, 2)) @ kernel
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    for batch_size in (1, 4, 7, 21, 64):
        embedded = plain(batch_size=batch_size).encode_image(images)
        assert embedded.dtype == np.float32 and embedded.shape == (21, 4)
        np.testing.assert_allclose(embedded, expected, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 8, 1), (2, 2, 2), (1, 1, 8)])
def test_real_towers_embed_alike_on_any_mesh(images, shape):
    towers = {"width": 16, "heads": 2, "depth": 1}
    model = DualEncoder(
        image=ViT(patch_size=8, image_size=SIZE, **towers),
        text=TextTransformer(vocab_size=VOCAB, context_length=LENGTH, **towers),
        embed_dim=8,
        logit_bias_init=-3.0,
    )
    settings = {"tokenizer": Bytes(), "context_length": LENGTH, "image_size": SIZE}
    graphdef, params, state = split(model.build(nnx.Rngs(0)))
    one = Predictor(graphdef, params, state, batch_size=21, **settings)
    mesh = MeshShape(*shape).build()
    spread = jax.device_put(params, Sharding(fsdp=True, min_size=1).apply(params, mesh))
    # 6 is rounded up to the next multiple of the mesh's batch shards.
    many = Predictor(graphdef, spread, state, mesh=mesh, batch_size=6, **settings)
    default = Predictor(graphdef, spread, state, mesh=mesh, **settings)
    assert default.batch_size == 64 * shape[0] * shape[1]
    assert many.batch_size == {8: 8, 4: 8, 1: 6}[shape[0] * shape[1]]
    np.testing.assert_allclose(many.encode_image(images), one.encode_image(images), atol=2e-6)
    np.testing.assert_allclose(many.encode_text(TEXTS), one.encode_text(TEXTS), atol=2e-6)
    assert many.logit_scale == pytest.approx(1 / 0.07, rel=1e-6) and many.logit_bias == -3.0


PROCESS = """
import sys
import jax
import numpy as np
from flax import nnx
index, port, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=index)
from clipjax.mesh import MeshShape, replicated
from clipjax.params import split
from clipjax.predictor import Predictor
sys.path.insert(0, sys.argv[4])
from test_predictor import SIZE, LENGTH, TEXTS, Bytes, Plain, nnx
mesh = MeshShape(group=2).build()
graphdef, params, state = split(Plain(nnx.Rngs(0)))
params = jax.tree.map(lambda x: jax.device_put(np.asarray(x), replicated(mesh)), params)
predictor = Predictor(graphdef, params, state, tokenizer=Bytes(), context_length=LENGTH,
                      image_size=SIZE, mesh=mesh, batch_size=6)
images = np.random.default_rng(0).integers(0, 256, (21, SIZE, SIZE, 3), np.uint8)
from clipjax.data import Resize
from clipjax.data.evalset import Pictures
from clipjax.evals.embed import embed_images
asked = []
def read(rows):
    asked.extend(rows.tolist())
    return images[rows]
rows = predictor.encode_image_rows(read, 21)
records = [{"image": image, "key": str(i)} for i, image in enumerate(images)]
records[13]["image"] = b"no picture"
pictures = Pictures(records, np.arange(21), SIZE, Resize())
embedded = embed_images(predictor, pictures)
np.savez(out + str(index), rows=rows, asked=asked, embedded=embedded, unreadable=pictures.unreadable,
         image=predictor.encode_image(images), scale=predictor.logit_scale,
         text=predictor.encode_text(TEXTS), processes=jax.process_count())
"""


def test_every_process_gets_all_embeddings(images, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    rest = [port, str(tmp_path / "out"), str(Path(__file__).parent)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(i), *rest],
            env=env,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    for process in processes:
        assert process.wait(timeout=120) == 0, process.stderr.read()[-2000:]
    alone = plain()
    shares = [set(np.load(tmp_path / f"out{i}.npz")["asked"].tolist()) for i in range(2)]
    assert shares[0] | shares[1] == set(range(21)) and not shares[0] & shares[1]
    for i in range(2):
        got = np.load(tmp_path / f"out{i}.npz")
        assert got["processes"] == 2
        np.testing.assert_allclose(got["image"], alone.encode_image(images), atol=1e-6)
        np.testing.assert_array_equal(got["rows"], got["image"])
        assert np.flatnonzero(got["unreadable"]).tolist() == [13]
        seen = np.arange(21) != 13
        np.testing.assert_array_equal(got["embedded"][seen], got["image"][seen])
        np.testing.assert_allclose(got["text"], alone.encode_text(TEXTS), atol=1e-6)
        assert float(got["scale"]) == pytest.approx(alone.logit_scale)


def test_other_weights_take_effect_without_compiling_again(images):
    predictor = plain(batch_size=8)
    before = predictor.encode_image(images)
    traces = Plain.traces
    params = split(Plain(nnx.Rngs(1)))[1]
    other = predictor.with_params(params)
    expected = plain(batch_size=8).with_params(params)
    after = other.encode_image(images)
    assert Plain.traces == traces
    np.testing.assert_array_equal(after, expected.encode_image(images))
    assert np.abs(after - before).max() > 0.1
    np.testing.assert_array_equal(predictor.encode_image(images), before)


def test_two_shapes_are_compiled_whatever_the_number_of_inputs(images):
    predictor = plain(batch_size=16)
    traces = Plain.traces
    for n in (3, 1, 2, 9, 15):
        assert predictor.encode_image(images[:n]).shape == (n, 4)
    assert Plain.traces == traces + 1  # few rows at a time, for all that fit into a batch
    for n in (16, 17, 21, 5):
        assert predictor.encode_image(images[:n]).shape == (n, 4)
    assert Plain.traces == traces + 2


def test_one_picture_does_not_cost_a_batch(images, monkeypatch):
    predictor = plain()
    assert predictor.batch_size == 64
    rows = []
    encode = predictor._encoder("image")
    monkeypatch.setattr(
        predictor, "_encoder", lambda *_: lambda p, s, x: rows.append(len(x)) or encode(p, s, x)
    )
    predictor.encode_image(images[0])
    predictor.encode_image(images[:21])
    assert rows == [4] * 7


def test_any_kind_of_picture_one_or_many(images, tmp_path):
    image = images[0]
    picture = Image.fromarray(image)
    picture.save(tmp_path / "a.png")
    path, content = tmp_path / "a.png", (tmp_path / "a.png").read_bytes()
    predictor = plain()
    expected = predictor.encode_image(images[:1])
    for one in (path, str(path), content, picture, image, jnp.asarray(image)):
        assert predictor.encode_image(one).shape == (4,)
        np.testing.assert_array_equal(predictor.encode_image(one), expected[0])
    many = predictor.encode_image([path, str(path), content, picture, image])
    np.testing.assert_array_equal(many, np.repeat(expected, 5, axis=0))
    np.testing.assert_array_equal(predictor.encode_image((path,)), expected)
    transparent = picture.convert("RGBA")
    np.testing.assert_array_equal(predictor.encode_image(transparent), expected[0])
    assert predictor.encode_text("a cat").shape == (4,)
    np.testing.assert_array_equal(
        predictor.encode_text("a cat"), predictor.encode_text(["a cat"])[0]
    )


def test_similarity_is_the_cosine(images):
    predictor = plain()
    u, v = predictor.encode_image(images), predictor.encode_text(TEXTS[:3])
    expected = np.einsum("ie,je->ij", u.astype(np.float64), v)
    np.testing.assert_allclose(predictor.similarity(images, TEXTS[:3]), expected, atol=1e-6)
    np.testing.assert_allclose(predictor.similarity(images[0], TEXTS[:3]), expected[0], atol=1e-6)
    np.testing.assert_allclose(predictor.similarity(images, TEXTS[0]), expected[:, 0], atol=1e-6)
    assert predictor.similarity(images[0], TEXTS[0]) == pytest.approx(expected[0, 0], abs=1e-6)


def test_softmax_models_choose_among_labels(images):
    predictor = plain()
    found = predictor.classify(images, ["cat", "dog", "ox"], ["a {}", "{} and {}"])
    prompts = [["a cat", "cat and cat"], ["a dog", "dog and dog"], ["a ox", "ox and ox"]]
    classes = np.stack([predictor.encode_text(p).astype(np.float64).mean(0) for p in prompts])
    classes /= np.linalg.norm(classes, axis=1, keepdims=True)
    powers = np.exp(np.exp(2.0) * predictor.encode_image(images) @ classes.T)
    expected = powers / powers.sum(1, keepdims=True)
    np.testing.assert_allclose(found.probabilities, expected, atol=1e-5)
    assert found.labels == ("cat", "dog", "ox") and found.probabilities.dtype == np.float32
    one = predictor.classify(images[4], ["cat", "dog", "ox"], ["a {}", "{} and {}"])
    np.testing.assert_allclose(one.probabilities, expected[4], atol=1e-5)
    order = np.argsort(-expected[4])
    assert [label for label, _ in one.top(2)] == [("cat", "dog", "ox")[i] for i in order[:2]]
    assert [p for _, p in found.top()[4]] == pytest.approx(expected[4][order], abs=1e-5)


class Accepting(Plain):
    """The same with a bias, as sigmoid models have."""

    def shared(self):
        return super().shared() | {"logit_bias": jnp.float32(-6.0)}


def test_sigmoid_models_accept_or_refuse_each_label(images):
    settings = {"tokenizer": Bytes(), "context_length": LENGTH, "image_size": SIZE}
    predictor = Predictor.from_module(Accepting(nnx.Rngs(0)), **settings)
    found = predictor.classify(images, ["cat", "dog"]).probabilities
    cosine = predictor.similarity(images, ["cat", "dog"]).astype(np.float64)
    np.testing.assert_allclose(found, 1 / (1 + np.exp(6.0 - np.exp(2.0) * cosine)), atol=1e-5)


def test_bad_labels_and_templates_are_refused(images):
    predictor = plain()
    for labels, templates, message in (
        ([], "{}", "labels is empty"),
        (["a", "b", "a"], "{}", "the label 'a' is given 2 times"),
        (["a", " "], "{}", "a label is empty"),
        (["a"], [], "templates is empty"),
        (["a"], "a photo", r"template 'a photo' has no \{\}"),
    ):
        with pytest.raises(ClipjaxError, match=message):
            predictor.classify(images[0], labels, templates)


def test_texts_and_their_tokens_embed_alike():
    predictor = plain(batch_size=8)
    tokens = predictor.tokenize(TEXTS)
    assert tokens.dtype == np.int32 and tokens.shape == (21, LENGTH)
    np.testing.assert_array_equal(predictor.encode_text(tokens), predictor.encode_text(TEXTS))


def test_no_inputs_give_no_embeddings():
    predictor = plain()
    assert predictor.encode_image(np.zeros((0, SIZE, SIZE, 3), np.uint8)).shape == (0, 4)
    assert predictor.encode_text([]).shape == (0, 4)


def test_scale_of_a_model_without_bias():
    predictor = plain()
    assert predictor.logit_scale == pytest.approx(np.exp(2.0), rel=1e-6)
    assert predictor.logit_bias is None


def test_pictures_of_other_sizes_are_resized_as_in_evaluation():
    rng = np.random.default_rng(1)
    wide = rng.integers(0, 256, (20, 30, 3), np.uint8)
    small = rng.integers(0, 256, (SIZE, SIZE, 3), np.uint8)
    for resize in (Resize("squash"), Resize("crop")):
        predictor = plain(resize=resize)
        expected = predictor.encode_image(np.stack([resize(wide, SIZE), small]))
        np.testing.assert_array_equal(predictor.encode_image([wide, small]), expected)
        np.testing.assert_array_equal(predictor.encode_image(wide[None]), expected[:1])


def test_bad_input_is_refused_by_name(images):
    predictor = plain()
    with pytest.raises(ClipjaxError, match=r"number 0: pixels must be uint8.*not float32"):
        predictor.encode_image(images.astype(np.float32))
    with pytest.raises(ClipjaxError, match=r"number 1: pixels must be uint8.*\[4, 4, 5\]"):
        predictor.encode_image([images[0], np.zeros((4, 4, 5), np.uint8)])
    with pytest.raises(ClipjaxError, match="number 1: .* not dict"):
        predictor.encode_image([images[0], {}])
    with pytest.raises(ClipjaxError, match=r"not uint8 \[1, 21, 16, 16, 3\]"):
        predictor.encode_image(images[None])
    with pytest.raises(ClipjaxError, match="nowhere.png: there is no file"):
        predictor.encode_image("nowhere.png")
    with pytest.raises(ClipjaxError, match="a list of texts, not one string"):
        predictor.tokenize("a cat")
    with pytest.raises(ClipjaxError, match=r"int32 \[n, 8\], not int32 \[2, 5\]"):
        predictor.encode_text(np.zeros((2, 5), np.int32))
    with pytest.raises(ClipjaxError, match="no tokenizer"):
        plain(tokenizer=None).encode_text(["a cat"])
    with pytest.raises(ClipjaxError, match="batch_size=0"):
        plain(batch_size=0)


def test_a_classifier_embeds_its_labels_once(images):
    predictor = plain()
    asked = []
    encode = predictor.encode_text
    predictor.encode_text = lambda texts: asked.append(len(texts)) or encode(texts)
    classify = predictor.classifier(["red", "blue"], ("a {}", "{}s"))
    for image in images[:3]:
        assert classify(image).probabilities.shape == (2,)
    assert asked == [4]
    whole = predictor.classify(images[:3], ["red", "blue"], ("a {}", "{}s"))
    np.testing.assert_allclose(classify(images[:3]).probabilities, whole.probabilities)


def test_short_texts_take_short_rows_where_padding_is_unseen(monkeypatch):
    """More than a batch of texts: most in rows of 16 tokens, the few long ones whole; nothing changes."""
    text = TextTransformer(
        width=16, depth=1, heads=2, vocab_size=VOCAB, context_length=40, eos_id=2
    )
    image = ViT(width=16, depth=1, heads=2, image_size=SIZE, patch_size=8)
    settings = {"tokenizer": None, "context_length": 40, "image_size": SIZE, "batch_size": 8}
    module = DualEncoder(image, text, embed_dim=8).build(nnx.Rngs(0))
    predictor = Predictor.from_module(module, **settings)
    rng = np.random.default_rng(0)
    lengths = rng.permutation(np.r_[np.arange(3, 16), np.full(4, 33)])
    tokens = np.zeros((len(lengths), 40), np.int32)
    for row, length in zip(tokens, lengths, strict=True):
        row[: length - 1], row[length - 1] = rng.integers(3, VOCAB, length - 1), 2
    np.testing.assert_array_equal(text.used_lengths(tokens), lengths)
    shapes, encode = [], predictor._encoder("text")
    monkeypatch.setattr(
        predictor, "_encoder", lambda *_: lambda p, s, x: shapes.append(x.shape) or encode(p, s, x)
    )
    cut = predictor.encode_text(tokens)
    assert {shape[1] for shape in shapes} == {16, 40}
    # A batch at most goes as it is.
    whole = np.concatenate([predictor.encode_text(tokens[i : i + 8]) for i in range(0, 17, 8)])
    np.testing.assert_allclose(cut, whole, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({}, [3, 4, 5]),  # causal, at the end token; a row without one is seen whole
        ({"causal": False, "pad_id": None}, [5, 5, 5]),
        ({"causal": False, "pool": "mean"}, [3, 4, 5]),
        ({"causal": False, "pool": "mean", "pad_id": None}, [5, 5, 5]),
        ({"pool": "last", "pad_id": None}, [5, 5, 5]),
        ({"pool": "class", "class_position": True}, [5, 5, 5]),
        ({"pool": "class", "legacy_class_mask": True}, [5, 5, 5]),
        ({"pool": "class"}, [3, 4, 5]),
    ],
)
def test_what_a_text_tower_sees_of_a_row(changes, wanted):
    tower = TextTransformer(
        **({"width": 16, "depth": 1, "heads": 2, "vocab_size": 9, "context_length": 5} | changes),
        eos_id=2,
    )
    rows = np.array([[5, 6, 2, 0, 0], [5, 6, 7, 2, 0], [5, 6, 7, 8, 4]], np.int32)
    assert tower.used_lengths(rows).tolist() == wanted


def test_rows_of_few_lengths_join_the_next_longer_ones():
    used = np.array([3, 40, 16, 17, 33, 50, 60, 64, 77, 1])
    groups = {size: rows.tolist() for size, rows in by_length(used, 77, 3)}
    # Up to 16: three; up to 32: one, which joins those up to 64; whole: one.
    assert groups == {16: [0, 2, 9], 64: [1, 3, 4, 5, 6, 7], 77: [8]}
    assert {size: len(rows) for size, rows in by_length(used, 77, 11)} == {77: 10}
    assert [size for size, _ in by_length(np.array([1, 2]), 8, 1)] == [8]


@pytest.mark.parametrize(
    ("count", "wanted"),
    # Of batches of 64 and of 4 on a CPU.
    [(1, [4]), (63, [4] * 16), (64, [64]), (65, [64, 4]), (130, [64, 64, 4]), (120, [64, 64])],
)
def test_batches_have_little_padding(count, wanted):
    batches = list(Batching.of(None, None).indices(count))
    assert [len(batch) for batch in batches] == wanted
    rows = np.concatenate(batches)
    np.testing.assert_array_equal(rows[:count], np.arange(count))
    assert (rows[count:] == count - 1).all()
