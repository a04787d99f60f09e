"""What a compiled program does: bytes it sends, over which links, matrix products, temporary memory.

Read from the optimized HLO text. Loop bodies are counted as often as they run, which
`compiled.cost_analysis()` does not do.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4}
_BYTES |= {"f32": 4, "s64": 8, "u64": 8, "f64": 8}

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\([^=]*?\)|\S+) ([\w\-]+)\((.*)$")
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)")
_TRIPS = re.compile(r'known_trip_count"?:\{"?n"?:"?(\d+)')
_GROUPS = re.compile(r"replica_groups=\{(\{[\d,{}]*\})\}")
_IOTA_GROUPS = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH_GROUPS = re.compile(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}")
_PAIRS = re.compile(r"source_target_pairs=\{(\{[\d,{}]*\})\}")
_CONTRACTED = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")
_OPERAND = re.compile(r"%([\w.\-]+)")


_CHANNEL = re.compile(r"channel_id=(\d+)")
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_INTEGER = re.compile(r"(\d+)\)")
COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")


@dataclasses.dataclass
class Work:
    """Per device: bytes sent by kind of collective, and floating-point operations of products.

    Attributes:
      sent: by kind.
      network: of these, by kind, what leaves the sender's island of fast links.
      matmul_flops: multiplications and additions.
    """

    sent: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    matmul_flops: float = 0.0
    network: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    def add(self, other: Work, times: int = 1) -> None:
        """Adds `other` as often as it runs."""
        self.matmul_flops += times * other.matmul_flops
        for mine, others in ((self.sent, other.sent), (self.network, other.network)):
            for kind, size in others.items():
                mine[kind] += times * size


def work(compiled: Any, devices: int = 1, islands: Sequence[Any] = ()) -> Work:
    """Counts a compiled program.

    Args:
      compiled: what `jax.jit(f).lower(...).compile()` gives.
      devices: devices of a collective that does not list its groups.
      islands: of each device, in the mesh's order, what it shares fast links with; none: all do.
    """
    computations, entry = _parse(compiled.as_text())
    counted: dict[str, Work] = {}

    def count(name: str) -> Work:
        if name not in counted:
            counted[name] = total = Work()
            shapes = {i[0]: i[1] for i in computations[name]}
            channels: set[str] = set()
            for _, shape, kind, rest in computations[name]:
                total.add(_own(shape, kind, rest, shapes, devices, islands))
                called = _CALLED.findall(rest)
                if kind == "fusion" and _again(called, computations, channels):
                    continue
                bound = _bound(rest, computations) if kind == "while" else None
                times = _times(kind, rest, [count(callee) for callee in called], bound)
                for callee in called:
                    total.add(count(callee), times)
        return counted[name]

    return count(entry)


def _again(called: list[str], computations: dict[str, Any], channels: set[str]) -> bool:
    """Whether all channels of a fusion have been met: TPUs start, use and end one transfer in several."""
    found = {
        channel
        for callee in called
        for _, _, kind, rest in computations[callee]
        if kind in COLLECTIVES
        for channel in _CHANNEL.findall(rest)
    }
    known = bool(found) and found <= channels
    channels |= found
    return known


def _bound(rest: str, computations: dict[str, Any]) -> int | None:
    """How often a loop that counts from 0 runs, from the constant that its condition compares with."""
    for condition in _CONDITION.findall(rest):
        body = computations[condition]
        constants = {
            name: int(found.group(1))
            for name, _, kind, rest in body
            if kind == "constant" and (found := _INTEGER.match(rest))
        }
        for _, _, kind, rest in body:
            if kind == "compare" and "direction=LT" in rest:
                limits = [constants[name] for name in _OPERAND.findall(rest) if name in constants]
                if len(limits) == 1:
                    return limits[0]
    return None


def arrays(compiled: Any) -> list[str]:
    """All arrays that a program's text names, such as f32[256,512], the largest first; inside of fusions included."""
    found = {
        f"{dtype}[{dims}]": _BYTES[dtype] * math.prod(_numbers(dims))
        for dtype, dims in _SHAPE.findall(compiled.as_text())
        if dtype in _BYTES
    }
    return sorted(found, key=lambda name: -found[name])


def temporary_bytes(compiled: Any) -> int:
    """Temporary memory of one device, in bytes, as the compiler planned it."""
    return int(compiled.memory_analysis().temp_size_in_bytes)


def _parse(text: str) -> tuple[dict[str, list[tuple[str, str, str, str]]], str]:
    computations: dict[str, list[tuple[str, str, str, str]]] = {}
    entry, current = "", None
    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
        if head := _COMPUTATION.match(line):
            current = computations.setdefault(head.group(2), [])
            if head.group(1):
                entry = head.group(2)
        elif current is not None and (found := _INSTRUCTION.match(line)):
            name, shape, kind, rest = found.groups()
            current.append((name, shape, kind, rest))
    return computations, entry


