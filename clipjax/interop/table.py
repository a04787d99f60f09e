"""The mapping table: rules that rename and reshape other people's tensors into ours, and back.

A `Rule` says which tensors of theirs hold which arrays of ours, and by which steps the ones become
the others. Every step has an inverse, so one table serves both directions and what is read can be
written again bit for bit. A table is made for one model configuration: all sizes in it are known.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from clipjax.errors import ClipjaxError, did_you_mean

Arrays = list[np.ndarray]
LISTED = 8  # names in an error message, at most
FLOATS = tuple(map(np.dtype, (np.float32, np.float16, np.float64, ml_dtypes.bfloat16)))


@dataclasses.dataclass(frozen=True)
class Transpose:
    """Permutes the axes."""

    axes: tuple[int, ...]

    def read(self, arrays: Arrays) -> Arrays:
        return [x.transpose(self.axes) for x in arrays]

    def write(self, arrays: Arrays) -> Arrays:
        return [x.transpose(np.argsort(self.axes)) for x in arrays]


@dataclasses.dataclass(frozen=True)
class Reshape:
    """From one shape, the only one it accepts, to another."""

    theirs: tuple[int, ...]
    ours: tuple[int, ...]

    def read(self, arrays: Arrays) -> Arrays:
        return [_reshaped(x, self.theirs, self.ours) for x in arrays]

    def write(self, arrays: Arrays) -> Arrays:
        return [_reshaped(x, self.ours, self.theirs) for x in arrays]


@dataclasses.dataclass(frozen=True)
class Split:
    """One tensor into equal parts along its first axis: a packed projection into q, k and v."""

    parts: int

    def read(self, arrays: Arrays) -> Arrays:
        (whole,) = arrays
        if whole.ndim == 0 or whole.shape[0] % self.parts:
            raise ValueError
        return list(np.split(whole, self.parts))

    def write(self, arrays: Arrays) -> Arrays:
        return [np.concatenate(arrays)]


Step = Transpose | Reshape | Split


@dataclasses.dataclass(frozen=True)
class Rule:
    """Theirs -> ours by `steps`; with `layers`, once for each layer, stacked along a new first axis.

    Attributes:
      theirs: a tensor's name; with `layers`, `{i}` in it stands for the layer's number.
      ours: paths of the arrays that it becomes (several after a `Split`).
      steps: applied in turn to read, inverted in reverse order to write.
      layers: the numbers of the layers, in the order of our stack; None for a single tensor.
    """

    theirs: str
    ours: tuple[str, ...]
    steps: tuple[Step, ...] = ()
    layers: range | None = None

    def names(self) -> list[str]:
        """The names of all tensors of theirs that the rule is about."""
        if self.layers is None:
            return [self.theirs]
        return [self.theirs.replace("{i}", str(i)) for i in self.layers]

    def read(self, tensors: Sequence[np.ndarray]) -> Arrays:
        """Our arrays, one for each of `ours`, from their tensors, one for each of `names()`."""
        each = []
        for tensor in tensors:
            arrays = [tensor]
            for step in self.steps:
                arrays = step.read(arrays)
            each.append(arrays)
        return each[0] if self.layers is None else [np.stack(a) for a in zip(*each, strict=True)]

    def write(self, arrays: Arrays) -> Arrays:
        """The inverse of `read`."""
        layers = [arrays] if self.layers is None else [list(a) for a in zip(*arrays, strict=True)]
        tensors: Arrays = []
        for layer in layers:
            for step in reversed(self.steps):
                layer = step.write(layer)
            tensors += layer
        return tensors


@dataclasses.dataclass(frozen=True)
class Table:
    """How a family lays out one model.

    Attributes:
      rules: every array of the model is named by exactly one of them.
      ignored: patterns (searched in the whole name) of tensors of theirs that hold no parameter and
        follow from the configuration, such as position indices.
      constants: those of the ignored ones that are written, because their reader expects them.
    """

    rules: tuple[Rule, ...]
    ignored: tuple[str, ...] = ()
    constants: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def read(self, tensors: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict:
        """Our arrays by path, float32, from their tensors by name.

        Args:
          tensors: theirs.
          shapes: of all our arrays, as the model's configuration makes them.

        Raises:
          ClipjaxError: a tensor is unknown, missing, of another shape or of a dtype that holds no
            weights; all of the first two kinds are named together.
        """
        self._account(tensors)
        flat: dict[str, np.ndarray] = {}
        for rule in self.rules:
            names = rule.names()
            given = [_floats(name, tensors[name]) for name in names]
            try:
                arrays = rule.read(given)
                fits = all(a.shape == shapes[p] for a, p in zip(arrays, rule.ours, strict=True))
            except ValueError:
                fits = False
            if not fits:
                raise ClipjaxError(_misshapen(rule, names, given, shapes))
            flat |= zip(rule.ours, arrays, strict=True)
        return flat

    def write(self, flat: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Their tensors by name, from our arrays by path; constants included."""
        tensors: dict[str, np.ndarray] = {}
        for rule in self.rules:
            arrays = [np.asarray(flat[path]) for path in rule.ours]
            tensors |= zip(rule.names(), rule.write(arrays), strict=True)
        tensors |= self.constants
        return {name: np.ascontiguousarray(t).reshape(t.shape) for name, t in tensors.items()}

    def _account(self, tensors: Mapping[str, Any]) -> None:
        known = [name for rule in self.rules for name in rule.names()]
        missing = [name for name in known if name not in tensors]
        ignored = re.compile("|".join(f"(?:{p})" for p in self.ignored) or r"\b\B")
        unknown = [n for n in tensors if n not in set(known) and not ignored.fullmatch(n)]
        if not (missing or unknown):
            return
        parts = []
        if missing:
            parts.append(f"the weights lack {_listed(missing)}")
        if unknown:
            parts.append(f"they hold {_listed(unknown)}, which the model has no place for")
            if len(unknown) == 1 and missing:
                parts[-1] += did_you_mean(unknown[0], missing)
        raise ClipjaxError("; ".join(parts))


