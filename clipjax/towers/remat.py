"""What blocks keep for the backward pass, what they make again, and what waits in the host's memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from clipjax.errors import ClipjaxError, did_you_mean
from clipjax.towers.attention import CUDNN

NAMES = {
    "normed": "what goes into a sub-layer, after its norm",
    "moments": "the norms' means and deviations",
    "q": "queries",
    "k": "keys",
    "v": "values",
    "lse": "the softmax's denominators",
    "attended": "what attention gives, before the output projection",
    "residual": "the stream between two sub-layers",
    "hidden": "the MLP's hidden channels before the activation",
    "activated": "and after it",
}
"""The named arrays of a block. Besides these, what a block got is kept whatever the policy."""

KEPT = {
    # What costs a matrix product to make again.
    "lean": ("q", "k", "v", "moments", "lse", "attended", "residual", "hidden"),
    "norms": tuple(name for name in NAMES if name != "normed"),
    "activation": tuple(name for name in NAMES if name != "activated"),
    "full": (),
}
POLICIES = ("none", "dots", *KEPT)


def check_remat(config: Any) -> None:
    """Refuses `remat` and `offload` that name no policy and no array.

    Raises:
      ClipjaxError: says which, and what there is.
    """
    owner = type(config).__name__
    if config.remat not in POLICIES:
        _check_names(f"{owner}.remat", config.remat, POLICIES)
    if config.offload:
        _check_names(f"{owner}.offload", config.offload, ())
        if config.remat in ("none", "dots"):
            raise ClipjaxError(
                f"{owner}.offload={config.offload!r} is for policies that name what they keep: set "
                f"{owner}.remat to 'lean', 'full' or names of your own, not {config.remat!r}"
            )


def rematerialized(step: Callable[..., Any], config: Any, looped: bool) -> Callable[..., Any]:
    """A block's step, in a loop or not, under the policy of a configuration with remat and offload."""
    if config.remat == "none":
        return step
    # Inside a loop the compiler cannot undo the recomputation: no barriers against that needed.
    return jax.checkpoint(step, policy=_policy(config), prevent_cse=not looped)


def _policy(config: Any) -> Any:
    policies = jax.checkpoint_policies
    if config.remat == "dots":
        return policies.dots_with_no_batch_dims_saveable
    offload = _split(config.offload)
    named = KEPT.get(config.remat, _split(config.remat))
    kept = [name for name in named if name not in offload]
    if not offload:
        by_name = policies.save_only_these_names(*kept)
        # What the kernel gives cannot be named before it leaves the kernel.
        return policies.save_from_both_policies(by_name, _cudnn) if "attended" in kept else by_name
    return policies.save_and_offload_only_these_names(
        names_which_can_be_saved=kept,
        names_which_can_be_offloaded=list(offload),
        offload_src="device",
        offload_dst="pinned_host",
    )


def _cudnn(primitive: Any, *_: Any, **__: Any) -> bool:
    return primitive.name == CUDNN


def _split(names: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in names.split(",") if name.strip())


def _check_names(field: str, value: str, others: tuple[str, ...]) -> None:
    for name in _split(value) or (value,):
        if name not in NAMES:
            raise ClipjaxError(
                f"{field}={value!r}: {name!r} is unknown{did_you_mean(name, [*others, *NAMES])}"
            )
