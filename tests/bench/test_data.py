"""`clipjax bench data`, small: what it says of itself is so."""

import json

import numpy as np
import pytest
from PIL import Image

from clipjax.cli import main


def test_the_figures_are_there(capsys):
    sizes = [
        "--sizes",
        "160",
        "120",
        "--image_size",
        "32",
        "--pictures",
        "2",
        "--tiny",
        "8",
        "--num_workers",
        "1",
    ]
    assert main(["bench", "data", *sizes, "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    measured = found["160x120"]
    assert measured["mean_difference"] < 4  # noise, at a quarter of its size
    ratio = measured["images_per_second"] / measured["pillow_images_per_second"]
    assert measured["ratio"] == pytest.approx(ratio)
    assert measured["bytes_per_pixel"] > 0.1
    assert found["loader"]["threads"] > 0 and found["loader"]["workers"] > 0


def test_pictures_of_ones_own(tmp_path, capsys):
    Image.fromarray(np.full((60, 80, 3), 7, np.uint8)).save(tmp_path / "plain.png")
    sizes = ["--sizes", "160", "120", "--image_size", "32", "--tiny", "8", "--num_workers", "0"]
    assert main(["bench", "data", "--folder", str(tmp_path), *sizes, "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["160x120"]["bytes_per_pixel"] < 0.1 and found["160x120"]["mean_difference"] == 0
    (tmp_path / "plain.png").unlink()
    assert main(["bench", "data", "--folder", str(tmp_path), *sizes]) != 0
    assert "holds no picture" in capsys.readouterr().err
