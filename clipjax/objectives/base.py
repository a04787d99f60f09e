"""Objective: what a run minimizes. Objectives add and scale: `Softmax() + 0.5 * Sigmoid()`.

There are three kinds. An `Objective` sees the whole batch at once, since its examples are compared
with each other. A `PerExample` objective is a sum over examples, each seen alone, so it can be taken a
micro-batch at a time, and what it needs of the model (features of every token) is never held for the
whole batch. A `Chosen` objective looks at the whole batch to choose rows, and then at each example
beside the rows that were chosen for it.

The life of a step: `prepare` (what it takes besides the model's output: a teacher's embeddings, a
queue), then the loss, then `advance` (its state after the step). A sum is the sum of what its terms
give alone: each term has its own state, its own `aux`, its own key.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from clipjax.batch import PAIR, Batch, Encoded, SpecialTokens, parse
from clipjax.component import Component
from clipjax.errors import ClipjaxError
from clipjax.objectives.pairs import PairEngine
from clipjax.objectives.ramp import Ramp
from clipjax.objectives.teachers import Teacher

Metrics = dict[str, jax.Array]
Totals = dict[str, Any]
Results = dict[str, Any]
Outcome = tuple[jax.Array, Metrics] | tuple[jax.Array, Metrics, Results]
"""Loss, scalars worth logging and, for `advance`, arrays by name, each with a row for each example."""


@struct.dataclass
class Aux:
    """What `prepare` made for one term.

    Attributes:
      rows: arrays with the batch as their leading axis.
      shared: arrays of any other shape, the same for all examples: a queue, a share.
    """

    rows: dict[str, Any] = struct.field(default_factory=dict)
    shared: dict[str, Any] = struct.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a run is, for an objective that keeps state.

    Attributes:
      examples: records in the data set; 0 where nobody knows, in a stream of files.
      batch_size: rows of the global batch.
      width: `width("image")` is the number of dimensions of that row of the model's output.
    """

    examples: int
    batch_size: int
    width: Callable[[str], int]


def _no_encoder(*_: Any) -> Encoded:
    raise ClipjaxError("context.encode is there in `prepare` alone")


def _no_head(name: str, *_: Any) -> Any:
    raise ClipjaxError(
        f"the objective calls the head {name!r}, and this model has none: wrap it in "
        "clipjax.models.Headed with a head of that name"
    )


@dataclasses.dataclass(frozen=True)
class Context:
    """What an objective is given besides the model's output.

    Attributes:
      engine: how pairs are reduced on this mesh.
      batch: the global batch (for `PerExample`, some of its examples).
      step: [] int32, finished steps.
      key: PRNG key of this step and this term; None: nothing is to be drawn.
      tokens: special tokens of the run's tokenizer; None: unknown.
      aux: what `prepare` made for this term.
      encode: `encode(teacher, needs) -> Encoded`, of the batch, in inference mode and without
        gradient; in `prepare` alone.
      head: `head(name, *arrays)`, a head of the model (`clipjax.models.Headed`) applied with its
        present weights, differentiably; in the loss alone.
    """

    engine: PairEngine = dataclasses.field(default_factory=PairEngine)
    batch: Batch = dataclasses.field(default_factory=dict)
    step: Any = 0
    key: jax.Array | None = None
    tokens: SpecialTokens | None = None
    aux: Aux = dataclasses.field(default_factory=Aux)
    encode: Callable[[Teacher, frozenset[str]], Encoded] = _no_encoder
    head: Callable[..., Any] = _no_head


@dataclasses.dataclass(frozen=True)
class Objective(Component):
    """A loss over a whole batch, and the state it keeps between steps, if any."""

    def __call__(self, encoded: Encoded, context: Context) -> Outcome:
        """The loss (scalar, float32, a mean over the global batch) and scalars worth logging.

        A third thing may be returned: results for `advance`, arrays [B, ...] by name.

        Args:
          encoded: the model's output on the global batch: what `needs` names.
          context: the batch, the pair engine, and more.
        """
        raise NotImplementedError

    @property
    def needs(self) -> frozenset[str]:
        """What it asks of the model, as names of `Encoded.rows`: inputs of the batch are embedded."""
        return PAIR

    @property
    def fuse_needs(self) -> frozenset[str]:
        """What it asks for one example at a time, which is never held for the whole batch (see `Chosen`)."""
        return frozenset()

    @property
    def teachers(self) -> tuple[Teacher, ...]:
        """The encoders beside the model that `prepare` asks for."""
        return ()

    def init_state(self, setting: Setting) -> Any:
        """The state to begin with; `{}` for none.

        It is sharded, checkpointed and resumed with the run. What lies below a key `rows` has a leading
        axis that is split over the devices as the batch is: a queue, a table over the data set
        (`pad_rows` makes its length divisible). All else is laid out by the run's sharding rules.
        """
        return {}

    def prepare(self, state: Any, context: Context) -> Aux:
        """What this term takes besides the model's output; before the loss, without gradient."""
        return Aux()

    def advance(self, state: Any, results: Results, context: Context) -> Any:
        """The state after the step.

        Args:
          state: the present one.
          results: what the loss returned as such, without gradient.
          context: of the global batch.
        """
        return state

    def __add__(self, other: Objective) -> Sum:
        return Sum(_terms(self) + _terms(other))

    def __radd__(self, other: Any) -> Objective:
        return self if other == 0 else NotImplemented  # what sum() begins with

    def __mul__(self, weight: float | Ramp) -> Sum:
        if isinstance(weight, Ramp):
            return Sum((Term(1.0, self, weight),))
        return Sum(tuple(dataclasses.replace(t, weight=weight * t.weight) for t in _terms(self)))

    __rmul__ = __mul__


