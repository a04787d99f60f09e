"""The trainer from the command line: it learns, continues, stops, and does what each setting says."""

import json

import numpy as np


def test_it_learns_and_leaves_the_whole_folder(clipjax, read_metrics, caplog):
    caplog.set_level("INFO", "clipjax")
    assert clipjax("train", "--duration.amount", 60, "--evals.0.every.amount", 30) == 0
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
