import json
from pathlib import Path

import pytest

from clipjax.cli import main

TINY = Path(__file__).parents[1] / "train" / "tiny.py"


def test_a_step_is_timed_alone_and_in_the_loop(capsys):
    options = [
        "--config",
        str(TINY),
        "--batch_size",
        "8",
        "--steps",
        "3",
        "--rounds",
        "2",
        "--json",
    ]
    assert main(["bench", "step", *options]) == 0
    results = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert results["batch_size"] == 8
    step, loop = results["step_seconds"], results["loop_step_seconds"]
    assert step > 0
    assert results["examples_per_second"] == pytest.approx(8 / step)
    assert results["overhead_of_100_ms"] == pytest.approx((loop - step) / 0.1)
    assert results["mfu"] is None  # the CPU is in no table
    # Two towers of width 16 and depth 2, 4 and 8 tokens: products of the blocks, forward and backward.
    blocks = sum(2 * n * (12 * 16 * 16 + 2 * n * 16) * 2 for n in (4, 8))
    patches = 2 * 4 * (8 * 8 * 3) * 16
    projections = 2 * 2 * 16 * 16
    flops = 3 * (blocks + patches + projections)
    devices = results["devices"]
    assert results["tflops_per_device"] == pytest.approx(
        flops * 8 / step / devices / 1e12, rel=0.02
    )
    assert main(["bench", "step", "--steps", "0"]) == 2
    assert "steps=0 must be positive" in capsys.readouterr().err
