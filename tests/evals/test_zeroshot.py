import json
import re

import numpy as np
import pytest
from PIL import Image

from clipjax.errors import ClipjaxError
from clipjax.evals import ZeroShot
from clipjax.evals.zeroshot import mean_direction
from clipjax.report import write_report
from clipjax.report.confusion import draw_confusion

# Four pictures: two of class 0, one each of 1 and 2.
IMAGES = np.array([[1, 0, 0], [0.6, 0.8, 0], [0, 1, 0], [0, 0, 1]])
TEXTS = {"red": [1, 0, 0], "green": [0, 1, 0], "blue": [0, 0, 1], "红": [0, 1, 0], "绿": [1, 0, 0]}
NAMES = ("red", "green", "blue")
ONE_CAPTION = (("red",), ("green",), ("green",), ("blue",))


def test_accuracies_by_label(shades, table):
    source = shades(ONE_CAPTION, labels=(0, 0, 1, 2), class_names=NAMES)
    results = ZeroShot(source).run(table(IMAGES, TEXTS))
    # Picture 1 is nearer to green (.8) than to red (.6).
    assert results == {
        "zeroshot/top1": 0.75,
        "zeroshot/top5": 1.0,
        "zeroshot/mean_per_class": pytest.approx((0.5 + 1 + 1) / 3),
    }


def test_pictures_without_a_label_sit_out(shades, table):
    source = shades(ONE_CAPTION, labels=(0, -1, 1, 2), class_names=NAMES)
    assert ZeroShot(source).run(table(IMAGES, TEXTS))["zeroshot/top1"] == 1.0


def test_templates_are_averaged_and_the_mean_normalized(shades, table):
    # "red" with both templates points between its two vectors; "green" has one long way round.
    texts = {
        "a red": [1, 0, 0], "red!": [0, 1, 0],
        "a green": [0, 1, 0], "green!": [0, 0, 1],
        "a blue": [0, 0, 1], "blue!": [0, 0, 1],
    }  # fmt: skip
    source = shades(ONE_CAPTION, labels=(0, 0, 1, 2), class_names=NAMES)
    predictor = table(IMAGES, texts)
    results = ZeroShot(source, templates=("a {}", "{}!")).run(predictor)
    # red = (1,1,0)/sqrt2, green = (0,1,1)/sqrt2, blue = (0,0,1). Picture 2 ties red and
    # green (.71): against it. Picture 3: blue 1 > green .71. Pictures 0 and 1: red.
    assert results["zeroshot/top1"] == 0.75
    directions = mean_direction(np.array([[[1.0, 0], [0, 1]]], np.float32))
    np.testing.assert_allclose(directions, [[0.5**0.5, 0.5**0.5]], rtol=1e-12)


def test_a_name_with_braces_is_taken_as_it_is(shades, table):
    source = shades(ONE_CAPTION[:1], labels=(0,))
    evaluator = ZeroShot(source, class_names=("{x}",), templates=("a {}",))
    assert evaluator.run(table(IMAGES, {"a {x}": [1, 0, 0]}))["zeroshot/top1"] == 1.0


def test_class_names_and_templates_by_language(shades, table):
    source = shades(ONE_CAPTION[:3:2], labels=(0, 1))
    texts = TEXTS | {"a red": [1, 0, 0], "a green": [0, 1, 0]}
    evaluator = ZeroShot(
        source,
        name="z",
        class_names={"en": ("red", "green"), "zh": ("红", "绿")},
        templates={"en": ("{}", "a {}"), "zh": ("{}",)},
    )
    results = evaluator.run(table(IMAGES[::2], texts))
    assert results["z/top1"] == results["z/en/top1"] == 1.0
    assert results["z/zh/top1"] == 0.0


def test_captions_as_classes_in_each_language(shades, table):
    captions = (("red", "红"), ("green", "绿"), ("green", "绿"), ("blue",))
    source = shades(captions, languages=("en", "zh"))
    runner = ZeroShot(source, classes="caption").build()
    results = runner(table(IMAGES, TEXTS))
    # English: the classes red, green, blue; picture 1 (green) scores .8 with green.
    assert results["zeroshot/top1"] == results["zeroshot/en/top1"] == 1.0
    # Chinese: 红 and 绿 point to each other's pictures; picture 1 is nearer to 红.
    assert results["zeroshot/zh/top1"] == 0.0
    assert runner.chance()["zeroshot/top1"] == pytest.approx(1 / 3)
    assert runner.chance()["zeroshot/zh/top1"] == pytest.approx(1 / 2)
    assert runner.chance()["zeroshot/zh/top5"] == 1.0


