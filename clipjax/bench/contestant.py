"""One implementation in a process of its own: prints its added memory, then one time per line read.

`contest` runs several side by side, taking turns, so that a busy machine is equally unkind to all.
Run as a script, with plain Python and torch, for the torch side: it must not import clipjax.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path


def contest(contestants: dict[str, list[str]], rounds: int) -> dict[str, dict[str, float]]:
    """Seconds (the least of all rounds) and added bytes of each contestant.

    Args:
      contestants: name -> command that runs this file with its arguments.
      rounds: how often each runs, in turns.

    Returns:
      name -> {"seconds", "bytes", ...}: the smallest time and what the contestant reported.

    Raises:
      ClipjaxError: a command does not exist.
      RunFailed: a contestant ended without a result (out of memory, no torch).
    """
    from clipjax.errors import ClipjaxError

    for name, (program, *_) in contestants.items():
        if shutil.which(program) is None:
            raise ClipjaxError(f"{program!r}, which should run {name}, is no program that starts")
    processes = {
        name: subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # several share an accelerator: none may take its memory in advance
            env=os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
        )
        for name, command in contestants.items()
    }
    try:
        results = {name: json.loads(_line(p, name)) for name, p in processes.items()}
        for _ in range(rounds):
            for name, process in processes.items():
                assert process.stdin is not None
                process.stdin.write("go\n")
                process.stdin.flush()
                seconds = float(_line(process, name))
                results[name]["seconds"] = min(results[name].get("seconds", seconds), seconds)
    finally:
        for process in processes.values():
            process.kill()
            process.wait()
    return results


def command(python: str, **settings: object) -> list[str]:
    """The command of one contestant."""
    return [python, str(Path(__file__).resolve()), json.dumps(settings)]


def _line(process: subprocess.Popen, name: str) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        from clipjax.errors import RunFailed

        raise RunFailed(f"the measurement of {name!r} ended without a result (its error is above)")
    return line


def _inputs(rows: int, width: int):
    import numpy as np

    rng = np.random.default_rng(0)
    image = rng.standard_normal((rows, width), np.float32)
    text = image + 3 * rng.standard_normal((rows, width), np.float32)
    return [a / np.linalg.norm(a, axis=1, keepdims=True) for a in (image, text)]


def _torch_step(objective: str, rows: int, width: int, **_) -> Callable[[], None]:
    """OpenCLIP's ClipLoss and SigLipLoss formulas on one process, forward and backward."""
    import torch
    import torch.nn.functional as F

    torch.set_num_threads(len(os.sched_getaffinity(0)))  # as many cores as JAX takes
    image, text = (torch.from_numpy(a).requires_grad_() for a in _inputs(rows, width))
    scale = torch.tensor(20.0, requires_grad=True)

    def step() -> None:
        image.grad = text.grad = scale.grad = None
        if objective == "softmax":
            per_image, per_text = scale * image @ text.T, scale * text @ image.T
            labels = torch.arange(rows)
            loss = (F.cross_entropy(per_image, labels) + F.cross_entropy(per_text, labels)) / 2
        else:
            logits = scale * image @ text.T - 10
            labels = 2 * torch.eye(rows) - torch.ones(rows, rows)
            loss = -F.logsigmoid(labels * logits).sum() / rows
        loss.backward()

    return step


def _jax_step(
    who: str, objective: str, rows: int, width: int, dtype: str, chunk: int | None
) -> tuple[Callable[[], None], dict[str, float]]:
    import jax
    import jax.numpy as jnp

    from clipjax.batch import Encoded
    from clipjax.bench import formulas
    from clipjax.bench.program import temporary_bytes
    from clipjax.objectives import Context, PairEngine, Sigmoid, Softmax

    engine = PairEngine(chunk=chunk, dtype=dtype)
    made: Softmax | Sigmoid = Softmax() if objective == "softmax" else Sigmoid()

    def ours(image, text, scale):
        return made(Encoded.pair(image, text, scale, jnp.float32(-10)), Context(engine))[0]

    loss = ours if who == "clipjax" else getattr(formulas, f"dense_{objective}")
    arguments = *map(jnp.asarray, _inputs(rows, width)), jnp.float32(20)
    compiled = jax.jit(jax.value_and_grad(loss, (0, 1, 2))).lower(*arguments).compile()
    return lambda: jax.block_until_ready(compiled(*arguments)), {"temp": temporary_bytes(compiled)}


