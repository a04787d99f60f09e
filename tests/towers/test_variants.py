"""Settings that other families' towers need: blocks against NumPy float64, places of tokens, stochastic depth."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from clipjax import ClipjaxError
from clipjax.towers import TextTransformer, ViT
from clipjax.towers.layers import drop_path
from clipjax.towers.rotary import (
    distance_buckets,
    grid_rotation,
    sinusoids,
    text_rotation,
)
from clipjax.towers.transformer import Block, TransformerTower, apply_stack, stack

BASE = TransformerTower(width=8, heads=2, depth=2, mlp_dim=12)
VARIANTS = {
    "eva02": dataclasses.replace(
        BASE, gated=True, activation="silu", inner_norms=True, key_bias=False
    ),
    "gemma": dataclasses.replace(
        BASE, kv_heads=1, head_dim=8, attention_scale=0.3, qk_norm=True, norms="both",
        norm="rmsnorm", gated=True, activation="gelu_tanh", qkv_bias=False, out_bias=False,
    ),
    "bert": dataclasses.replace(BASE, norms="post", activation="relu"),
    "eva02-e": dataclasses.replace(BASE, norms="out", layer_scale=0.5),
}  # fmt: skip
X = np.random.default_rng(4).standard_normal((2, 5, 8)).astype(np.float32)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_block_in_float64(name, oracles, drawn):
    config = VARIANTS[name]
    graphdef, params = drawn(lambda: Block(config, nnx.Rngs(0)))
    size = config.head_width
    rotation = text_rotation(5, size, 100.0)
    angles = np.arange(5)[:, None] * 100.0 ** (-np.arange(0, size, 2) / size)
    bias = np.random.default_rng(5).standard_normal((2, 5, 5))
    block = nnx.merge(graphdef, nnx.State(params))
    got = block(X, rotation=rotation, bias=jnp.asarray(bias, jnp.float32)[None])
    reference = oracles.float64(params)
    expected = oracles.variant_block(reference, X, config, angles=angles, bias=bias)
    np.testing.assert_allclose(got, expected, atol=2e-5)


def test_a_norm_without_bias_still_subtracts_the_mean(drawn):
    config = dataclasses.replace(BASE, norm="layernorm_no_bias")
    graphdef, params = drawn(lambda: Block(config, nnx.Rngs(0)))
    assert set(params["norm1"]) == {"scale"}
    got = nnx.merge(graphdef, nnx.State(params)).norm1(X)
    centered = X - X.mean(-1, keepdims=True)
    scale = np.asarray(params["norm1"]["scale"])
    np.testing.assert_allclose(
        got, centered / np.sqrt((centered**2).mean(-1, keepdims=True) + 1e-5) * scale, atol=1e-5
    )


@pytest.mark.parametrize("kind", ["eva02", "pe", "dinov3"])
def test_patches_are_turned_by_row_and_column(kind, oracles):
    """A patch's angles by hand, and the two tokens in front not at all."""
    rotation = grid_rotation(kind, (2, 3), 8, 100.0, (4, 6), 2)
    x = np.random.default_rng(6).standard_normal((1, 8, 1, 8)).astype(np.float32)
    got = np.asarray(rotation(jnp.asarray(x)))
    np.testing.assert_array_equal(got[:, :2], x[:, :2])
    row, column = 1, 2  # the last patch
    places = {
        "eva02": (row / 2 * 4, column / 3 * 6),
        "pe": ((column + 1) / 3 * 6, (row + 1) / 2 * 4),
        "dinov3": (2 * np.pi * (2 * 1.5 / 2 - 1), 2 * np.pi * (2 * 2.5 / 3 - 1)),
    }[kind]
    angles = np.concatenate([p * np.array([1.0, 0.1]) for p in places])  # 100 ** (-1 / 2)
    pairs = "halves" if kind == "dinov3" else "neighbors"
    expected = oracles.turned(x[0, 7], angles[None], pairs)
    np.testing.assert_allclose(got[0, 7], expected, atol=1e-5)


def test_scores_see_distances_alone():
    """What is turned by 3 and 7 meets as what is turned by 0 and 4."""
    rotation = text_rotation(8, 6, 10_000.0)
    q, k = np.random.default_rng(7).standard_normal((2, 6)).astype(np.float32)
    rows = [np.asarray(rotation(jnp.broadcast_to(x, (1, 8, 1, 6))))[0, :, 0] for x in (q, k)]
    np.testing.assert_allclose(rows[0][7] @ rows[1][3], rows[0][4] @ rows[1][0], rtol=1e-5)


def test_buckets_of_distances():
    """T5's with 8 buckets up to a distance of 16, both ways: 4 a direction, 2 of them exact."""
    found = distance_buckets(32, 8, 16, causal=False)
    assert found[:, 0].tolist()[:8] == [0, 1, 2, 2, 2, 2, 3, 3]
    assert found[20, 0] == found[31, 0] == 3
    assert found[0].tolist()[:8] == [0, 5, 6, 6, 6, 6, 7, 7]
    one_way = distance_buckets(6, 8, 16, causal=True)
    assert one_way[:, 0].tolist() == [0, 1, 2, 3, 4, 4]
    assert one_way[0].tolist() == [0] * 6


