"""Who is timed against whom, and one step of ours as the contestant takes it."""

import json

import pytest

from clipjax.bench import contestant, openclip
from clipjax.cli import main


def test_contestants_and_what_is_made_of_their_times(monkeypatch, capsys):
    asked = {}

    def contest(contestants, rounds):
        asked.update(contestants, rounds=rounds)
        seconds = {"clipjax": 2.0, "other tree": 2.5, "OpenCLIP": 3.0}
        return {name: {"seconds": seconds[name], "bytes": 1e9} for name in contestants}

    monkeypatch.setattr(openclip, "contest", contest)
    options = ["--torch_python", "torchy", "--other_tree", "old", "--model", "ViT-L-14"]
    options += ["--batch_size", "4", "--rounds", "3", "--json"]
    assert main(["bench", "openclip", *options]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert "clipjax is 1.50 times as fast" in printed[2]
    assert json.loads(printed[-1])["other tree"]["seconds"] == 2.5
    ours, theirs = json.loads(asked["clipjax"][-1]), json.loads(asked["OpenCLIP"][-1])
    assert ours == {"who": "clip", "image": "L/14", "text": "L", "embed_dim": 768, "rows": 4}
    sizes = {"image_size": 224, "length": 77, "words": 49408, "rows": 4}
    assert theirs == {"who": "OpenCLIP", "model": "ViT-L-14"} | sizes
    assert asked["other tree"] == ["env", "PYTHONPATH=old", *asked["clipjax"]]
    assert (asked["OpenCLIP"][0], asked["rounds"]) == ("torchy", 3)


def test_our_step_is_one_that_can_be_taken_again_and_again():
    step = contestant._jax_clip(image="Ti/32", text="S", embed_dim=16, rows=2)
    step()
    step()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--model", "ViT-B-64"], "model='ViT-B-64' is none of ViT-B-32"),
        (["--rounds", "0"], "rounds=0 must be positive"),
    ],
)
def test_what_cannot_be_timed_is_refused(options, words, capsys):
    assert main(["bench", "openclip", *options]) == 2
    assert words in capsys.readouterr().err
