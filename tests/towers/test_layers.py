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
    expected = oracles.norm(oracles.float64(params), X.astype(np.float64), eps=1e-3)
    np.testing.assert_allclose(got, expected, atol=2e-6)


def test_norms_keep_the_dtype_and_compute_in_float32():
    """bfloat16 has 8 bits: of 1000 + {0, 4, 8, 12} the mean and the deviations survive only in float32."""
    norm = layers.Norm("layernorm", 4, 1e-5)
    y = norm(jnp.asarray([[1000.0, 1004.0, 1008.0, 1012.0]], jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(jnp.float32), [[-1.342, -0.447, 0.447, 1.342]], atol=5e-3)


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
