"""`clipjax bench retrieval`: time and memory of exact retrieval figures over a large split."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from typing import Any

from clipjax.component import Component
from clipjax.errors import ClipjaxError


@dataclasses.dataclass(frozen=True)
class RetrievalBench(Component):
    """Ranks in both directions of made-up embeddings, in a process of its own."""

    images: int = 50_000
    """Pictures."""
    texts: int = 50_000
    """Captions, the same number for each picture."""
    width: int = 512
    """Embedding width."""
    tile: int = 2048
    """Rows and columns of a tile of similarities."""
    json: bool = False
    """End with one JSON object on the last line."""

    def __post_init__(self):
        for name in ("images", "texts", "width", "tile"):
            if getattr(self, name) < 1:
                raise ClipjaxError(
                    f"bench retrieval: {name}={getattr(self, name)} must be positive"
                )
        if self.texts < self.images:
            raise ClipjaxError(
                f"bench retrieval: texts={self.texts} must be at least images={self.images}"
            )

    def run(self) -> dict[str, Any]:
        """Measures, prints and returns what the JSON object holds."""
        settings = {k: v for k, v in dataclasses.asdict(self).items() if k != "json"}
        command = [sys.executable, "-m", "clipjax.bench.retrieval", json.dumps(settings)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        results = json.loads(done.stdout.splitlines()[-1])
        full = 4 * self.images * self.texts
        print(
            f"{self.images:,} x {self.texts:,} x {self.width}: {results['seconds']:.1f} s, "
            f"{results['added_bytes'] / 1e6:.0f} MB beyond the embeddings' "
            f"{results['embedding_bytes'] / 1e6:.0f} MB (the full matrix would take "
            f"{full / 1e6:,.0f} MB); {results['gflops']:.0f} GFLOP/s in float64"
        )
        if self.json:
            print(json.dumps(results))
        return results


def measure(images: int, texts: int, width: int, tile: int) -> dict[str, float]:
    """Seconds and added peak memory of the ranks of `images` with `texts`."""
    import numpy as np

    from clipjax.evals.metrics import retrieval_ranks, summarize_ranks

    rng = np.random.default_rng(0)
    image = _unit(rng.standard_normal((images, width), np.float32))
    owner = np.arange(texts) % images
    text = rng.standard_normal((texts, width), np.float32)
    for rows in np.array_split(np.arange(texts), max(texts // 8192, 1)):
        text[rows] += 0.2 * np.sqrt(width) * image[owner[rows]]
    text = _unit(text)
    retrieval_ranks(image[:64], text[:64], owner[:64] % min(64, images))  # loads what is lazy
    before = _peak_bytes()
    began = time.perf_counter()
    ranks = retrieval_ranks(image, text, owner, tile=tile)
    seconds = time.perf_counter() - began
    return {
        "seconds": seconds,
        "added_bytes": _peak_bytes() - before,
        "embedding_bytes": image.nbytes + text.nbytes,
        "gflops": 2 * images * texts * width / seconds / 1e9,
        "text_to_image_R@1": summarize_ranks(ranks.text_to_image)["R@1"],
    }


def _unit(x):
    import numpy as np

    for start in range(0, len(x), 8192):
        block = x[start : start + 8192]
        block /= np.linalg.norm(block, axis=1, keepdims=True)
    return x


def _peak_bytes() -> int:
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    print(json.dumps(measure(**json.loads(sys.argv[1]))))
