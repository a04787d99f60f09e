"""Pixels to normalized arrays, and the refusal of what is no image."""

import jax.numpy as jnp
import numpy as np
import pytest

from clipjax.errors import ClipjaxError
from clipjax.towers import ResNet, ViT
from clipjax.towers.pixels import normalize, require_images

CLIP = dict(mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711))
CONFIG = ViT(image_size=16, depth=1, width=8, heads=1, **CLIP)
IMAGE = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3)).astype(np.uint8)


def test_normalization():
    expected = (IMAGE / 255.0 - CLIP["mean"]) / CLIP["std"]
    np.testing.assert_allclose(normalize(jnp.asarray(IMAGE), CONFIG), expected, atol=2e-6)


def test_uint8_and_float_are_the_same_picture():
    as_float = normalize(jnp.asarray(IMAGE / 255.0, jnp.float32), CONFIG)
    np.testing.assert_allclose(normalize(jnp.asarray(IMAGE), CONFIG), as_float, atol=2e-6)


def test_half_precision_is_rounded_once_at_the_end():
    config = ViT(image_size=16, depth=1, width=8, heads=1, dtype="bfloat16", **CLIP)
    expected = normalize(jnp.asarray(IMAGE), CONFIG).astype(jnp.bfloat16)
    got = normalize(jnp.asarray(IMAGE), config)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got.astype(np.float32), expected.astype(np.float32))


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (
            np.zeros((2, 16, 15, 3), np.uint8),
            r"\[B, 16, 16, 3\], got \[2, 16, 15, 3\].*Some.image_size",
        ),
        (np.zeros((2, 3, 16, 16), np.uint8), r"got \[2, 3, 16, 16\]"),
        (np.zeros((16, 16, 3), np.uint8), r"got \[16, 16, 3\]"),
        (np.zeros((2, 16, 16, 3), np.int32), "uint8 or float images, got int32"),
    ],
)
def test_what_is_no_image_is_refused(image, words):
    with pytest.raises(ClipjaxError, match=words):
        require_images(image, (16, 16), "Some")


@pytest.mark.parametrize("tower", [ViT, ResNet])
@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"mean": (0.5,)}, r"\.mean=\(0.5,\) must have three numbers"),
        ({"std": (0.5, 0.0, 0.5)}, r"\.std=.* must be above 0"),
    ],
)
def test_impossible_normalizations_are_refused(tower, fields, words):
    with pytest.raises(ClipjaxError, match=tower.__name__ + words):
        tower(**fields)
