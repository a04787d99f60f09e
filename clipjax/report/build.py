"""A run's folder as one HTML file that needs nothing else: no network, no other file."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clipjax.files import replace_file
from clipjax.report import charts
from clipjax.report.confusion import row_shares
from clipjax.report.contents import CaptionExample, Confusion, Example, Similarities
from clipjax.report.pictures import heat_uri, picture_uri, strip_uri
from clipjax.tracking import headline, read_metrics
from clipjax.tracking.goodput import Goodput, goodput, read_attempts

REPORT_FILE = "report.html"
ACCENT = (42, 110, 219)
MISTAKES = 10  # the most frequent ones, beside a confusion matrix
SMALL_CHARTS = {
    "lr": "Learning rate",
    "logit_scale": "Logit scale",
    "logit_bias": "Logit bias",
    "grad_norm": "Gradient norm",
    "bad_steps": "Skipped steps",
    "examples_per_second": "Examples a second",
    "mfu": "Model FLOP utilization",
    "data_share": "Share of a step's time that waits for data",
}
"""Figures of training that get a chart besides the loss, where they are logged."""
FULL_SCALE = {"CIDEr-D": 10.0, "CLIPScore": 2.5}
"""Greatest value of figures that go beyond 1."""


@dataclasses.dataclass(frozen=True)
class Tile:
    """A headline figure: its value as text, 0..1 for the bar, and what chance or a baseline gives."""

    label: str
    value: str
    share: float
    chance: str


@dataclasses.dataclass(frozen=True)
class ResultTable:
    """Results that have the same columns, a row per prefix of their names."""

    columns: list[str]
    rows: list[tuple[str, list[str]]]


@dataclasses.dataclass(frozen=True)
class Part:
    """What a part of the wall clock was spent on."""

    name: str
    share: float
    time: str


@dataclasses.dataclass(frozen=True)
class Clock:
    """Goodput, ready to draw."""

    share: float
    wall: str
    restarts: int
    parts: list[Part]


@dataclasses.dataclass(frozen=True)
class Heat:
    """The similarity matrix, ready to draw."""

    image: str
    strip: str
    captions: list[str]
    scores: list[list[float]]
    low: float
    high: float
    diagonal: float
    elsewhere: float


@dataclasses.dataclass(frozen=True)
class Confused:
    """A confusion matrix, ready to draw, and (class, taken for, how often, of how many)."""

    name: str
    image: str
    classes: int
    mistakes: list[tuple[str, str, int, int]]


def write_report(
    run_dir: str | Path,
    *,
    results: Mapping[str, float],
    config: Any = None,
    environment: Mapping[str, Any] | None = None,
    chance: Mapping[str, float] | None = None,
    examples: Sequence[Example] = (),
    captions: Sequence[CaptionExample] = (),
    similarities: Similarities | None = None,
    confusions: Sequence[Confusion] = (),
    title: str | None = None,
    facts: Mapping[str, str] | None = None,
) -> Path:
    """Writes `report.html` into a run's folder, replacing the one that is there in one go.

    Args:
      run_dir: the run's folder; its `metrics.jsonl` gives the curves, if it is there.
      results: the final evaluation, by name.
      config: the run's configuration as JSON-able data.
      environment: what `environment()` returned.
      chance: what a random order scores, by the same names, where known.
      examples: pictures with the captions they retrieved.
      captions: pictures with the captions that the model wrote.
      similarities: pictures against captions.
      confusions: what classifiers took for what.
      title: heading; default: the folder's name.
      facts: short facts for the line below the heading, such as {"steps": "150"}.

    Returns:
      The path of the file.
    """
    import jinja2

    folder = Path(run_dir)
    log = read_metrics(folder / "metrics.jsonl")
    points = charts.curves(log)
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("clipjax.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters["figure"] = figure
    templates.filters["picture"] = picture_uri
    page = templates.get_template("template.html").render(
        title=title or folder.resolve().name,
        facts=dict(facts or {}) | _facts(log),
        written=datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        tiles=_tiles(results, chance or {}),
        training_charts=_training_charts(points),
        evaluation_charts=_evaluation_charts(points, results),
        tables=_tables(results),
        clock=_clock(goodput(log, read_attempts(folder))),
        heat=_heat(similarities) if similarities is not None else None,
        confusions=[_confused(c) for c in confusions],
        examples=examples,
        captions=captions,
        config=config,
        environment=environment,
        chart=charts,
        json=functools.partial(json.dumps, ensure_ascii=False),
        accent=ACCENT,
    )
    path = folder / REPORT_FILE
    replace_file(path, page)
    return path


def figure(name: str, value: float) -> str:
    """A result as text: shares as percentages, ranks and others as they are."""
    last = name.rsplit("/", 1)[-1]
    if not math.isfinite(value):
        return "–"
    if last.startswith(("R@", "top")) or last == "mean_per_class":
        return f"{100 * value:.1f} %"
    return f"{value:.4g}" if "rank" not in last or value < 1 else f"{value:,.1f}".removesuffix(".0")


def label(name: str) -> str:
    """A result's name for people: `image_to_text/R@1` -> `image → text · R@1`."""
    name = name.replace("_to_", " → ").replace("_", " ").replace("/", " · ")
    return re.sub(r"\btop(\d)", r"top-\1", name)


