"""`clipjax bench compile`: the scanned program does not grow with the depth, the unrolled one does."""

import json

import pytest

from clipjax.bench.compile import CompileBench, lowered
from clipjax.cli import main
from clipjax.errors import ClipjaxError


def lines(depth, scan):
    program = lowered(depth=depth, width=64, image_size=32, batch_size=2, scan=scan)
    return len(program.as_text().splitlines())


def test_the_scanned_program_does_not_grow_with_the_depth():
    assert lines(2, scan=True) == lines(6, scan=True)
    two, three, four = (lines(depth, scan=False) for depth in (2, 3, 4))
    assert four - three == three - two > 100  # a block, forward and backward


def test_from_the_command_line(capfd):
    options = ["--depth", "2", "--width", "64", "--image_size", "16", "--batch_size", "1"]
    assert main(["bench", "compile", *options, "--rounds", "1", "--json"]) == 0
    results = json.loads(capfd.readouterr().out.splitlines()[-1])
    for side in ("scanned", "unrolled"):
        assert results[side]["seconds"] == pytest.approx(
            results[side]["trace_seconds"] + results[side]["compile_seconds"]
        )
    assert results["ratio"] == results["scanned"]["seconds"] / results["unrolled"]["seconds"]
    assert results["depth"] == 2
    assert results["width"] == 64


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"depth": 0}, "depth=0 must be positive"),
        ({"rounds": 0}, "rounds=0"),
        ({"width": 100}, "width=100 must be a multiple of 64"),
        ({"image_size": 100}, "image_size=100 must be a multiple of 16"),
    ],
)
def test_bad_sizes_are_refused(fields, words):
    with pytest.raises(ClipjaxError, match=words):
        CompileBench(**fields)
