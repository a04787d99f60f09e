"""`clipjax bench loss` end to end, on tiny sizes."""

import json
import sys

import pytest

from clipjax.bench import loss
from clipjax.bench.contestant import command, contest
from clipjax.bench.loss import LossBench
from clipjax.cli.bench import main
from clipjax.errors import ClipjaxError, RunFailed


def test_the_last_line_is_one_json_object(capsys):
    bench = LossBench(
        rows=64, width=16, rounds=1, local_rows=16, local_width=64, torch_python="", json=True
    )
    bench.run()
    results = json.loads(capsys.readouterr().out.splitlines()[-1])
    for key in ("wire_units", "matmul_units"):
        assert {"AllGather", "Ring", "Hierarchical", "Grouped"} <= set(results[key])
    for key in ("temp_ratio_vs_openclip", "time_ratio_vs_dense"):
        assert isinstance(results[key], float)
    for key in ("time_ratio_vs_torch", "memory_ratio_vs_torch"):
        assert key in results
    assert results["seconds"]["clipjax"] > 0
    # 1.0 of an all-gather, 1.0 of a reduce-scatter, and a few vectors of floats beside 64 columns
    assert 2 <= results["wire_units"]["AllGather"] < 2.2


def test_options_reach_the_contestants_and_figures_are_their_ratios(monkeypatch, capsys):
    asked = {}

    def contest(commands, rounds):
        asked.update({who: json.loads(c[-1]) | {"python": c[0]} for who, c in commands.items()})
        asked["rounds"] = rounds
        seconds = {"clipjax": 2.0, "dense": 4.0, "torch": 8.0, "matmul": 0.5}
        return {
            who: {"seconds": seconds[who], "bytes": 100 * seconds[who] ** 2} for who in commands
        }

    def compile_for(devices, rows, width, cases):
        asked[devices] = [*asked.get(devices, []), (rows, width)]
        held = 8 * rows * width
        extra = {"OpenCLIP": held + 3000, "Ring": 10 - held}
        return {
            case: {"wire": 2.0, "matmul": 4.0, "temp": held + extra.get(case, 100)}
            for case in cases
        }

    monkeypatch.setattr(loss, "contest", contest)
    monkeypatch.setattr(loss, "compile_for", compile_for)
    options = "--rows 64 --width 32 --objective sigmoid --dtype bfloat16 --chunk 16 --rounds 2"
    options += " --torch_python other --devices 16 --local_rows 8 --local_width 4 --large --json"
    assert main(["loss", *options.split()]) == 0
    ours = {"objective": "sigmoid", "dtype": "bfloat16", "rows": 64, "width": 32, "chunk": 16}
    for who in ("clipjax", "dense"):
        assert ours.items() <= asked[who].items()
    assert asked["torch"]["python"] == "other" and asked["torch"]["objective"] == "sigmoid"
    assert asked["rounds"] == 2
    assert asked[16] == [(16 * 8, 4)] and asked[64] == [(2**20, 512), (2**16, 64 * 256)]

    results = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert results["time_ratio_vs_dense"] == 0.5
    assert results["time_ratio_vs_torch"] == 4
    assert results["memory_ratio_vs_torch"] == 16
    held = 8 * 128 * 4
    assert results["temp_ratio_vs_openclip"] == pytest.approx((2 * held + 3000) / (held + 100))
    assert results["ring_temp_ratio_vs_openclip"] == pytest.approx((2 * held + 3000) / 10)
    # 4 products of 64 x 64 x 32 in 2 s, over 2 x 4096^3 in half a second
    assert results["share_of_matmul_rate"] == pytest.approx(8 * 64**2 * 32 / 2 / (4 * 4096**3))
    assert set(results["large_temp_bytes"]) == set(loss.EXCHANGES)
    assert set(results["late_temp_bytes"]) == {"late interaction"}


@pytest.mark.parametrize("bad", [{"rows": 0}, {"chunk": 0}, {"rounds": 0}, {"devices": 6}])
def test_bad_sizes_are_refused(bad):
    with pytest.raises(ClipjaxError, match=next(iter(bad))):
        LossBench(**bad)


def test_a_python_that_cannot_run_its_contestant_is_named(capfd):
    with pytest.raises(ClipjaxError, match="'no-python', which should run torch"):
        contest({"torch": command("no-python")}, 1)
    with pytest.raises(RunFailed, match="measurement of 'torch' ended without a result"):
        contest({"torch": command(sys.executable, who="torch", objective="?")}, 1)