def test_sinusoids():
    table = sinusoids(3, 6)
    np.testing.assert_allclose(
        table[2], [*np.sin([2, 0.02, 2e-4]), *np.cos([2, 0.02, 2e-4])], atol=1e-7
    )


def test_stochastic_depth_leaves_out_whole_examples():
    x = jnp.ones((400, 2, 3))
    assert drop_path(x, jnp.float32(0.3), None) is x
    got = np.asarray(drop_path(x, jnp.float32(0.3), jax.random.key(0)))
    kept = got[:, 0, 0] > 0
    np.testing.assert_allclose(
        got, np.where(kept, 1 / 0.7, 0.0)[:, None, None] * np.ones_like(x), rtol=1e-6
    )
    assert 0.6 < kept.mean() < 0.8  # 5 standard deviations
    # The rate rises from 0 in the first block, which alone adds to what the last leaves as it was.
    config = dataclasses.replace(BASE, drop_path=0.5)
    blocks = stack(lambda rngs: Block(config, rngs), 2, nnx.Rngs(0))
    many = jnp.broadcast_to(jnp.asarray(X[:1]), (64, 5, 8))
    y = np.asarray(apply_stack(blocks, many, config, key=jax.random.key(1)))
    still = np.asarray(apply_stack(blocks, many, config))
    rows = np.unique(y.round(4), axis=0)
    assert len(rows) == 4  # the last block's two sub-layers, there or not
    assert np.abs(y - X[0]).max((1, 2)).min() > 0.01
    assert len(np.unique(still.round(4), axis=0)) == 1


def test_registers_stand_between_class_token_and_patches():
    config = ViT(
        width=8, heads=2, depth=1, patch_size=4, image_size=8, registers=3, rope="dinov3",
        positions="none", patch_dropout=0.5,
    )  # fmt: skip
    module = config.build(nnx.Rngs(0))
    image = np.random.default_rng(8).integers(0, 256, (2, 8, 8, 3)).astype(np.uint8)
    tokens, _ = module(image)
    assert tokens.shape == (2, 1 + 3 + 4, 8)
    assert module.describe(image)["places"][0].tolist() == [-1, -1, -1, -1, 0, 1, 2, 3]
    # Patches keep their angles where others are left out: without attention to what is gone, a tower of
    # one patch gives the same as one that drops all but that.
    key = jax.random.key(3)
    tokens, _ = module(image, key=key)
    assert tokens.shape == (2, 1 + 3 + 2, 8)
    kept = np.asarray(module.describe(image, key=key)["places"])[:, 4:]
    rotation = module._rotation(jnp.asarray(kept))
    whole = module._rotation(None)
    np.testing.assert_array_equal(rotation.cos[:, 4:], np.asarray(whole.cos)[4 + kept])


def test_a_window_in_some_layers_only():
    """A change beyond the window reaches a token through the layer that sees all, or not at all."""

    def reach(pattern, depth):
        config = TextTransformer(
            width=8, heads=2, depth=depth, vocab_size=20, context_length=9, causal=False, pool="mean",
            positions="rotary", window=2, window_layers=pattern, window_theta=100.0, pad_id=None,
        )  # fmt: skip
        module = config.build(nnx.Rngs(0))
        ids = np.arange(9)[None] + 1
        other = ids.copy()
        other[0, 8] = 0
        change = np.abs(np.asarray(module(other)[0] - module(ids)[0])).max(-1)[0]
        return np.flatnonzero(change > 1e-6).tolist()

    assert reach("l", 1) == [6, 7, 8]
    assert reach("l", 2) == [4, 5, 6, 7, 8]
    assert reach("gl", 2) == list(range(9))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TransformerTower(width=8, heads=2, kv_heads=3), "kv_heads=3 does not divide"),
        (lambda: TransformerTower(width=8, heads=2, norms="middle"), "norms='middle' is unknown"),
        (lambda: TransformerTower(width=8, heads=2, drop_path=1.0), "drop_path=1.0 must be"),
        (lambda: ViT(rope="rows"), "rope='rows' is unknown"),
        (lambda: ViT(width=24, heads=4, rope="pe"), "no multiple of 4"),
        (lambda: ViT(class_token=False), "needs a class token"),
        (lambda: TextTransformer(window=4), "window=4 and window_layers='': both or neither"),
        (lambda: TextTransformer(window=4, window_layers="gx"), "g \\(all\\) and l"),
        (lambda: TextTransformer(pool="class", positions="rotary"), "needs positions='learned'"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_are_refused(make, message):
    with pytest.raises(ClipjaxError, match=message):
        make()
