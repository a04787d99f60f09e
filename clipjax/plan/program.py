"""A run's own step compiled for a machine, and what the compiler says of it: one process, one JSON line."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from clipjax.component import from_json, to_json
from clipjax.config import Run, load_module
from clipjax.errors import ClipjaxError
from clipjax.plan.machines import Machine, machine
from clipjax.plan.target import COMPILER_OPTIONS, devices, environment


def compiled_for(run: Run, on: Machine, files: list[Path], examples: int) -> dict[str, Any]:
    """Compiles the run's step for a machine, in a process of its own.

    Args:
      run: what to train.
      on: where.
      files: the user's Python files that the run's components come from.
      examples: in one epoch.

    Returns:
      devices, shards (of the batch), state (bytes on one device by part of the train state), batch
      (bytes on one device), temporary, arguments (bytes on one device, the compiler's), sent (bytes of
      one device by kind of collective, on rings), flops (matrix products of all devices), forward
      (those of one pass over the batch), layout (a line on what is split), seconds (to compile).

    Raises:
      ClipjaxError: the run does not fit the machine, or its compiler is not there.
    """
    asked = {
        "run": to_json(run),
        "on": on.name,
        "files": [str(path) for path in files],
        "examples": examples,
    }
    done = subprocess.run(
        [sys.executable, "-m", "clipjax.plan.program"],
        input=json.dumps(asked),
        env=environment(on),
        capture_output=True,
        text=True,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        raise ClipjaxError(
            f"plan: the step did not compile for {on.name}:\n{done.stderr[-2000:].strip()}"
        )
    answer = json.loads(lines[-1])
    if "error" in answer:
        raise ClipjaxError(answer["error"])
    return answer


def measure(run: Run, on: Machine, examples: int) -> dict[str, Any]:
    """`compiled_for`, in this process."""
    import jax

    from clipjax.batch import SpecialTokens
    from clipjax.bench.program import work
    from clipjax.evals.flops import count
    from clipjax.mesh import batch_sharding, batch_shards
    from clipjax.optim import Scale
    from clipjax.sharding import per_device_bytes
    from clipjax.train.state import Blueprint
    from clipjax.train.step import check_batch, jit_step, make_step

    mesh = run.mesh.build(devices(on))
    check_batch(run.data.batch_size, mesh, run.accumulate)
    scale = Scale(run.data.batch_size, examples)
    blueprint = Blueprint.draw(
        run.model, run.objective, run.optimizer, run.ema, mesh, run.sharding,
        max(1, run.duration.steps(scale)), scale, run.seed, run.data.spec(),
        run.spikes,
    )  # fmt: skip
    engine = run.engine(mesh)
    tokens = SpecialTokens(1, 2, 0)  # which they are changes no program
    step = make_step(
        blueprint, run.objective, engine, mesh, run.accumulate, run.ema, tokens, run.spikes,
        run.sharding,
    )  # fmt: skip
    split = batch_sharding(mesh)
    batch = {
        key: jax.ShapeDtypeStruct((run.data.batch_size, *row.shape), row.dtype, sharding=split)
        for key, row in run.data.spec().items()
    }
    began = time.monotonic()
    jitted: Any = jit_step(step, blueprint)
    frozen = (blueprint.frozen_weights,) if blueprint.frozen else ()
    traced = jitted.trace(blueprint.target(), batch, *frozen)
    compiled = traced.lower().compile(compiler_options=COMPILER_OPTIONS[on.chip.platform])
    memory, shards = compiled.memory_analysis(), batch_shards(mesh)
    state = {
        part.name: per_device_bytes(
            getattr(blueprint.abstract, part.name), getattr(blueprint.shardings, part.name)
        )[0]
        for part in dataclasses.fields(blueprint.abstract)
    }
    rows = sum(x.size * x.dtype.itemsize for x in batch.values())
    sent = work(compiled, on.devices).sent
    return {
        "devices": on.devices,
        "shards": shards,
        "state": {name: size for name, size in state.items() if size > 64},
        "batch": rows // shards,
        "temporary": int(memory.temp_size_in_bytes),
        "arguments": int(memory.argument_size_in_bytes),
        "sent": {kind: float(size) for kind, size in sorted(sent.items())},
        "flops": count(traced.jaxpr.jaxpr),
        "forward": _forward(blueprint, run.objective, batch),
        "layout": run.sharding.describe(blueprint.abstract, blueprint.shardings, mesh),
        "seconds": time.monotonic() - began,
    }


def _forward(blueprint: Any, objective: Any, batch: Any) -> float:
    """Matrix products of the model in making, once, all that the objective asks for."""
    import jax

    from clipjax.evals.flops import count
    from clipjax.objectives.base import leaves, union

    needs = union(leaf.objective.needs for leaf in leaves(objective))

    def encode(params, model_state, batch):
        return blueprint.module(params, model_state)(batch, key=None, needs=needs).rows

    state = blueprint.abstract
    return count(jax.make_jaxpr(encode)(state.params, state.model_state, batch).jaxpr)


def _main() -> None:
    asked = json.load(sys.stdin)
    try:
        for path in asked["files"]:
            load_module(Path(path))
        found = measure(from_json(asked["run"]), machine(asked["on"]), asked["examples"])
    except ClipjaxError as error:
        found = {"error": str(error)}
    print(json.dumps(found))


if __name__ == "__main__":
    _main()
