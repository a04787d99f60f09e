"""Evaluator: figures of a model that are not its loss, and how often to take them.

An evaluator of one's own is one class:

    @dataclasses.dataclass(frozen=True)
    class Brightness(Evaluator):
        source: Source

        def run(self, predictor):
            return {f"{self.name}/gap": ...predictor.encode_image(pictures)...}
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from clipjax.component import Component
from clipjax.errors import ClipjaxError
from clipjax.evals.once import Once
from clipjax.optim.duration import Every as Every
from clipjax.predictor import Predictor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluator(Component):
    """Role: takes a `Predictor`, gives named figures.

    A subclass has `run`; or, where it loads data, a `Runner` of its own, which `build` makes and
    which keeps the data between evaluations.
    """

    every: Every | None = None
    """When to run during training; None: only at the end."""

    @property
    def name(self) -> str:
        """First part of the names of its figures; no two evaluators of a run share one.

        The class's name in lower case. A subclass that may occur twice makes it a field instead.
        """
        return type(self).__name__.lower()

    def run(self, predictor: Predictor) -> dict[str, float]:
        """The figures, under names that begin with `{self.name}/`."""
        if type(self).build is Evaluator.build:
            raise NotImplementedError(f"{type(self).__name__} has neither run nor build")
        return self.build()(predictor)

    def build(self) -> Runner:
        """What evaluates again and again with `runner(predictor)`."""
        return Runner(self)


def require_at_least(evaluator: Evaluator, least: int, *fields: str) -> None:
    """Refuses fields below `least`; None passes.

    Raises:
      ClipjaxError: one is; it is named.
    """
    for field in fields:
        value = getattr(evaluator, field)
        if value is not None and value < least:
            raise ClipjaxError(f"{evaluator.name}: {field}={value} must be at least {least}")


class Runner:
    """An evaluator at work. Calls `evaluator.run`, unless a subclass says otherwise.

    Attributes:
      once: where splits and embeddings come from, so that runners of one evaluation make each once.
      figures: as last evaluated; those that are a `Figure` know their examples, for intervals.

    What comes out of `prepare` and `__call__` names the evaluator: a `ClipjaxError` keeps its kind
    and gets the name put before its message; any other exception, a bug, gets it as a note.
    """

    def __init__(self, evaluator: Any):
        self.evaluator = evaluator
        self.once = Once()
        self.figures: dict[str, float] = {}
        self._loaded_for: tuple[int, int] | None = None

    def __call__(self, predictor: Predictor) -> dict[str, float]:
        """The evaluator's figures."""
        self.prepare(predictor)
        with self._named():
            self.figures = dict(self.evaluate(predictor))
            return {name: float(value) for name, value in self.figures.items()}

    def prepare(self, predictor: Predictor) -> None:
        """Loads what is needed, once for pictures and texts of one size.

        A run does so before it trains, for faults to show early.
        """
        needed = (predictor.image_size, predictor.context_length)
        if self._loaded_for == needed:
            return
        with self._named():
            self.load(predictor)
        self._loaded_for = needed

    def load(self, predictor: Predictor) -> None:
        """Loads what `evaluate` needs; for subclasses."""

    def evaluate(self, predictor: Predictor) -> dict[str, float]:
        """The figures, each a `Figure` where it is worked out from examples; for subclasses."""
        return self.evaluator.run(predictor)

    def chance(self) -> dict[str, float]:
        """What a random order would score, by the names of the figures where it is known.

        Asked after `prepare`; reports show it beside the figures.
        """
        return {}

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        name = self.evaluator.name
        try:
            yield
        except ClipjaxError as error:
            raise type(error)(f"evaluator {name!r}: {error}") from error
        except Exception as error:
            error.add_note(f"raised by the evaluator {name!r} ({type(self.evaluator).__name__})")
            raise


def build_runners(evaluators: Sequence[Evaluator]) -> list[tuple[Evaluator, Runner]]:
    """Each evaluator with its runner, in the given order; what several need is made once for all.

    Raises:
      ClipjaxError: a name is empty, holds a "/", or is used twice.
    """
    names = [evaluator.name for evaluator in evaluators]
    for name in names:
        if not name or "/" in name:
            raise ClipjaxError(f"evaluator name {name!r}: give one that is not empty, without '/'")
        if names.count(name) > 1:
            raise ClipjaxError(
                f"{names.count(name)} evaluators are named {name!r}: their figures would overwrite "
                f"each other; give one of them another name, such as name={name + '_2'!r}"
            )
    runners = [evaluator.build() for evaluator in evaluators]
    once = Once()
    for runner in runners:
        runner.once = once
    return list(zip(evaluators, runners, strict=True))
