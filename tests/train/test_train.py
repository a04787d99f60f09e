"""The trainer from the command line: it learns, continues, stops, and does what each setting says."""

import json

import jax
import numpy as np
import pytest


def test_it_learns_and_leaves_the_whole_folder(clipjax, read_metrics, caplog):
    caplog.set_level("INFO", "clipjax")
    options = ("--duration.amount", 60, "--evals.0.every.amount", 30, "--profile", "20:22")
    assert clipjax("train", *options) == 0
    assert "pairs: AllGather, 1 device, 16 of 16 columns at a time" in caplog.text
    loss = read_metrics(clipjax.workdir)
    assert sorted(loss) == list(range(1, 61))
    # 16 kinds among 64 records: a batch of 16 holds equal captions, so the loss has a floor above 0.
    assert loss[1] > np.log(16) - 0.3
    assert np.mean([loss[s] for s in range(51, 61)]) < 0.5 * loss[1]
    results = json.loads((clipjax.workdir / "results.json").read_text())
    assert results["step"] == 60
    assert results["retrieval/image_to_text/R@1"] > 0.5  # chance is 1/16
    assert {"run.json", "tokenizer", "checkpoints", "metrics.jsonl", "report.html"} <= {
        p.name for p in clipjax.workdir.iterdir()
    }
    # How fast it went, and where the time went.
    speed, seconds = (
        read_metrics(clipjax.workdir, n) for n in ("examples_per_second", "step_seconds")
    )
    assert sorted(speed) == list(range(2, 61))
    assert all(speed[s] == pytest.approx(16 / seconds[s]) for s in speed)
    waited = read_metrics(clipjax.workdir, "data_share")
    assert all(0 <= share <= 1 for share in waited.values())
    assert read_metrics(clipjax.workdir, "tokens_per_second")[9] == pytest.approx(8 * speed[9])
    assert set(read_metrics(clipjax.workdir, "mfu").values()) == {None}  # the CPU is in no table
    assert read_metrics(clipjax.workdir, "seconds/saving")
    assert results["restarts"] == 0
    parts = results["wall_seconds_by"]
    assert sum(parts.values()) == pytest.approx(results["wall_seconds"], abs=0.5)
    assert results["goodput"] == pytest.approx(parts["steps"] / results["wall_seconds"], abs=0.01)
    assert "Where the time went" in (clipjax.workdir / "report.html").read_text()
    # The trace holds the steps that were asked for, and no others.
    (trace,) = (clipjax.workdir / "profile").rglob("*.xplane.pb")
    events = [
        event
        for plane in jax.profiler.ProfileData.from_file(str(trace)).planes
        for line in plane.lines
        for event in line.events
        if event.name == "train"
    ]
    assert sorted({dict(e.stats)["step_num"] for e in events}) == [20, 21, 22]
    assert clipjax("train", "--profile", "5:3") == 2
