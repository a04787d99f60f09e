import dataclasses
import importlib.util
import shutil

import numpy as np
import pytest

from clipjax.component import from_json, to_json
from clipjax.data import Source
from clipjax.errors import ClipjaxError
from clipjax.evals import Captioning, build_runners
from clipjax.evals import caption_metrics as metrics
from clipjax.generation import Beam, Greedy, Sample
from clipjax.restore import Opened

CAPTIONS = (
    ("A dog!", "a small dog", "一只狗"),
    ("a cat on a mat", "一只猫"),
    ("the sun over the sea", "太阳"),
)
LANGUAGES = (("en", "en", "zh"), ("en", "zh"), ("en", "zh"))
WRITTEN = ["a dog", "a dog on a mat", "the sun"]


@dataclasses.dataclass(frozen=True)
class Shades(Source):
    """Picture i is a square of gray value 10 i; a caption in `broken` stands beside no picture."""

    captions: tuple[tuple[str, ...], ...] = CAPTIONS
    languages: tuple[tuple[str, ...], ...] = LANGUAGES
    ids: tuple[int, ...] = (0, 1, 2)

    def open(self):
        return [
            {
                "image": np.full((8, 8, 3), 10 * i, np.uint8),
                "captions": captions,
                "languages": self.languages[i] if self.languages else (),
                "id": self.ids[i],
                "key": f"shade {i}",
            }
            for i, captions in enumerate(self.captions)
        ]


