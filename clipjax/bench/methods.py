"""`clipjax bench methods`: what published methods reach on the embedded data under one recipe and budget."""

from __future__ import annotations

import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from clipjax.component import Component
from clipjax.errors import ClipjaxError, did_you_mean

FIGURES = (
    "retrieval/image_to_text/R@1",
    "retrieval/text_to_image/R@1",
    "novel/image_to_text/R@1",
    "novel/text_to_image/R@1",
)
BASELINE = "recipe"


@dataclasses.dataclass(frozen=True)
class MethodsBench(Component):
    """Trains the configs of a folder, some seeds each, and prints mean and spread of R@1."""

    folder: str = "configs/methods"
    """Where the configs are; `recipe.py` in it is what they are measured against."""
    only: tuple[str, ...] = ()
    """Configs to train, without `.py`, besides the recipe; () is all."""
    seeds: int = 2
    """Runs of each, with seeds 0, 1, ..."""
    steps: int | None = None
    """Steps of each run; None is the recipe's."""
    workdir: str = ""
    """Where runs are kept, so that a run that is finished is not trained again; "": nowhere."""
    json: bool = False
    """End with one JSON object on the last line."""

    def __post_init__(self):
        if self.seeds < 1:
            raise ClipjaxError(f"bench methods: seeds={self.seeds} must be at least 1")

    def run(self) -> dict[str, Any]:
        """Trains, prints and returns {config: {figure: [value of each seed]}}."""
        folder = Path(self.folder)
        known = sorted(path.stem for path in folder.glob("*.py") if path.stem != BASELINE)
        for name in self.only:
            if name not in known:
                raise ClipjaxError(f"{folder} has no config {name!r}{did_you_mean(name, known)}")
        results: dict[str, Any] = {}
        with tempfile.TemporaryDirectory() as scratch:
            runs = Path(self.workdir or scratch)
            for name in (BASELINE, *(self.only or known)):
                found = [
                    self._train(folder / f"{name}.py", runs / f"{name}-{seed}", seed)
                    for seed in range(self.seeds)
                ]
                results[name] = {
                    figure: [one[figure] for one in found]
                    for figure in FIGURES
                    if all(figure in one for one in found)
                }
                print(_line(name, results[name], results[BASELINE]), flush=True)
        if self.json:
            print(json.dumps(results))
        return results

    def _train(self, config: Path, workdir: Path, seed: int) -> dict[str, float]:
        command = [sys.executable, "-m", "clipjax.cli", "train", str(config)]
        command += ["--workdir", str(workdir), "--seed", str(seed)]
        if self.steps is not None:
            command += ["--duration.amount", str(self.steps)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise ClipjaxError(f"{config}: {done.stderr.strip().splitlines()[-1]}")
        saved = json.loads((workdir / "results.json").read_text())
        return saved.get("results", saved)


def _line(name: str, figures: dict[str, list[float]], baseline: dict[str, list[float]]) -> str:
    """The config, and of each figure its mean, half the range, and the gain over the recipe."""
    parts = []
    for figure, values in figures.items():
        mean, spread = statistics.mean(values), (max(values) - min(values)) / 2
        gain = mean - statistics.mean(baseline[figure])
        parts.append(f"{mean:.3f} ± {spread:.3f} ({gain:+.3f})")
    return f"{name:22} " + "  ".join(parts)
