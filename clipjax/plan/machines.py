"""The machines that runs can be planned for: their chips, and how many."""

from __future__ import annotations

import dataclasses
import re

from clipjax.chips import peak_flops
from clipjax.errors import ClipjaxError

GB = 10**9


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator.

    Attributes:
      name: as jax or the maker calls it.
      platform: cpu, gpu or tpu.
      memory: bytes.
      flops: products and sums of bfloat16 matrix products a second, dense.
      bandwidth: bytes a second from and to its memory.
      link: bytes a second that it sends to its neighbors, all fast links together, one way.
      fabric: what the fast links are called.
      network: its share of its host's links to others, bytes a second one way; 0: no such links.
      source: where the figures are from.
      host: chips that share one host.
      cores: units of its compiler that count towards a machine's name (v5p-128 is 64 chips).
      facts: of a GPU, what its compiler asks for besides.
    """

    name: str
    platform: str
    memory: float = 0.0
    flops: float = 0.0
    bandwidth: float = 0.0
    link: float = 0.0
    fabric: str = ""
    network: float = 0.0
    source: str = ""
    host: int = 8
    cores: int = 1
    facts: str = ""


def _peak(name: str) -> float:
    peak = peak_flops(name)
    assert peak is not None, name
    return peak


def _tpu(name: str, page: str, memory, bandwidth, both_ways, **fields) -> Chip:
    return Chip(
        name, "tpu", memory * GB, _peak(name), bandwidth * GB, both_ways / 2 * GB,
        "ICI", source=f"docs.cloud.google.com/tpu/docs/{page}", **fields,
    )  # fmt: skip


_FACTS = """gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  threads_per_core_limit: 2048 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 registers_per_core_limit: 65536 registers_per_block_limit: 65536
  device_memory_size: {memory} memory_bandwidth: {bandwidth} {others}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{name}"
"""


def _gpu(name: str, source: str, memory, bandwidth, both_ways, network, others: str) -> Chip:
    facts = _FACTS.format(
        memory=memory, bandwidth=int(bandwidth * GB), name=name, others=others.replace("=", ": ")
    )
    return Chip(
        name, "gpu", memory, _peak(name), bandwidth * GB, both_ways / 2 * GB, "NVLink",
        network * GB, source, facts=facts,
    )  # fmt: skip


CHIPS = {
    "v5e": _tpu("TPU v5e", "v5e", 16, 819, 400),
    "v5p": _tpu("TPU v5p", "v5p", 95, 2765, 1200, host=4, cores=2),
    "v6e": _tpu("TPU v6e", "v6e", 32, 1638, 800),
    "h100": _gpu(
        "NVIDIA H100 80GB HBM3", "NVIDIA H100 SXM and DGX H100 datasheets", 84_942_979_072, 3352.32,
        900, 50,
        "core_count=132 fpus_per_core=128 shared_memory_per_core=233472 l2_cache_size=52428800 "
        "shared_memory_per_block_optin=232448 clock_rate_ghz=1.98 cuda_compute_capability "
        "{ major=9 }",
    ),
    "h200": _gpu(
        "NVIDIA H200", "NVIDIA H200 and DGX H200 datasheets", 141 * GB, 4800, 900, 50,
        "core_count=132 fpus_per_core=128 shared_memory_per_core=233472 l2_cache_size=52428800 "
        "shared_memory_per_block_optin=232448 clock_rate_ghz=1.98 cuda_compute_capability "
        "{ major=9 }",
    ),
    "a100": _gpu(
        "NVIDIA A100-SXM4-80GB", "NVIDIA A100 SXM 80GB and DGX A100 datasheets", 84_986_691_584,
        2039, 600, 25,
        "core_count=108 fpus_per_core=64 shared_memory_per_core=167936 l2_cache_size=41943040 "
        "shared_memory_per_block_optin=166912 clock_rate_ghz=1.41 cuda_compute_capability "
        "{ major=8 }",
    ),
    "cpu": Chip("simulated CPU devices", "cpu"),
}  # fmt: skip
"""By the name that a machine begins with."""

_GRIDS = {
    2: {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"},
    3: {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8",
        256: "4x8x8", 512: "8x8x8", 1024: "8x8x16", 2048: "8x16x16", 4096: "16x16x16"},
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Machine:
    """Some chips: what `--on` names.

    Attributes:
      name: as it was given.
      chip: what it is made of.
      devices: how many.
      topology: how the compiler calls the arrangement.
    """

    name: str
    chip: Chip
    devices: int
    topology: str

    @property
    def hosts(self) -> int:
        return -(-self.devices // self.chip.host)

    @property
    def link(self) -> float:
        """Bytes a second that a chip in the middle sends to its neighbors, one way: all of a GPU's links; of a TPU's,
        two along each side of the grid, one where the side is 2, none where it is 1."""
        if self.chip.platform != "tpu" or self.devices == 1:
            return self.chip.link
        sides = [int(side) for side in self.topology.split(":")[1].split("x")]
        return self.chip.link * sum(min(side - 1, 2) for side in sides) / (2 * len(sides))

    @property
    def island(self) -> int:
        """Devices that share fast links: those of a TPU slice, else of a host."""
        whole = self.chip.platform == "tpu" or self.hosts == 1
        return self.devices if whole else self.chip.host


def machine(name: str) -> Machine:
    """The machine of a name: v5e-256, v6e-64, v5p-128 (cores, two a chip), h100x64, a100x8, cpux8.

    Raises:
      ClipjaxError: there is none of that name, or the chip does not come in that number.
    """
    # Google Cloud's accelerator types call a v5e otherwise.
    found = re.fullmatch(r"([a-z0-9]+?)(?:-|x)(\d+)", name.lower().replace("v5litepod-", "v5e-"))
    if found is None or found[1] not in CHIPS:
        examples = ("v5e-256", "v6e-64", "v5p-128", "h100x64", "a100x8", "cpux8")
        raise ClipjaxError(
            f"--on {name}: no such machine. It is a chip ({', '.join(CHIPS)}) and a number, such as "
            f"{', '.join(examples)}"
        )
    chip, number = CHIPS[found[1]], int(found[2])
    devices = number // chip.cores
    if chip.platform == "tpu":
        grids = _GRIDS[3 if found[1] == "v5p" else 2]
        if devices not in grids or number % chip.cores:
            sizes = ", ".join(str(n * chip.cores) for n in grids)
            raise ClipjaxError(f"--on {name}: {chip.name} slices come in sizes {sizes}")
        return Machine(name, chip, devices, f"{found[1]}:{grids[devices]}")
    simulated = chip.platform == "cpu"
    if simulated and devices < 1:
        raise ClipjaxError(f"--on {name}: give at least one device")
    if devices < 1 or (not simulated and devices > chip.host and devices % chip.host):
        raise ClipjaxError(
            f"--on {name}: give up to {chip.host} devices, or whole hosts of {chip.host}"
        )
    if simulated:  # in one process
        chip = dataclasses.replace(chip, host=devices)
    hosts = max(1, devices // chip.host)
    return Machine(name, chip, devices, f"1x{hosts}x{devices // hosts}")
