"""The distributed loss compiled for simulated CPU devices: bytes sent, products, memory.

Nothing is run, so any size will do. The number of devices must be known before jax starts:
`compile_for` starts this file in a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any, NamedTuple

TOKENS = 64  # of the late interaction: a row is so many vectors of width / TOKENS


class Case(NamedTuple):
    """One way to compute the loss."""

    exchange: str
    """Name of the engine's exchange; empty for OpenCLIP's pattern."""
    group: int = 1
    """Device groups, of 8."""
    tensor: int = 1
    """Devices that share one tensor-parallel layer."""
    one_tile: bool = False
    """One tile for the whole block: it need not be computed again."""
    tokens: bool = False
    """Token by token (FILIP), not one vector each."""


CASES = {
    "AllGather": Case("AllGather"),
    "AllGather, no recomputation": Case("AllGather", one_tile=True),
    "AllGather, tensor=2": Case("AllGather", tensor=2),
    "Ring": Case("Ring"),
    "Hierarchical": Case("Hierarchical", group=4),
    "Grouped": Case("Grouped", group=2),
    "OpenCLIP": Case(""),
}
LATE = {"late interaction": Case("Auto", tokens=True)}


def compile_for(devices: int, rows: int, width: int, cases: list[str]) -> dict[str, dict[str, Any]]:
    """Compiles the softmax loss and its gradient for `devices` simulated devices.

    Args:
      devices: simulated devices.
      rows: global batch.
      width: embedding width.
      cases: names from `CASES` and `LATE`.

    Returns:
      case -> wire (units of one all-gather of one modality), sent (the same by collective), matmul
      (units of 2 N N d for all devices together), temp (bytes per device).
    """
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "clipjax.bench.simulated",
            json.dumps([devices, rows, width, cases]),
        ],
        env=os.environ | {"XLA_FLAGS": flags.strip(), "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def measure(devices: int, rows: int, width: int, case: str) -> dict[str, Any]:
    """One case of `compile_for`, in this process."""
    import jax
    import jax.numpy as jnp

    from clipjax import objectives
    from clipjax.batch import Encoded
    from clipjax.bench.formulas import gathered_softmax, late_interaction
    from clipjax.bench.program import temporary_bytes, work
    from clipjax.mesh import MeshShape, batch_sharding, replicated

    how = (CASES | LATE)[case]
    shape = MeshShape(group=how.group * devices // 8 or 1, tensor=how.tensor)
    mesh = shape.build(jax.devices()[:devices])
    if how.exchange:
        chunk = rows if how.one_tile else None
        engine = objectives.PairEngine(mesh, getattr(objectives, how.exchange)(), chunk)

        def loss(image, text, scale):
            if how.tokens:
                return late_interaction(engine, image, text, scale)
            return objectives.Softmax()(
                Encoded.pair(image, text, scale), objectives.Context(engine)
            )[0]

    else:
        loss = gathered_softmax(mesh)
    split, whole = batch_sharding(mesh), replicated(mesh)
    step = jax.jit(
        jax.value_and_grad(loss, (0, 1, 2)),
        in_shardings=(split, split, whole),
        out_shardings=(whole, (split, split, whole)),
    )
    entry = (TOKENS, width // TOKENS) if how.tokens else (width,)
    embedding = jax.ShapeDtypeStruct((rows, *entry), jnp.float32)
    compiled = step.lower(embedding, embedding, jax.ShapeDtypeStruct((), jnp.float32)).compile()
    counted = work(compiled, devices)
    shards = devices // how.tensor
    unit = (shards - 1) / shards * rows * width * 4
    return {
        "wire": sum(counted.sent.values()) / unit,
        "sent": {kind: size / unit for kind, size in sorted(counted.sent.items())},
        "matmul": counted.matmul_flops / (2 * (rows // devices) * rows * width),
        "temp": temporary_bytes(compiled),
    }


if __name__ == "__main__":
    devices, rows, width, cases = json.loads(sys.argv[1])
    print(json.dumps({case: measure(devices, rows, width, case) for case in cases}))
