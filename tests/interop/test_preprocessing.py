"""Pictures come to size as in the reference pipelines, to 1/255 a channel."""

from pathlib import Path

import numpy as np
import photos
import pytest

from clipjax.data import Resize

GOLDENS = np.load(Path(__file__).parent / "goldens" / "preprocessing.npz")
PIPELINES = {
    "open_clip": Resize("crop"),
    "open_clip_squash": Resize("squash"),
    "clip": Resize("crop", half_pixel="down"),
    "siglip_bilinear": Resize("squash", "bilinear"),
}


@pytest.mark.parametrize("name", PIPELINES)
def test_pictures_are_the_reference_pipelines(name):
    worst = 0
    for ours, theirs in zip(photos.pictures(), GOLDENS[name], strict=True):
        resized = PIPELINES[name](ours, 36)
        assert resized.shape == (36, 36, 3) and resized.dtype == np.uint8
        worst = max(worst, np.abs(resized.astype(int) - theirs.astype(int)).max())
    assert worst <= 1


def test_the_pipelines_differ_where_they_should():
    """The rounding of an odd margin shows: the goldens can tell the two apart."""
    assert (GOLDENS["open_clip"] != GOLDENS["clip"]).any()
    differing = (GOLDENS["open_clip"] != GOLDENS["clip"]).any((1, 2, 3)).sum()
    assert differing < len(GOLDENS["clip"]) / 2
