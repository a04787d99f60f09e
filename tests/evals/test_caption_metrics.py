import json
import math
from pathlib import Path

import numpy as np
import pytest

from clipjax.errors import ClipjaxError
from clipjax.evals import caption_metrics as metrics

GOLDEN = json.loads((Path(__file__).parent / "goldens" / "caption_metrics.json").read_text())
CANDIDATES = [c.split() for c in GOLDEN["candidates"]]
REFERENCES = [[r.split() for r in own] for own in GOLDEN["references"]]


def test_metrics_agree_with_pycocoevalcap():
    assert len(CANDIDATES) >= 200 and {len(own) for own in REFERENCES} == {1, 2, 3, 4, 5}
    np.testing.assert_allclose(metrics.bleu(CANDIDATES, REFERENCES), GOLDEN["bleu"], atol=1e-9)
    by_set = [metrics.bleu([c], [own]) for c, own in zip(CANDIDATES, REFERENCES, strict=True)]
    np.testing.assert_allclose(by_set, GOLDEN["bleu_by_set"], atol=1e-9)
    np.testing.assert_allclose(
        metrics.rouge_l(CANDIDATES, REFERENCES), GOLDEN["rouge_l"], atol=1e-9
    )
    np.testing.assert_allclose(
        metrics.cider_d(CANDIDATES, REFERENCES), GOLDEN["cider_d"], atol=1e-9
    )


def test_metrics_by_hand():
    candidates = [["a", "b", "c"], ["d"]]
    references = [[["a", "b", "d", "e"]], [["d"]]]
    # BLEU-1: 3 of 4 words; BLEU-2: 1 of 2 pairs; 4 words against 5.
    one, two = metrics.bleu(candidates, references, n=2)
    assert one == pytest.approx(0.75 * math.exp(1 - 5 / 4))
    assert two == pytest.approx(math.sqrt(0.75 * 0.5) * math.exp(1 - 5 / 4))
    # ROUGE-L: precision 2/3, recall 2/4
    f = 2.44 * (2 / 3) * 0.5 / (0.5 + 1.44 * 2 / 3)
    np.testing.assert_allclose(metrics.rouge_l(candidates, references), [f, 1.0])
    # CIDEr-D: "d" is in both documents and weighs nothing; log 2 divides out of the first.
    expected = 10 * math.exp(-1 / 72) * np.mean([2 / math.sqrt(3 * 3), 1 / math.sqrt(2 * 3), 0, 0])
    np.testing.assert_allclose(metrics.cider_d(candidates, references), [expected, 0.0])


def test_an_empty_caption_scores_nothing():
    references = [[["a", "b"]], [["c"]]]
    assert metrics.rouge_l([[], ["c"]], references).tolist() == [0, 1]
    assert metrics.cider_d([[], ["c"]], references)[0] == 0
    assert metrics.bleu([[], []], references) == pytest.approx((0, 0, 0, 0), abs=1e-6)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("A man's dog, running!", ["a", "mans", "dog", "running"]),
        ('T-shirt/jeans — "new"  (two)', ["t", "shirt", "jeans", "new", "two"]),
        ("ÉCOLE ＡＢＣ ½", ["école", "abc", "1⁄2"]),
        ("笑顔の犬、two", ["笑", "顔", "の", "犬", "two"]),
        ("中文emoji。", ["中", "文", "emoji"]),
        ("한국 개", ["한국", "개"]),
        ("кошка «и» собака", ["кошка", "и", "собака"]),
        ("قطة ، كلب", ["قطة", "كلب"]),
        ("हिन्दी", ["हिन्दी"]),
        ("…", []),
    ],
)
def test_tokens(text, tokens):
    assert metrics.tokenize(text) == tokens


def test_scripts_without_spaces_may_stay_whole():
    assert metrics.tokenize("笑顔の犬、two", split_unspaced=False) == ["笑顔の犬two"]


def test_clip_scores_by_hand():
    image = np.array([[1.0, 0.0], [1.0, 0.0]])
    caption = np.array([[0.6, 0.8], [-1.0, 0.0]])
    np.testing.assert_allclose(metrics.clip_score(image, caption), [1.5, 0.0])
    reference = np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    owner = np.array([0, 0, 1])
    # The best reference has cosine .8: 2 * 1.5 * .8 / 2.3
    np.testing.assert_allclose(
        metrics.ref_clip_score(image, caption, reference, owner), [2.4 / 2.3, 0.0]
    )


def test_bad_input_is_refused():
    with pytest.raises(ClipjaxError, match="1 captions and references for 2 pictures"):
        metrics.bleu([["a"]], [[["a"]], [["b"]]])
    with pytest.raises(ClipjaxError, match="picture number 1 has no reference"):
        metrics.cider_d([["a"], ["b"]], [[["a"]], []])
