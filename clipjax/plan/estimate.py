"""From what a compiler says of a step to what a run would take: arithmetic, each line with its rule."""

from __future__ import annotations

from typing import Any

from clipjax.config import Run
from clipjax.optim import Scale
from clipjax.plan.machines import Machine
from clipjax.plan.parts import compute_itemsize

DISK = 1e9  # bytes a second that a host writes of a checkpoint, where nothing else is said


def estimate(
    run: Run, on: Machine, found: dict[str, Any], examples: int | None, disk: float = DISK
) -> dict[str, Any]:
    """Bounds from the maker's figures: no run is faster, most are slower.

    Args:
      run: what to train.
      on: where.
      found: what `compiled_for` returned.
      examples: in one epoch; None: unknown.
      disk: bytes a second that each host writes of a checkpoint.

    Returns:
      held (bytes on one device: arguments, results, temporary and batches that wait), memory (the chip's),
      fits; parts (of `held`, by kind; what arithmetic does not explain is `other`); checkpoint_seconds;
      seconds: of products at the chip's peak (half of it for float32 towers on a GPU), of its memory (state
      read and written, temporary memory written and read), of its fast links (all sent over them) and of its
      network; step (the largest of these), limit (which), serial (their sum), mfu (of three forward passes at
      `step`, of the peak in bfloat16, as training has it), pairs_per_second, pairs_per_host (each second),
      images_per_host; and where the duration is known: steps, hours, chip_hours. Of simulated CPUs, memory
      alone.
    """
    chip, state = on.chip, sum(found["state"].values())
    held = found["arguments"] + found["temporary"] + found.get("returned", 0)
    held += found.get("waiting", 0)
    result: dict[str, Any] = {
        "held": held,
        "memory": chip.memory or None,
        "parts": _parts(found, held),
        "checkpoint_seconds": found["checkpoint"] / on.hosts / disk,
    }
    if not chip.flops:
        return result
    network = sum(found.get("network", {}).values())
    # A GPU multiplies float32 as TensorFloat-32, at half the rate (makers' datasheets); a TPU as bfloat16.
    slow = chip.platform == "gpu" and compute_itemsize(run) == 4
    flops = chip.flops / 2 if slow else chip.flops
    seconds = {
        "products": found["flops"] / on.devices / flops,
        "memory": 2 * (state + found["temporary"]) / chip.bandwidth,
        chip.fabric: (sum(found["sent"].values()) - network) / on.link,
    }
    if chip.network and on.island < on.devices:
        seconds["network"] = network / chip.network
    limit = max(seconds, key=lambda name: seconds[name])
    step, batch = seconds[limit], run.data.batch_size
    pictures = sum(len(row.shape) == 3 for row in run.data.spec().values())
    result |= {
        "fits": held <= chip.memory,
        "seconds": seconds,
        "step": step,
        "limit": limit,
        "serial": sum(seconds.values()),
        "mfu": 3 * found["forward"] / on.devices / chip.flops / step,
        "pairs_per_second": batch / step,
        "pairs_per_host": batch / step / on.hosts,
        "images_per_host": pictures * batch / step / on.hosts,
    }
    if run.duration.unit != "epochs" or examples is not None:
        steps = run.duration.steps(Scale(batch, examples or batch))
        hours = steps * step / 3600
        result |= {"steps": steps, "hours": hours, "chip_hours": hours * on.devices}
    return result


def _parts(found: dict[str, Any], held: float) -> dict[str, float]:
    """A chip's memory by kind. The compiler may lay kinds over each other: none is given more than there is."""
    parts = {
        "parameters": found["state"].get("params", 0),
        "optimizer": found["state"].get("opt_state", 0),
    }
    parts["other state"] = sum(found["state"].values()) - sum(parts.values())
    parts["batch"] = found["batch"]
    parts["batches waiting"] = found.get("waiting", 0)
    left = found["temporary"]
    for name, size in found["temporary_parts"].items():
        parts[name] = min(size, left)
        left -= parts[name]
    parts["other"] = max(0.0, held - sum(parts.values()))
    return parts
