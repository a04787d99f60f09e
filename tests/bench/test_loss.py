"""`clipjax bench loss` end to end, on tiny sizes."""

import json

import pytest

from clipjax.bench.loss import LossBench
from clipjax.errors import ClipjaxError


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


@pytest.mark.parametrize("bad", [{"rows": 0}, {"rounds": 0}, {"devices": 6}])
def test_bad_sizes_are_refused(bad):
    with pytest.raises(ClipjaxError, match=next(iter(bad))):
        LossBench(**bad)
