"""From a checkpoint to the state of the run as it is configured now.

Some settings may change while a run goes on. What the checkpoint lacks for them is made from what it has: a new
average begins with the weights, a stage that has just been switched on with its first state. What is no longer wanted
is left out. Another optimizer or another model is refused.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from clipjax.checkpoint import Checkpoints
from clipjax.errors import ClipjaxError
from clipjax.meta import Meta
from clipjax.optim import Optimizer
from clipjax.params import map_with_path, paths

log = logging.getLogger(__name__)
COPIES = {"ema": "params", "ema_state": "model_state"}
"""Part of the state -> the part that it begins as a copy of."""
DROPPED = r"^(ema|ema_state|averages|guard|opt_state|objective_state)/"
"""What a checkpoint may have that the run no longer asks for."""


def restore(checkpoints: Checkpoints, step: int, target: Any, optimizer: Optimizer) -> Any:
    """The state of `step`, fitted to what the run asks for now.

    Args:
      checkpoints: of the run.
      step: which one.
      target: TrainState of ShapeDtypeStructs with shardings.
      optimizer: the run's, as it is configured now.

    Raises:
      ClipjaxError: the checkpoint is of another model, optimizer or objective.
      DamagedCheckpoint: it cannot be read.
    """
    meta = checkpoints.meta(step)
    _same_optimizer(meta, optimizer, checkpoints.folder / str(step))
    shapes = checkpoints.saved_shapes(step)
    layout = dict(paths(target))
    guard = [name for name in layout if name.startswith("guard/")]
    if any(shapes.get(name) != tuple(layout[name].shape) for name in guard):
        shapes = {n: s for n, s in shapes.items() if not n.startswith("guard/")}  # begins anew
    saved = shapes.keys()
    place = {name: _place(name, meta, saved) for name in layout}
    made = {name for name in layout if place[name] not in saved and _made_from(name, layout)}
    read = checkpoints.read(
        step, {place[name]: leaf for name, leaf in layout.items() if name not in made}
    )
    if begun := sorted({"/".join(name.split("/")[:2]) for name in made}):
        log.info("new since step %d: %s", step, ", ".join(begun))
    unused = saved - set(place.values())
    if left := sorted(name for name in unused if not re.search(DROPPED, name)):
        raise ClipjaxError(
            f"checkpoint {checkpoints.folder / str(step)} is of another model: it has {left[0]!r}, which "
            "the run's has not"
        )
    if unused:
        parts = sorted({name.split("/")[0] for name in unused})
        log.info("of step %d no longer used: %s", step, ", ".join(parts))

    def leaf(name: str, wanted: jax.ShapeDtypeStruct) -> jax.Array:
        if name not in made:
            return read[place[name]]
        source = _made_from(name, layout)
        value = jnp.copy(read[place[source]]) if source in layout else jnp.zeros(wanted.shape)
        return jax.device_put(value.astype(wanted.dtype), wanted.sharding)

    return map_with_path(leaf, target)


def _made_from(name: str, layout: dict[str, Any]) -> str:
    """What a leaf that the checkpoint lacks begins as: the path of another, "0", or "" if it must be there."""
    part, _, rest = name.partition("/")
    if part in COPIES:
        return f"{COPIES[part]}/{rest}"
    if part == "averages":  # averages/<decay>/<path>
        return "params/" + rest.partition("/")[2]
    if name == "opt_state/hold/count":
        return "opt_state/lr/count"
    return "0" if part == "guard" else ""


def _place(name: str, meta: Meta, saved: Iterable[str]) -> str:
    """Where a leaf is in a checkpoint; format 1 knew the optimizer's stages by their position."""
    stage = re.match(r"opt_state/(rule|hold|lr)(/|$)", name)
    if meta.format > 1 or stage is None:
        return name
    rule = 1 if meta.run["optimizer"].get("clip_norm") else 0
    held = {f"opt_state/{rule + 3}/count", f"opt_state/{rule + 4}/count"} <= set(saved)
    position = {"rule": rule, "hold": rule + 3 if held else -1, "lr": rule + 3 + held}[stage[1]]
    return f"opt_state/{position}" + name[stage.end(1) :]


def _same_optimizer(meta: Meta, optimizer: Optimizer, where: Any) -> None:
    before = str(meta.run["optimizer"]["@type"]).rsplit(":", 1)[-1]
    if before != type(optimizer).__name__:
        raise ClipjaxError(
            f"checkpoint {where} is of another optimizer: {before} there and {type(optimizer).__name__} "
            "here. Keep it, or begin a new run with these weights (start=StartFrom(...))"
        )