def _matmul_step(size: int, dtype: str, **_) -> Callable[[], None]:
    """A plain square product: the rate that the machine has to give."""
    import jax
    import jax.numpy as jnp

    a, b = (jnp.asarray(v, dtype) for v in _inputs(size, size))
    precision = "highest" if dtype == "float32" else None
    product = jax.jit(lambda a, b: jnp.matmul(a, b.T, precision=precision)).lower(a, b).compile()
    return lambda: jax.block_until_ready(product(a, b))


def _torch_clip(
    model: str, rows: int, image_size: int, length: int, words: int, **_
) -> Callable[[], None]:
    """A training step of OpenCLIP's model of that name, with its own loss and torch's AdamW, in float32."""
    import open_clip
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    clip = open_clip.create_model(model).train()
    optimizer = torch.optim.AdamW(clip.parameters(), lr=1e-4)
    image, text = _pairs(rows, image_size, length, words)
    pixels = torch.from_numpy(image).permute(0, 3, 1, 2).float() / 255
    tokens, loss_of = torch.from_numpy(text).long(), open_clip.ClipLoss()

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss_of(*clip(pixels, tokens)[:3]).backward()
        optimizer.step()

    return step


def _jax_clip(image: str, text: str, embed_dim: int, rows: int, **_) -> Callable[[], None]:
    """A training step of the same size in whatever clipjax this process imports, on one device."""
    import jax

    from clipjax.mesh import MeshShape
    from clipjax.models import DualEncoder
    from clipjax.objectives import PairEngine, Softmax
    from clipjax.optim import AdamW, Scale
    from clipjax.sharding import Sharding
    from clipjax.towers import TextTransformer, ViT
    from clipjax.train.state import Blueprint
    from clipjax.train.step import jit_step, make_step

    towers = ViT.preset(image), TextTransformer.preset(text)
    model = DualEncoder(image=towers[0], text=towers[1], embed_dim=embed_dim)
    mesh, objective = MeshShape().build(jax.devices()[:1]), Softmax()
    blueprint = Blueprint.draw(
        model, objective, AdamW(), None, mesh, Sharding(), 1, Scale(rows, rows), 0
    )
    step = jit_step(make_step(blueprint, objective, PairEngine(mesh), mesh, 1), blueprint)
    size, length, words = towers[0].image_shape[0], towers[1].context_length, towers[1].vocab_size
    pixels, tokens = _pairs(rows, size, length, words)
    batch = jax.device_put({"image": pixels, "text": tokens, "id": jax.numpy.arange(rows)})
    held = [blueprint.init()]

    def once() -> None:
        held[0], metrics = step(held[0], batch)
        jax.block_until_ready(metrics)

    return once


def _pairs(rows: int, image_size: int, length: int, words: int):
    """uint8 [rows, size, size, 3] and int32 [rows, length] without padding."""
    import numpy as np

    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (rows, image_size, image_size, 3), np.uint8)
    return image, rng.integers(3, words, (rows, length), np.int32)


def memory(field: str) -> int:
    """A line of /proc/self/status, in bytes (VmRSS: now; VmHWM: the peak)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}: memory is measured on Linux only")


def _added_peak(step: Callable[[], None], who: str) -> int:
    """Bytes by which one step raises the peak, of the accelerator's memory if there is one."""
    if who not in ("torch", "OpenCLIP"):
        import jax

        device = jax.devices()[0]
        if device.platform != "cpu":
            before = device.memory_stats()["bytes_in_use"]
            step()
            return device.memory_stats()["peak_bytes_in_use"] - before
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    step()
    return memory("VmHWM") - before


def main() -> None:
    """Reports the added peak memory of one step, then the time of one step for every line read."""
    settings = json.loads(sys.argv[1])
    who = settings.pop("who")
    report: dict[str, float] = {}
    if who == "torch":
        step = _torch_step(**settings)
    elif who == "matmul":
        step = _matmul_step(**settings)
    elif who == "OpenCLIP":
        step = _torch_clip(**settings)
    elif who == "clip":
        step = _jax_clip(**settings)
    else:
        step, report = _jax_step(who, **settings)
    print(json.dumps(report | {"bytes": _added_peak(step, who)}), flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        step()
        print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    main()