class Writer:
    """Writes `WRITTEN` by shade; embeds shades as unit vectors and texts by their first letters."""

    image_size, context_length, mesh = 8, 16, None

    def __init__(self):
        from clipjax.data import Resize

        self.resize, self.asked, self.prefixes = Resize(), [], set()

    def require_decoder(self):
        """It writes."""

    def caption_rows(self, read, count, strategy, prompt, seed):
        self.asked.append((strategy, prompt, seed))
        return [WRITTEN[image[0, 0, 0] // 10] for image in read(np.arange(count))]

    def encode_image(self, image):
        return np.eye(3, dtype=np.float32)[image[:, 0, 0, 0] // 10]

    def encode_image_rows(self, read, count):
        return self.encode_image(read(np.arange(count)))

    def encode_text(self, texts):
        table = {"a d": [0.8, 0.6, 0], "a c": [0, 1, 0], "the": [0, 0, 1]}
        self.prefixes |= {text.startswith("A photo depicts ") for text in texts}
        texts = [text.removeprefix("A photo depicts ") for text in texts]
        return np.array([table.get(text[:3].lower(), [0.6, 0, 0.8]) for text in texts], np.float32)


def tokens(*texts):
    return [metrics.tokenize(text) for text in texts]


def test_figures_compare_with_the_references_of_the_first_language():
    evaluator = Captioning(Shades(), languages=("en", "zh"))
    results = evaluator.run(Writer())
    english = [tokens("a dog", "a small dog"), tokens(CAPTIONS[1][0]), tokens(CAPTIONS[2][0])]
    written = tokens(*WRITTEN)
    for n, value in enumerate(metrics.bleu(written, english), 1):
        assert results[f"captioning/BLEU-{n}"] == results[f"captioning/en/BLEU-{n}"] == value
    # 2 + 4 + 2 words of 2 + 5 + 2 are right, against lengths 2 + 5 + 5.
    assert results["captioning/BLEU-1"] == pytest.approx(8 / 9 * np.exp(1 - 12 / 9))
    assert results["captioning/CIDEr-D"] == metrics.cider_d(written, english).mean()
    assert results["captioning/ROUGE-L"] == metrics.rouge_l(written, english).mean()
    assert results["captioning/zh/BLEU-1"] == pytest.approx(0, abs=1e-12)
    # Cosines of captions with pictures: .8, .6, 1.
    assert results["captioning/CLIPScore"] == pytest.approx(2.5 * 2.4 / 3)
    # Best references: 1 (the same), 1 * .6 (cat: e1 with [.8, .6, 0]), 1.
    both = [(2.0, 1.0), (1.5, 0.6), (2.5, 1.0)]
    harmonic = [2 * a * b / (a + b) for a, b in both]
    assert results["captioning/RefCLIPScore"] == pytest.approx(np.mean(harmonic))
    assert len(results) == 8 + 2 * 6


def test_a_caption_that_two_people_wrote_counts_twice():
    """CIDEr-D is a mean over references."""
    captions = (("a dog", "a dog", "the animal"), CAPTIONS[1], CAPTIONS[2])
    results = Captioning(Shades(captions, languages=())).run(Writer())
    everything = [tokens(*own) for own in captions]
    assert results["captioning/CIDEr-D"] == metrics.cider_d(tokens(*WRITTEN), everything).mean()
    once = [tokens(*dict.fromkeys(own)) for own in captions]
    assert results["captioning/CIDEr-D"] > metrics.cider_d(tokens(*WRITTEN), once).mean()


def test_clip_score_asks_as_the_paper_does():
    writer = Writer()
    Captioning(Shades(), languages=("en",)).run(writer)
    assert writer.prefixes == {True}
    Captioning(Shades(), languages=("en",), prefix="").run(plain := Writer())
    assert plain.prefixes == {False}


def test_without_languages_every_caption_is_a_reference():
    results = Captioning(Shades(languages=()), name="all").run(Writer())
    everything = [tokens(*own) for own in CAPTIONS]
    assert results["all/ROUGE-L"] == metrics.rouge_l(tokens(*WRITTEN), everything).mean()
    assert len(results) == 8


def test_pictures_with_equal_ids_are_one_with_all_their_captions():
    results = Captioning(Shades(ids=(4, 9, 4)), languages=("en",)).run(Writer())
    merged = [tokens("a dog", "a small dog", CAPTIONS[2][0]), tokens(CAPTIONS[1][0])]
    assert results["captioning/ROUGE-L"] == metrics.rouge_l(tokens(*WRITTEN[:2]), merged).mean()
    limited = Captioning(Shades(), languages=("en",), limit=1).run(Writer())
    assert limited["captioning/ROUGE-L"] == 1.0 and limited["captioning/CIDEr-D"] == 0.0


def test_the_baseline_is_the_nearest_training_caption():
    training = Shades(
        captions=(("a desk", "桌子"), ("a cup",), ("the moon",)),
        languages=(("en", "zh"), ("en",), ("en",)),
    )
    evaluator = Captioning(Shades(), languages=("en",), training=training)
    results = evaluator.run(Writer())
    english = [tokens("a dog", "a small dog"), tokens(CAPTIONS[1][0]), tokens(CAPTIONS[2][0])]
    nearest = tokens("a desk", "a cup", "the moon")
    cider = metrics.cider_d(nearest, english).mean()
    assert results["captioning/retrieved/CIDEr-D"] == cider
    assert results["captioning/CIDEr-D"] > cider
    assert results["captioning/retrieved/BLEU-4"] == metrics.bleu(nearest, english)[3]
    assert results["captioning/retrieved/CLIPScore"] == pytest.approx(2.5 * 2.8 / 3)
    two = dataclasses.replace(evaluator, training_limit=2).build()
    assert two.examples(Writer(), count=3)[2].retrieved.text in ("a desk", "a cup")


def test_the_model_is_asked_as_configured_and_the_config_survives_json():
    evaluator = Captioning(
        Shades(), strategy=Beam(width=2), prompt="a", seed=5, embeddings=False, name="beam"
    )
    writer = Writer()
    results = evaluator.run(writer)
    assert writer.asked == [(Beam(width=2), "a", 5)]
    assert "beam/CIDEr-D" in results and not any("CLIP" in name for name in results)
    strange = Captioning(Shades(), strategy=Sample(top_k=3))
    assert to_json(strange)["strategy"] == to_json(Sample(top_k=3))
    assert from_json(to_json(Captioning.__dataclass_fields__["strategy"].default)) == Greedy()


def test_examples_show_caption_references_and_cosines():
    runner = Captioning(Shades(), languages=("en",)).build()
    examples = runner.examples(Writer(), count=3)
    assert [e.caption.text for e in examples] == WRITTEN
    assert [e.right for e in examples] == [True, False, False]
    assert [[r.text for r in e.references] for e in examples] == [
        ["A dog!", "a small dog"],
        ["a cat on a mat"],
        ["the sun over the sea"],
    ]
    assert examples[0].caption.score == pytest.approx(0.8)
    assert examples[1].references[0].score == pytest.approx(1.0)
    assert examples[2].image[0, 0, 0] == 20 and examples[0].retrieved is None
    silent = Captioning(Shades(), embeddings=False).build().examples(Writer(), count=1)
    assert silent[0].caption.score is None


def test_the_report_shows_what_was_written(tmp_path):
    training = Shades(captions=(("a cup",),) * 3, languages=(("en",),) * 3)
    runners = build_runners([Captioning(Shades(), languages=("en",), training=training)])
    page = Opened(tmp_path, 3, None, Writer(), runners).report().read_text()
    text = " ".join(page.split())
    assert "What the model writes" in text and "nearest training caption" in text
    for caption in (*WRITTEN, "a small dog", "a cat on a mat", "a cup"):
        assert f">{caption}<" in text
    assert text.count("✓ a reference") == 1
    assert ">CIDEr-D<" in text


def test_scripts_without_spaces_are_compared_by_character():
    source = Shades(captions=(("一只大狗",),), languages=(("zh",),))

    class Chinese(Writer):
        def caption_rows(self, read, count, *settings):
            return ["一只狗"]

    assert Captioning(source).run(Chinese())["captioning/ROUGE-L"] > 0.8
    assert Captioning(source, split_unspaced=False).run(Chinese())["captioning/ROUGE-L"] == 0


def test_meteor_and_spice_say_what_is_missing(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for setting, name in (("meteor", "METEOR"), ("spice", "SPICE")):
        with pytest.raises(ClipjaxError, match=rf"evaluator 'captioning': {name} .*captioning\]'"):
            Captioning(Shades(), **{setting: True}).run(Writer())
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ClipjaxError, match=r"METEOR and SPICE need Java.*no `java` on the PATH"):
        Captioning(Shades(), meteor=True, spice=True).run(Writer())


def test_bad_input_is_refused():
    with pytest.raises(ClipjaxError, match=r"languages=\('fr',\): no caption .* 'fr'.*en, zh"):
        Captioning(Shades(), languages=("fr",)).run(Writer())
    with pytest.raises(ClipjaxError, match="no captions to compare with"):
        Captioning(Shades(captions=((), ()), languages=())).run(Writer())
    with pytest.raises(ClipjaxError, match="limit=0 must be at least 1"):
        Captioning(Shades(), limit=0)
    with pytest.raises(ClipjaxError, match="leave training out"):
        Captioning(Shades(), training=Shades(), embeddings=False)
    with pytest.raises(ClipjaxError, match="has no captions to retrieve"):
        Captioning(Shades(), training=Shades(captions=())).run(Writer())
