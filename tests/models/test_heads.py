"""Heads beside a model, and models of any number of towers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from clipjax.batch import PAIR
from clipjax.errors import ClipjaxError
from clipjax.models import DualEncoder, Encoder, FusionEncoder, Headed, MlpHead, MultiEncoder
from clipjax.params import paths, split
from clipjax.predictor import Predictor
from clipjax.pretrained import Pretrained
from clipjax.towers import TextTransformer, ViT
from clipjax.towers.transformer import Transformer

SHAPE = {"width": 8, "depth": 1, "heads": 2, "scan": False}
IMAGE = ViT(image_size=16, patch_size=8, pool="mean", **SHAPE)
TEXT = TextTransformer(vocab_size=20, context_length=6, pool="mean", **SHAPE)
DUAL = DualEncoder(image=IMAGE, text=TEXT, embed_dim=6)
HEADED = Headed(
    DUAL,
    heads=(
        MlpHead("projected", widths=(10, 4)),
        MlpHead("predicted", reads="projected", widths=(4,), unit=False),
        FusionEncoder(blocks=Transformer(**SHAPE)),
    ),
)


def make_batch(n=3):
    rng = np.random.default_rng(0)
    image, image_2 = rng.integers(0, 256, (2, n, 16, 16, 3)).astype(np.uint8)
    text = rng.integers(1, 20, (n, 6)).astype(np.int32)
    return {
        "image": image,
        "image_2": image_2,
        "text": text,
        "text_hard": np.stack([text, text[::-1]], 1),
        "german": text[:, ::-1].copy(),
    }


def test_heads_are_further_outputs_of_any_view():
    module, batch = HEADED.build(nnx.Rngs(0)), make_batch()
    needs = {"image_2_projected", "image_projected", "image_predicted", "text"}
    encoded = module(batch, needs=frozenset(needs))
    assert set(encoded.rows) == needs
    heads = module.heads
    pooled = module.base.encode("image", batch["image_2"], output="pooled")
    x = np.asarray(pooled, np.float64)
    for i, layer in enumerate(heads["image_projected"].layers):
        x = x @ np.asarray(layer.kernel[...], np.float64) + np.asarray(layer.bias[...])
        if i == 0:
            x = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)
            x = np.maximum(x, 0)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    np.testing.assert_allclose(encoded["image_2_projected"], x, atol=1e-5)
    one = heads["image_predicted"](encoded["image_projected"])
    np.testing.assert_allclose(encoded["image_predicted"], one, atol=1e-6)
    alone = module.encode("image_2", batch["image_2"], output="projected")
    np.testing.assert_allclose(alone, x, atol=1e-5)
    fused = module.head(
        "fusion", *(module.base.encode(n, batch[n], output="tokens") for n in ("text", "image"))
    )
    assert fused.shape == (3, 2) and fused.dtype == jnp.float32


def test_a_fusion_encoder_reads_both_and_no_padding():
    module, batch = HEADED.build(nnx.Rngs(0)), make_batch()

    def judge(image, text):
        tokens = (
            module.encode("text", text, output="tokens"),
            module.encode("image", image, output="tokens"),
        )
        return np.asarray(module.head("fusion", *tokens))

    plain = judge(batch["image"], batch["text"])
    assert np.abs(judge(batch["image_2"], batch["text"]) - plain).max() > 1e-5
    assert np.abs(judge(batch["image"], batch["text"][::-1]) - plain).max() > 1e-5


def test_several_inputs_a_row_go_through_the_same_tower():
    module, batch = DUAL.build(nnx.Rngs(0)), make_batch()
    encoded = module(batch, needs=frozenset({"text_hard", "text", "image_2", "image"}))
    assert encoded["text_hard"].shape == (3, 2, 6)
    np.testing.assert_allclose(encoded["text_hard"][:, 0], encoded["text"], atol=1e-6)
    np.testing.assert_allclose(encoded["text_hard"][:, 1], encoded["text"][::-1], atol=1e-6)
    again = module({"image": batch["image_2"]}, needs=frozenset({"image"}))
    np.testing.assert_allclose(encoded["image_2"], again["image"], atol=1e-6)


def test_exports_leave_heads_out():
    _, params, _ = split(HEADED.build(nnx.Rngs(0)))
    model, kept = HEADED.folded(params)
    assert model == DUAL
    bare = split(DUAL.build(nnx.Rngs(0)))[1]
    assert [name for name, _ in paths(kept)] == [name for name, _ in paths(bare)]
    Pretrained(model, kept, {}, None, 6, 16).check()


def test_a_model_of_three_towers():
    three = MultiEncoder(
        towers=(Encoder("image", IMAGE), Encoder("text", TEXT), Encoder("german", TEXT, "mlp")),
        embed_dim=6,
    )
    module, batch = three.build(nnx.Rngs(0)), make_batch()
    encoded = module(batch, needs=frozenset({"image", "text", "german"}))
    for name in ("image", "text", "german"):
        np.testing.assert_allclose(np.linalg.norm(encoded[name], axis=1), 1, rtol=1e-5)
    two = MultiEncoder(towers=three.towers[:2], embed_dim=6).build(nnx.Rngs(0))
    dual = DUAL.build(nnx.Rngs(0))
    for (name, a), (other, b) in zip(paths(split(two)[1]), paths(split(dual)[1]), strict=True):
        assert name == other
        np.testing.assert_array_equal(a, b)
    predictor = Predictor.from_module(
        module, tokenizer=None, context_length=6, image_size=16, batch_size=2
    )
    np.testing.assert_allclose(
        predictor.encode("german", batch["german"]), encoded["german"], atol=1e-6
    )
    tokens = predictor.encode("image", batch["image"], output="tokens")
    assert tokens["values"].shape == (3, 4, 8) and tokens["mask"].all()
    one = predictor.encode("image", batch["image"][0], output="pooled")
    np.testing.assert_allclose(one, tokens["values"][0].mean(0), atol=1e-5)
    with pytest.raises(ClipjaxError, match="no encoder for 'audio'"):
        predictor.encode("audio", batch["german"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Headed(DUAL, heads=(MlpHead(), MlpHead())), "two heads 'image_projected'"),
        (lambda: MlpHead(widths=()), "widths is empty"),
        (lambda: Headed(DUAL, heads=(MlpHead(of="audio"),)).build(nnx.Rngs(0)), "reads of 'audio'"),
        (
            lambda: Headed(DUAL, heads=(FusionEncoder(blocks=Transformer(width=16)),)).build(nnx.Rngs(0)),
            "blocks.width=16 is not the width 8",
        ),
        (lambda: MultiEncoder(towers=(Encoder("a", IMAGE),) * 2), "two towers called 'a'"),
        (lambda: MultiEncoder(towers=()), "towers is empty"),
        (lambda: MultiEncoder(towers=(Encoder("shared", IMAGE),)), "'shared' is taken"),
        (lambda: Encoder("no name", IMAGE), "must be a name"),
        (lambda: HEADED.build(nnx.Rngs(0)).head("judge"), "calls the head 'judge'"),
        (
            lambda: DUAL.build(nnx.Rngs(0))(make_batch(), needs=PAIR | {"image_projected"}),
            "makes no 'projected' of 'image'",
        ),
        (
            lambda: DUAL.build(nnx.Rngs(0))({"image": make_batch()["image"]}),
            "the batch has no `text`",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(ClipjaxError, match=message):
        make()


def test_dropout_depends_on_the_input_s_name_alone():
    """What else is asked for changes nothing: the first pass of accumulation asks for less."""
    noisy = dataclasses.replace(DUAL, image=dataclasses.replace(IMAGE, dropout=0.5))
    module, batch, key = noisy.build(nnx.Rngs(0)), make_batch(), jax.random.key(0)
    some = module(batch, key=key, needs=frozenset({"image"}))
    more = module(batch, key=key, needs=frozenset({"image", "image_2", "text", "image_tokens"}))
    np.testing.assert_array_equal(some["image"], more["image"])
    assert np.abs(more["image"] - module(batch, needs=frozenset({"image"}))["image"]).max() > 1e-3
