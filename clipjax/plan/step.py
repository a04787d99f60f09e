"""A run's own step, traced and compiled from shapes alone, and what its compiler says of it.

For a process whose devices are those of the machine that is planned for (`clipjax.plan.program`).
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import jax

from clipjax.batch import SpecialTokens
from clipjax.bench.program import arrays, work
from clipjax.config import Run
from clipjax.evals.flops import count
from clipjax.mesh import batch_sharding, batch_shards, island
from clipjax.optim import Scale
from clipjax.plan.machines import Machine
from clipjax.plan.parts import forward_flops, parts_of_temporary, whole_leaves
from clipjax.plan.target import COMPILER_OPTIONS, devices
from clipjax.sharding import on_host, per_device_bytes
from clipjax.train.state import Blueprint
from clipjax.train.step import IN_FLIGHT, check_batch, jit_step, make_step

SMALL = 64  # bytes: counters and keys, not worth a line
EPOCH = 10_000  # batches, where nobody says: the size of no array depends on it, but schedules want a length


@dataclasses.dataclass(frozen=True)
class Step:
    """A run's step and what it is made for.

    Attributes:
      run: the run.
      mesh: the devices.
      blueprint: the state's.
      batch: ShapeDtypeStructs with their sharding.
      jitted: the step.
    """

    run: Run
    mesh: jax.sharding.Mesh
    blueprint: Blueprint
    batch: dict[str, jax.ShapeDtypeStruct]
    jitted: Any

    @classmethod
    def of(cls, run: Run, found: list[Any], examples: int | None) -> Step:
        """The step on these devices; nothing is allocated.

        Raises:
          ClipjaxError: the mesh does not fit the devices, or the batch the mesh.
        """
        mesh = run.mesh.build(found)
        rows = run.data.batch_size
        check_batch(rows, mesh, run.accumulate)
        run.sharding.check_heads(run.model, mesh)
        scale, rows_of = Scale(rows, examples or EPOCH * rows), run.data.spec()
        blueprint = Blueprint.draw(
            run.model, run.objective, run.optimizer, run.ema, mesh, run.sharding,
            max(1, run.duration.steps(scale)), scale, run.seed, rows_of, run.spikes,
        )  # fmt: skip
        engine = run.engine(mesh)
        tokens = SpecialTokens(1, 2, 0)  # which they are changes no program
        step = make_step(
            blueprint, run.objective, engine, mesh, run.accumulate, run.ema, tokens, run.spikes,
            run.sharding,
        )  # fmt: skip
        split = batch_sharding(mesh)
        batch = {
            key: jax.ShapeDtypeStruct((rows, *row.shape), row.dtype, sharding=split)
            for key, row in rows_of.items()
        }
        return cls(run, mesh, blueprint, batch, jit_step(step, blueprint))

    def trace(self) -> Any:
        """The step's program before any compiler sees it."""
        frozen = (self.blueprint.frozen_weights,) if self.blueprint.frozen else ()
        return self.jitted.trace(self.blueprint.target(), self.batch, *frozen)


def state_bytes(state: Any, layout: Any) -> dict[str, tuple[int, int, int]]:
    """Of each part of a train state: bytes on one device, of one device's on the host, and in all."""
    sizes = {}
    for part in dataclasses.fields(state):
        leaves, shardings = getattr(state, part.name), getattr(layout, part.name)
        local, total = per_device_bytes(leaves, shardings)
        waiting = per_device_bytes(*_on_host(leaves, shardings))[0]
        if total > SMALL:
            sizes[part.name] = local - waiting, waiting, total
    return sizes


def _on_host(leaves: Any, shardings: Any) -> tuple[list[Any], list[Any]]:
    pairs = zip(jax.tree.leaves(leaves), jax.tree.leaves(shardings), strict=True)
    waiting = [pair for pair in pairs if on_host(pair[1])]
    return [leaf for leaf, _ in waiting], [sharding for _, sharding in waiting]


def measure(run: Run, on: Machine, examples: int | None) -> dict[str, Any]:
    """What `compiled_for` returns, from a process of that machine's devices."""
    began = time.monotonic()
    step = Step.of(run, devices(on), examples)
    traced = step.trace()
    compiled = traced.lower().compile(compiler_options=COMPILER_OPTIONS[on.chip.platform])
    return {"seconds": time.monotonic() - began} | described(step, traced, compiled, on)


def described(step: Step, traced: Any, compiled: Any, on: Machine) -> dict[str, Any]:
    """What a compiled step says, as in `compiled_for`."""
    memory, shards = compiled.memory_analysis(), batch_shards(step.mesh)
    islands = [island(device) for device in step.mesh.devices.flat]
    done = work(compiled, on.devices, islands)
    rows = sum(x.size * x.dtype.itemsize for x in step.batch.values())
    state = state_bytes(step.blueprint.abstract, step.blueprint.shardings)
    temporary = int(memory.temp_size_in_bytes)
    given = int(memory.output_size_in_bytes) - int(memory.alias_size_in_bytes)
    parts = parts_of_temporary(step.run, step.blueprint, step.mesh)
    return {
        "devices": on.devices,
        "shards": shards,
        "state": {name: local for name, (local, _, _) in state.items()},
        "state_total": {name: total for name, (_, _, total) in state.items()},
        "on_host": sum(waiting for _, waiting, _ in state.values()),
        "checkpoint": sum(total for _, _, total in state.values()),
        "batch": rows // shards,
        "waiting": IN_FLIGHT * rows // shards,
        "temporary": temporary,
        "temporary_parts": parts,
        "arguments": int(memory.argument_size_in_bytes),
        "returned": max(0, given),
        "aliased": int(memory.alias_size_in_bytes),
        "sent": {kind: float(size) for kind, size in sorted(done.sent.items())},
        "network": {kind: float(size) for kind, size in sorted(done.network.items()) if size},
        "flops": count(traced.jaxpr.jaxpr),
        "forward": forward_flops(step.run, step.blueprint),
        "layout": step.run.sharding.describe(
            step.blueprint.abstract, step.blueprint.shardings, step.mesh
        ),
        "whole": whole_leaves(step.blueprint),
        "arrays": arrays(compiled),
        "from": "compiler",
    }
