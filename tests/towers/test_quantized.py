"""Products of 8-bit numbers against NumPy float64 that rounds as they do."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from clipjax.errors import ClipjaxError
from clipjax.towers import Quantize, TextTransformer, ViT
from clipjax.towers.quantized import product
from clipjax.towers.transformer import Block

RNG = np.random.default_rng(3)


def numbers(*shape):
    """Normal, the largest of each row 4: at the negative end of int8's range a half may round either way."""
    x = np.clip(RNG.standard_normal(shape), -3.5, 3.5).astype(np.float32)
    x[..., 0] = x[..., 0, :] = 4
    return x


X, W, G = numbers(2, 5, 32), numbers(32, 16), numbers(2, 5, 16)
# Largest number that a scale is for, and the format itself.
LIMITS = {"int8": (127.5, 127.5), "fp8": (448.0, 57344.0)}
FLOATS = (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2)


def rounded(x, axis, format, backward=False):
    """float64, with a scale for each row along `axis`; divided in float32, as halves may go either way."""
    scale = np.abs(x).max(axis, keepdims=True) / np.float32(LIMITS[format][backward])
    if format == "int8":
        return np.float64(scale) * np.clip(np.round(x / scale), -128, 127)
    return np.float64(scale) * (x / scale).astype(FLOATS[backward]).astype(np.float64)


@pytest.mark.parametrize("format", ["int8", "fp8"])
def test_products_by_hand(format):
    got, vjp = jax.vjp(
        lambda x, w: product(x, w, format, jnp.float32), jnp.asarray(X), jnp.asarray(W)
    )
    dx, dw = vjp(jnp.asarray(G))
    np.testing.assert_allclose(got, rounded(X, -1, format) @ rounded(W, 0, format), atol=2e-5)
    expected = rounded(G, -1, format, backward=True) @ rounded(W.T, 0, format)
    np.testing.assert_allclose(dx, expected, atol=2e-5)
    # A weight's gradient is not rounded at all.
    np.testing.assert_allclose(dw, np.einsum("bni,bno->io", *map(np.float64, (X, G))), atol=2e-5)
    # And the rounding is no more than the format's: 7 bits of int8, 3 of e4m3.
    assert np.abs(got - X @ W).max() < {"int8": 0.02, "fp8": 0.1}[format] * np.abs(X @ W).max()


def test_rules_choose_matrices_by_path():
    rules = (Quantize(r"mlp/fc1$", "fp8"), Quantize(r"(mlp/|attn/q)", "int8"))
    config = ViT(width=16, depth=1, heads=2, quantize=rules)
    block = nnx.eval_shape(lambda: Block(config, nnx.Rngs(0)))
    assert (block.mlp.fc1.format, block.mlp.fc2.format) == ("fp8", "int8")
    assert (block.attn.q.format, block.attn.k.format, block.attn.out.format) == ("int8", "", "")
    text = str(jax.make_jaxpr(lambda x: nnx.merge(*nnx.split(Block(config, nnx.Rngs(0))))(x))(
        jnp.zeros((1, 4, 16))))  # fmt: skip
    assert text.count("f8_e4m3fn[1,4,16]") > 0 and text.count("i8[1,4,16]") > 0
    plain = nnx.eval_shape(lambda: Block(ViT(width=16, depth=1, heads=2), nnx.Rngs(0)))
    assert plain.mlp.fc1.format == ""


def test_a_pattern_that_is_none_is_refused():
    with pytest.raises(ClipjaxError, match=r"Quantize.pattern='\(' is no regular expression"):
        Quantize("(")


def test_without_qwix_the_extra_is_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "qwix", None)
    with pytest.raises(
        ClipjaxError, match=r"TextTransformer.quantize needs Qwix.*clipjax\[quantized\]"
    ):
        TextTransformer(quantize=(Quantize(),))
