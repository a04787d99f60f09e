"""Objective: what a run minimises. Objectives add and scale: `Softmax() + 0.5 * Sigmoid()`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from clipjax.batch import Batch, Encoded
from clipjax.component import Component
from clipjax.objectives.pairs import PairEngine

Metrics = dict[str, jax.Array]
EncodeFn = Callable[[Any, Batch], Encoded]


@dataclasses.dataclass(frozen=True)
class Objective(Component):
    """A loss over a whole batch, and the state it keeps between steps, if any.

    State that is no parameter (a teacher's weights, a queue) is declared by `init_state`, lives in
    the train state, and is sharded, checkpointed and resumed with it.
    """

    def __call__(
        self, encoded: Encoded, batch: Batch, engine: PairEngine
    ) -> tuple[jax.Array, Metrics]:
        """The loss (scalar, float32, a mean over the global batch) and scalars worth logging.

        Args:
          encoded: the model's output on the global batch.
          batch: the global batch.
          engine: how pairs are reduced on this mesh.
        """
        raise NotImplementedError

    def init_state(self, params: Any) -> Any:
        """The state this objective keeps, given the model's initial parameters; `{}` for none."""
        return {}

    def prepare(self, state: Any, params: Any, batch: Batch, encode: EncodeFn) -> tuple[Any, Batch]:
        """Advances the state and adds what it provides (teacher embeddings, ...) to the batch.

        Runs before the loss and outside differentiation.

        Args:
          state: what `init_state` or the last `prepare` returned.
          params: the model's current parameters.
          batch: the global batch.
          encode: `encode(params, batch) -> Encoded`, in inference mode.
        """
        return state, batch

    def __add__(self, other: Objective) -> Sum:
        return Sum(_terms(self) + _terms(other))

    def __mul__(self, weight: float) -> Sum:
        return Sum(tuple(Term(weight * t.weight, t.objective) for t in _terms(self)))

    __rmul__ = __mul__


@dataclasses.dataclass(frozen=True)
class Term(Component):
    """One objective and its weight in a sum."""

    weight: float
    objective: Objective


@dataclasses.dataclass(frozen=True)
class Sum(Objective):
    """A weighted sum of objectives. Metrics are the terms' own, plus each term's loss by name."""

    terms: tuple[Term, ...]

    def __call__(self, encoded, batch, engine):
        total = jnp.zeros((), jnp.float32)
        metrics: Metrics = {}
        for name, term in self._named():
            loss, scalars = term.objective(encoded, batch, engine)
            total = total + term.weight * loss
            metrics |= {f"loss/{name}": loss} | scalars
        return total, metrics

    def init_state(self, params):
        return {name: term.objective.init_state(params) for name, term in self._named()}

    def prepare(self, state, params, batch, encode):
        new = {}
        for name, term in self._named():
            new[name], batch = term.objective.prepare(state[name], params, batch, encode)
        return new, batch

    def _named(self) -> list[tuple[str, Term]]:
        """Terms by class name in lower case; a repeated class gets its position appended."""
        names = [type(t.objective).__name__.lower() for t in self.terms]
        return [
            (n if names.count(n) == 1 else f"{n}_{i}", t)
            for i, (n, t) in enumerate(zip(names, self.terms, strict=True))
        ]


def _terms(objective: Objective) -> tuple[Term, ...]:
    return objective.terms if isinstance(objective, Sum) else (Term(1.0, objective),)
