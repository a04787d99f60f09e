"""`clipjax bench caption` from the command line, on tiny sizes."""

import json

import pytest

from clipjax.cli import main


def test_the_last_line_is_one_json_object(capsys):
    sizes = [
        "--batch",
        "4",
        "--length",
        "5",
        "--vocabulary",
        "300",
        "--width",
        "16",
        "--chunk",
        "64",
    ]
    assert main(["bench", "caption", *sizes, "--rounds", "1", "--json"]) == 0
    results = json.loads(capsys.readouterr().out.splitlines()[-1])
    # Three products of features and words, and one again in the backward pass.
    assert results["matmul_units"]["dense"] == pytest.approx(3.0)
    assert results["matmul_units"]["chunked"] == pytest.approx(4.0, rel=0.1)
    assert results["loss"]["chunked"] == pytest.approx(results["loss"]["dense"], rel=1e-5)
    assert results["seconds"]["chunked"] > 0


@pytest.mark.parametrize("bad", ["--batch 0", "--length 1", "--rounds -1"])
def test_bad_sizes_are_refused(bad, capsys):
    assert main(["bench", "caption", *bad.split()]) == 2
    assert bad.split()[0].strip("-") in capsys.readouterr().err
