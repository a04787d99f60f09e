"""From what a compiler says of a step to what a run would take: arithmetic, each line with its rule."""

from __future__ import annotations

from typing import Any

from clipjax.config import Run
from clipjax.optim import Scale
from clipjax.plan.machines import Machine


def estimate(run: Run, on: Machine, found: dict[str, Any], examples: int | None) -> dict[str, Any]:
    """Bounds from the maker's figures: no run is faster, most are slower.

    Args:
      run: what to train.
      on: where.
      found: what `compiled_for` returned.
      examples: in one epoch; None: unknown.

    Returns:
      held (bytes on one device: arguments and temporary), memory (the chip's), fits; seconds: of products
      at the chip's peak, of its memory (state read and written, temporary memory written and read), of
      its links (all sent over all of them); step (the largest of these), limit (which), serial (their
      sum), mfu (of three forward passes, at `step`), pairs_per_second, pairs_per_host (each second);
      and where the duration is known: steps, hours, chip_hours. Of simulated CPUs, memory alone.
    """
    chip, state = on.chip, sum(found["state"].values())
    held = found["arguments"] + found["temporary"]
    result: dict[str, Any] = {"held": held, "memory": chip.memory or None}
    if not chip.flops:
        return result
    seconds = {
        "products": found["flops"] / on.devices / chip.flops,
        "memory": 2 * (state + found["temporary"]) / chip.bandwidth,
        "links": sum(found["sent"].values()) / chip.link,
    }
    limit = max(seconds, key=lambda name: seconds[name])
    step, batch = seconds[limit], run.data.batch_size
    hosts = -(-on.devices // chip.host)
    result |= {
        "fits": held <= chip.memory,
        "seconds": seconds,
        "step": step,
        "limit": limit,
        "serial": sum(seconds.values()),
        "mfu": 3 * found["forward"] / on.devices / chip.flops / step,
        "pairs_per_second": batch / step,
        "pairs_per_host": batch / step / hosts,
    }
    if run.duration.unit != "epochs" or examples is not None:
        steps = run.duration.steps(Scale(batch, examples or batch))
        hours = steps * step / 3600
        result |= {"steps": steps, "hours": hours, "chip_hours": hours * on.devices}
    return result
