import numpy as np
import pytest

from clipjax.errors import ClipjaxError
from clipjax.evals import ZeroShot
from clipjax.evals.zeroshot import mean_direction

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
    with pytest.raises(ClipjaxError, match="set class_names"):
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
