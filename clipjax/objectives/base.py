"""Objective: what a run minimises. Objectives add and scale: `Softmax() + 0.5 * Sigmoid()`.

There are two kinds. An `Objective` sees the whole batch at once, since its examples are compared
with each other. A `PerExample` objective is a sum over examples, each seen alone, so it can be taken a
micro-batch at a time and what it needs of the model (features of every token) is never held for the whole batch.
"""

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
Totals = dict[str, Any]
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

    @property
    def needs(self) -> frozenset[str]:
        """What it asks of the model besides embeddings, as keywords of the model's `__call__`: "captions", "tokens"."""
        return frozenset()

    def split(self) -> tuple[Objective | None, PerExample]:
        """The part that compares examples with each other (or None), and the part that sees each one alone."""
        return self, PerExampleSum(())

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
class PerExample(Objective):
    """A loss whose every example is seen alone; define `local`, and `totals` if it is a mean.

    The value must add up: with the same totals, the losses (and metrics) of parts of a batch sum to
    those of the whole batch. So divide by totals of the batch, not by the number of rows at hand.
    """

    def totals(self, batch: Batch) -> Totals:
        """What is summed over the global batch and known before any forward pass: what to divide by."""
        return {"examples": jnp.asarray(batch["text"].shape[0], jnp.float32)}

    def local(
        self, encoded: Encoded, batch: Batch, totals: Totals, engine: PairEngine
    ) -> tuple[jax.Array, Metrics]:
        """These examples' part of the loss (scalar, float32), and of scalars worth logging.

        Args:
          encoded: the model's output on some examples, with what `needs` names.
          batch: these examples.
          totals: what `totals` returned for the global batch.
          engine: has the mesh.
        """
        raise NotImplementedError

    def __call__(self, encoded, batch, engine):
        return self.local(encoded, batch, self.totals(batch), engine)

    def split(self):
        return None, self


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
        return _weighted(self.terms, lambda _, objective: objective(encoded, batch, engine))

    @property
    def needs(self):
        return frozenset[str]().union(*(term.objective.needs for term in self.terms))

    def split(self):
        local = tuple(t for t in self.terms if isinstance(t.objective, PerExample))
        coupled = tuple(t for t in self.terms if not isinstance(t.objective, PerExample))
        return Sum(coupled) if coupled else None, PerExampleSum(local)

    def init_state(self, params):
        return {name: term.objective.init_state(params) for name, term in _named(self.terms)}

    def prepare(self, state, params, batch, encode):
        new = {}
        for name, term in _named(self.terms):
            new[name], batch = term.objective.prepare(state[name], params, batch, encode)
        return new, batch


@dataclasses.dataclass(frozen=True)
class PerExampleSum(PerExample):
    """The `PerExample` terms of a `Sum`; without any, it is zero and asks for nothing."""

    terms: tuple[Term, ...]

    @property
    def needs(self):
        return Sum(self.terms).needs

    def totals(self, batch):
        return {name: term.objective.totals(batch) for name, term in _named(self.terms)}

    def local(self, encoded, batch, totals, engine):
        return _weighted(
            self.terms,
            lambda name, objective: objective.local(encoded, batch, totals[name], engine),
        )


def _weighted(
    terms: tuple[Term, ...], value: Callable[[str, Any], tuple[jax.Array, Metrics]]
) -> tuple[jax.Array, Metrics]:
    total = jnp.zeros((), jnp.float32)
    metrics: Metrics = {}
    for name, term in _named(terms):
        loss, scalars = value(name, term.objective)
        total = total + term.weight * loss
        metrics |= {f"loss/{name}": loss} | scalars
    return total, metrics


def _named(terms: tuple[Term, ...]) -> list[tuple[str, Any]]:
    """Terms by class name in lower case; those of one class are numbered."""
    names = [type(t.objective).__name__.lower() for t in terms]
    return [
        (n if names.count(n) == 1 else f"{n}_{names[:i].count(n)}", t)
        for i, (n, t) in enumerate(zip(names, terms, strict=True))
    ]


def _terms(objective: Objective) -> tuple[Term, ...]:
    return objective.terms if isinstance(objective, Sum) else (Term(1.0, objective),)
