import numpy as np
import pytest

from clipjax.errors import ClipjaxError
from clipjax.evals import Retrieval
from clipjax.mesh import MeshShape
from clipjax.predictor import Predictor

# Three pictures with unit vectors e0, e1, e2; English captions are where they belong, Chinese ones
# of pictures 0 and 1 are swapped.
EYE = np.eye(3)
TEXTS = {
    "dog": [0.8, 0.6, 0],
    "cat": [0.6, 0.8, 0],
    "sun": [0, 0, 1],
    "狗": [0, 1, 0],
    "猫": [1, 0, 0],
    "日": [0, 0, 1],
}
CAPTIONS = (("dog", "狗"), ("cat", "猫"), ("sun", "日"))


def test_figures_by_direction_and_language(shades, table):
    source = shades(CAPTIONS, languages=("en", "zh"))
    results = Retrieval(source).run(table(EYE, TEXTS))
    # English: every first is right.
    for prefix in ("retrieval", "retrieval/en"):
        for direction in ("image_to_text", "text_to_image"):
            assert results[f"{prefix}/{direction}/R@1"] == 1.0
            assert results[f"{prefix}/{direction}/median_rank"] == 1.0
    # Chinese: the sun alone is found first. Picture 0 scores 狗 0 and 日 0 too (a tie counts
    # against it): rank 3, as for picture 1.
    assert results["retrieval/zh/image_to_text/R@1"] == pytest.approx(1 / 3)
    assert results["retrieval/zh/image_to_text/R@5"] == 1.0
    assert results["retrieval/zh/image_to_text/median_rank"] == 3.0
    mrr = (1 / 3 + 1 / 3 + 1) / 3
    assert results["retrieval/zh/image_to_text/mean_reciprocal_rank"] == pytest.approx(mrr)
    # All six captions at once: picture 0 finds dog (.8) after 猫 (1); picture 1 likewise.
    assert results["retrieval/any_language/image_to_text/R@1"] == pytest.approx(1 / 3)
    assert results["retrieval/any_language/image_to_text/median_rank"] == 2.0
    assert results["retrieval/any_language/text_to_image/R@1"] == pytest.approx(4 / 6)
    mean = "retrieval/mean_over_languages"
    assert results[f"{mean}/image_to_text/R@1"] == pytest.approx((1 + 1 / 3) / 2)
    for direction in ("image_to_text", "text_to_image"):
        both = [results[f"retrieval/{code}/{direction}/R@1"] for code in ("en", "zh")]
        assert results[f"{mean}/{direction}/R@1"] == pytest.approx(np.mean(both))
    assert len(results) == 4 * 2 * 5 + 2 * 3


def test_the_first_language_asked_for_gives_the_main_figures(shades, table):
    source = shades(CAPTIONS, languages=("en", "zh"))
    results = Retrieval(source, name="r", languages=("zh", "en")).run(table(EYE, TEXTS))
    assert results["r/image_to_text/R@1"] == results["r/zh/image_to_text/R@1"] == 1 / 3
    one = Retrieval(source, languages=("zh",)).run(table(EYE, TEXTS))
    assert set(one) == {k for k in one if k.count("/") == 2} and len(one) == 10
    assert one["retrieval/image_to_text/R@1"] == 1 / 3


def test_captions_without_languages_are_used_all_together(shades, table):
    results = Retrieval(shades(CAPTIONS)).run(table(EYE, TEXTS))
    assert len(results) == 10
    # As any_language above.
    assert results["retrieval/image_to_text/R@1"] == pytest.approx(1 / 3)
    assert results["retrieval/text_to_image/R@1"] == pytest.approx(4 / 6)


def test_pictures_with_equal_ids_are_one_that_owns_all_their_captions(shades, table):
    source = shades(CAPTIONS, ids=(7, 9, 7))
    results = Retrieval(source).run(table(EYE, TEXTS))
    # Pictures: shade 0 (dog, 狗, sun, 日) and shade 1 (cat, 猫). Shade 1 prefers 狗 to cat.
    assert results["retrieval/image_to_text/R@1"] == 0.0
    # dog, 狗 (no), cat, 猫 (no), sun and 日 (both score 0 with both: ties).
    assert results["retrieval/text_to_image/R@1"] == pytest.approx(2 / 6)


def test_a_picture_without_a_caption_in_a_language_sits_out(shades, table):
    captions = (("dog", "狗"), ("cat",), ("sun", "日"))
    results = Retrieval(shades(captions, languages=("en", "zh"))).run(table(EYE, TEXTS))
    # 狗 against pictures 0 and 2 scores 0 and 0: a tie.
    assert results["retrieval/zh/text_to_image/R@1"] == 0.5
    assert results["retrieval/en/text_to_image/R@1"] == 1.0


