"""Path rules -> PartitionSpec, applied from outside the modules to the whole train state.

A rule is a regular expression searched in a leaf's path (`params/image/blocks/attn/q/kernel`,
`opt_state/0/mu/image/...`). The first rule that matches decides; a leaf that no rule matches is an error.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import re
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from clipjax.component import Component
from clipjax.errors import ClipjaxError
from clipjax.mesh import BATCH_AXES

log = logging.getLogger(__name__)
AnyMesh = Mesh | AbstractMesh
WASTEFUL = 2.0  # times the ideal bytes a device, above which the description says what to do
HOST = "pinned_host"
NEGLIGIBLE = 64 * 2**20  # bytes a device


@dataclasses.dataclass(frozen=True)
class Rule(Component):
    """How the leaves whose path matches are laid out."""

    pattern: str
    """Regular expression, searched in the path."""
    tensor: int | None = None
    """Dimension split over the `tensor` axis, counted from the end (-1 is the last); None: not split."""
    fsdp: bool = True
    """Whether FSDP may shard the leaf over the `data` axis."""


TRANSFORMER_RULES = (
    Rule(r"/(q|k|v|fc1|gate|head)/kernel$", tensor=-1),
    Rule(r"/(q|k|v|fc1|gate)/bias$", tensor=-1),
    Rule(r"/(out|fc2)/kernel$", tensor=-2),
    Rule(r".*"),
)
"""Column-parallel into attention heads and the hidden layer, row-parallel out of them (Megatron-LM,
arXiv:1909.08053): one all-reduce per sub-layer. A vocabulary head (CoCa's) is split by words, as its losses and
logits are. Everything else is not split over `tensor`."""


@dataclasses.dataclass(frozen=True)
class Sharding(Component):
    """Where parameters, optimizer state and the rest of the train state live."""

    fsdp: bool = False
    """Shard every large leaf over the `data` axis (ZeRO-3): memory per device falls with their number."""
    rules: tuple[Rule, ...] = TRANSFORMER_RULES
    """First match wins; every leaf must match one."""
    min_size: int = 4096
    """Leaves with fewer elements (in one layer, where layers are stacked) stay whole: gathering a
    norm's scale from all devices costs more time than it saves memory."""
    offload: str = ""
    """Regular expression of paths of the train state, such as ^opt_state/: large leaves that wait in the host's
    memory between steps; empty: none."""
    gather_gb: float = 4.0
    """With micro-batches: as long as all weights and their gradients take no more than this, in GB a device, they are
    gathered and reduced once a step; else for every micro-batch, a layer at a time."""

    def __post_init__(self) -> None:
        try:
            re.compile(self.offload)
        except re.error as error:
            raise ClipjaxError(
                f"sharding.offload={self.offload!r} is no regular expression: {error}"
            ) from error

    def apply(self, tree: Any, mesh: AnyMesh) -> Any:
        """A tree of `NamedSharding`, one for each leaf of `tree` (arrays or ShapeDtypeStructs).

        A leaf that divides over `data` in no single dimension is split in several, or over as many of these
        devices as divide it; its sharding then names the factors of `data` (`finer`) instead of `data`.

        Raises:
          ClipjaxError: no rule matches a leaf, or a pattern is no regular expression.
        """
        rule_of = self._matcher()
        whole: list[str] = []

        def leaf_sharding(path, leaf):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            if name.startswith("objective_state/") and "/rows/" in name:
                return _as_the_batch(name, leaf.shape, mesh)
            sharding = self._leaf(name, leaf.shape, rule_of(name, leaf.shape), mesh, whole)
            waits = self.offload and _size(leaf.shape) >= self.min_size
            if waits and re.search(self.offload, name):
                return sharding.with_memory_kind(HOST)
            return sharding

        shardings = jax.tree_util.tree_map_with_path(leaf_sharding, tree)
        if whole:
            log.warning(
                "not split over %d tensor devices, which do not divide that dimension: %s%s",
                mesh.shape["tensor"], ", ".join(whole[:3]),
                f" and {len(whole) - 3} others" if len(whole) > 3 else "",
            )  # fmt: skip
        return shardings

    def _matcher(self):
        try:
            compiled = [(re.compile(rule.pattern), rule) for rule in self.rules]
        except re.error as error:
            raise ClipjaxError(
                f"sharding.rules: {error.pattern!r} is no regular expression: {error}"
            ) from error

        def rule_of(name: str, shape: tuple[int, ...]) -> Rule:
            rule = next((rule for regex, rule in compiled if regex.search(name)), None)
            if rule is None:
                raise ClipjaxError(
                    f"no sharding rule covers {name!r} with shape {tuple(shape)}: add a Rule to "
                    'sharding.rules (Rule(".*") covers everything that is left)'
                )
            return rule

        return rule_of

    def _leaf(
        self, name: str, shape: tuple[int, ...], rule: Rule, mesh: AnyMesh, whole: list[str]
    ) -> NamedSharding:
        spec: list[Any] = [None] * len(shape)
        tensor, data = mesh.shape["tensor"], mesh.shape["data"]
        if rule.tensor is not None and tensor > 1 and len(shape) >= -rule.tensor:
            if shape[rule.tensor] % tensor == 0:
                spec[rule.tensor] = "tensor"
            else:
                whole.append(f"{name} {tuple(shape)}")
        # The layer axis of stacked blocks is scanned over: sharding it would gather all layers at once.
        first = 1 if re.search(r"(^|/)blocks/", name) and len(shape) > 1 else 0
        if not (self.fsdp and rule.fsdp and data > 1 and _size(shape[first:]) >= self.min_size):
            return NamedSharding(mesh, PartitionSpec(*spec))
        free = [i for i in range(first, len(shape)) if spec[i] is None]
        free.sort(key=lambda i: (shape[i], i), reverse=True)
        for i in free:
            if shape[i] % data == 0:
                spec[i] = "data"
                return NamedSharding(mesh, PartitionSpec(*spec))
        left = list(enumerate(prime_factors(data)))
        for i in free:
            taken, size = [], shape[i]
            for number, prime in left:
                if size % prime == 0:
                    size //= prime
                    taken.append((number, prime))
            left = [factor for factor in left if factor not in taken]
            if taken:
                spec[i] = tuple(f"data_{number}" for number, _ in taken)
        return NamedSharding(finer(mesh), PartitionSpec(*spec))

    def describe(self, tree: Any, shardings: Any, mesh: AnyMesh) -> str:
        """One line on what a device holds of a tree that `apply` has laid out, and how far from the ideal that is."""
        local, total = per_device_bytes(tree, shardings)
        if not self.fsdp:
            return f"each device holds {_bytes(local)} of {_bytes(total)} of state (no FSDP)"
        data = mesh.shape["data"]
        line = (
            f"FSDP over {data} devices: each holds {_bytes(local)} of {_bytes(total)} of state, "
            f"{local * data / max(total, 1):.2f}x the ideal"
        )
        # What is small anyway is not worth a word.
        if local * data <= WASTEFUL * total or local - total / data < NEGLIGIBLE:
            return line
        leaves = zip(
            jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(shardings), strict=True
        )
        held = sorted(
            (
                (_size(s.shard_shape(x.shape)) * x.dtype.itemsize, path, x)
                for (path, x), s in leaves
            ),
            key=lambda entry: -entry[0],
        )
        largest = [
            f"{jax.tree_util.keystr(path, simple=True, separator='/')} {tuple(x.shape)}"
            for _, path, x in held[:3]
        ]
        return (
            f"{line}: mesh.data={data} shares too few factors with the model's sizes. What a device holds most of: "
            f"{', '.join(largest)}. Choose mesh.data=2^k and more mesh.group, or other widths"
        )

    def check_heads(self, model: Any, mesh: AnyMesh) -> None:
        """Refuses tensor parallelism that would cut through attention heads.

        Widths may divide where heads do not; the program would be right, and send activations around in each layer.

        Args:
          model: a component; it and the components in it may say how many `heads` they have.
          mesh: where it goes.

        Raises:
          ClipjaxError: heads that `mesh.tensor` does not divide, of a part that the rules split.
        """
        tensor = mesh.shape["tensor"]
        if tensor == 1 or self._matcher()("blocks/attn/q/kernel", ()).tensor is None:
            return
        for path, heads in _heads("model", model):
            if heads % tensor:
                fits = [n for n in range(1, heads + 1) if heads % n == 0]
                raise ClipjaxError(
                    f"{path}.heads={heads} do not divide over mesh.tensor={tensor}: choose mesh.tensor from {fits}"
                )


def _heads(path: str, component: Any) -> Iterator[tuple[str, int]]:
    """(dotted path, number of heads) of a component and of all components in it."""
    if isinstance(getattr(component, "heads", None), int):
        yield path, component.heads
    for field in dataclasses.fields(component):
        value = getattr(component, field.name)
        named = {field.name: value}
        if isinstance(value, tuple):
            named = {f"{field.name}.{i}": v for i, v in enumerate(value)}
        elif isinstance(value, dict):
            named = {f"{field.name}.{key}": v for key, v in value.items()}
        for name, part in named.items():
            if isinstance(part, Component):
                yield from _heads(f"{path}.{name}", part)


def prime_factors(number: int) -> list[int]:
    """Ascending, with repetitions: 12 -> [2, 2, 3]."""
    factors, prime = [], 2
    while number > 1:
        while number % prime == 0:
            factors.append(prime)
            number //= prime
        prime += 1
    return factors


@functools.lru_cache
def finer(mesh: AnyMesh) -> AnyMesh:
    """The same devices in the same order, with the axis `data` taken apart into its prime factors.

    `data` of 12 becomes `data_0`, `data_1`, `data_2` of sizes 2, 2 and 3: what cannot be split over 12 in one
    dimension may be split over 4 in one and over 3 in another.
    """
    names: list[str] = []
    sizes: list[int] = []
    for axis, size in mesh.shape.items():
        factors = prime_factors(size) if axis == "data" else [size]
        names += [f"data_{i}" for i in range(len(factors))] if axis == "data" else [axis]
        sizes += factors
    types = (AxisType.Auto,) * len(names)
    if isinstance(mesh, AbstractMesh):
        return AbstractMesh(tuple(sizes), tuple(names), axis_types=types)
    return Mesh(mesh.devices.reshape(sizes), tuple(names), axis_types=types)


def _as_the_batch(name: str, shape: tuple[int, ...], mesh: AnyMesh) -> NamedSharding:
    """What an objective keeps under `rows` (a queue, a table over the data set) is split as a batch is."""
    shards = mesh.shape["group"] * mesh.shape["data"]
    if shape[0] % shards:
        raise ClipjaxError(
            f"{name} has {shape[0]} rows, which {shards} devices (mesh group x data) do not divide: choose a "
            f"multiple of {shards} (of a Queue: its size)"
        )
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for n in shape:
        size *= n
    return size


def per_device_bytes(tree: Any, shardings: Any) -> tuple[int, int]:
    """(bytes held by one device, bytes in total) of a tree of ShapeDtypeStructs or arrays."""
    local = total = 0
    for leaf, sharding in zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True):
        total += _size(leaf.shape) * leaf.dtype.itemsize
        local += _size(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    return local, total


def on_host(sharding: NamedSharding) -> bool:
    """Whether an array laid out so is in the host's memory."""
    return sharding.memory_kind == HOST


def to_devices(tree: Any, shardings: Any) -> Any:
    """In a compiled function: the tree with what waits on the host back on the devices."""
    return jax.tree.map(
        lambda x, s: jax.device_put(x, s.with_memory_kind("device")) if on_host(s) else x,
        tree,
        shardings,
    )


def _bytes(number: float) -> str:
    power = min(3, max(0, len(str(int(number))) - 1) // 3)
    return f"{number / 1000**power:.3g} {('bytes', 'kB', 'MB', 'GB')[power]}"
