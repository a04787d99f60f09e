import json

import numpy as np
import pytest
from PIL import Image

from clipjax.errors import ClipjaxError
from clipjax.evals import Compositional, WinoGAViL, Winoground

TEXTS = {"a": [1, 0, 0], "b": [0, 1, 0], "ab": [0.8, 0.6, 0], "ba": [0.6, 0.8, 0], "c": [0, 0, 1]}


@pytest.fixture
def folder(tmp_path):
    for i in range(4):
        Image.new("RGB", (8, 8), (10 * i,) * 3).save(tmp_path / f"p{i}.png")
    return tmp_path


def write(folder, entries):
    path = folder / "entries.jsonl"
    path.write_text("\n".join(map(json.dumps, entries)))
    return {"files": (str(path),), "images": str(folder)}


def test_winoground(folder, table):
    def entry(images, captions, tag):
        named = {f"image_{i}": f"p{k}" for i, k in enumerate(images)}  # without their ends
        return named | {f"caption_{i}": c for i, c in enumerate(captions)} | {"collapsed_tag": tag}

    # Pictures 0 to 3 are at x, y, between them, and at z.
    predictor = table(np.array([[1, 0, 0], [0, 1, 0], [0.8, 0.6, 0], [0, 0, 1]]), TEXTS)
    where = write(
        folder,
        [
            entry((0, 1), ("a", "b"), "Object"),  # all right
            entry(
                (0, 2), ("a", "ba"), "Object"
            ),  # picture 2 likes ba .96, a .8; a likes 0: all right
            entry(
                (0, 2), ("ab", "a"), "Relation"
            ),  # picture 0 prefers a; ab and a like 2, 0: all wrong
            entry((3, 0), ("b", "a"), "Both"),  # picture 3: a tie at 0; b: a tie at 0
            entry((2, 0), ("a", "b"), "Object"),  # 2 likes a, 0 likes a; a likes 0
        ],
    )
    found = Winoground(**where).run(predictor)
    assert found == {
        "winoground/text": 2 / 5,
        "winoground/image": 2 / 5,
        "winoground/group": 2 / 5,
        "winoground/Object/group": pytest.approx(2 / 3),
        "winoground/Relation/group": 0.0,
        "winoground/Both/group": 0.0,
        "winoground/mean_per_category": pytest.approx(2 / 9),
    }
    # Pictures 0 and 2, a and ab: 0 prefers a and 2 ab; but a prefers 0 and ab prefers 2. With ba for
    # ab, the pictures at x and between: what each picture prefers and what each text does differ.
    one_way = Winoground(**write(folder, [entry((2, 1), ("ab", "ba"), "x")])).run(predictor)
    assert (one_way["winoground/text"], one_way["winoground/image"]) == (1.0, 0.0)


def test_winogavil_is_the_jaccard_index(folder, table):
    predictor = table(np.array([[1, 0, 0], [0.8, 0.6, 0], [0.6, 0.8, 0], [0, 1, 0]]), TEXTS)
    candidates = [f"p{i}.png" for i in range(4)]
    entries = [
        {"cue": "a", "candidates": candidates, "associations": candidates[:2]},  # both: 1
        {
            "cue": "a",
            "candidates": candidates,
            "associations": ["p0.png", "p3.png"],
        },  # one of three
        {"cue": "b", "candidates": candidates[:2], "associations": ["p0.png"]},  # none
        {"cue": "c", "candidates": candidates[:2], "associations": ["p0.png"]},  # a tie: none
    ]
    found = WinoGAViL(**write(folder, entries)).run(predictor)
    assert found == {
        "winogavil/jaccard": pytest.approx((1 + 1 / 3) / 4),
        "winogavil/4_candidates/jaccard": pytest.approx(2 / 3),
        "winogavil/2_candidates/jaccard": 0.0,
        "winogavil/mean_per_category": pytest.approx(1 / 3),
    }
    entries[0]["associations"] = ["p9.png"]
    with pytest.raises(ClipjaxError, match="'p9.png' is no candidate"):
        WinoGAViL(**write(folder, entries)).run(predictor)


def test_entries_in_aros_form(folder, table):
    """A box of a picture, captions that are true and false, and a list whose first is right."""
    half = np.full((8, 8, 3), 30, np.uint8)
    half[:, 4:] = 10
    Image.fromarray(half).save(folder / "half.png")
    entries = [
        {"image_path": "half.png", "true_caption": "b", "false_caption": "a", "relation_name": "on"}
        | dict(zip(("bbox_x", "bbox_y", "bbox_w", "bbox_h"), (4, 0, 4, 8), strict=True)),
        {"image_path": "half.png", "true_caption": "b", "false_caption": "a", "relation_name": "on"}
        | {"box": [0, 0, 4, 8]},
        {"image": "p0.png", "caption_options": ["a", "b", "c"], "category": "order"},
    ]
    predictor = table(np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 0]]), TEXTS)
    found = Compositional(**write(folder, entries)).run(predictor)
    assert found["compositional/on/accuracy"] == 1 / 2
    assert found["compositional/order/accuracy"] == 1.0
    entries[0]["bbox_x"] = 9
    assert (
        Compositional(**write(folder, entries)).run(predictor)["compositional/on/accuracy"] == 0.0
    )
    entries[0]["box"] = "left"
    with pytest.raises(ClipjaxError, match="entry 1: the box 'left' is no left, top"):
        Compositional(**write(folder, entries)).run(predictor)