def test_equal_pictures_count_once_when_captions_are_classes(shades, table):
    source = shades(ONE_CAPTION, ids=(3, 3, 1, 2))
    runner = ZeroShot(source, classes="caption").build()
    results = runner(table(IMAGES, TEXTS))
    assert results["zeroshot/top1"] == 1.0
    assert runner._tasks[0].images.tolist() == [0, 2, 3]


def test_data_are_read_once(shades, table, reads):
    runner = ZeroShot(shades(ONE_CAPTION, labels=(0, 0, 1, 2)), class_names=NAMES).build()
    predictor = table(IMAGES, TEXTS)
    assert runner(predictor) == runner(predictor)
    assert reads() == 4 and predictor.tokenized == 3


def test_bad_input_is_refused_by_name(shades, table):
    predictor = table(IMAGES, TEXTS)
    labeled = shades(ONE_CAPTION, labels=(0, 0, 1, 2))
    with pytest.raises(ClipjaxError, match=r"evaluator 'zeroshot': .* has no labels"):
        ZeroShot(shades(ONE_CAPTION), class_names=NAMES).run(predictor)
    with pytest.raises(ClipjaxError, match="set class_names or prompts"):
        ZeroShot(labeled).run(predictor)
    with pytest.raises(ClipjaxError, match=r"has 2 names, but .* has a label 2"):
        ZeroShot(labeled, class_names=NAMES[:2]).run(predictor)
    with pytest.raises(ClipjaxError, match=r"templates=\('a dog',\)"):
        ZeroShot(labeled, templates=("a dog",))
    with pytest.raises(ClipjaxError, match="templates has none for the language 'zh'"):
        names = {"en": NAMES, "zh": NAMES}
        ZeroShot(labeled, class_names=names, templates={"en": ("{}",)}).run(predictor)
    with pytest.raises(ClipjaxError, match="classes='group'"):
        ZeroShot(labeled, classes="group")
    with pytest.raises(ClipjaxError, match="class_names is for"):
        ZeroShot(labeled, classes="caption", class_names=NAMES)
    with pytest.raises(ClipjaxError, match=r"no caption .* in 'fr'"):
        ZeroShot(labeled, classes="caption", languages=("fr",)).run(predictor)


def test_classes_of_one_name_are_merged_or_ranked_in_order(shades, table, caplog):
    """Two classes "red": by themselves every picture of them would be wrong, or every second one."""
    source = shades(ONE_CAPTION, labels=(0, 3, 1, 2))
    names = (*NAMES, "red")
    predictor = table([IMAGES[0], IMAGES[0], *IMAGES[2:]], TEXTS)
    results = ZeroShot(source, class_names=names).run(predictor)
    assert results["zeroshot/top1"] == 1.0
    assert "1 names stand for several classes each (such as 'red'), which are merged" in caplog.text
    # argmax takes the first: the picture of label 0 is right, that of label 3 is not.
    first = ZeroShot(source, class_names=names, ties="first").run(predictor)
    assert first["zeroshot/top1"] == 0.75 and first["zeroshot/top5"] == 1.0
    with pytest.raises(ClipjaxError, match="ties='last'"):
        ZeroShot(source, ties="last")


def write(path, content):
    path.write_text(json.dumps(content))
    return str(path)


def test_names_and_templates_of_a_prompt_file(shades, table, tmp_path):
    texts = {"a red": [1, 0, 0], "a green": [0, 1, 0], "a blue": [0, 0, 1]} | TEXTS
    prompts = write(tmp_path / "p.json", {"names": list(NAMES), "templates": ["a {}"]})
    source = shades(ONE_CAPTION, labels=(0, 0, 1, 2))
    predictor = table(IMAGES, texts)
    assert ZeroShot(source, prompts=prompts).run(predictor)["zeroshot/top1"] == 0.75
    assert predictor.tokenized == 3
    # other templates take the place of the file's
    ZeroShot(source, prompts=prompts, templates=("{}", "a {}")).run(predictor)
    assert predictor.tokenized == 3 + 6
    # the data set declares its classes in another order
    source = shades(ONE_CAPTION, labels=(2, 2, 0, 1), class_names=("Green", "Blue", "Red"))
    assert ZeroShot(source, prompts=prompts).run(predictor)["zeroshot/top1"] == 0.75


