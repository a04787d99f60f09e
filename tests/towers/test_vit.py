"""ViT: sizes, tokens, positions, pooling, patch dropout."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from clipjax.errors import ClipjaxError
from clipjax.params import abstract, count, paths
from clipjax.towers import ViT
from clipjax.towers.vit import kept_patches, patchify, sincos2d

CONFIG = ViT(
    width=8, heads=2, depth=2, mlp_dim=12, patch_size=4, image_size=(8, 12),
    mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3),
)  # fmt: skip
IMAGE = np.random.default_rng(2).integers(0, 256, (3, 8, 12, 3)).astype(np.uint8)


def parameters(name, **fields):
    return count(abstract(lambda: ViT.preset(name, **fields).build(nnx.Rngs(0)))[1])


@pytest.mark.parametrize(
    ("name", "fields", "published"),
    [
        # DeiT's 5,717,416 and 22,050,664 and ViT's 86,567,656 less a head for 1,000 classes
        ("Ti/16", {}, 5_717_416 - 193 * 1000),
        ("S/16", {}, 22_050_664 - 385 * 1000),
        ("B/16", {}, 86_567_656 - 769 * 1000),
        # transformers' CLIPVisionModel of OpenAI's L/14 and LAION's H/14
        ("L/14", {"pre_norm": True, "patch_bias": False}, 303_179_776),
        ("H/14", {"pre_norm": True, "patch_bias": False}, 630_766_080),
        # timm's vit_so400m_patch14_siglip_224
        ("So400m/14", {"pool": "map"}, 427_680_704),
    ],
)
def test_presets_have_the_published_number_of_parameters(name, fields, published):
    assert parameters(name, **fields) == published


@pytest.mark.parametrize(
    ("name", "embed_dim", "millions"), [("g/14", 1024, 1012.65), ("G/14", 1280, 1844.91)]
)
def test_the_largest_presets_have_the_published_millions(name, embed_dim, millions):
    """OpenCLIP lists image towers with their projections."""
    ours = parameters(name, pre_norm=True, patch_bias=False)
    width = ViT.preset(name).width
    assert (ours + width * embed_dim) / 1e6 == pytest.approx(millions, abs=0.005)


def reference(oracles, params, image, config):
    """The whole tower in float64, for learned positions and a class token or map pooling."""
    p = oracles.float64(params)
    rows, cols = config.grid
    size = config.patch_size
    pixels = (image / 255.0 - config.mean) / config.std
    patches = [
        pixels[:, r * size : (r + 1) * size, c * size : (c + 1) * size].reshape(len(image), -1)
        for r in range(rows)
        for c in range(cols)
    ]
    x = oracles.linear(p["patch"], np.stack(patches, 1))
    if config.pool == "class":
        first = np.broadcast_to(p["class_token"], (len(image), 1, config.width))
        x = np.concatenate([first, x], 1)
    x = x + (p["positions"] if config.positions == "learned" else sincos2d(config.grid, 8))
    if config.pre_norm:
        x = oracles.norm(p["pre_norm"], x)
    for i in range(config.depth):
        x = oracles.block(oracles.layer(p["blocks"], i), x, config.heads)
    x = oracles.norm(p["norm"], x)
    if config.pool == "map":
        return x, oracles.map_pool(p["pool"], x, config.heads)
    return x, x[:, 0] if config.pool == "class" else x.mean(1)


@pytest.mark.parametrize(
    "fields",
    [
        {"pre_norm": True, "patch_bias": False},
        {"pool": "mean", "positions": "sincos2d"},
        {"pool": "map"},
    ],
    ids=["class-learned-pre_norm", "mean-sincos2d", "map-learned"],
)
def test_the_whole_tower_in_float64(fields, tower, oracles):
    config = dataclasses.replace(CONFIG, **fields)
    params, run = tower(config)
    names = {name for name, _ in paths(params)}
    assert ("patch/bias" in names) == config.patch_bias
    assert ("positions" in names) == (config.positions == "learned")
    tokens, pooled = run(params, IMAGE)
    expected_tokens, expected = reference(oracles, params, IMAGE, config)
    np.testing.assert_allclose(tokens, expected_tokens, atol=5e-5)
    np.testing.assert_allclose(pooled, expected, atol=5e-5)


def test_a_class_token_has_no_fixed_position(tower):
    params, run = tower(dataclasses.replace(CONFIG, positions="sincos2d"))
    tokens, pooled = run(params, IMAGE)
    assert tokens.shape == (3, 7, 8)
    np.testing.assert_array_equal(tokens[:, 0], pooled)


def test_float_pixels_are_the_same_picture(tower):
    params, run = tower(dataclasses.replace(CONFIG, pre_norm=True, patch_bias=False))
    as_float = run(params, (IMAGE / 255.0).astype(np.float32))
    for got, expected in zip(as_float, run(params, IMAGE), strict=True):
        np.testing.assert_allclose(got, expected, atol=2e-5)


def test_bfloat16_computes_with_float32_parameters(tower):
    params, run = tower(CONFIG)
    _, half = tower(dataclasses.replace(CONFIG, dtype="bfloat16"))
    assert {leaf.dtype for _, leaf in paths(params)} == {jnp.dtype("float32")}
    for got, expected in zip(half(params, IMAGE), run(params, IMAGE), strict=True):
        assert got.dtype == jnp.bfloat16
        error = np.abs(got.astype(np.float32) - expected).max()
        assert 1e-4 < error < 0.15  # 8 bits, through 2 blocks, of values around 1


def test_patchify_goes_row_by_row():
    image = np.arange(2 * 4 * 6 * 1).reshape(2, 4, 6, 1)
    got = np.asarray(patchify(jnp.asarray(image), 2))
    assert got.shape == (2, 6, 4)
    np.testing.assert_array_equal(got[0, 0], [0, 1, 6, 7])
    np.testing.assert_array_equal(got[0, 1], [2, 3, 8, 9])
    np.testing.assert_array_equal(got[1, 5], np.array([16, 17, 22, 23]) + 24)


def test_sincos_positions():
    table = sincos2d((2, 3), 8)
    frequencies = [1.0, 1e-2]  # 10000^0, 10000^(-1/2)
    for row in range(2):
        for col in range(3):
            expected = [f(p * w) for p in (col, row) for f in (np.sin, np.cos) for w in frequencies]
            np.testing.assert_allclose(table[row * 3 + col], expected, atol=1e-6)


def test_patch_dropout_keeps_a_share_of_each_image_in_order():
    kept = np.asarray(kept_patches(50, 40, 0.7, jax.random.key(0)))
    assert kept.shape == (50, 12)
    assert (np.diff(kept, axis=1) > 0).all()
    assert len({tuple(row) for row in kept}) == 50  # 40 choose 12 subsets: no two alike
    np.testing.assert_array_equal(kept, kept_patches(50, 40, 0.7, jax.random.key(0)))
    assert (kept != kept_patches(50, 40, 0.7, jax.random.key(1))).any()
    # Every patch is kept in 30 % of the images: 15 of 50, within 4.5 standard deviations of 3.2.
    counts = np.bincount(kept.ravel(), minlength=40)
    assert (abs(counts - 15) < 14.6).all()
    assert kept_patches(50, 40, 0.99, jax.random.key(0)).shape == (50, 1)
    assert kept_patches(50, 40, 0.7, None) is None
    assert kept_patches(50, 40, 0.0, jax.random.key(0)) is None


def test_patch_dropout_in_the_tower_is_for_training(tower):
    params, run = tower(dataclasses.replace(CONFIG, patch_dropout=0.5))
    assert run(params, IMAGE, jax.random.key(0))[0].shape == (3, 1 + 3, 8)  # the class token stays
    assert run(params, IMAGE)[0].shape == (3, 1 + 6, 8)
    _, plain = tower(CONFIG)
    np.testing.assert_array_equal(run(params, IMAGE)[1], plain(params, IMAGE)[1])


def test_a_tower_says_which_patches_are_left(drawn):
    """Tokens that no block changes are the patches themselves: each is where it is said to be."""
    config = dataclasses.replace(CONFIG, patch_dropout=0.5, positions="sincos2d")
    graphdef, params = drawn(lambda: config.build(nnx.Rngs(0)))
    zero = jax.tree.map(jnp.zeros_like, params["blocks"])
    module = nnx.merge(graphdef, nnx.State(params | {"blocks": zero}))
    found = module.describe(IMAGE, key=jax.random.key(4))
    tokens, every = module(IMAGE, key=jax.random.key(4))[0], module(IMAGE)[0]
    assert found["mask"].shape == found["places"].shape == (3, 1 + 3) and found["mask"].all()
    assert (found["places"][:, 0] == -1).all() and (found["places"][:, 1:] >= 0).all()
    for row in range(3):
        np.testing.assert_array_equal(tokens[row], every[row][found["places"][row] + 1])
    np.testing.assert_array_equal(module.describe(IMAGE)["places"], [range(-1, 6)] * 3)
    pooled = dataclasses.replace(CONFIG, pool="mean").build(nnx.Rngs(0))
    np.testing.assert_array_equal(pooled.describe(IMAGE)["places"], [range(6)] * 3)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"image_size": (8, 10)}, r"image_size=\(8, 10\) is no multiple of ViT.patch_size=4"),
        ({"pool": "cls"}, "pool='cls' is unknown.*class"),
        ({"positions": "sincos"}, "positions='sincos' is unknown.*sincos2d"),
        ({"patch_dropout": 1.0}, "patch_dropout=1.0"),
        ({"patch_size": 0}, "patch_size=0"),
        ({"positions": "sincos2d", "width": 6}, "width=6 must be a multiple of 4"),
    ],
)
def test_bad_fields_are_refused_by_name(fields, words):
    with pytest.raises(ClipjaxError, match=words):
        dataclasses.replace(CONFIG, **fields)


@pytest.mark.parametrize(
    ("name", "words"), [("B16", "form 'B/16'"), ("b/16", "unknown size 'b'"), ("B/0", "form")]
)
def test_unknown_presets_are_refused(name, words):
    with pytest.raises(ClipjaxError, match=words):
        ViT.preset(name)


def test_images_of_another_size_are_refused(tower):
    params, run = tower(CONFIG)
    with pytest.raises(ClipjaxError, match=r"images \[B, 8, 12, 3\], got \[3, 12, 8, 3\]"):
        run(params, IMAGE.swapaxes(1, 2))
