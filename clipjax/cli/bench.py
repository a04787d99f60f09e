"""`clipjax bench NAME [OPTIONS]`: the measurements behind the claims in docs/benchmarks.md."""

from __future__ import annotations

import importlib

from clipjax.errors import ClipjaxError, did_you_mean

BENCHES = {
    "caption": ("clipjax.bench.caption", "CaptionBench"),
    "compile": ("clipjax.bench.compile", "CompileBench"),
    "data": ("clipjax.bench.data", "DataBench"),
    "generate": ("clipjax.bench.generate", "GenerateBench"),
    "loss": ("clipjax.bench.loss", "LossBench"),
    "memory": ("clipjax.bench.memory", "MemoryBench"),
    "methods": ("clipjax.bench.methods", "MethodsBench"),
    "neighbors": ("clipjax.bench.neighbors", "NeighborsBench"),
    "openclip": ("clipjax.bench.openclip", "OpenclipBench"),
    "precision": ("clipjax.bench.precision", "PrecisionBench"),
    "retrieval": ("clipjax.bench.retrieval", "RetrievalBench"),
    "step": ("clipjax.bench.step", "StepBench"),
    "survive": ("clipjax.bench.survive", "SurviveBench"),
    "zeroshot": ("clipjax.bench.zeroshot", "ZeroshotBench"),
}
"""Name -> module and class: a dataclass whose fields are the options, with `run() -> None`."""


def main(arguments: list[str]) -> int:
    """Runs one benchmark."""
    if not arguments or arguments[0] in ("--help", "-h"):
        print("usage: clipjax bench NAME [OPTIONS]   (clipjax bench NAME --help lists them)")
        print("names: " + ", ".join(BENCHES))
        return 0 if arguments else 2
    name, options = arguments[0], arguments[1:]
    if name not in BENCHES:
        raise ClipjaxError(f"no benchmark {name!r}{did_you_mean(name, BENCHES)}")
    import tyro

    module, cls = BENCHES[name]
    bench = getattr(importlib.import_module(module), cls)
    tyro.cli(bench, args=options, prog=f"clipjax bench {name}", use_underscores=True).run()
    return 0