def _own(
    shape: str, kind: str, rest: str, shapes: dict[str, str], devices: int, islands: Sequence[Any]
) -> Work:
    if kind == "dot":
        inline = _SHAPE.match(rest)  # some versions print the operand's shape in place
        lhs_dims = _dims(inline.group(0) if inline else shapes[_OPERAND.findall(rest)[0]])
        found = _CONTRACTED.search(rest)
        axes = [int(a) for a in found.group(1).split(",") if a] if found else []
        inner = math.prod(lhs_dims[a] for a in axes)
        return Work(matmul_flops=2.0 * math.prod(_dims(shape)) * inner)
    started, kind = kind.endswith("-start"), kind.removesuffix("-start")
    if kind not in COLLECTIVES:
        return Work()
    if started and kind != "all-reduce":
        shape = _result(shape)
    size = sum(
        _BYTES[dtype] * math.prod(int(d) for d in dims.split(",") if d)
        for dtype, dims in _SHAPE.findall(shape)
        if dtype in _BYTES
    )
    groups = _groups(rest, devices)
    g = len(groups[0])
    # Bytes one device sends on a ring, from the size of what it holds afterwards.
    factor = {
        "all-gather": (g - 1) / g,
        "reduce-scatter": g - 1,
        "all-reduce": 2 * (g - 1) / g,
        "all-to-all": (g - 1) / g,
        "collective-permute": 1,
    }[kind]
    sent = factor * size
    if not islands:
        slow = 0.0
    elif kind == "collective-permute":
        pairs = _PAIRS.search(rest)
        edges = _lists(pairs.group(1)) if pairs else []
        slow = float(any(islands[a] != islands[b] for a, b in edges))  # who waits for the slow link
    else:
        slow = max(leaving(group, islands) for group in groups)
    return Work(collections.Counter({kind: sent}), network=collections.Counter({kind: slow * sent}))


def leaving(group: Sequence[int], islands: Sequence[Any]) -> float:
    """The share of a ring's edges that leave an island, its devices in the order of their islands."""
    order = sorted((islands[device] for device in group), key=str)
    edges = list(itertools.pairwise([*order, order[0]]))
    return sum(a != b for a, b in edges) / len(edges)


def _result(shape: str) -> str:
    """Of what a started collective gives, (operands, results, ...), the results."""
    if not shape.startswith("("):
        return shape
    parts, depth, begin = [], 0, 1
    for i, mark in enumerate(shape):
        depth += (mark in "([{") - (mark in ")]}")
        if (mark == "," and depth == 1) or (mark == ")" and depth == 0):
            parts.append(shape[begin:i])
            begin = i + 1
    return parts[1] if len(parts) > 1 else shape


def _groups(rest: str, devices: int) -> list[list[int]]:
    """The devices of each group of a collective, all groups being of one size."""
    if found := _GROUPS.search(rest):
        return _lists(found.group(1))
    if found := _IOTA_GROUPS.search(rest):
        number, size, shape, axes = found.groups()
        ids = np.arange(int(number) * int(size)).reshape(_numbers(shape))
        ids = ids.transpose(_numbers(axes)) if axes else ids
        return ids.reshape(int(number), int(size)).tolist()
    if found := _MESH_GROUPS.search(rest):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", found.group(1)))
        names = list(sizes)
        inner = [names.index(axis) for axis in re.findall(r"'?([\w]+)'?", found.group(2))]
        ids = np.arange(math.prod(map(int, sizes.values()))).reshape(
            [int(n) for n in sizes.values()]
        )
        outer = [axis for axis in range(ids.ndim) if axis not in inner]
        size = math.prod(ids.shape[axis] for axis in inner)
        return ids.transpose(*outer, *inner).reshape(-1, size).tolist()
    return [list(range(devices))]


def _lists(text: str) -> list[list[int]]:
    """ "{0,1},{2,3}" as lists."""
    return [_numbers(part) for part in re.findall(r"\{([\d,]*)\}", text)]


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]


def _dims(shape: str) -> list[int]:
    found = _SHAPE.search(shape)
    return [int(d) for d in found.group(2).split(",") if d] if found else []


def _times(kind: str, rest: str, called: list[Work], bound: int | None) -> int:
    """How often an instruction runs what it calls."""
    if kind != "while":
        return 1
    if found := _TRIPS.search(rest):
        return int(found.group(1))
    if bound is not None:
        return bound
    if any(w.matmul_flops or w.sent for w in called):
        raise ValueError(f"a loop of unknown length does countable work: {rest[:200]}")
    return 0
