"""`clipjax bench neighbors`: the host's memory while neighbors are looked for on many devices."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from typing import Any

from clipjax.component import Component
from clipjax.errors import ClipjaxError


@dataclasses.dataclass(frozen=True)
class NeighborsBench(Component):
    """The nearest rows of a made-up bank, for each number of simulated devices in a process of its own.

    Memory is the peak of what Python and NumPy allocate: the simulated devices' own arrays, which lie
    in the same machine's memory here and nowhere else, do not count.
    """

    queries: int = 2048
    """Embeddings that look for their neighbors."""
    bank: int = 50_000
    """Embeddings to look among."""
    width: int = 512
    """Embedding width."""
    k: int = 20
    """Neighbors."""
    shards: tuple[int, ...] = (1, 256)
    """Simulated devices, of which each has its share of the bank; the first is compared with."""
    json: bool = False
    """End with one JSON object on the last line."""

    def __post_init__(self):
        for name in ("queries", "bank", "width", "k"):
            if getattr(self, name) < 1:
                raise ClipjaxError(
                    f"bench neighbors: {name}={getattr(self, name)} must be positive"
                )
        if not self.shards or min(self.shards) < 1:
            raise ClipjaxError(f"bench neighbors: shards={self.shards}: give numbers from 1")

    def run(self) -> dict[str, Any]:
        """Measures, prints and returns what the JSON object holds."""
        settings = {
            k: v for k, v in dataclasses.asdict(self).items() if k not in ("json", "shards")
        }
        results: dict[str, Any] = {}
        for shards in self.shards:
            results[str(shards)] = found = _measured(shards, settings)
            first = results[str(self.shards[0])]
            found["memory_of_first"] = found["host_bytes"] / first["host_bytes"]
            print(
                f"{shards} shards: {found['host_bytes'] / 1e6:.1f} MB on the host "
                f"({found['memory_of_first']:.3f} of {self.shards[0]}'s), {found['seconds']:.1f} s, "
                + ("the same" if found["sum"] == first["sum"] else "OTHER")
                + " neighbors"
            )
        if self.json:
            print(json.dumps(results))
        return results


def _measured(shards: int, settings: dict[str, int]) -> dict[str, Any]:
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={shards}"
    done = subprocess.run(
        [sys.executable, "-m", "clipjax.bench.neighbors", json.dumps(settings)],
        env=os.environ | {"XLA_FLAGS": flags.strip(), "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def measure(queries: int, bank: int, width: int, k: int) -> dict[str, float]:
    """Peak bytes that the host allocates for the neighbors, seconds, and a sum that tells them apart."""
    import tracemalloc

    import numpy as np

    from clipjax.evals.knn import nearest
    from clipjax.mesh import MeshShape

    rng = np.random.default_rng(0)
    query, rows = (rng.standard_normal((n, width), np.float32) for n in (queries, bank))
    mesh = MeshShape().build()
    nearest(query, rows, k, mesh)  # compiles
    tracemalloc.start()
    began = time.perf_counter()
    index, _ = nearest(query, rows, k, mesh)
    seconds = time.perf_counter() - began
    place = np.arange(1, 1 + index.size).reshape(index.shape)
    return {
        "host_bytes": tracemalloc.get_traced_memory()[1],
        "seconds": seconds,
        "sum": int((index * place % 1_000_003).sum()),
    }


if __name__ == "__main__":
    print(json.dumps(measure(**json.loads(sys.argv[1]))))
