"""Tokens to one vector, against NumPy float64."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from clipjax.towers.pooling import AttentionPool, last_valid, mean_pool, take
from clipjax.towers.transformer import TransformerTower

TOKENS = np.random.default_rng(0).standard_normal((3, 5, 8)).astype(np.float32)
VALID = np.array([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 1, 1, 0, 0]], bool)
CONFIG = TransformerTower(width=8, heads=2, depth=1, mlp_dim=12)


def test_mean_counts_valid_tokens_only():
    np.testing.assert_allclose(mean_pool(TOKENS), TOKENS.mean(1), rtol=1e-5)
    expected = [TOKENS[0].mean(0), TOKENS[1, :2].mean(0), TOKENS[2, 1:3].mean(0)]
    np.testing.assert_allclose(mean_pool(TOKENS, jnp.asarray(VALID)), expected, atol=1e-6)


def test_mean_of_bfloat16_accumulates_in_float32():
    """1 + 1/1024 rounds to 1 in bfloat16: a sum of 4,096 tokens kept in it would stop at 256."""
    ones = jnp.ones((1, 4096, 1), jnp.bfloat16)
    for valid in (None, jnp.ones((1, 4096), bool)):
        pooled = mean_pool(ones, valid)
        assert pooled.dtype == jnp.bfloat16
        assert float(pooled[0, 0]) == 1.0


def test_last_valid_and_take():
    last = last_valid(jnp.asarray(VALID))
    np.testing.assert_array_equal(last, [4, 1, 2])
    np.testing.assert_array_equal(last_valid(jnp.zeros((1, 5), bool)), [0])
    np.testing.assert_array_equal(take(TOKENS, last), TOKENS[[0, 1, 2], [4, 1, 2]])


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_attention_pooling(norm, oracles, drawn):
    config = dataclasses.replace(CONFIG, norm=norm)
    graphdef, params = drawn(lambda: AttentionPool(config, nnx.Rngs(0)))
    pool, reference = nnx.merge(graphdef, nnx.State(params)), oracles.float64(params)
    np.testing.assert_allclose(pool(TOKENS), oracles.map_pool(reference, TOKENS, 2), atol=1e-5)
    expected = oracles.map_pool(reference, TOKENS, 2, VALID)
    np.testing.assert_allclose(pool(TOKENS, jnp.asarray(VALID)), expected, atol=1e-5)
