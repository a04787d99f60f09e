"""`clipjax bench step`: a configuration's own training step, and what the loop around it costs."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipjax.component import Component
from clipjax.errors import ClipjaxError

if TYPE_CHECKING:
    from clipjax.train.setup import Session
    from clipjax.train.state import TrainState


@dataclasses.dataclass(frozen=True)
class StepBench(Component):
    """Time of one training step, alone and in the trainer's loop, in turns; always on the same batch."""

    config: str = "configs/quickstart.py"
    """A config file, or the folder of a run; its data are opened for one batch."""
    batch_size: int | None = None
    """Replaces the configuration's."""
    steps: int = 20
    """Steps in a round."""
    rounds: int = 5
    """Rounds of each, in turns; medians count."""
    json: bool = False
    """End with one JSON object on the last line."""

    def __post_init__(self) -> None:
        for name in ("steps", "rounds"):
            if getattr(self, name) < 1:
                raise ClipjaxError(f"bench step: {name}={getattr(self, name)} must be positive")

    def run(self) -> dict[str, Any]:
        """Measures, prints and returns what the JSON object holds."""
        import jax

        from clipjax.chips import peak_flops
        from clipjax.config import load_config
        from clipjax.train.setup import setup
        from clipjax.train.watch import memory_peak

        path = Path(self.config)
        run = load_config(path / "run.json" if path.is_dir() else path)
        data = dataclasses.replace(run.data, batch_size=self.batch_size or run.data.batch_size)
        run = dataclasses.replace(run, data=data, evals=(), trackers=())
        with tempfile.TemporaryDirectory() as folder:
            session = setup(run, Path(folder) / "run")
            session.loader = _Repeated(session.loader.batch(0))
            state, compiling = self._compile(session)
            alone: list[float] = []
            looped: list[float] = []
            for _ in range(self.rounds):
                state, seconds = self._alone(session, state)
                alone.append(seconds)
                state, seconds = self._in_the_loop(session, state)
                looped.append(seconds)
        step, loop = statistics.median(alone), statistics.median(looped)
        flops = session.flops_per_example()
        rate = flops * data.batch_size / step / jax.device_count() if flops else None
        peak = peak_flops(jax.devices()[0].device_kind)
        memory = memory_peak()
        results = {
            "device": jax.devices()[0].device_kind,
            "devices": jax.device_count(),
            "batch_size": data.batch_size,
            "compile_seconds": round(compiling, 2),
            "step_seconds": step,
            "loop_step_seconds": loop,
            "overhead_seconds": loop - step,
            "overhead_of_100_ms": (loop - step) / 0.1,
            "examples_per_second": data.batch_size / step,
            "tflops_per_device": rate and rate / 1e12,
            "mfu": rate / peak if rate and peak else None,
            "memory_peak_gb": None if memory != memory else memory / 1e9,
        }
        self._print(results)
        if self.json:
            print(json.dumps(results))
        return results

    def _compile(self, session: Session) -> tuple[TrainState, float]:
        import jax

        state = session.restore_or_init()
        began = time.perf_counter()
        state, metrics = _advance(session, state)
        jax.block_until_ready(metrics)
        return state, time.perf_counter() - began

    def _alone(self, session: Session, state: TrainState) -> tuple[TrainState, float]:
        """The step and its batch, with no more under way than the loop has."""
        import jax

        from clipjax.train.step import IN_FLIGHT

        under_way: list[Any] = []
        began = time.perf_counter()
        for _ in range(self.steps):
            state, metrics = _advance(session, state)
            under_way.append(metrics)
            if len(under_way) > IN_FLIGHT:
                jax.block_until_ready(under_way.pop(0))
        jax.block_until_ready(under_way)
        return state, (time.perf_counter() - began) / self.steps

    def _in_the_loop(self, session: Session, state: TrainState) -> tuple[TrainState, float]:
        """The same steps as the trainer takes them: watched, logged, ready to stop."""
        from rich.console import Console

        from clipjax.checkpoint import Checkpointing, Checkpoints
        from clipjax.tracking import Progress, Tracking
        from clipjax.train.loop import Loop
        from clipjax.train.signals import StopRequest
        from clipjax.train.watch import Profile, Watch
        from clipjax.train.watchdog import Watchdog

        session = dataclasses.replace(session, total_steps=self.steps)
        size, length = session.scale.batch_size, session.run.data.context_length
        with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
            folder = Path(name)
            console = Console(file=stack.enter_context(open(os.devnull, "w")))
            checkpoints = Checkpoints(folder, Checkpointing(every=None))
            stack.callback(checkpoints.close)
            loop = Loop(
                session,
                checkpoints,
                stack.enter_context(Tracking(folder)),
                stack.enter_context(Progress(self.steps, size, console=console)),
                stack.enter_context(StopRequest()),
                stack.enter_context(Watchdog(600.0)),
                Watch(size, length, session.flops_per_example(), 0),
                Profile(folder, None),
            )
            began = time.perf_counter()
            state = loop.steps(state)
            return state, (time.perf_counter() - began) / self.steps

    def _print(self, results: dict[str, Any]) -> None:
        mfu = results["mfu"]
        print(
            f"{results['devices']} x {results['device']}, batch {results['batch_size']}: "
            f"{1e3 * results['step_seconds']:.2f} ms a step, {results['examples_per_second']:,.0f} examples/s"
            + (f", {100 * mfu:.1f} % MFU" if mfu else "")
            + f"; in the loop {1e3 * results['loop_step_seconds']:.2f} ms, "
            f"{100 * results['overhead_of_100_ms']:.2f} % of a step of 100 ms more"
        )


def _advance(session: Session, state: TrainState) -> tuple[TrainState, Any]:
    from clipjax.data.placement import to_global

    return session.step(state, to_global(session.loader.rows, session.mesh))


class _Repeated:
    """A loader that always has the same batch ready."""

    def __init__(self, rows: Any):
        self.rows = rows
        self.skipped = self.unreachable = 0

    def iterate(self, start_step: int = 0, shift: int = 0) -> Iterator[Any]:
        while True:
            yield self.rows
