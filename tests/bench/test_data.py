"""`clipjax bench data`, small: what it says of itself is so."""

import json

import pytest

from clipjax.cli import main


def test_the_figures_are_there(capsys):
    sizes = ["--sizes", "160", "120", "--image_size", "32", "--pictures", "2", "--tiny", "8"]
    assert main(["bench", "data", *sizes, "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    measured = found["160x120"]
    assert measured["mean_difference"] < 4  # noise, at a quarter of its size
    ratio = measured["images_per_second"] / measured["pillow_images_per_second"]
    assert measured["ratio"] == pytest.approx(ratio)
    assert found["loader"]["samples_per_second"] > 0
