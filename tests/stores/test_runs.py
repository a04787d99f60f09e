"""A run in a bucket, one request in twenty failing, is a run on disk."""

import json
import os
from pathlib import Path

import pytest

import clipjax
from clipjax.checkpoint import complete_steps, latest_step
from clipjax.cli import main
from clipjax.files import replace_file
from clipjax.tracking import read_metrics
from clipjax.tracking.goodput import read_attempts

TINY = str(Path(__file__).parents[1] / "train/tiny.py")
SEED = int(os.environ.get("FAULTS_SEED", "0"))
"""Which requests fail: other values for repetitions (`FAULTS_SEED=3 make test-stores`)."""
FIVE_PERCENT = dict(refused=0.01, cut=0.01, lost=0.01, half=0.01, slow=0.01)


def figures(folder):
    """(step, name) -> figure, of those that are no times."""
    return {
        (line["step"], name): value
        for line in read_metrics(folder / "metrics.jsonl")
        for name, value in line.items()
        if name in ("loss", "grad_norm") or name.startswith("retrieval/")
    }


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory):
    folder = tmp_path_factory.mktemp("disk") / "run"
    assert main(["train", TINY, "--workdir", str(folder), "--duration.amount", "8"]) == 0
    return folder


def test_a_run_in_a_bucket_goes_on_and_ends_as_on_disk(store, on_disk, capsys):
    folder, faults = store
    with faults.at(seed=SEED, **FIVE_PERCENT):
        assert main(["train", TINY, "--workdir", str(folder), "--duration.amount", "5"]) == 0
        # What a machine that is lost during a save leaves: objects, and nothing that says they are all.
        replace_file(folder / "checkpoints/7/state/manifest.ocdbt", "half")
        assert latest_step(folder) == 5
        # The folder alone says what the run is.
        again = ["train", str(folder), "--imports", TINY, "--duration.amount", "8"]
        assert main([*again, "--profile", "6:7"]) == 0
        assert complete_steps(folder)[-1] == 8
        predictor = clipjax.load(str(folder))
        capsys.readouterr()
        assert main(["eval", str(folder), "--imports", TINY, "--json"]) == 0
        evaluated = json.loads(capsys.readouterr().out.splitlines()[-1])
        (folder / "report.html").unlink()
        assert main(["report", str(folder), "--imports", TINY]) == 0
        assert b"<html" in (folder / "report.html").read_bytes()
        model = f"{folder.parent}/{folder.name}_model"
        export = ["export", str(folder), "--to", "clipjax", "--out", model, "--imports", TINY]
        assert main(export) == 0
        exported = clipjax.load(model)
    found, expected = figures(folder), figures(on_disk)
    assert {at: found[at] for at in expected} == expected
    # A run that ends evaluates: the one of five steps did.
    assert {step for step, _ in found.keys() - expected.keys()} == {5}
    text = ["red on the left", "blue on the top"]
    there = clipjax.load(on_disk).encode_text(text)
    assert (predictor.encode_text(text) == there).all()
    assert (exported.encode_text(text) == there).all()
    results = json.loads((folder / "results.json").read_text())
    assert {n: v for n, v in results.items() if n in evaluated} == evaluated
    assert [attempt["step"] for attempt in read_attempts(folder)] == [0, 5]
    names = {path.name for path in folder.iterdir()}
    assert names >= {"run.json", "metrics.jsonl", "tokenizer", "checkpoints", "profile"}
    assert not (folder / ".lease").exists()
    assert min(faults.seen.values()) > 0
    assert faults.failed() > 0.02 * faults.seen["requests"]
