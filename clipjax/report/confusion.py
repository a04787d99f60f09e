"""A confusion matrix as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from clipjax.errors import ClipjaxError
from clipjax.report.contents import Confusion

MOST_NAMES = 60
"""Classes up to which each is named at the picture's edges."""


def row_shares(confusion: Confusion) -> np.ndarray:
    """[C, C] share of each class's pictures taken for each class; 0 for classes without pictures."""
    counts = np.asarray(confusion.counts, np.float64)
    return counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)


def require_drawable(path: Path) -> None:
    """Refuses a picture's path before any work is done for it.

    Raises:
      ClipjaxError: the folder is not there, or the suffix is of no picture that matplotlib writes.
    """
    from matplotlib.backend_bases import FigureCanvasBase

    known = FigureCanvasBase.get_supported_filetypes()
    if not path.absolute().parent.is_dir():
        raise ClipjaxError(f"there is no folder to write {str(path)!r} into")
    if path.suffix.lower().lstrip(".") not in known:
        raise ClipjaxError(
            f"{str(path)!r}: pictures are written as {', '.join('.' + kind for kind in sorted(known))}"
        )


def draw_confusion(confusion: Confusion, path: str | Path) -> None:
    """Writes a picture: true classes down, predicted ones across, as shares of the true class.

    Raises:
      ClipjaxError: the folder is not there, or the suffix is of no picture that matplotlib writes.
    """
    from matplotlib.figure import Figure

    size = len(confusion.classes)
    side = float(np.clip(2.5 + 0.22 * size, 4.5, 14))
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(row_shares(confusion), cmap="Blues", vmin=0, vmax=1, interpolation="none")
    axes.set(xlabel="taken for", ylabel="is")
    plain: dict[str, Any] = {"parse_math": False}  # a "$" in a name is a "$"
    axes.set_title(confusion.name, **plain)
    if size <= MOST_NAMES:
        axes.set_xticks(range(size), confusion.classes, rotation=90, fontsize=7, **plain)
        axes.set_yticks(range(size), confusion.classes, fontsize=7, **plain)
    figure.colorbar(image, ax=axes, shrink=0.7, label="share of the class")
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise ClipjaxError(f"the picture {str(path)!r} cannot be written: {error}") from error