@dataclasses.dataclass(frozen=True)
class Pairwise(Objective):
    """An objective that compares two sides of the model's output, row by row of the batch.

    `Softmax()` compares images with texts; `Softmax("image", "image_2")` two views of an image.
    """

    first: str = "image"
    """One side of the pairs: a name of the model's output."""
    second: str = "text"
    """The other side."""

    @property
    def needs(self):
        return frozenset({self.first, self.second})


@dataclasses.dataclass(frozen=True)
class PerExample(Objective):
    """A loss whose every example is seen alone; define `local`, and `totals` if it is a mean.

    The value must add up: with the same totals, the losses (and metrics) of parts of a batch sum to
    those of the whole batch. So divide by totals of the batch, not by the number of rows at hand.
    """

    def totals(self, context: Context) -> Totals:
        """What is summed over the global batch and known before any forward pass: what to divide by."""
        rows = jax.tree.leaves(context.batch)[0].shape[0]
        return {"examples": jnp.asarray(rows, jnp.float32)}

    def local(self, encoded: Encoded, context: Context, totals: Totals) -> Outcome:
        """These examples' part of the loss (scalar, float32), and of scalars worth logging.

        Args:
          encoded: the model's output on some examples: what `needs` names.
          context: of these examples.
          totals: what `totals` returned for the global batch.
        """
        raise NotImplementedError

    def __call__(self, encoded, context):
        return self.local(encoded, context, self.totals(context))


@dataclasses.dataclass(frozen=True)
class Chosen(Objective):
    """A loss on each example beside rows of the batch that were chosen for it.

    Image-text matching with drawn negatives, a cross-encoder: what is too dear for all pairs is done
    for a few. `choose` sees the whole batch, on any mesh; `fuse` then sees each example with the rows
    chosen for it, wherever they were, and gradients reach these too. Like a `PerExample`, `fuse` must
    add up over parts of a batch. Under accumulation the chosen inputs are encoded again beside each
    micro-batch, so that no tokens are held for the whole batch.
    """

    @property
    def fuse_needs(self) -> frozenset[str]:
        """What `fuse` reads of its examples, and of the chosen rows, as names of `Encoded.rows`."""
        return frozenset({"image_tokens", "text_tokens"})

    def choose(self, encoded: Encoded, context: Context) -> dict[str, jax.Array]:
        """For each row of the batch, other rows by input.

        Args:
          encoded: what `needs` names, of the global batch; no gradient passes.
          context: of the global batch.

        Returns:
          int32 [B] by the name of an input: `{"text": j}` asks for the text of row j[i] beside row i.
        """
        raise NotImplementedError

    def totals(self, context: Context) -> Totals:
        """As that of `PerExample`."""
        rows = jax.tree.leaves(context.batch)[0].shape[0]
        return {"examples": jnp.asarray(rows, jnp.float32)}

    def fuse(
        self, encoded: Encoded, chosen: dict[str, Encoded], context: Context, totals: Totals
    ) -> Outcome:
        """These examples' part of the loss, and of scalars worth logging.

        Args:
          encoded: what `fuse_needs` names, of these examples.
          chosen: by the name of an input, what `fuse_needs` names of it, of the chosen rows:
            `chosen["text"]["text_tokens"]`.
          context: of these examples.
          totals: what `totals` returned for the global batch.
        """
        raise NotImplementedError

    def __call__(self, encoded, context):
        index = self.choose(jax.lax.stop_gradient(encoded), context)
        chosen = {
            name: Encoded(
                context.engine.rows_at(
                    {need: encoded[need] for need in needs_of(self, name, context.batch)}, rows
                ),
                encoded.shared,
            )
            for name, rows in index.items()
        }
        return self.fuse(encoded, chosen, context, self.totals(context))


