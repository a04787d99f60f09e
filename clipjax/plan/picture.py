"""A plan as a picture: a chip's memory by kind beside what the chip has, and a step's time by what takes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def draw(path: Path, title: str, plans: list[tuple[str, dict[str, Any]]]) -> None:
    """Writes bars.

    Args:
      path: ends in .png, .svg or .pdf.
      title: of the machine.
      plans: name and what `estimate` returned, of one plan or of several.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    names = [name for name, _ in plans]
    timed = [judged for _, judged in plans if "seconds" in judged]
    figure, axes = pyplot.subplots(
        1, 1 + bool(timed), figsize=(5 + 5 * bool(timed), 1.6 + 0.5 * len(plans)), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    _stack(axes[0][0], names, [judged["parts"] for _, judged in plans], 1e-9)
    if memory := plans[0][1]["memory"]:
        axes[0][0].axvline(memory / 1e9, color="black", linestyle="--")
    axes[0][0].set_xlabel("GB on one chip (dashed: what it has)")
    if timed:
        _stack(axes[0][1], names, [judged["seconds"] for judged in timed], 1e3)
        axes[0][1].set_xlabel("ms a step, if nothing overlaps")
        axes[0][1].set_yticks([])
    figure.suptitle(title)
    figure.savefig(path)
    pyplot.close(figure)


def _stack(axis: Any, names: list[str], bars: list[dict[str, float]], scale: float) -> None:
    kinds = dict.fromkeys(kind for bar in bars for kind in bar)
    left = [0.0] * len(bars)
    for kind in kinds:
        sizes = [scale * bar.get(kind, 0.0) for bar in bars]
        axis.barh(range(len(bars)), sizes, left=left, label=kind)
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    axis.set_yticks(range(len(bars)), names)
    axis.invert_yaxis()
    axis.legend(fontsize="x-small", loc="lower right")