def test_a_part_of_the_classes_leaves_the_other_pictures_out(shades, table, tmp_path):
    write(tmp_path / "whole.json", {"names": list(NAMES)})
    part = {"subset_of": str(tmp_path / "whole.json"), "classes": [0, 2]}
    source = shades(ONE_CAPTION, labels=(0, 0, 1, 2))
    runner = ZeroShot(source, prompts=write(tmp_path / "part.json", part)).build()
    # Without green as a choice, picture 1 is red; picture 2 is green and sits out.
    assert runner(table(IMAGES, TEXTS))["zeroshot/top1"] == 1.0
    assert runner.chance()["zeroshot/top1"] == 0.5
    assert runner.confusion().counts.tolist() == [[2, 0], [0, 1]]


def test_a_class_that_stands_for_several_scores_as_the_best_of_them(shades, table, tmp_path):
    prompts = write(tmp_path / "p.json", {"names": list(NAMES)})
    mapped = write(tmp_path / "m.json", {"warm": ["red", 1], "cold": "blue"})
    source = shades(ONE_CAPTION, labels=(0, 0, 0, 2), class_names=("warm", "none", "cold"))
    runner = ZeroShot(source, prompts=prompts, class_map=mapped).build()
    assert runner(table(IMAGES, TEXTS))["zeroshot/top1"] == 1.0
    confusion = runner.confusion()
    assert confusion.classes == ("warm", "cold") and confusion.counts.tolist() == [[3, 0], [0, 1]]
    # A class that the map leaves out: its picture sits out.
    source = shades(ONE_CAPTION, labels=(0, 0, 1, 2), class_names=("warm", "none", "cold"))
    runner = ZeroShot(source, prompts=prompts, class_map=mapped).build()
    runner(table(IMAGES, TEXTS))
    assert runner.confusion().counts.tolist() == [[2, 0], [0, 1]]


def test_calibration_is_that_of_the_scaled_scores(shades, table):
    source = shades(ONE_CAPTION, labels=(0, 0, 1, 2), class_names=NAMES)
    results = ZeroShot(source, calibration=True).run(table(IMAGES, TEXTS))
    logits = 10.0 * IMAGES  # the texts are unit vectors; the scale of the table is 10
    probability = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert results["zeroshot/nll"] == pytest.approx(
        -np.log(probability[np.arange(4), [0, 0, 1, 2]]).mean(), rel=1e-6
    )
    # Three of confidence near 1, right; picture 1 is taken for green at .88, wrong: two bins.
    top = probability.max(axis=1)
    expected = 0.75 * abs(1 - top[[0, 2, 3]].mean()) + 0.25 * top[1]
    assert results["zeroshot/ece"] == pytest.approx(expected, rel=1e-6)
    assert {"zeroshot/ece_scaled", "zeroshot/temperature"} <= set(results)


def test_the_confusion_matrix_goes_into_a_report(shades, table, tmp_path):
    source = shades(ONE_CAPTION, labels=(0, 0, 1, 2), class_names=NAMES)
    runner = ZeroShot(source).build()
    assert runner.confusion() is None
    results = runner(table(IMAGES, TEXTS))
    assert runner.confusion().counts.tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 1]]
    page = write_report(tmp_path, results=results, confusions=[runner.confusion()]).read_text()
    assert "What was taken for what: zeroshot" in page
    assert re.search(r"<th>red</th>\s*<td>green</td>\s*<td>1 of 2</td>", page)
    draw_confusion(runner.confusion(), tmp_path / "c.png")
    assert Image.open(tmp_path / "c.png").size[0] > 400
    with pytest.raises(ClipjaxError, match="cannot be written"):
        draw_confusion(runner.confusion(), tmp_path / "none" / "c.png")


def test_prompts_that_cannot_work_are_refused(shades, table, tmp_path):
    labeled = shades(ONE_CAPTION, labels=(0, 0, 1, 2))
    with pytest.raises(ClipjaxError, match="leave class_names empty"):
        ZeroShot(labeled, prompts="cifar10", class_names=NAMES)
    with pytest.raises(ClipjaxError, match="needs prompts"):
        ZeroShot(labeled, class_map="map.json")
    with pytest.raises(ClipjaxError, match="did you mean 'cifar10'"):
        ZeroShot(labeled, prompts="cifar").run(table(IMAGES, TEXTS))
    with pytest.raises(ClipjaxError, match="has 3 classes, but 'patch_camelyon' names 2"):
        ZeroShot(labeled, prompts="patch_camelyon").run(table(IMAGES, TEXTS))
    part = {"subset_of": "cifar10", "classes": [7, 8]}
    with pytest.raises(ClipjaxError, match="no picture of .* has a class"):
        prompts = write(tmp_path / "part.json", part)
        ZeroShot(shades(ONE_CAPTION, labels=(0, 0, 1, 2)), prompts=prompts).run(
            table(IMAGES, TEXTS)
        )