@dataclasses.dataclass(frozen=True)
class Term(Component):
    """One objective and its weight in a sum."""

    weight: float
    """What its loss is multiplied by."""
    objective: Objective
    """The objective."""
    ramp: Ramp | None = None
    """A second factor, which follows the step; None: no other."""

    def __post_init__(self):
        if not math.isfinite(self.weight):
            raise ClipjaxError(f"a term's weight is {self.weight}: it must be a finite number")

    def factor(self, step: Any) -> Any:
        """The whole weight after `step` finished steps."""
        return self.weight if self.ramp is None else self.weight * self.ramp.at(step)


@dataclasses.dataclass(frozen=True)
class Sum(Objective):
    """A weighted sum of objectives. Metrics are the terms' own, plus each term's loss by name."""

    terms: tuple[Term, ...]

    def __call__(self, encoded, context):
        parts = leaves(self)
        outcomes = [leaf.objective(encoded, leaf.own(context)) for leaf in parts]
        loss, metrics, results = add_up(parts, context, outcomes)
        return loss, named(metrics), results

    @property
    def needs(self):
        return union(leaf.objective.needs for leaf in leaves(self))

    @property
    def fuse_needs(self):
        return union(leaf.objective.fuse_needs for leaf in leaves(self))

    @property
    def teachers(self):
        return tuple(dict.fromkeys(t for leaf in leaves(self) for t in leaf.objective.teachers))


@dataclasses.dataclass(frozen=True)
class Leaf:
    """An objective that is no sum, as part of one.

    Attributes:
      name: its class in lower case; those of one class are numbered.
      number: its place among the terms, or None if there are no others.
      terms: the terms that it stands in, from the outermost on; their factors' product is its weight.
      objective: the objective.
    """

    name: str
    number: int | None
    terms: tuple[Term, ...]
    objective: Any

    def weight(self, step: Any) -> Any:
        """Its weight at a step."""
        return math.prod(term.factor(step) for term in self.terms)

    def own(self, context: Context, aux: dict[str, Aux] | None = None) -> Context:
        """The context as this term sees it: its own `aux` and its own key."""
        key = context.key
        if key is not None and self.number is not None:
            key = jax.random.fold_in(key, self.number)
        return dataclasses.replace(context, key=key, aux=(aux or {}).get(self.name, Aux()))


def leaves(objective: Objective) -> tuple[Leaf, ...]:
    """The terms of a sum, those of sums in it too; of any other objective, itself."""

    def walk(objective, terms) -> list[tuple[tuple[Term, ...], Objective]]:
        if not isinstance(objective, Sum):
            return [(terms, objective)]
        return [found for t in objective.terms for found in walk(t.objective, (*terms, t))]

    found = walk(objective, ())
    names = [type(one).__name__.lower() for _, one in found]
    return tuple(
        Leaf(
            name if names.count(name) == 1 else f"{name}_{names[:i].count(name)}",
            i if isinstance(objective, Sum) else None,
            terms,
            one,
        )
        for i, (name, (terms, one)) in enumerate(zip(names, found, strict=True))
    )


def add_up(
    parts: Iterable[Leaf], context: Context, outcomes: Iterable[Outcome]
) -> tuple[jax.Array, dict[str, Metrics], dict[str, Results]]:
    """The weighted sum of the terms' losses, and by term their metrics (see `named`) and results."""
    total = jnp.zeros((), jnp.float32)
    metrics: dict[str, Metrics] = {}
    results: dict[str, Results] = {}
    for leaf, outcome in zip(parts, outcomes, strict=True):
        total = total + leaf.weight(context.step) * outcome[0]
        own = {f"loss/{leaf.name}": outcome[0]} if leaf.number is not None else {}
        metrics[leaf.name] = own | outcome[1]
        if len(outcome) > 2:
            results[leaf.name] = jax.lax.stop_gradient(outcome[2])  # type: ignore[misc]
    return total, metrics, results


def named(metrics: dict[str, Metrics]) -> Metrics:
    """All terms' metrics; one that two terms call alike gets the term's name in front."""
    names = [name for own in metrics.values() for name in own]
    return {
        (name if names.count(name) == 1 else f"{term}/{name}"): value
        for term, own in metrics.items()
        for name, value in own.items()
    }


def needs_of(objective: Chosen, name: str, batch: Batch) -> frozenset[str]:
    """What `fuse` reads of one input: of `text` perhaps `text_tokens` and `text`."""
    return frozenset(need for need in objective.fuse_needs if parse(need, batch)[0] == name)


def union(sets: Iterable[frozenset[str]]) -> frozenset[str]:
    """All of their elements."""
    return frozenset[str]().union(*sets)


def _terms(objective: Objective) -> tuple[Term, ...]:
    return objective.terms if isinstance(objective, Sum) else (Term(1.0, objective),)