def test_data_are_read_once_and_tokenized_once(shades, table, reads):
    runner = Retrieval(shades(CAPTIONS)).build()
    predictor = table(EYE, TEXTS)
    assert reads() == 0
    first = runner(predictor)
    runner.similarities(predictor, 2)
    assert runner(predictor) == first
    assert reads() == 3
    assert predictor.tokenized == 6 + 2


def test_chance_is_one_in_n_with_one_caption_each(shades, table):
    runner = Retrieval(shades(CAPTIONS, languages=("en", "zh"))).build()
    runner.prepare(table(EYE, TEXTS))
    chance = runner.chance()
    assert chance["retrieval/image_to_text/R@1"] == pytest.approx(1 / 3)
    assert chance["retrieval/text_to_image/R@1"] == pytest.approx(1 / 3)
    assert chance["retrieval/any_language/image_to_text/R@1"] == pytest.approx(2 / 6)
    results = runner(table(EYE, TEXTS))
    assert set(chance) == {name for name in results if "R@" in name}


def test_examples_show_what_each_picture_retrieved(shades, table):
    runner = Retrieval(shades(CAPTIONS, languages=("en", "zh"))).build()
    examples = runner.examples(table(EYE, TEXTS), count=3, k=2)
    assert [e.caption for e in examples] == ["dog", "cat", "sun"]
    english, chinese = examples[0].rankings
    assert (english.language, chinese.language) == ("en", "zh")
    assert [(g.caption, g.right) for g in english.guesses] == [("dog", True), ("cat", False)]
    np.testing.assert_allclose([g.score for g in english.guesses], [0.8, 0.6], atol=1e-6)
    assert english.rank == 1 and chinese.rank == 3
    assert not chinese.guesses[0].right
    assert examples[1].image.shape == (8, 8, 3) and examples[1].image[0, 0, 0] == 10
    assert len(runner.examples(table(EYE, TEXTS), count=2)) == 2


def test_examples_skip_a_language_that_a_picture_lacks(shades, table):
    captions = (("dog", "狗"), ("cat",), ("sun", "日"))
    runner = Retrieval(shades(captions, languages=("en", "zh"))).build()
    examples = runner.examples(table(EYE, TEXTS), count=3)
    assert [[r.language for r in e.rankings] for e in examples] == [
        ["en", "zh"],
        ["en"],
        ["en", "zh"],
    ]


def test_similarities_have_pictures_as_rows(shades, table):
    runner = Retrieval(shades(CAPTIONS, languages=("en", "zh"))).build()
    similar = runner.similarities(table(EYE, TEXTS))
    assert similar.captions == ("dog", "cat", "sun")
    np.testing.assert_allclose(
        similar.scores, EYE @ np.array([TEXTS[c] for c in similar.captions]).T
    )
    assert similar.images[:, 0, 0, 0].tolist() == [0, 10, 20]


def test_bad_input_is_refused_by_name(shades, table):
    source = shades(CAPTIONS, languages=("en", "zh"))
    with pytest.raises(
        ClipjaxError, match=r"evaluator 'retrieval': .*no caption .* in 'fr'.*en, zh"
    ):
        Retrieval(source, languages=("en", "fr")).run(table(EYE, TEXTS))
    with pytest.raises(ClipjaxError, match=r"evaluator 'retrieval'.*captions without languages"):
        Retrieval(shades(CAPTIONS), languages=("en",)).run(table(EYE, TEXTS))
    with pytest.raises(ClipjaxError, match="no captions to retrieve"):
        Retrieval(shades(((), ()))).run(table(EYE, TEXTS))
    with pytest.raises(ClipjaxError, match="limit=0"):
        Retrieval(source, limit=0)
    with pytest.raises(ClipjaxError, match=r"evaluator 'retrieval': .* not finite"):
        Retrieval(source).run(table(EYE * np.nan, TEXTS))


class Characters:
    def encode(self, texts, context_length):
        return np.array([[ord(c) % 30 for c in t.ljust(6)[:6]] for t in texts], np.int32)


def test_figures_do_not_depend_on_mesh_or_batch_size(shades, linear, flat):
    captions = tuple((f"{i * 7919 % 1000:06d}", f"{i * 104729 % 1000:06d}") for i in range(24))
    evaluator = Retrieval(shades(captions, languages=("en", "zh")))
    settings = {"tokenizer": Characters(), "context_length": 6, "image_size": 8}
    module = linear
    reference = evaluator.run(Predictor.from_module(module, batch_size=24, **settings))
    assert 0 < reference["retrieval/text_to_image/R@10"] < 1
    for shape, batch_size in (((1, 8, 1), 5), ((2, 2, 2), 7), ((1, 1, 8), 100)):
        mesh = MeshShape(*shape).build()
        predictor = Predictor.from_module(module, mesh=mesh, batch_size=batch_size, **settings)
        assert evaluator.run(predictor) == reference
    # All pictures in one place, up to rounding: nothing is found, everywhere.
    collapsed = Predictor.from_module(flat, mesh=mesh, **settings)
    assert evaluator.run(collapsed)["retrieval/text_to_image/R@10"] == 0.0
