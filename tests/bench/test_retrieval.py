"""`clipjax bench retrieval` end to end, on tiny sizes."""

import json

import pytest

from clipjax.cli import main


def test_the_last_line_is_one_json_object(capsys):
    options = ["--images", "300", "--texts", "700", "--width", "16", "--tile", "64", "--json"]
    assert main(["bench", "retrieval", *options]) == 0
    *_, text, last = capsys.readouterr().out.splitlines()
    assert text.startswith("300 x 700 x 16")
    found = json.loads(last)
    assert found["seconds"] > 0 and found["embedding_bytes"] == 4 * 16 * 1000
    # far below what 300 x 700 float64 scores would take with their comparisons, whatever a page is
    assert 0 <= found["added_bytes"] < 8e6
    assert 0 < found["text_to_image_R@1"] < 1


@pytest.mark.parametrize("bad", ["--images", "--width", "--tile"])
def test_bad_sizes_are_refused(capsys, bad):
    assert main(["bench", "retrieval", bad, "0"]) == 2
    assert f"{bad[2:]}=0" in capsys.readouterr().err
    assert main(["bench", "retrieval", "--images", "9", "--texts", "8"]) == 2
