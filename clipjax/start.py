"""Start: what a run begins with instead of random weights.

    start=StartFrom("models/vit_b16", fresh="^(text|text_projection)/")   # LiT: only the image tower is kept
    start=Together(parts=(StartFrom("models/dinov3", fresh=...), StartFrom("models/xlmr", fresh=...)))
    start=Average(("runs/a", "runs/b"), weights=(0.5, 0.5))               # WiSE-FT, model soups

docs/transfer.md has the recipes.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from clipjax.component import Component
from clipjax.errors import ClipjaxError, did_you_mean
from clipjax.params import map_with_path, paths
from clipjax.pretrained import Pretrained

log = logging.getLogger(__name__)
Opener = Callable[[str], Pretrained]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Start(Component):
    """Role: where the first weights come from. A run that continues its own checkpoint does not ask."""

    fresh: str = ""
    """Regular expression for the parameters that stay random; all others must be there."""
    into: str = ""
    """Path under which the run's model holds what is opened: "base" for `Lora`; "" is the whole model."""

    def open(self, opener: Opener) -> Pretrained:
        """The model whose weights are taken.

        Args:
          opener: opens the model at a path: `clipjax.open_pretrained`.
        """
        raise NotImplementedError

    def adapted(self, opened: Pretrained, wanted: dict[str, Any]) -> Pretrained:
        """The opened model as the run's parameters `wanted`, by path, need it; as it is, by default."""
        return opened

    def leaves(
        self, params: Any, model_state: Any, opener: Opener
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The arrays to begin with, by their paths in the run's model.

        Args:
          params: the run's parameters (arrays or ShapeDtypeStructs).
          model_state: the rest of its arrays.
          opener: as for `open`.

        Returns:
          (of the parameters, of the model state).

        Raises:
          ClipjaxError: a parameter that is not `fresh` is missing there or has another shape.
        """
        try:
            fresh = re.compile(self.fresh) if self.fresh else None
        except re.error as error:
            raise ClipjaxError(
                f"start.fresh={self.fresh!r}: no regular expression: {error}"
            ) from error
        opened = self.adapted(self.open(opener), dict(paths(params)))
        taken: list[dict[str, Any]] = []
        random: list[str] = []
        for wanted, given in ((params, opened.params), (model_state, opened.model_state)):
            there = {self._placed(name): leaf for name, leaf in paths(given)}
            found: dict[str, Any] = {}
            for name, leaf in paths(wanted):
                if fresh is not None and fresh.search(name):
                    random.append(name)
                    continue
                found[name] = _fitting(name, leaf, there)
            unused = [name for name in there if name not in found]
            if unused:
                log.info("%d arrays of the start are not used: %s", len(unused), _some(unused))
            taken.append(found)
        if fresh is not None and not random:
            raise ClipjaxError(
                f"start.fresh={self.fresh!r} matches no parameter"
                + did_you_mean(self.fresh, [name for name, _ in paths(params)])
            )
        if random:
            log.info("%d parameters start at random: %s", len(random), _some(random))
        return taken[0], taken[1]

    def _placed(self, name: str) -> str:
        return f"{self.into}/{name}" if self.into else name


@dataclasses.dataclass(frozen=True)
class StartFrom(Start):
    """The weights of one model: a run, one of its checkpoints, or a model's folder."""

    path: str
    """What `clipjax.open_pretrained` opens."""
    resample: bool = False
    """Whether learned position embeddings come to the run's image size (bicubic, antialiased) and
    context length (shorter alone): for a last epoch at 336 pixels, say."""

    def open(self, opener):
        return opener(self.path)

    def adapted(self, opened, wanted):
        if not self.resample:
            return opened
        from clipjax.interop.resample import with_context_length, with_image_size

        model: Any = opened.model
        shapes = {name: tuple(leaf.shape) for name, leaf in wanted.items()}
        have = dict(paths(opened.params))
        for name in ("image/positions", "image/pool/positions"):
            there = shapes.get(self._placed(name))
            if name in have and there is not None and there[0] != have[name].shape[0]:
                side = self._side(name, have[name].shape[0], there[0], model.image.grid)
                size = model.image.image_shape[0] * side // model.image.grid[0]
                opened = with_image_size(opened, size)
        there = shapes.get(self._placed("text/positions"))
        if there is not None and "text/positions" in have:
            missing = have["text/positions"].shape[0] - there[0]
            if missing:
                opened = with_context_length(opened, opened.context_length - missing)
        return opened

    @staticmethod
    def _side(name: str, rows: int, new_rows: int, grid: tuple[int, int]) -> int:
        """The side of the square grid that a table of `new_rows` positions has."""
        places = new_rows - (rows - grid[0] * grid[1])
        side = math.isqrt(max(places, 0))
        if side**2 != places or not places or grid[0] != grid[1]:
            raise ClipjaxError(
                f"start.resample: {name!r} has {rows} positions in the start and {new_rows} in the run's "
                "model: only square grids are resampled"
            )
        return side


@dataclasses.dataclass(frozen=True)
class Average(Start):
    """A weighted mean of the weights of models of one architecture.

    Of a model before and after fine-tuning, it is WiSE-FT (arXiv:2109.01903); of several fine-tuned
    models, a model soup (arXiv:2203.05482); of the checkpoints of one run, weight averaging.
    """

    models: tuple[str, ...]
    """Runs, checkpoints or models' folders."""
    weights: tuple[float, ...] = ()
    """One for each, adding up to 1; () weighs all the same."""

    def __post_init__(self) -> None:
        if len(self.models) < 2:
            raise ClipjaxError(f"Average: models={self.models}: name at least two")
        if self.weights and len(self.weights) != len(self.models):
            raise ClipjaxError(
                f"Average: {len(self.weights)} weights for {len(self.models)} models: give one each"
            )
        if self.weights and abs(sum(self.weights) - 1) > 1e-6:
            raise ClipjaxError(
                f"Average: weights={self.weights} add up to {sum(self.weights):g}: make it 1"
            )

    def open(self, opener):
        weights = self.weights or (1 / len(self.models),) * len(self.models)
        first = opener(self.models[0]).folded()
        mean = _scaled(first, weights[0])
        # One model at a time: no more than two are held.
        for path, weight in zip(self.models[1:], weights[1:], strict=True):
            other = opener(path).folded()
            _same(first, self.models[0], other, path)
            mean = jax.tree.map(lambda m, x, w=weight: m + w * _float(x), mean, _arrays(other))
        params, model_state = jax.tree.map(lambda m, x: m.astype(x.dtype), mean, _arrays(first))
        return dataclasses.replace(first, params=params, model_state=model_state)


@dataclasses.dataclass(frozen=True)
class Together(Start):
    """Weights of several models: an image tower of one, a text tower of another.

    Each part's `fresh` says what it does not bring; what none brings is random.
    """

    parts: tuple[Start, ...] = ()
    """The starts, at least two."""

    def __post_init__(self) -> None:
        if len(self.parts) < 2:
            raise ClipjaxError(f"Together: parts={self.parts}: name at least two")
        if self.fresh or self.into:
            raise ClipjaxError("Together: fresh and into are settings of its parts")

    def leaves(self, params, model_state, opener):
        taken: list[dict[str, Any]] = [{}, {}]
        for part in self.parts:
            for mine, theirs in zip(taken, part.leaves(params, model_state, opener), strict=True):
                twice = sorted(mine.keys() & theirs.keys())
                if twice:
                    raise ClipjaxError(
                        f"Together: two parts bring {twice[0]!r}: let the fresh of all but one match it"
                    )
                mine |= theirs
        return taken[0], taken[1]


def overlay(tree: Any, leaves: dict[str, Any]) -> Any:
    """`tree` with the leaves at these paths replaced; dtypes stay those of `tree`."""
    return map_with_path(
        lambda name, leaf: leaves[name].astype(leaf.dtype) if name in leaves else leaf, tree
    )


def _fitting(name: str, leaf: Any, there: dict[str, Any]) -> Any:
    if name not in there:
        raise ClipjaxError(
            f"the start has no {name!r}{did_you_mean(name, there)} (start.fresh is a regular "
            "expression for what may begin at random)"
        )
    if tuple(there[name].shape) != tuple(leaf.shape):
        raise ClipjaxError(
            f"{name!r} has shape {tuple(there[name].shape)} in the start and {tuple(leaf.shape)} in "
            "the run's model: make them equal, or let start.fresh match it"
        )
    return there[name]


def _arrays(opened: Pretrained) -> tuple[Any, Any]:
    return opened.params, opened.model_state


def _scaled(opened: Pretrained, weight: float) -> Any:
    return jax.tree.map(lambda x: weight * _float(x), _arrays(opened))


def _float(x: Any) -> np.ndarray:
    return np.asarray(x, np.float64)


def _same(first: Pretrained, name: str, other: Pretrained, other_name: str) -> None:
    ours, theirs = (
        {k: tuple(v.shape) for k, v in paths(_arrays(opened))} for opened in (first, other)
    )
    for path in sorted(ours.keys() | theirs.keys()):
        if ours.get(path) != theirs.get(path):
            raise ClipjaxError(
                f"{name} and {other_name} cannot be averaged: {path!r} is "
                f"{ours.get(path, 'missing')} in the first and {theirs.get(path, 'missing')} in the other"
            )


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
