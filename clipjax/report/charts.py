"""Line charts, worked out as coordinates; the template draws them as SVG."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

Points = list[tuple[float, float]]
"""(step, value) in order of step."""

WIDTH, HEIGHT = 520, 250
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 12, 30
MAX_POINTS = 300


@dataclasses.dataclass(frozen=True)
class Line:
    """One series of a chart.

    Attributes:
      name: what the legend calls it.
      color: index into the template's palette.
      dashed: whether the line is dashed.
      path: SVG path of the values; a gap where one is missing.
      trend: SVG path of the running mean, for long noisy series; else empty.
      dots: (x, y) of the values if there are few enough to mark.
      points: (step, value) for the tooltip, thinned out.
    """

    name: str
    color: int
    dashed: bool
    path: str
    trend: str
    dots: list[tuple[float, float]]
    points: Points


@dataclasses.dataclass(frozen=True)
class Chart:
    """A chart in a viewport of WIDTH x HEIGHT.

    Attributes:
      title: above the chart.
      lines: the series.
      x_ticks: (x, label).
      y_ticks: (y, label).
      x_range: first and last step, at LEFT and WIDTH - RIGHT.
    """

    title: str
    lines: list[Line]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    x_range: tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Series:
    """What goes into a chart."""

    name: str
    points: Points
    color: int = 0
    dashed: bool = False
    noisy: bool = False
    """Draw a running mean over the values, if they are many."""


def line_chart(title: str, series: Sequence[Series], from_zero: bool = False) -> Chart | None:
    """Lays out a chart; None if no series has a finite value.

    Args:
      title: above the chart.
      series: values that are not finite make gaps.
      from_zero: whether the value axis starts at 0.
    """
    finite = [(x, y) for s in series for x, y in s.points if math.isfinite(y)]
    if not finite:
        return None
    x_low, x_high = min(x for x, _ in finite), max(x for x, _ in finite)
    if x_low == x_high:
        x_low, x_high = x_low - 1, x_high + 1
    y_low = 0.0 if from_zero else min(y for _, y in finite)
    ticks = nice_ticks(min(y_low, min(y for _, y in finite)), max(y for _, y in finite))
    y_low, y_high = ticks[0], ticks[-1]

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)
        up = (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)
        return round(LEFT + across, 1), round(HEIGHT - BOTTOM - up, 1)

    lines = []
    for s in series:
        points = thin(s.points)
        noisy = s.noisy and len(points) > 60
        lines.append(
            Line(
                s.name,
                s.color,
                s.dashed,
                _path(points, place),
                _path(running_mean(points, len(points) // 15), place) if noisy else "",
                [place(x, y) for x, y in points if math.isfinite(y)] if len(points) <= 24 else [],
                [(x, float(f"{y:.5g}")) for x, y in points if math.isfinite(y)],
            )
        )
    steps = [t for t in nice_ticks(x_low, x_high, 6) if x_low <= t <= x_high]
    return Chart(
        title,
        lines,
        [(place(t, y_low)[0], f"{t:,.0f}") for t in steps if t == int(t)],
        [(place(x_low, t)[1], _label(t, ticks[1] - ticks[0])) for t in ticks],
        (x_low, x_high),
    )


def nice_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """About so many multiples of 1, 2 or 5 times a power of ten, that enclose [low, high]."""
    if low == high:
        low, high = low - (abs(low) or 1.0) * 0.5, high + (abs(high) or 1.0) * 0.5
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def thin(points: Points) -> Points:
    """At most MAX_POINTS points: means of equal runs of neighbors."""
    run = math.ceil(len(points) / MAX_POINTS)
    if run <= 1:
        return points
    runs = [points[i : i + run] for i in range(0, len(points), run)]
    return [(r[-1][0], math.fsum(y for _, y in r) / len(r)) for r in runs]


def running_mean(points: Points, window: int) -> Points:
    """The mean of each value and up to `window` neighbors on either side; the ends have fewer."""
    finite = [(x, y) for x, y in points if math.isfinite(y)]
    means = []
    for i, (x, _) in enumerate(finite):
        near = [y for _, y in finite[max(0, i - window) : i + window + 1]]
        means.append((x, math.fsum(near) / len(near)))
    return means


def curves(log: Sequence[Mapping[str, float]]) -> dict[str, Points]:
    """By name, the points of each figure in the lines of `metrics.jsonl`; null becomes NaN."""
    by_name: dict[str, Points] = {}
    for line in log:
        for name, value in line.items():
            if name not in ("step", "time"):
                value = math.nan if value is None else float(value)
                by_name.setdefault(name, []).append((float(line["step"]), value))
    return by_name


def _path(points: Points, place) -> str:
    commands, pen_down = [], False
    for x, y in points:
        if math.isfinite(y):
            commands.append(("L" if pen_down else "M") + "{:g} {:g}".format(*place(x, y)))
        pen_down = math.isfinite(y)
    return " ".join(commands)


def _label(value: float, step: float) -> str:
    if value and (abs(value) >= 1e5 or abs(step) < 1e-4):
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return f"{value:,.{decimals}f}"
