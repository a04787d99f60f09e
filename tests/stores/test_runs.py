"""A run in a bucket, one request in twenty failing, is a run on disk."""

from pathlib import Path

import clipjax
from clipjax.checkpoint import complete_steps, latest_step
from clipjax.cli import main
from clipjax.files import replace_file
from clipjax.tracking import read_metrics

TINY = str(Path(__file__).parents[1] / "train/tiny.py")


def losses(folder):
    return {
        line["step"]: line["loss"]
        for line in read_metrics(folder / "metrics.jsonl")
        if "loss" in line
    }


def test_a_run_in_a_bucket_goes_on_and_ends_as_on_disk(store, tmp_path):
    folder, faults = store
    with faults.at(refused=0.025, cut=0.025):
        assert main(["train", TINY, "--workdir", str(folder), "--duration.amount", "5"]) == 0
        # What a machine that is lost during a save leaves: objects, and nothing that says they are all.
        replace_file(folder / "checkpoints/7/state/manifest.ocdbt", "half")
        assert latest_step(folder) == 5
        assert main(["train", TINY, "--workdir", str(folder), "--duration.amount", "8"]) == 0
        assert complete_steps(folder)[-1] == 8
        predictor = clipjax.load(str(folder))
    assert main(["train", TINY, "--workdir", str(tmp_path / "run"), "--duration.amount", "8"]) == 0
    assert losses(folder) == losses(tmp_path / "run")
    text = ["red on the left", "blue on the top"]
    there = clipjax.load(tmp_path / "run").encode_text(text)
    assert (predictor.encode_text(text) == there).all()
    names = {path.name for path in folder.iterdir()}
    assert names >= {
        "run.json",
        "metrics.jsonl",
        "results.json",
        "report.html",
        "tokenizer",
        "checkpoints",
    }
    assert not (folder / ".lease").exists()
    assert faults.seen["refused"] + faults.seen["cut"] > 5
