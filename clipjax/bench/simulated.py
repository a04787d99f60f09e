"""The distributed loss compiled for simulated CPU devices: bytes sent, products, memory.

Nothing is run, so any size will do. The number of devices must be known before jax starts:
`compile_for` starts this file in a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

# name -> (exchange, groups out of 8, one tile for the whole block)
CASES: dict[str, tuple[str, int, bool]] = {
    "AllGather": ("AllGather", 1, False),
    "AllGather, no recomputation": ("AllGather", 1, True),
    "Ring": ("Ring", 1, False),
    "Hierarchical": ("Hierarchical", 4, False),
    "Grouped": ("Grouped", 2, False),
    "OpenCLIP": ("", 1, False),
}


def compile_for(devices: int, rows: int, width: int, cases: list[str]) -> dict[str, dict[str, Any]]:
    """Compiles the softmax loss and its gradient for `devices` simulated devices.

    Args:
      devices: simulated devices.
      rows: global batch.
      width: embedding width.
      cases: names from `CASES`.

    Returns:
      case -> wire (units of one all-gather of one modality), sent (the same by collective), matmul
      (units of 2 b N d), temp (bytes per device).
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
    from clipjax.bench.formulas import gathered_softmax
    from clipjax.bench.program import temporary_bytes, work
    from clipjax.mesh import MeshShape, batch_sharding, replicated

    exchange, eighths, one_tile = CASES[case]
    mesh = MeshShape(group=eighths * devices // 8 or 1).build(jax.devices()[:devices])
    if exchange:
        chunk = rows if one_tile else None
        engine = objectives.PairEngine(mesh, getattr(objectives, exchange)(), chunk)

        def loss(image, text, scale):
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
    embedding = jax.ShapeDtypeStruct((rows, width), jnp.float32)
    compiled = step.lower(embedding, embedding, jax.ShapeDtypeStruct((), jnp.float32)).compile()
    counted = work(compiled, devices)
    unit = (devices - 1) / devices * rows * width * 4
    return {
        "wire": sum(counted.sent.values()) / unit,
        "sent": {kind: size / unit for kind, size in sorted(counted.sent.items())},
        "matmul": counted.matmul_flops / (2 * (rows // devices) * rows * width),
        "temp": temporary_bytes(compiled),
    }


if __name__ == "__main__":
    devices, rows, width, cases = json.loads(sys.argv[1])
    print(json.dumps({case: measure(devices, rows, width, case) for case in cases}))
