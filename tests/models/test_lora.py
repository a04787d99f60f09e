"""Lora: starts as its base, adds a @ b, folds into plain kernels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from clipjax.errors import ClipjaxError
from clipjax.models import DualEncoder, Lora
from clipjax.params import merge, paths, split
from clipjax.towers import TextTransformer, ViT

SHAPE = {"width": 16, "depth": 2, "heads": 2}
BASE = DualEncoder(
    image=ViT(image_size=16, patch_size=8, **SHAPE),
    text=TextTransformer(vocab_size=32, context_length=6, **SHAPE),
    embed_dim=8,
)
LORA = Lora(BASE, rank=3, alpha=6.0)


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    return {
        "image": rng.integers(0, 256, (4, 16, 16, 3)).astype(np.uint8),
        "text": rng.integers(3, 32, (4, 6)).astype(np.int32),
    }


def similarities(module, batch):
    encoded = module(batch)
    return np.asarray(encoded.logit_scale * encoded["image"] @ encoded["text"].T)


def with_random_b(seed=1):
    """The parts of a Lora module whose updates are not zero any more."""
    graphdef, params, rest = split(LORA.build(nnx.Rngs(0)))
    for i, factors in enumerate(params["lora"].values()):
        factors["b"] = 0.3 * jax.random.normal(jax.random.key(seed + i), factors["b"].shape)
    return graphdef, params, rest


def test_it_starts_as_its_base(batch):
    module = LORA.build(nnx.Rngs(0))
    np.testing.assert_array_equal(similarities(module, batch), similarities(module.base, batch))
    np.testing.assert_array_equal(
        module.encode_image(batch["image"]), module.base.encode_image(batch["image"])
    )


def test_the_update_is_a_times_b_in_every_layer_of_every_match():
    graphdef, params, rest = with_random_b()
    updated = dict(paths(split(merge(graphdef, params, rest).updated())[1]))
    matched = {
        n for n, _ in paths(params["base"]) if n.endswith(("attn/q/kernel", "attn/v/kernel"))
    }
    assert len(params["lora"]) == len(matched) == 4  # q and v of two towers, their layers stacked
    for name, leaf in paths(params["base"]):
        expected = np.float64(leaf)
        if name in matched:
            f = params["lora"][name.replace("/", ".")]
            for layer in range(2):  # alpha / rank = 2
                expected[layer] += 2 * np.float64(f["a"][layer]) @ np.float64(f["b"][layer])
        np.testing.assert_allclose(updated[name], expected, rtol=1e-5, atol=1e-6)


def test_folded_it_is_a_plain_model_that_says_the_same(batch):
    graphdef, params, rest = with_random_b()
    adapted = similarities(merge(graphdef, params, rest), batch)
    assert np.abs(adapted - similarities(merge(graphdef, params, rest).base, batch)).max() > 0.01
    model, plain = LORA.folded(params)
    assert model == BASE
    plain_graph, _, plain_rest = split(BASE.build(nnx.Rngs(5)))
    np.testing.assert_allclose(
        similarities(merge(plain_graph, plain, plain_rest), batch), adapted, atol=1e-5
    )


def test_gradients_reach_a_and_b(batch):
    graphdef, params, rest = with_random_b()

    def loss(factors):
        module = merge(graphdef, params | {"lora": factors}, rest)
        return jnp.sum(module(batch)["image"][:, 0])

    grads = jax.grad(loss)(params["lora"])
    for name, g in paths(grads):
        assert bool(jnp.any(g != 0)) == name.startswith("image"), name


def test_what_is_asked_of_the_configuration_is_the_bases():
    """So a run checks the tokenizer against the towers, and logs the embeddings' width."""
    assert (LORA.text, LORA.image, LORA.embed_dim) == (BASE.text, BASE.image, 8)
    with pytest.raises(AttributeError, match="unimodal"):
        LORA.unimodal  # noqa: B018


def test_refusals():
    with pytest.raises(ClipjaxError, match="'/atn/' matches no matrix"):
        Lora(BASE, pattern="/atn/").build(nnx.Rngs(0))
    with pytest.raises(ClipjaxError, match="rank=0"):
        Lora(BASE, rank=0)
    with pytest.raises(ClipjaxError, match=r"pattern='\('"):
        Lora(BASE, pattern="(")
    with pytest.raises(AttributeError, match="has no attribute 'caption_memory'"):
        LORA.build(nnx.Rngs(0)).caption_memory  # noqa: B018
