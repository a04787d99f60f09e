"""Devices of a machine that is not here, as its compiler knows them.

Both compilers come as Python packages and need no device: libtpu for TPUs, jax's CUDA plugin for
NVIDIA's GPUs. This module is for a process that does nothing else (`clipjax.plan.program`).
"""

from __future__ import annotations

import os
from typing import Any

from clipjax.errors import ClipjaxError
from clipjax.plan.machines import Machine

COMPILER_OPTIONS: dict[str, dict[str, Any]] = {
    # It is read and never run: machine code need not be good.
    "cpu": {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True},
    # Without a device nothing can be tuned by trying it out, and Triton's products need that.
    "gpu": {"xla_gpu_enable_triton_gemm": False, "xla_gpu_autotune_level": 0},
    "tpu": {},
}


def environment(machine: Machine, compiler: bool = True) -> dict[str, str]:
    """The environment of a process that compiles for a machine, or traces alone: set before jax is imported."""
    changed = dict(os.environ) | {"JAX_PLATFORMS": "cpu"}
    if not compiler:
        return changed
    if machine.chip.platform == "cpu":
        flags = f"--xla_force_host_platform_device_count={machine.devices}"
        changed["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
    if machine.chip.platform == "tpu":
        changed |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
        changed["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # it is no device that is loaded
    return changed


def devices(machine: Machine) -> list[Any]:
    """The machine's devices, to build a mesh of.

    Raises:
      ClipjaxError: the package with its compiler is not installed, or is of another version than jax.
    """
    import jax

    if machine.chip.platform == "cpu":
        return jax.devices()[: machine.devices]
    from jax.experimental import topologies

    extra = f"plan-{machine.chip.platform}"
    try:
        if machine.chip.platform == "tpu":
            import libtpu  # noqa: F401

            return list(topologies.get_topology_desc(machine.topology, "tpu").devices)
        import jax_cuda12_plugin  # noqa: F401

        _assume_cudnn()
        jax.devices()  # plugins register here
        found = topologies.get_topology_desc(
            machine.name, "cuda", target_config=machine.chip.facts, topology=machine.topology
        )
        return list(found.devices)
    except ImportError as error:
        raise ClipjaxError(
            f"planning for {machine.name} needs its compiler: pip install 'clipjax[{extra}]' ({error})"
        ) from error
    except Exception as error:
        raise ClipjaxError(
            f"the compiler for {machine.name} did not answer: {error}. It must fit jax "
            f"{jax.__version__}: pip install 'clipjax[{extra}]'"
        ) from error


def _assume_cudnn() -> None:
    """cuDNN is on the machine that is planned for, not here: jax's questions about it are answered."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    cudnn.check_cudnn_version = lambda: 91000
    cudnn.check_compute_capability = lambda _: True
    cudnn.is_cuda_compute_capability_equal = lambda _: False
