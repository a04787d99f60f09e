"""Path rules -> PartitionSpec, applied from outside the modules to the whole train state.

A rule is a regular expression searched in a leaf's path (`params/image/blocks/attn/q/kernel`,
`opt_state/0/mu/image/...`). The first rule that matches decides; a leaf that no rule matches is an error.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from clipjax.component import Component
from clipjax.errors import ClipjaxError

log = logging.getLogger(__name__)


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

    def apply(self, tree: Any, mesh: Mesh) -> Any:
        """A tree of `NamedSharding`, one for each leaf of `tree` (arrays or ShapeDtypeStructs).

        Raises:
          ClipjaxError: no rule matches a leaf, or a pattern is no regular expression.
        """
        try:
            compiled = [(re.compile(rule.pattern), rule) for rule in self.rules]
        except re.error as error:
            raise ClipjaxError(
                f"sharding.rules: {error.pattern!r} is no regular expression: {error}"
            ) from error

        def leaf_sharding(path, leaf):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            rule = next((rule for regex, rule in compiled if regex.search(name)), None)
            if rule is None:
                raise ClipjaxError(
                    f"no sharding rule covers {name!r} with shape {tuple(leaf.shape)}: add a Rule to "
                    'sharding.rules (Rule(".*") covers everything that is left)'
                )
            return NamedSharding(mesh, self._spec(name, leaf.shape, rule, mesh))

        return jax.tree_util.tree_map_with_path(leaf_sharding, tree)

    def _spec(self, name: str, shape: tuple[int, ...], rule: Rule, mesh: Mesh) -> PartitionSpec:
        spec: list[str | None] = [None] * len(shape)
        tensor, data = mesh.shape["tensor"], mesh.shape["data"]
        if rule.tensor is not None and tensor > 1 and len(shape) >= -rule.tensor:
            if shape[rule.tensor] % tensor == 0:
                spec[rule.tensor] = "tensor"
            else:
                log.warning(
                    "%s %s: dimension %d does not divide over %d tensor devices, so it is not split",
                    name, shape, rule.tensor, tensor,
                )  # fmt: skip
        # The layer axis of stacked blocks is scanned over: sharding it would gather all layers at once.
        first = 1 if re.search(r"(^|/)blocks/", name) and len(shape) > 1 else 0
        if self.fsdp and rule.fsdp and data > 1 and _size(shape[first:]) >= self.min_size:
            free = [i for i in range(first, len(shape)) if spec[i] is None and shape[i] % data == 0]
            if free:
                spec[max(free, key=lambda i: (shape[i], i))] = "data"
            elif "tensor" not in spec and name.startswith("params/"):
                log.warning(
                    "%s %s: no dimension divides over %d data devices, so each holds all of it",
                    name, shape, data,
                )  # fmt: skip
        return PartitionSpec(*spec)


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
