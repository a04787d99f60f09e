"""Family: how one library names its tensors and writes down an architecture."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from clipjax.data import Resize
from clipjax.errors import ClipjaxError, did_you_mean
from clipjax.interop.table import Table
from clipjax.models import Model

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)
Tensors = Mapping[str, Any]
"""A file's tensors by name."""

_NO_ARCHITECTURE = {
    # Fields that change how a model trains or how fast it runs, not what it computes.
    *("dropout", "patch_dropout", "drop_path", "dtype", "scan", "scan_unroll", "remat", "offload"),
    *("attention", "quantize", "reduce_dtype", "freeze_stats", "momentum"),
    *("logit_scale_init", "logit_scale_max"),
    # What is compared by what it comes to.
    *("mlp_dim", "heads", "class_token"),
}


@dataclasses.dataclass(frozen=True)
class Description:
    """What an import knows beside the weights, and what an export says beside them.

    Attributes:
      shapes: of the tensors, by their name.
      files: the JSON files beside the weights that matter here, parsed, by name.
    """

    shapes: Mapping[str, tuple[int, ...]]
    files: Mapping[str, dict[str, Any]]

    def has(self, *names: str) -> bool:
        """Whether there are tensors of all these names."""
        return all(name in self.shapes for name in names)

    def shape(self, name: str, axes: int) -> tuple[int, ...]:
        """A tensor's shape.

        Raises:
          ClipjaxError: there is no such tensor, or it has another number of axes.
        """
        if name not in self.shapes:
            raise ClipjaxError(f"the weights lack {name!r}")
        shape = self.shapes[name]
        if len(shape) != axes:
            raise ClipjaxError(
                f"tensor {name!r} has shape {list(shape)}, and should have {axes} axes"
            )
        return shape

    def layers(self, prefix: str) -> int:
        """How many different names stand after `prefix`, up to the next dot or slash."""
        rest = [n.removeprefix(prefix) for n in self.shapes if n.startswith(prefix)]
        return len({r.replace("/", ".").split(".")[0] for r in rest})


@dataclasses.dataclass(frozen=True)
class Family:
    """One library's way to write models; see the modules that make the instances.

    Attributes:
      name: as messages call it.
      models: the types of models it can express; their text towers are TextTransformers.
      image_towers: the types of image towers it can express.
      weights_file: what the weights are called in a folder of that library.
      claims: whether tensors of these shapes, with these files, are of this family.
      model: reads the architecture.
      table: the names and shapes of the tensors of a model that `nearest` leaves as it is.
      nearest: the model most like the given one that the family can express.
      describe: the JSON files that say the architecture and preprocessing, by name.
      resize: how pictures come to the model's size.
      tokens: settings of `TokenizerFile` or `SentencePiece` for a tokenizer found beside the weights.
      adapt: tensors as the table needs them, from those in the file and the files beside it; of families
        that are read alone.
      prepare: a `Pretrained` to export, written in the parameters that the family has.
      notes: what the library does otherwise with a `Pretrained`'s texts and pictures, in sentences.
    """

    name: str
    models: tuple[type, ...]
    image_towers: tuple[type, ...]
    weights_file: str
    claims: Callable[[Description], bool]
    model: Callable[[Description], Model]
    table: Callable[[Model], Table]
    nearest: Callable[[Model], Model]
    describe: Callable[[Any], dict[str, Any]]
    resize: Callable[[Description], Resize]
    tokens: Callable[[Description], dict[str, Any]]
    adapt: Callable[[Tensors, Mapping[str, Any]], Tensors] = lambda tensors, files: tensors
    prepare: Callable[[Any], Any] = lambda pretrained: pretrained
    notes: Callable[[Any], list[str]] = lambda pretrained: []


def field(config: Mapping[str, Any], name: str, where: str) -> Any:
    """A value of a configuration file that must be there."""
    if name not in config:
        raise ClipjaxError(f"{where} lacks {name!r}")
    return config[name]


ANY = ()
"""In `refuse_unknown`: every value of the field is accepted (it is read, or changes no output)."""


def refuse_unknown(config: Mapping[str, Any], where: str, **known: tuple[Any, ...]) -> None:
    """Refuses what a configuration file says and nobody here has read.

    Args:
      config: a part of the file.
      where: how messages call it.
      **known: by field, the values accepted; `ANY`: all.

    Raises:
      ClipjaxError: a field is unknown, or has a value that is not supported.
    """
    for name, value in config.items():
        if name not in known:
            raise ClipjaxError(
                f"{where}: {name}={value!r} is not known here, and may change what the model "
                f"computes{did_you_mean(name, known)}"
            )
        if known[name] and value not in known[name]:
            raise ClipjaxError(
                f"{where}: {name}={value!r} is not supported here "
                f"(only {' or '.join(map(repr, known[name]))})"
            )


def differences(model: Any, nearest: Any, where: str = "model") -> list[str]:
    """What of a model a family has otherwise, field by field, apart from what changes no output.

    Args:
      model: the model.
      nearest: the one most like it that the family can express.
      where: how messages call it.
    """
    if type(model) is not type(nearest):
        return [f"{where}, a {type(model).__name__}: only {type(nearest).__name__}"]
    found: list[str] = []
    for f in dataclasses.fields(model):
        ours, theirs = getattr(model, f.name), getattr(nearest, f.name)
        if dataclasses.is_dataclass(ours):
            found += differences(ours, theirs, f"{where}.{f.name}")
        elif f.name not in _NO_ARCHITECTURE and not _is_idle(model, f.name):
            known = f.name in ("logit_bias_init", "layer_scale") and None not in (ours, theirs)
            if not known and not _equal(ours, theirs):
                found.append(f"{where}.{f.name}={ours!r}: there it is {theirs!r}")
    for name in ("hidden", "num_heads", "heads", "has_class"):  # what None in a field stands for
        ours, theirs = getattr(model, name, None), getattr(nearest, name, None)
        if ours is not None and theirs is not None and ours != theirs:
            found.append(f"{where}: {name} {ours}, there {theirs}")
    return found


def _is_idle(tower: Any, name: str) -> bool:
    """Whether a tower's field says nothing, because of how it pools."""
    return (
        (name == "pad_id" and pads_are_unseen(tower))
        or (name == "eos_id" and tower.pool != "eos")
        or (name == "class_position" and tower.pool != "class")
    )


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, float) and isinstance(b, float):
        return bool(np.isclose(a, b, rtol=1e-6, atol=0))
    return a == b


def pads_are_unseen(text: Any) -> bool:
    """Whether the pooled vector cannot depend on padding, so that `pad_id` may be left out."""
    return text.causal and text.pool == "eos"


def square(image: Any) -> int:
    """The side of an image tower's pictures, which must be square."""
    height, width = image.image_shape
    if height != width:
        raise ClipjaxError(f"model.image.image_size={image.image_size}: only squares")
    return height


def side_of(places: int, table: str) -> int:
    """The side of the square that a table of positions is for.

    Raises:
      ClipjaxError: it is for none.
    """
    side = math.isqrt(max(places, 0))
    if side**2 != places or not places:
        raise ClipjaxError(
            f"tensor {table!r} has positions for {places} places, which make no square"
        )
    return side


def three(values: Any, where: str) -> tuple[float, float, float]:
    """Three numbers of a configuration file, one a channel."""
    try:
        red, green, blue = map(float, values)
    except (TypeError, ValueError) as error:
        raise ClipjaxError(f"{where}={values!r} must be three numbers, one a channel") from error
    return red, green, blue
