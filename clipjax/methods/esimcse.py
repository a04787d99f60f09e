"""ESimCSE: a text against itself with some words said twice, and against a queue of earlier texts.

Wu et al. 2021, "ESimCSE: Enhanced Sample Building Method for Contrastive Learning of Unsupervised Sentence
Embedding" (arXiv 2109.04380). Status: the authors' code (caskcsg/sentemb) read.

In a second copy of a text a random number of tokens, below min(10, rate x length), stand twice, so that length
tells nothing. InfoNCE at a fixed temperature compares the text with the copies of the batch and with a queue of a
momentum encoder's embeddings of earlier texts.

What differs here: a term beside an image-text loss; a text of equal `id` in the queue is no negative; tokens are
doubled before a long text is cut, and the end-of-text token stays last.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clipjax.data.fields import Field, Spec
from clipjax.errors import ClipjaxError
from clipjax.methods.registry import Method
from clipjax.objectives import Aux, MovingAverage, Pairwise, Queue, Teacher
from clipjax.objectives.pairs import LogSumExp

METHOD = Method(
    id="esimcse",
    title="ESimCSE: Enhanced Sample Building Method for Contrastive Learning of Unsupervised Sentence Embedding",
    arxiv="2109.04380",
    status="official",
    summary="texts against themselves with words repeated, and a queue",
)


@dataclasses.dataclass(frozen=True)
class Repeated(Field):
    """The tokens of another text field, some of them twice: int32 [L]."""

    name: str = "text_2"
    """Key in the batch."""
    of: str = "text"
    """The text field that it repeats."""
    rate: float = 0.32
    """Of a text of n tokens, fewer than min(10, rate x n) are doubled."""

    def __post_init__(self):
        if not 0 <= self.rate <= 1:
            raise ClipjaxError(f"Repeated: rate={self.rate} must lie in [0, 1]")

    @property
    def follows(self):
        return (self.of,)

    def spec(self, data):
        return {self.name: Spec((data.context_length,), "int32")}

    def open(self, data, tokenizer, records):
        return OpenRepeated(self, data.context_length, tokenizer)


@dataclasses.dataclass(frozen=True)
class OpenRepeated:
    """A `Repeated` that knows its tokenizer."""

    field: Repeated
    length: int
    tokenizer: Any

    def read(self, example):
        (shown, *_) = example.made[self.field.of]
        tokens = self.tokenizer.encode([shown.text], 2 * self.length)[0]
        return repeated(
            tokens,
            self.field.rate,
            example.rng,
            self.length,
            self.tokenizer.eos_id,
            self.tokenizer.pad_id,
        )

    def write(self, values, rows):
        rows[self.field.name][:] = np.stack(values)


def repeated(
    tokens: np.ndarray, rate: float, rng: np.random.Generator, length: int, eos: int, pad: int
) -> np.ndarray:
    """Tokens [n], with padding, as int32 [length] in which some stand twice; the ends do not."""
    ends = np.flatnonzero(tokens == eos)
    kept = tokens[: ends[0] + 1] if len(ends) else tokens
    twice = int(rng.integers(0, max(1, min(10, int(rate * len(kept))))))
    inner = np.arange(1, len(kept) - 1)
    chosen = rng.choice(inner, min(twice, len(inner)), replace=False) if len(inner) else inner
    counts = np.ones(len(kept), int)
    counts[chosen] = 2
    made = np.repeat(kept, counts)
    if len(made) > length:
        made = np.append(made[: length - 1], kept[-1])
    return np.pad(made, (0, length - len(made)), constant_values=pad).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class ESimCSE(Pairwise):
    """A text against the copies of the batch and the texts of a queue."""

    first: str = "text"
    """The texts."""
    second: str = "text_2"
    """Their copies with words repeated."""
    temperature: float = 0.05
    """What similarities are divided by."""
    queue: Queue = Queue(160)
    """Embeddings of earlier texts; the paper has 2.5 batches."""
    teacher: Teacher = MovingAverage(0.995)
    """Who embeds what goes into the queue."""

    @property
    def teachers(self):
        return (self.teacher,)

    def init_state(self, setting):
        return self.queue.init(key=setting.width(self.first))

    def prepare(self, state, context):
        new = context.encode(self.teacher, frozenset({self.first}))[self.first]
        return Aux({"new": new}, self.queue.columns(state))

    def __call__(self, encoded, context):
        engine, bank, ids = context.engine, context.aux.shared, context.batch["id"]
        text, copy = encoded[self.first] / self.temperature, encoded[self.second]

        def tile(row, col, shared):
            logits = engine.dot(row["text"], col["key"])
            in_batch = col["id"] == -2
            own = row["index"][:, None] == col["index"]
            other = jnp.where(in_batch, ~own, (col["id"] >= 0) & (row["id"][:, None] != col["id"]))
            return {"negatives": LogSumExp(logits, other)}, {}

        blocks = {"key": copy, "id": jnp.full_like(ids, -2)}, {"key": bank["key"], "id": bank["id"]}
        rows, _ = engine.reduce(tile, {"text": text, "id": ids}, blocks)
        loss = jnp.mean(jax.nn.softplus(rows["negatives"] - jnp.sum(text * copy, -1)))
        return loss, {}, {"key": context.aux.rows["new"]}

    def advance(self, state, results, context):
        return self.queue.push(context.engine, state, context.batch["id"], key=results["key"])
