"""`clipjax bench zeroshot`: zero-shot classification at ImageNet's size, here and in another checkout."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from clipjax.component import Component
from clipjax.errors import ClipjaxError


@dataclasses.dataclass(frozen=True)
class ZeroshotBench(Component):
    """`ZeroShot` with the text tower of CLIP's ViT-B/16 on ImageNet's names and the 24 templates for them.

    Weights are random, and the image tower is tiny: pictures of 16 x 16 pixels are there for their
    number. The time is that of one evaluation: texts, pictures, scores; loading, tokenizing and one
    evaluation with four classes, which compiles, come before. Processor time is given besides, which other
    work on the machine disturbs less.
    """

    classes: int = 1000
    """Classes, the first of ImageNet's."""
    images: int = 50_000
    """Pictures."""
    tower: str = "B"
    """Text tower: `TextTransformer.preset`."""
    against: Path | None = None
    """Another checkout of clipjax, measured by the same file before this one."""
    json: bool = False
    """End with one JSON object on the last line."""

    def __post_init__(self):
        for name, most in (("classes", 1000), ("images", sys.maxsize)):
            if not 1 <= getattr(self, name) <= most:
                raise ClipjaxError(f"bench zeroshot: {name}={getattr(self, name)}: 1 to {most:,}")
        if self.against is not None and not (self.against / "clipjax").is_dir():
            raise ClipjaxError(f"bench zeroshot: against={str(self.against)!r} is no checkout")

    def run(self) -> dict[str, Any]:
        """Measures, prints and returns what the JSON object holds."""
        trees = {"against": self.against, "here": Path(__file__).parents[2]}
        results: dict[str, Any] = {}
        for name, tree in trees.items():
            if tree is None:
                continue
            done = subprocess.run(
                [sys.executable, __file__, str(self.classes), str(self.images), self.tower],
                env=os.environ | {"PYTHONPATH": str(tree.resolve())},
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            results[name] = found = json.loads(done.stdout.splitlines()[-1])
            print(
                f"{name}: {self.images:,} pictures, {self.classes:,} classes x {found['templates']} "
                f"templates: {found['seconds']:.1f} s ({found['cpu_seconds']:.1f} s of processors), of "
                f"which texts {found['text_seconds']:.1f} s; {found['texts']:,} texts encoded, "
                f"top1 {found['top1']:.5f}"
            )
        if "against" in results:
            results["faster"] = results["against"]["seconds"] / results["here"]["seconds"]
            print(f"{results['faster']:.2f} times as fast")
        if self.json:
            print(json.dumps(results))
        return results


def measure(classes: int, images: int, tower: str) -> dict[str, Any]:
    """One evaluation's seconds, and how many texts were encoded for it.

    Only what old checkouts have too is used here, since this runs in them.
    """
    import numpy as np
    from flax import nnx

    from clipjax.data import BPE
    from clipjax.evals import ZeroShot, build_runners
    from clipjax.evals.prompts import read_classes
    from clipjax.models import DualEncoder
    from clipjax.predictor import Predictor
    from clipjax.towers import TextTransformer, ViT

    known = read_classes("imagenet")
    prompts = [t.replace("{}", name) for name in known.names[:200] for t in known.templates]
    tokenizer = BPE(vocab_size=3000).build(iter(prompts))
    text = TextTransformer.preset(tower, vocab_size=49_408, context_length=77, eos_id=2)
    image = ViT(image_size=16, patch_size=16, width=16, depth=1, heads=1)
    model = DualEncoder(image=image, text=text, embed_dim=512)
    predictor = Predictor.from_module(
        model.build(nnx.Rngs(0)), tokenizer=tokenizer, context_length=77, image_size=16
    )

    def runner(names: tuple[str, ...], pictures: int) -> Any:
        source = _source(pictures, len(names))
        config = ZeroShot(source, class_names=names, templates=known.templates)
        ((_, made),) = build_runners([config])
        made.prepare(predictor)
        return made

    # As many texts as compile every length that the measured ones have.
    runner(known.names[: max(4, classes // 8)], 256)(predictor)
    measured = runner(known.names[:classes], images)
    counts = {"texts": 0, "text_seconds": 0.0}
    encode = predictor.encode_text

    def counting(tokens: Any) -> Any:
        began = time.perf_counter()
        made = encode(tokens)
        counts["text_seconds"] += time.perf_counter() - began
        counts["texts"] += len(tokens)
        return np.asarray(made)

    predictor.encode_text = counting
    began, processors = time.perf_counter(), time.process_time()
    figures = measured(predictor)
    return counts | {
        "seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - processors,
        "templates": len(known.templates),
        "top1": figures["zeroshot/top1"],
    }


def _source(pictures: int, classes: int) -> Any:
    """Noise with labels."""
    import numpy as np

    from clipjax.data import Source

    @dataclasses.dataclass(frozen=True)
    class Noise(Source):
        def open(self) -> Any:
            pixels = np.random.default_rng(0).integers(0, 255, (pictures, 16, 16, 3), np.uint8)
            return [
                {"image": x, "captions": (), "id": i, "key": str(i), "label": i % classes}
                for i, x in enumerate(pixels)
            ]

    return Noise()


if __name__ == "__main__":
    count, size, name = sys.argv[1:]
    print(json.dumps(measure(int(count), int(size), name)))
