"""`clipjax bench compile`: how long a training step takes to compile, blocks scanned or unrolled."""

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

SIDES = {"scanned": True, "unrolled": False}


@dataclasses.dataclass(frozen=True)
class CompileBench(Component):
    """Time to trace and compile one training step of a ViT (forward, backward, AdamW): scan on and off."""

    depth: int = 24
    """Blocks."""
    width: int = 384
    """Channels, a multiple of 64; there is a head for every 64."""
    image_size: int = 224
    """Side of the images in pixels, a multiple of 16."""
    batch_size: int = 8
    """Images in the step, which is compiled but never run."""
    rounds: int = 3
    """Compilations of each side, in turns and each in a process of its own; the least time counts."""
    json: bool = False
    """End with one JSON object on the last line."""

    def __post_init__(self) -> None:
        for name in ("depth", "width", "image_size", "batch_size", "rounds"):
            if getattr(self, name) < 1:
                raise ClipjaxError(f"bench compile: {name}={getattr(self, name)} must be positive")
        for name, unit in (("width", 64), ("image_size", 16)):
            if getattr(self, name) % unit:
                raise ClipjaxError(
                    f"bench compile: {name}={getattr(self, name)} must be a multiple of {unit}"
                )

    def run(self) -> dict[str, Any]:
        """Measures, prints the table and returns what the JSON object holds."""
        rounds: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
        for _ in range(self.rounds):
            for side, scan in SIDES.items():
                rounds[side].append(self._compile_apart(scan))
        sides = {
            side: {name: min(one[name] for one in all_rounds) for name in all_rounds[0]}
            for side, all_rounds in rounds.items()
        }
        results = {
            "depth": self.depth,
            "width": self.width,
            **sides,
            "ratio": sides["scanned"]["seconds"] / sides["unrolled"]["seconds"],
        }
        self._print(results)
        if self.json:
            print(json.dumps(results))
        return results

    def _compile_apart(self, scan: bool) -> dict[str, float]:
        """`measure` in a fresh process, so that nothing is cached."""
        settings = dataclasses.asdict(self) | {"scan": scan}
        done = subprocess.run(
            [sys.executable, "-m", "clipjax.bench.compile", json.dumps(settings)],
            env=os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        return json.loads(done.stdout.splitlines()[-1])

    def _print(self, results: dict[str, Any]) -> None:
        from rich.console import Console
        from rich.table import Table

        title = f"ViT training step, depth {self.depth}, width {self.width}"
        table = Table("blocks", "trace s", "compile s", "both s", "program lines", title=title)
        for side in SIDES:
            row = results[side]
            table.add_row(
                side,
                f"{row['trace_seconds']:.2f}",
                f"{row['compile_seconds']:.2f}",
                f"{row['seconds']:.2f}",
                f"{row['program_lines']:.0f}",
            )
        console = Console()
        console.print(table)
        console.print(f"scanned / unrolled: {results['ratio']:.2f}")


def lowered(depth: int, width: int, image_size: int, batch_size: int, scan: bool) -> Any:
    """The training step, traced and lowered for the default device; nothing is allocated."""
    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx

    from clipjax.optim import AdamW, Constant, Scale
    from clipjax.params import abstract, merge
    from clipjax.towers import ViT

    config = ViT(
        depth=depth, width=width, heads=width // 64, image_size=image_size, pool="mean", scan=scan
    )
    graphdef, params, _ = abstract(lambda: config.build(nnx.Rngs(0)))
    transform, _ = AdamW(schedule=Constant()).build(params, 1, Scale(batch_size, batch_size))

    def step(params, opt_state, image):
        def loss(params):
            return jnp.square(merge(graphdef, params, {})(image, key=jax.random.key(0))[1]).mean()

        value, grads = jax.value_and_grad(loss)(params)
        updates, opt_state = transform.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    opt_state = jax.eval_shape(transform.init, params)
    image = jax.ShapeDtypeStruct((batch_size, image_size, image_size, 3), jnp.uint8)
    return jax.jit(step, donate_argnums=(0, 1)).lower(params, opt_state, image)


def measure(scan: bool, **size: int) -> dict[str, float]:
    """Seconds to trace and to compile, and the size of the program in between.

    Args:
      scan: as in `ViT`.
      **size: depth, width, image_size and batch_size.
    """
    import jax

    jax.devices()  # starting the backend is no part of compiling
    start = time.perf_counter()
    program = lowered(scan=scan, **size)
    traced = time.perf_counter()
    program.compile()
    done = time.perf_counter()
    return {
        "trace_seconds": traced - start,
        "compile_seconds": done - traced,
        "seconds": done - start,
        "program_lines": len(program.as_text().splitlines()),
    }


if __name__ == "__main__":
    settings = json.loads(sys.argv[1])
    size = {name: settings[name] for name in ("depth", "width", "image_size", "batch_size")}
    print(json.dumps(measure(settings["scan"], **size)))