def _facts(log: list[dict[str, Any]]) -> dict[str, str]:
    """Steps and training time from the log: the gaps that a stopped run leaves do not count."""
    if not log:
        return {}
    times = [line["time"] for line in log if "time" in line]
    gaps = np.diff(times)
    typical = np.median(gaps) if len(gaps) else 0.0
    seconds = float(sum(gap for gap in gaps if 0 <= gap <= max(60.0, 20 * typical)))
    facts = {"steps": f"{max(line['step'] for line in log):,}"}
    if seconds > 0:
        facts["logged time"] = str(datetime.timedelta(seconds=round(seconds)))
    return facts


def _clock(spent: Goodput | None) -> Clock | None:
    if spent is None or not math.isfinite(spent.share):
        return None
    parts = [
        Part(name, seconds / spent.wall, _time(seconds))
        for name, seconds in spent.seconds.items()
        if seconds >= 0.0005 * spent.wall
    ]
    return Clock(spent.share, _time(spent.wall), spent.restarts, parts)


def _time(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else str(datetime.timedelta(seconds=round(seconds)))


def _tiles(results: Mapping[str, float], chance: Mapping[str, float]) -> dict[str, list[Tile]]:
    """The main figures by evaluator."""
    tiles: dict[str, list[Tile]] = {}
    for name, value in headline(results).items():
        evaluator, _, rest = name.partition("/")
        beside = f"chance {figure(name, chance[name])}" if name in chance else ""
        baseline = f"{evaluator}/retrieved/{rest}"
        if baseline in results:
            beside = f"nearest training caption {figure(baseline, results[baseline])}"
        share = min(max(value / FULL_SCALE.get(rest, 1.0), 0.0), 1.0)
        tile = Tile(label(rest or name), figure(name, value), share, beside)
        tiles.setdefault(evaluator, []).append(tile)
    return tiles


def _training_charts(points: Mapping[str, charts.Points]) -> list[charts.Chart]:
    losses = [name for name in points if name == "loss" or name.startswith("loss/")]
    series = [charts.Series(name, points[name], i, noisy=True) for i, name in enumerate(losses)]
    drawn = [charts.line_chart("Loss", series)]
    for name, title in SMALL_CHARTS.items():
        values = points.get(name, [])
        if len({y for _, y in values}) > 1:  # a constant needs no chart
            one = [charts.Series(title, values, noisy=name == "grad_norm")]
            drawn.append(charts.line_chart(title, one, from_zero=name == "lr"))
    return [chart for chart in drawn if chart is not None]


def _evaluation_charts(
    points: Mapping[str, charts.Points], results: Mapping[str, float]
) -> list[charts.Chart]:
    """A chart per evaluator that ran more than once: color for what is asked, dashes for the second k."""
    by_evaluator: dict[str, list[str]] = {}
    for name in headline(results):
        if len(points.get(name, [])) > 1:
            by_evaluator.setdefault(name.split("/", 1)[0], []).append(name)
    drawn = []
    for evaluator, names in by_evaluator.items():
        middles = list(dict.fromkeys(name.rsplit("/", 1)[0] for name in names))
        lasts = list(dict.fromkeys(name.rsplit("/", 1)[-1] for name in names))
        series = []
        for name in names:
            middle, last = name.rsplit("/", 1)
            color = middles.index(middle) if len(middles) > 1 else lasts.index(last)
            dashed = len(middles) > 1 and lasts.index(last) > 0
            short = label(name.split("/", 1)[-1])
            values = [(x, 100 * y) for x, y in points[name]]
            series.append(charts.Series(short, values, color, dashed))
        unit = "x 100" if any(last in FULL_SCALE for last in lasts) else "%"
        drawn.append(charts.line_chart(f"{label(evaluator)}, {unit}", series, from_zero=True))
    return [chart for chart in drawn if chart is not None]


def _tables(results: Mapping[str, float]) -> list[ResultTable]:
    rows: dict[str, dict[str, str]] = {}
    for name, value in results.items():
        prefix, _, column = name.rpartition("/")
        rows.setdefault(prefix or name, {})[column] = figure(name, value)
    tables: dict[tuple[str, ...], ResultTable] = {}
    for prefix, cells in rows.items():
        columns = tuple(cells)
        table = tables.setdefault(columns, ResultTable([label(c) for c in columns], []))
        table.rows.append((label(prefix), list(cells.values())))
    return list(tables.values())


def _confused(confusion: Confusion) -> Confused:
    """The matrix, and the most frequent mistakes."""
    counts = np.asarray(confusion.counts)
    wrong = counts - np.diag(np.diag(counts))
    worst = np.argsort(-wrong, axis=None, kind="stable")[:MISTAKES]
    mistakes = [
        (confusion.classes[i], confusion.classes[j], int(wrong[i, j]), int(counts[i].sum()))
        for i, j in zip(*np.unravel_index(worst, wrong.shape), strict=True)
        if wrong[i, j]
    ]
    image = heat_uri(row_shares(confusion), 0.0, 1.0, ACCENT)
    return Confused(label(confusion.name), image, len(counts), mistakes)


def _heat(similar: Similarities) -> Heat:
    scores = np.asarray(similar.scores, np.float64)
    off = scores[~np.eye(len(scores), dtype=bool)]
    low = float(np.quantile(off, 0.05)) if off.size else float(scores.min())
    high = float(scores.max())
    return Heat(
        image=heat_uri(scores, low, high, ACCENT),
        strip=strip_uri(similar.images),
        captions=list(similar.captions),
        scores=np.round(scores, 3).tolist(),
        low=low,
        high=high,
        diagonal=float(np.diag(scores).mean()),
        elsewhere=float(off.mean()) if off.size else math.nan,
    )
