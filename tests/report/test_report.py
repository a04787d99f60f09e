import base64
import html.parser
import io
import json
import math
import re

import numpy as np
import pytest
from PIL import Image

from clipjax.report import (
    Example,
    Guess,
    Ranking,
    Similarities,
    charts,
    environment,
    pictures,
    write_report,
)
from clipjax.report.build import figure
from clipjax.tracking import read_metrics

HOSTILE = '</script><script>alert("x")</script><img src=http://evil.example/x.png onerror=alert(1)> \' & {{ 7 * 7 }}'


class Page(html.parser.HTMLParser):
    """Tags with their attributes, and the text, as a browser would see them."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.text = [], []
        self.feed(source)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text.append(data)


def picture(shade):
    return np.full((72, 72, 3), shade, np.uint8)


def examples(caption, language="en"):
    guesses = (Guess(caption, 0.75, True), Guess("other", -0.1, False))
    return [Example(picture(9), caption, (Ranking(language, guesses, 1),))]


def full_report(folder, caption="a cat"):
    lines = [
        {
            "step": 10 * i,
            "time": float(i),
            "loss": 5.0 - i,
            "grad_norm": None if i == 2 else 1.0 + i,
        }
        for i in range(1, 5)
    ]
    lines += [
        {
            "step": s,
            "time": 5.0,
            "retrieval/image_to_text/R@1": s / 100,
            "retrieval/image_to_text/R@5": 0.5,
        }
        for s in (20, 40)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return write_report(
        folder,
        results={
            "retrieval/image_to_text/R@1": 0.4,
            "retrieval/image_to_text/median_rank": 2.5,
            "zeroshot/top1": 0.123,
        },
        chance={"retrieval/image_to_text/R@1": 0.0025},
        config={
            "@type": "clipjax.config:Run",
            "seed": 3,
            "names": [caption],
            "evals": [{"@type": "m:Mine"}],
        },
        environment={"versions": {"jax": "0.0.1"}, "commit": None},
        examples=examples(caption),
        similarities=Similarities(
            np.array([[0.9, 0.1], [0.2, 0.8]]), np.stack([picture(0), picture(255)]), (caption, "b")
        ),
        title=caption,
        facts={"device": caption},
    ).read_text()


def test_the_report_holds_figures_curves_gallery_config_and_environment(tmp_path):
    source = full_report(tmp_path)
    text = " ".join(" ".join(Page(source).text).split())
    for part in (
        "40.0 %", "12.3 %", "chance 0.2 %", "2.5",  # results
        "Loss", "Gradient norm", "Retrieval, %",  # charts
        "a cat", "0.75", "-0.10", "rank 1",  # gallery
        "0.850", "0.150",  # mean similarity on and off the diagonal
        "Run", "Mine", "seed 3", "jax 0.0.1", "commit null",  # config and environment
        "steps 40",
    ):  # fmt: skip
        assert part in text, part
    assert "✓" in text and "✗" in text


def test_the_report_needs_nothing_else(tmp_path):
    page = Page(full_report(tmp_path))
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base", "form")
        for name in ("src", "href", "srcset", "data", "action"):
            assert attributes.get(name, "data:").startswith("data:"), (tag, attributes)
    styles = "".join(page.text) + "".join(a.get("style", "") for _, a in page.tags)
    assert "url(" not in styles and "@import" not in styles
    (policy,) = [a["content"] for t, a in page.tags if a.get("http-equiv")]
    assert policy.startswith("default-src 'none'; img-src data:")


def test_hostile_text_stays_text(tmp_path):
    harmless = Page(full_report(tmp_path, "a cat"))
    page = Page(full_report(tmp_path, HOSTILE))
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in harmless.tags]
    assert [sorted(a) for _, a in page.tags] == [sorted(a) for _, a in harmless.tags]
    assert sum(HOSTILE in text for text in page.text) >= 4  # title, fact, own caption, guess
    (captions,) = [a["data-captions"] for _, a in page.tags if "data-captions" in a]
    assert json.loads(captions) == [HOSTILE, "b"]


def test_captions_of_any_script_and_broken_unicode_are_kept(tmp_path):
    for caption in ("红苹果 🍎", "تفاح", "\ud83d half"):
        path = write_report(tmp_path, results={}, examples=examples(caption, "zh"))
        text = path.read_bytes().decode("utf-8")
        assert caption.replace("\ud83d", "?") in text
    assert 'lang="zh"' in text and 'dir="auto"' in text


def test_a_run_without_figures_gets_a_report_too(tmp_path):
    (tmp_path / "report.html").write_text("old")
    source = write_report(tmp_path, results={}).read_text()
    assert f"<h1>{tmp_path.name}</h1>" in source and "<h2>" not in source
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_reading_metrics_leaves_out_what_a_kill_cut_off(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    path.write_text('{"step": 1, "loss": 2.0}\n[1]\n{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1, "loss": 2.0}]


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("retrieval/image_to_text/R@1", 0.31234, "31.2 %"),
        ("zeroshot/top5", 1.0, "100.0 %"),
        ("retrieval/image_to_text/median_rank", 3.0, "3"),
        ("retrieval/image_to_text/median_rank", 1234.5, "1,234.5"),
        ("retrieval/image_to_text/mean_reciprocal_rank", 0.471234, "0.4712"),
        ("mine/seconds", 12345.678, "1.235e+04"),
        ("mine/broken", math.nan, "–"),
    ],
)
def test_figures_are_written_for_people(name, value, text):
    assert figure(name, value) == text


def test_a_chart_puts_values_where_they_belong():
    chart = charts.line_chart("t", [charts.Series("a", [(0, 0.0), (50, 5.0), (100, 10.0)])])
    left, right = charts.LEFT, charts.WIDTH - charts.RIGHT
    top, bottom = charts.TOP, charts.HEIGHT - charts.BOTTOM
    middle = ((left + right) / 2, (top + bottom) / 2)
    assert chart.lines[0].dots == [(left, bottom), middle, (right, top)]
    assert [label for _, label in chart.y_ticks] == ["0", "2", "4", "6", "8", "10"]
    assert chart.y_ticks[0][0] == bottom and chart.y_ticks[-1][0] == top
    assert chart.x_ticks[0] == (left, "0") and chart.x_ticks[-1] == (right, "100")


def test_missing_values_make_gaps_and_none_makes_no_chart():
    values = [(1, 1.0), (2, math.nan), (3, 2.0), (4, 3.0)]
    chart = charts.line_chart("t", [charts.Series("a", values)])
    assert re.sub(r"[\d. ]+", " ", chart.lines[0].path) == "M M L "
    assert chart.lines[0].points == [(1, 1.0), (3, 2.0), (4, 3.0)]
    assert charts.line_chart("t", [charts.Series("a", [(1, math.nan)])]) is None
    assert charts.line_chart("t", [charts.Series("a", [(7, 2.0)])]) is not None


@pytest.mark.parametrize("scale", [1e-7, 0.03, 1.0, 45.0, 3e6])
def test_ticks_enclose_the_values_in_round_steps(scale):
    low, high = -0.37 * scale, 1.93 * scale
    ticks = charts.nice_ticks(low, high)
    steps = np.diff(ticks)
    assert ticks[0] <= low and ticks[-1] >= high and 4 <= len(ticks) <= 8
    np.testing.assert_allclose(steps, steps[0], rtol=1e-6)
    mantissa = steps[0] / 10 ** math.floor(math.log10(steps[0]) + 1e-9)
    assert min(abs(mantissa - round_step) for round_step in (1, 2, 5)) < 1e-6
    assert charts.nice_ticks(3.0, 3.0)[0] < 3.0 < charts.nice_ticks(3.0, 3.0)[-1]


def test_long_series_are_thinned_and_smoothed_without_bias():
    points = [(float(i), 2.0 + (-1.0) ** i) for i in range(9000)]
    thinned = charts.thin(points)
    assert len(thinned) == 300 and thinned[-1][0] == 8999
    assert {y for _, y in thinned} == {2.0}
    smooth = charts.running_mean([(float(i), float(i)) for i in range(10)], 2)
    assert smooth[5] == (5.0, 5.0) and smooth[0] == (0.0, 1.0)


def pixels(uri):
    kind, data = re.fullmatch(r"data:image/(png|jpeg);base64,(.*)", uri).groups()
    return kind, Image.open(io.BytesIO(base64.b64decode(data)))


def test_small_pictures_are_embedded_as_they_are_and_large_ones_shrunk():
    image = np.random.default_rng(0).integers(0, 256, (72, 60, 3), np.uint8)
    kind, embedded = pixels(pictures.picture_uri(image))
    assert kind == "png"
    np.testing.assert_array_equal(np.asarray(embedded), image)
    kind, embedded = pixels(pictures.picture_uri(np.zeros((400, 800, 3), np.uint8)))
    assert kind == "jpeg" and embedded.size == (144, 72)


def test_heat_is_opacity():
    kind, heat = pixels(pictures.heat_uri(np.array([[-1.0, 0.0], [0.5, 2.0]]), 0.0, 1.0, (1, 2, 3)))
    assert kind == "png"
    np.testing.assert_array_equal(np.asarray(heat)[..., 3], [[0, 0], [128, 255]])
    assert np.asarray(heat)[..., :3].reshape(-1, 3).tolist() == [[1, 2, 3]] * 4


def test_strip_stacks_pictures_in_order():
    _, strip = pixels(pictures.strip_uri(np.stack([picture(0), picture(255)]), side=20))
    assert strip.size == (20, 40)
    gray = np.asarray(strip.convert("L"), np.int32)
    assert gray[:16].max() < 40 and gray[24:].min() > 215


def test_environment_names_versions_devices_and_commit(tmp_path, monkeypatch):
    import jax

    found = environment()
    assert found["versions"]["jax"] == jax.__version__
    assert found["devices"]["count"] == 8 and found["devices"]["backend"] == "cpu"
    json.dumps(found)
    monkeypatch.chdir(tmp_path)
    assert environment()["commit"] is None
