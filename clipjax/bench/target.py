"""The distributed loss compiled for machines that are not here: what a chip sends and holds, and its kernels."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any, NamedTuple

from clipjax.errors import ClipjaxError
from clipjax.plan.machines import Machine, machine
from clipjax.plan.target import COMPILER_OPTIONS, devices, environment


class Way(NamedTuple):
    """How the loss is taken."""

    exchange: str = "AllGather"
    """Name of the engine's exchange."""
    grads: str = "float32"
    """Dtype of the columns' gradient as it travels."""
    kernel: str = "fused"
    """The engine's."""


WAYS = {
    "AllGather": Way(),
    "AllGather, gradient in bfloat16": Way(grads="bfloat16"),
    "AllGather, generic": Way(kernel="generic"),
    "Ring": Way("Ring"),
}


def compile_on(
    on: Machine, rows: int, width: int, objective: str, dtype: str, ways: list[str]
) -> dict[str, dict[str, Any]]:
    """Compiles a loss and its gradient, in a process of its own.

    Args:
      on: where.
      rows: global batch.
      width: embedding width.
      objective: "softmax" or "sigmoid".
      dtype: of the pairs' operands and the gathered columns.
      ways: names from `WAYS`.

    Returns:
      way -> wire (units of one all-gather of one modality in `dtype`), sent (the same by collective), temp
      (bytes a chip), kernels (calls of fused tiles in the program).

    Raises:
      ClipjaxError: the machine's compiler is not there.
    """
    done = subprocess.run(
        [sys.executable, "-m", "clipjax.bench.target"],
        input=json.dumps([on.name, rows, width, objective, dtype, ways]),
        env=environment(on),
        capture_output=True,
        text=True,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        raise ClipjaxError(f"the loss did not compile for {on.name}: {done.stderr[-2000:].strip()}")
    answer = json.loads(lines[-1])
    if "error" in answer:
        raise ClipjaxError(answer["error"])
    return answer


def measure(
    on: Machine, rows: int, width: int, objective: str, dtype: str, way: str
) -> dict[str, Any]:
    """One way of `compile_on`, in this process."""
    import jax
    import jax.numpy as jnp

    from clipjax import objectives
    from clipjax.batch import Encoded
    from clipjax.bench.program import temporary_bytes, work
    from clipjax.mesh import MeshShape, batch_sharding, replicated

    mesh, how = MeshShape().build(devices(on)), WAYS[way]
    engine = objectives.PairEngine(
        mesh, getattr(objectives, how.exchange)(), dtype=dtype, grads=how.grads, kernel=how.kernel
    )
    made: Any = objectives.Softmax() if objective == "softmax" else objectives.Sigmoid()

    def loss(image, text, scale, bias):
        return made(Encoded.pair(image, text, scale, bias), objectives.Context(engine))[0]

    split, whole = batch_sharding(mesh), replicated(mesh)
    embedding = jax.ShapeDtypeStruct((rows, width), jnp.float32, sharding=split)
    scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=whole)
    step = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3)))
    lowered = step.lower(embedding, embedding, scalar, scalar)
    compiled = lowered.compile(compiler_options=COMPILER_OPTIONS[on.chip.platform])
    sent, text = work(compiled, on.devices).sent, compiled.as_text() or ""
    unit = (on.devices - 1) / on.devices * rows * width * jnp.dtype(dtype).itemsize
    return {
        "wire": sum(sent.values()) / unit,
        "sent": {kind: size / unit for kind, size in sorted(sent.items())},
        "temp": temporary_bytes(compiled),
        "kernels": sum(text.count(f'custom_call_target="{name}"') for name in KERNELS),
    }


KERNELS = ("tpu_custom_call", "__gpu$xla.gpu.triton")


def _main() -> None:
    name, rows, width, objective, dtype, ways = json.load(sys.stdin)
    try:
        found: dict[str, Any] = {
            way: measure(machine(name), rows, width, objective, dtype, way) for way in ways
        }
    except ClipjaxError as error:
        found = {"error": str(error)}
    print(json.dumps(found))


if __name__ == "__main__":
    _main()
