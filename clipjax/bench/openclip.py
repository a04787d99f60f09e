"""`clipjax bench openclip`: a training step of a published size beside OpenCLIP's own, in float32, taking turns."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Any

from clipjax.bench.contestant import command, contest
from clipjax.component import Component
from clipjax.errors import ClipjaxError

SIZES = {
    # OpenCLIP's name: (image tower, text tower, embed_dim)
    "ViT-B-32": ("B/32", "B", 512),
    "ViT-B-16": ("B/16", "B", 512),
    "ViT-L-14": ("L/14", "L", 768),
}


@dataclasses.dataclass(frozen=True)
class OpenclipBench(Component):
    """Forward, loss, backward and AdamW on the same noise; each contestant in a process of its own."""

    torch_python: str | None = None
    """A Python with torch and open_clip; None: without OpenCLIP."""
    other_tree: str | None = None
    """The folder of another checkout of clipjax, to be timed too."""
    model: str = "ViT-B-32"
    """OpenCLIP's name of the size."""
    batch_size: int = 32
    """Pairs in a step."""
    rounds: int = 5
    """Steps of each, in turns; the quickest counts."""
    json: bool = False
    """End with one JSON object on the last line."""

    def __post_init__(self) -> None:
        if self.model not in SIZES:
            raise ClipjaxError(
                f"bench openclip: model={self.model!r} is none of {', '.join(SIZES)}"
            )
        for name in ("batch_size", "rounds"):
            if getattr(self, name) < 1:
                raise ClipjaxError(f"bench openclip: {name}={getattr(self, name)} must be positive")

    def run(self) -> dict[str, Any]:
        """Measures, prints and returns what the JSON object holds.

        Returns:
          by contestant (clipjax, other tree, OpenCLIP) seconds and added bytes at the peak.
        """
        from clipjax.towers import TextTransformer, ViT

        image, text, width = SIZES[self.model]
        settings: dict[str, Any] = dict(rows=self.batch_size)
        ours = command(
            sys.executable, who="clip", image=image, text=text, embed_dim=width, **settings
        )
        contestants = {"clipjax": ours}
        if self.other_tree:
            contestants["other tree"] = ["env", f"PYTHONPATH={self.other_tree}", *ours]
        if self.torch_python:
            size, reader = ViT.preset(image), TextTransformer.preset(text)
            contestants["OpenCLIP"] = command(
                self.torch_python, who="OpenCLIP", model=self.model, image_size=size.image_size,
                length=reader.context_length, words=reader.vocab_size, **settings,
            )  # fmt: skip
        results = contest(contestants, self.rounds)
        first = results["clipjax"]["seconds"]
        for name, found in results.items():
            print(
                f"{name}: {found['seconds']:.3f} s a step of {self.batch_size} pairs ({self.model}), "
                f"{found['bytes'] / 1e9:.2f} GB added; clipjax is {found['seconds'] / first:.2f} times as fast"
            )
        if self.json:
            print(json.dumps(results))
        return results
