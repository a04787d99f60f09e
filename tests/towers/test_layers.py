"""The smallest pieces against NumPy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from clipjax.params import split
from clipjax.towers import layers

X = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32) * 2 + 0.5


@pytest.mark.parametrize("name", sorted(layers.ACTIVATIONS))
def test_activations(name, oracles):
    np.testing.assert_allclose(
        layers.ACTIVATIONS[name](X), oracles.ACTIVATIONS[name](X.astype(np.float64)), atol=2e-6
    )


@pytest.mark.parametrize("kind", layers.NORMS)
def test_norms(kind, oracles, drawn):
    graphdef, params = drawn(lambda: layers.Norm(kind, 6, 1e-3))
    assert set(params) == ({"scale", "bias"} if kind == "layernorm" else {"scale"})
    got = nnx.merge(graphdef, nnx.State(params))(X)
    x = X.astype(np.float64)
    x = x - x.mean(-1, keepdims=True) if kind == "layernorm_no_bias" else x
    expected = oracles.norm(oracles.float64(params), x, eps=1e-3)
    np.testing.assert_allclose(got, expected, atol=2e-6)


def test_norms_keep_the_dtype_and_compute_in_float32():
    """bfloat16 has 8 bits: of 1000 + {0, 4, 8, 12} the mean and the deviations survive only in float32."""
    norm = layers.Norm("layernorm", 4, 1e-5)
    y = norm(jnp.asarray([[1000.0, 1004.0, 1008.0, 1012.0]], jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(jnp.float32), [[-1.342, -0.447, 0.447, 1.342]], atol=5e-3)


def gradients(f, *inputs, dtype):
    """Of sum(sin(f)) by each input."""
    with jax.enable_x64(dtype == np.float64):
        inputs = [jnp.asarray(x, dtype) for x in inputs]
        return jax.grad(lambda *x: jnp.sin(f(*x)).sum(), tuple(range(len(inputs))))(*inputs)


def assert_gradients(f, plain, *inputs):
    got = gradients(f, *inputs, dtype=np.float32)
    for g, expected in zip(got, gradients(plain, *inputs, dtype=np.float64), strict=True):
        np.testing.assert_allclose(g, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("kind", layers.NORMS)
def test_norms_have_the_gradients_of_their_formula(kind):
    centered, biased = kind != "rmsnorm", kind == "layernorm"

    def plain(x, scale, bias):
        y = x - x.mean(-1, keepdims=True) if centered else x
        y = y / jnp.sqrt((y**2).mean(-1, keepdims=True) + 1e-3) * scale
        return y + bias if biased else y

    def ours(x, scale, bias):
        norm = layers.Norm(kind, 6, 1e-3)
        norm.scale[...] = scale
        if biased:
            norm.bias[...] = bias
        return norm(x)

    assert_gradients(ours, plain, X, np.arange(1.0, 7), np.arange(-3.0, 3))


@pytest.mark.parametrize("name", sorted(layers.ACTIVATIONS))
def test_activations_have_the_gradients_of_their_formula(name):
    plain = {
        "gelu": lambda x: 0.5 * x * (1 + jax.scipy.special.erf(x / np.sqrt(2))),
        "gelu_tanh": lambda x: 0.5 * x * (1 + jnp.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
        "quick_gelu": lambda x: x / (1 + jnp.exp(-1.702 * x)),
        "silu": lambda x: x / (1 + jnp.exp(-x)),
        "relu": lambda x: jnp.where(x > 0, x, 0.0),
    }
    assert_gradients(layers.ACTIVATIONS[name], plain[name], X)


def test_linear_draws_and_computes_as_documented():
    linear = layers.Linear(400, 300, nnx.Rngs(0), std=0.3)
    kernel = np.asarray(linear.kernel[...])
    assert kernel.shape == (400, 300)
    assert kernel.std() == pytest.approx(0.3, rel=0.01)  # 120,000 draws: standard error 0.2 %
    assert np.asarray(layers.Linear(400, 300, nnx.Rngs(0)).kernel[...]).std() == pytest.approx(
        0.05, rel=0.01
    )
    assert not np.asarray(linear.bias[...]).any()
    assert layers.Linear(4, 3, nnx.Rngs(0), bias=False).bias is None
    assert linear(jnp.ones((2, 400), jnp.bfloat16)).dtype == jnp.bfloat16
    assert kernel.dtype == np.float32


def test_a_bfloat16_product_may_keep_its_float32_sums():
    linear = layers.Linear(256, 8, nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (4, 256), jnp.bfloat16)
    kernel = linear.kernel[...].astype(jnp.bfloat16)
    exact = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64)
    y = linear(x, jnp.float32)
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, exact, atol=1e-5)
    assert abs(np.asarray(linear(x), np.float64) - exact).max() > 1e-3
    gradient = jax.grad(lambda x: linear(x, jnp.float32).sum())(x)
    assert gradient.dtype == jnp.bfloat16


def test_dropout_zeroes_a_share_and_keeps_the_mean():
    x = jnp.ones((200, 500))
    y = np.asarray(layers.dropout(x, 0.25, jax.random.key(0)))
    assert set(np.unique(y)) == {0.0, np.float32(1 / 0.75)}
    assert (y == 0).mean() == pytest.approx(0.25, abs=0.006)  # 4 standard errors of 100,000 draws
    np.testing.assert_array_equal(y, layers.dropout(x, 0.25, jax.random.key(0)))
    assert (y != layers.dropout(x, 0.25, jax.random.key(1))).any()
    np.testing.assert_array_equal(layers.dropout(x, 0.25, None), x)
    np.testing.assert_array_equal(layers.dropout(x, 0.0, jax.random.key(0)), x)


def test_keys_differ_or_are_none():
    assert layers.keys(None, 3) == [None] * 3
    data = [tuple(jax.random.key_data(k).tolist()) for k in layers.keys(jax.random.key(0), 3)]
    assert len(set(data)) == 3


def test_fan_in():
    assert layers.fan_in((3, 3, 16, 32)) == 144


def test_modules_hold_no_random_state():
    split(layers.Linear(2, 2, nnx.Rngs(0)))  # refuses a module that does


def test_a_kernels_gradient_comes_in_the_dtype_that_it_is_added_up_in():
    """bfloat16 rounds a sum of 512 terms to 8 bits before devices add theirs; float32 does not."""
    rng = np.random.default_rng(1)
    x, g = (jnp.asarray(rng.standard_normal((8, 64, n)), jnp.bfloat16) for n in (16, 4))
    linear = layers.Linear(16, 4, nnx.Rngs(0))
    expected = np.einsum("bni,bno->io", np.float64(x), np.float64(g))

    def gradients(reduce_dtype):
        linear.reduce_dtype = reduce_dtype
        graphdef, state = nnx.split(linear)
        _, vjp = jax.vjp(lambda state, x: nnx.merge(graphdef, state)(x), state, x)
        kernel, dx = vjp(g)
        return np.float64(kernel.kernel[...]), dx

    exact, dx = gradients("float32")
    rounded, same_dx = gradients("bfloat16")
    np.testing.assert_allclose(exact, expected, atol=1e-4)
    for grad, in_bfloat16 in ((exact, False), (rounded, True), (gradients(None)[0], True)):
        assert (grad == np.float64(jnp.bfloat16(grad))).all() == in_bfloat16
    assert 0.01 < np.abs(rounded - expected).max() < np.abs(expected).max() / 128
    np.testing.assert_array_equal(dx, same_dx)
