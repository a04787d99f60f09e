"""A planned step run for real on simulated CPU devices: what was predicted, and what it took."""

from __future__ import annotations

import ctypes
import gc
from typing import Any

import jax
import jax.numpy as jnp

from clipjax.bench.contestant import memory
from clipjax.config import Run
from clipjax.errors import ClipjaxError
from clipjax.plan.machines import Machine
from clipjax.plan.step import Step, described
from clipjax.plan.target import devices

STEPS = 2


def measure(run: Run, on: Machine, examples: int) -> dict[str, Any]:
    """What `checked_on_cpus` returns, from a process with these devices.

    Raises:
      ClipjaxError: the machine is not made of CPUs, or the run has frozen teachers.
    """
    if on.chip.platform != "cpu":
        raise ClipjaxError(f"--check runs the step here: --on {on.name} is no cpuxN")
    step = Step.of(run, devices(on), examples)
    if step.blueprint.frozen:
        raise ClipjaxError("--check: steps with frozen teachers are compiled alone")
    traced = step.trace()
    compiled = traced.lower().compile()
    init = step.blueprint.jit_init.lower({}, {}).compile()
    found = described(step, traced, compiled, on)
    del traced
    _give_back()
    before = memory("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak counts from here
    state = jax.block_until_ready(init({}, {}))
    _give_back()
    batch = {
        name: jax.device_put(jnp.zeros(x.shape, x.dtype), x.sharding)
        for name, x in step.batch.items()
    }
    for _ in range(STEPS):
        state, metrics = compiled(state, batch)
        jax.block_until_ready(metrics)
    return found | {"measured": memory("VmHWM") - before}


def _give_back() -> None:
    """What was freed goes back to the system, or the step would grow into it unseen."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
