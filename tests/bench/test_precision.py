"""Losses in several precisions, from the command line: beside each other, and not the same."""

import json
from pathlib import Path

from clipjax.cli import main

TINY = Path(__file__).parents[1] / "train" / "tiny.py"


def test_precisions_are_close_and_differ(capsys):
    options = ["--config", str(TINY), "--batch_size", "8", "--steps", "3", "--json"]
    assert main(["bench", "precision", *options, "--precisions", "float32", "int8"]) == 0
    results = json.loads(capsys.readouterr().out.splitlines()[-1])
    plain, rounded = (results[name]["losses"] for name in ("float32", "int8"))
    assert len(plain) == len(rounded) == 3
    assert 0 < max(abs(a - b) for a, b in zip(plain, rounded, strict=True)) < 0.05
    assert main(["bench", "precision", "--precisions", "int4"]) == 2
    assert "'int4' is no precision" in capsys.readouterr().err
