"""DualEncoder: embeddings, projections, and a scale that stays below its limit and can come back."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from clipjax.batch import PAIR
from clipjax.errors import ClipjaxError
from clipjax.models import DualEncoder
from clipjax.models.scale import clamp_max
from clipjax.params import abstract, count, merge, split
from clipjax.towers import ResNet, TextTransformer, Tower, ViT

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""Machine code that is quick to make: a run takes no time here, compiling it does."""
SHAPE = dict(width=8, heads=2, depth=1, mlp_dim=8)
CONFIG = DualEncoder(
    image=ViT(image_size=8, patch_size=4, pool="mean", **SHAPE),
    text=TextTransformer(vocab_size=20, context_length=6, **SHAPE),
    embed_dim=6,
    logit_bias_init=-10.0,
)
RNG = np.random.default_rng(0)
BATCH = {
    "image": RNG.integers(0, 256, (3, 8, 8, 3)).astype(np.uint8),
    "text": RNG.integers(1, 20, (3, 6)).astype(np.int32),
}


@pytest.fixture(scope="module")
def encode():
    """`encode(config, **arguments) -> (params, Encoded)`, compiled."""

    def run(config, batch=BATCH, key=None, **arguments):
        graphdef, params, state = split(config.build(nnx.Rngs(0)))

        def forward(p, b):
            return merge(graphdef, p, state)(b, key=key, **arguments)

        call = jax.jit(forward, compiler_options=QUICK)
        return params, call(params, batch)

    return run


def test_embeddings_are_projected_unit_vectors(encode):
    """Against the towers' pooled vectors, projected in float64."""
    config = dataclasses.replace(
        CONFIG, text_projection="affine", text=dataclasses.replace(CONFIG.text, pool="mean")
    )
    params, encoded = encode(config, needs=PAIR | {"image_tokens", "text_tokens", "image_pooled"})
    assert encoded["image"].shape == encoded["text"].shape == (3, 6)
    tokens = {name: encoded[f"{name}_tokens"] for name in ("image", "text")}
    pooled = np.asarray(tokens["image"]["values"], np.float64).mean(1)  # pool="mean" of the tokens
    np.testing.assert_allclose(encoded["image_pooled"], pooled, atol=1e-6)
    expected = pooled @ np.asarray(params["image_projection"]["kernel"], np.float64)
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(encoded["image"], expected, atol=1e-5)
    assert set(params["image_projection"]) == {"kernel"}
    assert set(params["text_projection"]) == {"kernel", "bias"}
    assert tokens["text"]["values"].shape == (3, 6, 8)
    np.testing.assert_array_equal(tokens["text"]["mask"], np.asarray(BATCH["text"]) != 0)
    np.testing.assert_allclose(np.linalg.norm(encoded["text"], axis=1), 1, rtol=1e-6)
    assert float(encoded.logit_scale) == pytest.approx(1 / 0.07)
    assert float(encoded.logit_bias) == -10.0


def test_tokens_and_bias_are_there_only_when_asked_for(encode):
    _, encoded = encode(dataclasses.replace(CONFIG, logit_bias_init=None))
    assert set(encoded.rows) == {"image", "text"} and encoded.logit_bias is None


def test_embeddings_are_float32_whatever_the_towers_compute_in(encode):
    half = {
        side: dataclasses.replace(getattr(CONFIG, side), dtype="bfloat16")
        for side in ("image", "text")
    }
    _, encoded = encode(dataclasses.replace(CONFIG, **half))
    assert encoded["image"].dtype == encoded["text"].dtype == jnp.float32
    np.testing.assert_allclose(np.linalg.norm(encoded["image"], axis=1), 1, rtol=1e-6)


def test_towers_draw_from_different_keys(encode):
    """The same key for both would correlate their dropout."""
    seen = {}

    @dataclasses.dataclass(frozen=True)
    class Spy(Tower):
        name: str = ""

        def build(self, rngs):
            return SpyModule(self.name)

    class SpyModule(nnx.Module):
        def __init__(self, name):
            self.name, self.width = name, 6

        def __call__(self, x, *, key=None):
            seen[self.name] = key
            return jnp.ones((3, 1, 6)), jnp.ones((3, 6))

    config = DualEncoder(
        image=Spy("image"), text=Spy("text"), embed_dim=6, image_projection="none", text_projection="none"
    )  # fmt: skip
    module = config.build(nnx.Rngs(0))
    module(BATCH, key=jax.random.key(0))
    a, b = (jax.random.key_data(seen[side]).tolist() for side in ("image", "text"))
    assert a != b
    module(BATCH)
    assert seen == {"image": None, "text": None}


def test_resnet_needs_no_projection():
    """OpenAI's RN50: 102,007,137 parameters, the scale included."""
    config = DualEncoder(
        image=ResNet.preset("RN50"),
        text=TextTransformer.preset("B"),
        embed_dim=1024,
        image_projection="none",
    )
    assert count(abstract(lambda: config.build(nnx.Rngs(0)))[1]) == 102_007_137


@pytest.mark.parametrize(
    ("x", "cotangent", "expected"),
    [
        (1.0, 2.0, 2.0),  # below the limit: untouched
        (1.0, -2.0, -2.0),
        (3.0, -2.0, 0.0),  # at the limit: descent would raise it further
        (4.0, -2.0, 0.0),
        (3.0, 2.0, 2.0),  # ... and may lower it
        (4.0, 2.0, 2.0),
    ],
)
def test_the_clamp_lets_the_scale_come_back(x, cotangent, expected):
    value, vjp = jax.vjp(lambda x: clamp_max(x, 3.0), jnp.float32(x))
    assert float(value) == min(x, 3.0)
    assert float(vjp(jnp.float32(cotangent))[0]) == expected


def test_the_scale_is_limited():
    module = dataclasses.replace(CONFIG, logit_scale_max=20.0).build(nnx.Rngs(0))
    module.logit_scale[...] = jnp.log(50.0)
    assert float(module.shared()["logit_scale"]) == pytest.approx(20.0)
    free = dataclasses.replace(CONFIG, logit_scale_max=None).build(nnx.Rngs(0))
    free.logit_scale[...] = jnp.log(500.0)
    assert float(free.shared()["logit_scale"]) == pytest.approx(500.0, rel=1e-5)
    assert float(free.logit_scale[...]) == pytest.approx(math.log(500))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"embed_dim": 0}, "embed_dim=0"),
        ({"image_projection": "mlp2"}, "image_projection='mlp2' is unknown"),
        ({"image": "ViT"}, "DualEncoder.image='ViT' is no Tower"),
        ({"logit_scale_init": 0.0}, "logit_scale_init=0.0 must be above 0"),
        ({"logit_scale_max": 5.0}, "logit_scale_max=5.0 is below logit_scale_init"),
    ],
)
def test_bad_fields_are_refused_by_name(fields, words):
    with pytest.raises(ClipjaxError, match=words):
        dataclasses.replace(CONFIG, **fields)


def test_widths_that_do_not_fit_are_refused():
    config = dataclasses.replace(CONFIG, text_projection="none")
    with pytest.raises(
        ClipjaxError, match=r"embed_dim=6 is not the text tower's width 8.*'linear'"
    ):
        abstract(lambda: config.build(nnx.Rngs(0)))


def test_a_tower_without_a_width_is_refused():
    @dataclasses.dataclass(frozen=True)
    class Odd(Tower):
        def build(self, rngs):
            return nnx.Module()

    with pytest.raises(ClipjaxError, match="module of Odd has no attribute `width`"):
        dataclasses.replace(CONFIG, image=Odd()).build(nnx.Rngs(0))
