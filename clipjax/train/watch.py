"""Where a run's time goes, and how fast it is: the figures beside every line of `metrics.jsonl`."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from clipjax.chips import peak_flops

PARTS = ("starting", "training", "data", "evaluation", "saving")
"""`starting` ends with the first step, which compiles; `data` is the part of `training` that waited for data."""
PROFILE_FOLDER = "profile"


class Watch:
    """A stopwatch of one process, for one attempt at a run."""

    def __init__(
        self,
        batch_size: int,
        context_length: int,
        flops: float | None,
        restarts: int,
        elapsed: float = 0.0,
        clock: Callable[[], float] = time.perf_counter,
    ):
        """Starts.

        Args:
          batch_size: examples a step, over all devices.
          context_length: tokens an example.
          flops: of the model for one example, forward and backward; None if unknown.
          restarts: how often the run was started before.
          elapsed: seconds since the process set out.
          clock: monotonic seconds.
        """
        self._batch_size, self._context_length, self._restarts = (
            batch_size,
            context_length,
            restarts,
        )
        self._clock = clock
        self._flops = flops / jax.device_count() if flops else None
        self._peak = peak_flops(jax.devices()[0].device_kind)
        self._spent = dict.fromkeys(PARTS, 0.0)
        self._mark = clock() - elapsed
        self._apart = 0.0  # seconds since the mark that are no training
        self._steps = 0
        self._started = False

    @contextlib.contextmanager
    def doing(self, part: str) -> Iterator[None]:
        """What happens in here is `data`, `evaluation` or `saving`."""
        began = self._clock()
        try:
            yield
        finally:
            seconds = self._clock() - began
            if self._started or part != "data":
                self._spent[part] += seconds
            if part != "data":
                self._apart += seconds

    def stepped(self) -> None:
        """A step has ended; the first one ends the start."""
        if self._started:
            self._steps += 1
        else:
            self._turn("starting")
            self._started = True

    def figures(self) -> dict[str, float]:
        """What has happened since it was asked for last; throughput where a step was timed."""
        self._turn("training" if self._started else "starting")
        spent, self._spent = self._spent, dict.fromkeys(PARTS, 0.0)
        steps, self._steps = self._steps, 0
        figures = {f"seconds/{part}": seconds for part, seconds in spent.items() if seconds}
        figures["restarts"] = self._restarts
        if not steps or not spent["training"]:
            return figures
        seconds = spent["training"] / steps
        per_second = self._batch_size / seconds
        figures |= {
            "step_seconds": seconds,
            "examples_per_second": per_second,
            "tokens_per_second": per_second * self._context_length,
            "data_share": min(spent["data"] / spent["training"], 1.0),
            "memory_peak_gb": memory_peak() / 1e9,
        }
        if self._flops:
            rate = self._flops * per_second
            figures["tflops_per_device"] = rate / 1e12
            figures["mfu"] = rate / self._peak if self._peak else float("nan")
        return figures

    def _turn(self, part: str) -> None:
        """What has passed since the last turn and was nothing else was `part`."""
        now = self._clock()
        self._spent[part] += max(now - self._mark - self._apart, 0.0)
        self._mark, self._apart = now, 0.0


def memory_peak() -> float:
    """Most bytes in use on any of this process's devices so far; NaN where they do not say."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    return max(float(s.get("peak_bytes_in_use", "nan")) for s in stats)


class Profile:
    """Writes a trace of some steps into the run's `profile/`, by process 0; XProf and Perfetto open it."""

    def __init__(self, workdir: Path, steps: tuple[int, int] | None):
        """Does nothing without `steps`, the first and the last."""
        self._folder = workdir / PROFILE_FOLDER
        self._first, self._last = steps or (0, 0)
        self._on = False

    def before(self, step: int) -> None:
        """Starts with the first of the steps."""
        if step == self._first and jax.process_index() == 0:
            jax.profiler.start_trace(str(self._folder))
            self._on = True

    def ends_with(self, step: int) -> bool:
        """Whether this step is the last one of the trace."""
        return self._on and step == self._last

    def stop(self) -> None:
        """Writes the trace, if one is being taken."""
        if self._on:
            self._on = False
            jax.profiler.stop_trace()
