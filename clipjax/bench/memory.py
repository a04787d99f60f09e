"""`clipjax bench memory`: what one device holds and sends in a training step, without running one.

The step of a published size is compiled for simulated CPU devices, from shapes alone: nothing is allocated.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from typing import Any, Literal

from clipjax.bench.program import temporary_bytes, work
from clipjax.component import Component, from_json, to_json
from clipjax.errors import ClipjaxError

READ_ONLY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""The program is read and never run, so its machine code need not be good: half the time to compile."""


@dataclasses.dataclass(frozen=True)
class MemoryBench(Component):
    """Memory and traffic per device of one compiled training step (softmax, AdamW, float32 state)."""

    image: str = "B/16"
    """Image tower: a ViT preset such as L/14, or a ResNet preset such as RN50."""
    text: str = "B"
    """Text tower: a TextTransformer preset."""
    devices: int = 8
    """Simulated devices."""
    group: int = 1
    """Groups of the mesh."""
    tensor: int = 1
    """Devices that share one tensor-parallel layer."""
    fsdp: bool = True
    """Shard parameters and optimizer state over the data axis."""
    local_batch: int = 8
    """Pairs per batch shard."""
    accumulate: int = 1
    """Micro-batches per step."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype of the towers (simulated devices compute in float32 all the same)."""
    remat: Literal["none", "norms", "lean", "activation", "dots", "full"] = "none"
    """What the towers recompute; a ResNet knows none and full."""
    json: bool = False
    """End with one JSON object on the last line."""

    def __post_init__(self) -> None:
        for name in ("devices", "local_batch"):
            if getattr(self, name) < 1:
                raise ClipjaxError(f"bench memory: {name}={getattr(self, name)} must be positive")
        self.model()  # refuses what is no preset before a process is started

    def model(self) -> Any:
        """The dual encoder that is measured."""
        from clipjax.models import DualEncoder
        from clipjax.towers import ResNet, TextTransformer, ViT

        settings = {"dtype": self.dtype, "remat": self.remat}
        text = TextTransformer.preset(self.text, **settings)
        if self.image.startswith("RN"):
            resnet = ResNet.preset(self.image, **settings)
            return DualEncoder(
                image=resnet, text=text, embed_dim=resnet.output_dim, image_projection="none"
            )
        return DualEncoder(image=ViT.preset(self.image, **settings), text=text)

    def run(self) -> dict[str, Any]:
        """Measures in a process with that many devices, prints the table, returns the JSON object."""
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={self.devices}"
        done = subprocess.run(
            [sys.executable, "-m", "clipjax.bench.memory", json.dumps(to_json(self))],
            env=os.environ | {"XLA_FLAGS": flags.strip(), "JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            text=True,
        )
        if done.returncode:
            raise ClipjaxError("bench memory: the step did not compile (its error is above)")
        results = json.loads(done.stdout.splitlines()[-1])
        self._print(results)
        if self.json:
            print(json.dumps(results))
        return results

    def _print(self, results: dict[str, Any]) -> None:
        from rich.console import Console
        from rich.table import Table

        title = f"{self.image} + {self.text}, {self.local_batch} pairs on each of {self.devices} devices"
        table = Table("one device", "MB", "of the whole", title=title)
        for name in ("params", "opt_state"):
            local, total = results[name]
            table.add_row(name, f"{local / 1e6:.1f}", f"{local / total:.4f}")
        share = f"{results['share']:.4f}"
        table.add_row("both", f"{results['held_bytes'] / 1e6:.1f}", share)
        table.add_row("temporary", f"{results['temp_bytes'] / 1e6:.1f}", "")
        for kind, size in results["sent_bytes"].items():
            table.add_row(f"sent: {kind}", f"{size / 1e6:.1f}", "")
        Console().print(table)


def compile_step(bench: MemoryBench) -> tuple[Any, Any]:
    """The compiled step and its blueprint, on the devices of this process.

    Raises:
      ClipjaxError: the mesh does not fit the devices, or the batch the mesh.
    """
    import jax
    import jax.numpy as jnp

    from clipjax.mesh import MeshShape, batch_sharding, batch_shards
    from clipjax.objectives import PairEngine, Softmax
    from clipjax.optim import AdamW, Scale
    from clipjax.sharding import Sharding
    from clipjax.train.state import Blueprint
    from clipjax.train.step import check_batch, jit_step, make_step

    model, objective = bench.model(), Softmax()
    mesh_shape = MeshShape(group=bench.group, tensor=bench.tensor)
    mesh = mesh_shape.build(jax.devices()[: bench.devices])
    rows = bench.local_batch * batch_shards(mesh)
    check_batch(rows, mesh, bench.accumulate)
    blueprint = Blueprint.draw(
        model, objective, AdamW(), None, mesh, Sharding(fsdp=bench.fsdp), 1, Scale(rows, rows), 0
    )
    split = batch_sharding(mesh)
    batch = {
        "image": jax.ShapeDtypeStruct(
            (rows, *model.image.image_shape, 3), jnp.uint8, sharding=split
        ),
        "text": jax.ShapeDtypeStruct((rows, model.text.context_length), jnp.int32, sharding=split),
        "id": jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=split),
    }
    step = make_step(blueprint, objective, PairEngine(mesh), mesh, bench.accumulate)
    jitted: Any = jit_step(step, blueprint)
    lowered = jitted.lower(blueprint.target(), batch)
    return lowered.compile(compiler_options=READ_ONLY), blueprint


def measure(bench: MemoryBench, compiled: Any, blueprint: Any) -> dict[str, Any]:
    """What the compiled step says.

    Returns:
      params and opt_state: [bytes on one device, bytes in all]; held_bytes, both on one device;
      share, both on one device over both in all; state_bytes, the whole train state as the compiled
      program returns it into the donated one; temp_bytes; sent_bytes by collective, on a ring.
    """
    from clipjax.sharding import per_device_bytes

    abstract, shardings = blueprint.abstract, blueprint.shardings
    params = per_device_bytes(abstract.params, shardings.params)
    opt_state = per_device_bytes(abstract.opt_state, shardings.opt_state)
    held = params[0] + opt_state[0]
    sent = work(compiled, bench.devices).sent
    return {
        "params": params,
        "opt_state": opt_state,
        "held_bytes": held,
        "share": held / (params[1] + opt_state[1]),
        "state_bytes": int(compiled.memory_analysis().alias_size_in_bytes),
        "temp_bytes": temporary_bytes(compiled),
        "sent_bytes": {kind: float(size) for kind, size in sorted(sent.items())},
    }


if __name__ == "__main__":
    bench = from_json(json.loads(sys.argv[1]))
    print(json.dumps(measure(bench, *compile_step(bench))))
