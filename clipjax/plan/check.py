"""A planned step run for real on simulated CPU devices: what was predicted, and what it took."""

from __future__ import annotations

import ctypes
import gc
import time
from typing import Any

import jax
import numpy as np

from clipjax.bench.contestant import memory
from clipjax.config import Run
from clipjax.data.placement import to_global
from clipjax.errors import ClipjaxError
from clipjax.plan.machines import Machine
from clipjax.plan.step import Step, described
from clipjax.plan.target import devices
from clipjax.train.step import IN_FLIGHT

STEPS = 2
MMAP_THRESHOLD = -3  # of mallopt, as <malloc.h> numbers it


def measure(run: Run, on: Machine, examples: int | None) -> dict[str, Any]:
    """What `checked_on_cpus` returns, from a process with these devices.

    The steps are taken twice. The first time the process grows by the program too: code of the compiler's
    libraries that is read in, and what CPUs make of each operation when it first runs. That stays when the arrays
    are gone, and no chip holds it among its arrays, so it is told apart.

    Raises:
      ClipjaxError: the machine is not made of CPUs, or the run has frozen teachers.
    """
    if on.chip.platform != "cpu":
        raise ClipjaxError(f"--check runs the step here: --on {on.name} is no cpuxN")
    step = Step.of(run, devices(on), examples)
    if step.blueprint.frozen:
        raise ClipjaxError("--check: steps with frozen teachers are compiled alone")
    began = time.monotonic()
    # Arrays in mappings of their own: else the allocator keeps pieces of what was freed, and they count as held.
    ctypes.CDLL("libc.so.6").mallopt(MMAP_THRESHOLD, 1 << 16)
    traced = step.trace()
    compiled = traced.lower().compile()
    seconds = time.monotonic() - began
    init = step.blueprint.jit_init.lower({}, {}).compile()
    found = described(step, traced, compiled, on)
    del traced
    _give_back()
    before = memory("VmRSS")
    _train(step, init, compiled)
    _give_back()
    warm = memory("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak counts from here
    _train(step, init, compiled)
    taken = {"measured": memory("VmHWM") - warm, "stays": max(0, warm - before)}
    return found | taken | {"seconds": seconds}


def _train(step: Step, init: Any, compiled: Any) -> None:
    """A few steps from the first weights, with as many batches on the devices as the loop puts there."""
    state = jax.block_until_ready(init({}, {}))
    _give_back()
    rows = {name: np.ones(x.shape, x.dtype) for name, x in step.batch.items()}
    batches = [to_global(rows, step.mesh) for _ in range(1 + IN_FLIGHT)]
    del rows
    for i in range(STEPS):
        state, metrics = compiled(state, batches[i])
        jax.block_until_ready((state, metrics))


def _give_back() -> None:
    """What was freed goes back to the system, or the step would grow into it unseen."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
