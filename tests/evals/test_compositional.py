import json

import numpy as np
import pytest
from PIL import Image

from clipjax.errors import ClipjaxError
from clipjax.evals import Compositional

TEXTS = {
    "right": [1, 0, 0], "near": [0.8, 0.6, 0], "far": [0, 1, 0], "same": [1, 0, 0], "other": [0, 0, 1],
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    for i in range(3):
        Image.new("RGB", (8, 8), (10 * i,) * 3).save(tmp_path / f"{i}.png")
    return tmp_path


def entry(image, caption, *negatives, **more):
    key = "negative_caption" if len(negatives) == 1 else "negative_captions"
    return {
        "image": image,
        "caption": caption,
        key: negatives[0] if len(negatives) == 1 else negatives,
        **more,
    }


def test_accuracy_overall_and_by_category(folder, table):
    # SugarCrepe's own form: an object of entries, one file a category, `filename`.
    swap = {
        "0": {"filename": "0.png", "caption": "right", "negative_caption": "near"},
        "1": {"filename": "1.png", "caption": "right", "negative_caption": "far"},  # far is nearer
        "2": {"filename": "0.png", "caption": "right", "negative_caption": "same"},  # a tie: lost
    }
    (folder / "swap_obj.json").write_text(json.dumps(swap))
    lines = [
        entry("1.png", "far", "near", "right", category="several"),
        entry("2.png", "other", "near"),
    ]
    (folder / "rest.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    files = (str(folder / "swap_obj.json"), str(folder / "rest.jsonl"))
    runner = Compositional(files=files, images=str(folder)).build()
    predictor = table(np.eye(3), TEXTS)
    assert runner(predictor) == {
        "compositional/accuracy": 3 / 5,
        "compositional/mean_per_category": pytest.approx((1 / 3 + 1 + 1) / 3),
        "compositional/swap_obj/accuracy": pytest.approx(1 / 3),
        "compositional/several/accuracy": 1.0,
        "compositional/rest/accuracy": 1.0,
    }
    # As in ARO's figures of order, the third entry's caption stands before its equal.
    first = Compositional(files=files, images=str(folder), ties="first").run(predictor)
    assert first["compositional/accuracy"] == 4 / 5
    assert first["compositional/swap_obj/accuracy"] == pytest.approx(2 / 3)
    assert runner.chance()["compositional/accuracy"] == pytest.approx((4 * 1 / 2 + 1 / 3) / 5)
    assert (
        Compositional(files=files[:1], images=str(folder), limit=1).run(predictor)[
            "compositional/accuracy"
        ]
        == 1.0
    )


def test_a_picture_that_does_not_decode_takes_its_entries_away(folder, table):
    (folder / "1.png").write_bytes(b"no picture")
    items = [entry("0.png", "right", "far"), entry("1.png", "right", "far")]
    (folder / "x.json").write_text(json.dumps(items))
    found = Compositional(files=(str(folder / "x.json"),), images=str(folder)).run(
        table(np.eye(3), TEXTS)
    )
    assert found["compositional/accuracy"] == 1.0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "has no entries"),
        ("3", "expected a list or an object"),
        ("[1]", "entry 0 is not an object"),
        (
            '[{"imge": "0.png", "caption": "a", "negative_caption": "b"}]',
            "has no 'image'; did you mean 'imge'",
        ),
        ('[{"image": "0.png", "caption": "a"}]', "has no 'negative_caption'"),
        (
            '[{"image": "9.png", "caption": "a", "negative_caption": "b"}]',
            "1 of 1 pictures are not there",
        ),
    ],
)
def test_a_bad_file_is_refused_by_name(folder, table, content, message):
    (folder / "bad.json").write_text(content)
    with pytest.raises(ClipjaxError, match=message):
        Compositional(files=(str(folder / "bad.json"),), images=str(folder)).run(
            table(np.eye(3), TEXTS)
        )


def test_bad_input_is_refused_by_name(folder, table):
    (folder / "bad.jsonl").write_text("{}\n{")
    for files, message in (
        ((str(folder / "bad.jsonl"),), "line 2, is not JSON"),
        (("none.json",), "no file 'none.json'"),
    ):
        with pytest.raises(ClipjaxError, match=message):
            Compositional(files=files, images=str(folder)).run(table(np.eye(3), TEXTS))
    with pytest.raises(ClipjaxError, match="files is empty"):
        Compositional(files=(), images=".")
    with pytest.raises(ClipjaxError, match="limit=0"):
        Compositional(files=("x",), images=".", limit=0)
    with pytest.raises(ClipjaxError, match="ties='last'"):
        Compositional(files=("x",), images=".", ties="last")