def layered(rules: Iterable[Rule], layers: range) -> list[Rule]:
    """The rules, each for all of `layers`."""
    return [dataclasses.replace(rule, layers=layers) for rule in rules]


def same(theirs: str, ours: str) -> list[Rule]:
    """An array that both sides hold alike."""
    return [Rule(theirs, (ours,))]


def linear(theirs: str, ours: str, *, bias: bool = True) -> list[Rule]:
    """PyTorch's `nn.Linear` (weight [out, in]) -> kernel [in, out]."""
    rules = [Rule(f"{theirs}.weight", (f"{ours}/kernel",), (Transpose((1, 0)),))]
    return rules + same(f"{theirs}.bias", f"{ours}/bias") * bias


def norm(theirs: str, ours: str) -> list[Rule]:
    """PyTorch's `nn.LayerNorm`."""
    return same(f"{theirs}.weight", f"{ours}/scale") + same(f"{theirs}.bias", f"{ours}/bias")


def packed(theirs: str, ours: Sequence[str]) -> list[Rule]:
    """One projection that is several of ours one above the other; `theirs` ends before "weight"."""
    split = Split(len(ours))
    return [
        Rule(f"{theirs}weight", tuple(f"{o}/kernel" for o in ours), (split, Transpose((1, 0)))),
        Rule(f"{theirs}bias", tuple(f"{o}/bias" for o in ours), (split,)),
    ]


def patches(theirs: str, ours: str, size: int, width: int, *, bias: bool) -> list[Rule]:
    """A convolution [out, channel, y, x] whose stride is its size -> a kernel on flat patches."""
    steps = (Transpose((2, 3, 1, 0)), Reshape((size, size, 3, width), (3 * size**2, width)))
    rules = [Rule(f"{theirs}.weight", (f"{ours}/kernel",), steps)]
    return rules + same(f"{theirs}.bias", f"{ours}/bias") * bias


def squeezed(theirs: str, ours: str, shape: tuple[int, ...], ones: int = 1) -> list[Rule]:
    """Theirs has `ones` leading axes of length 1 before our `shape`."""
    return [Rule(theirs, (ours,), (Reshape((1,) * ones + shape, shape),))]


def _reshaped(x: np.ndarray, start: tuple[int, ...], end: tuple[int, ...]) -> np.ndarray:
    if x.shape != start:
        raise ValueError
    return x.reshape(end)


def _floats(name: str, tensor: Any) -> np.ndarray:
    tensor = np.asarray(tensor)
    if tensor.dtype not in FLOATS:
        raise ClipjaxError(
            f"tensor {name!r} holds {tensor.dtype}, and weights must be float32, float16, bfloat16 "
            "or float64: quantized weights must be expanded first"
        )
    return tensor.astype(np.float32, copy=False)


def _misshapen(
    rule: Rule, names: list[str], given: Arrays, shapes: Mapping[str, tuple[int, ...]]
) -> str:
    wanted = rule.write([np.empty(shapes[path], np.float32) for path in rule.ours])
    for name, tensor, want in zip(names, given, wanted, strict=True):
        if tensor.shape != want.shape:
            return (
                f"tensor {name!r} has shape {list(tensor.shape)}, where the model's configuration "
                f"makes it {list(want.shape)}"
            )
    raise AssertionError(f"the table's rule for {rule.theirs!r} does not fit its own shapes")


def _listed(names: list[str]) -> str:
    shown = ", ".join(map(repr, names[:LISTED]))
    return shown if len(names) <= LISTED else f"{shown} and {len(names) - LISTED} more"
