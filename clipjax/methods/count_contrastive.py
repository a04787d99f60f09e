"""Counting: a caption with the right number against the same caption with a wrong one.

Paiss et al. 2023, "Teaching CLIP to Count to Ten" (arXiv 2302.12066). Status: second hand (the reproduction
SforAiDl/CountCLIP read).

For captions with a spelled number from two to ten, a counterfactual has another one in its place; with u the
picture, v the caption and v' the counterfactual, -log e^<u,v> / (e^<u,v> + e^<u,v'>) = softplus(<u,v'> - <u,v>), a
mean over such captions, is added to CLIP's loss. Counterfactuals are no negatives of anything else.

What differs here: captions are taken at their word; the paper checks them with a detector. Similarities are not
scaled, as there, unless `scaled`: then the loss can go below softplus(-2).
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clipjax.batch import field
from clipjax.data.fields import Field, Spec
from clipjax.methods.registry import Method
from clipjax.objectives import PerExample

METHOD = Method(
    id="count_contrastive",
    title="Teaching CLIP to Count to Ten",
    arxiv="2302.12066",
    status="second hand",
    summary="captions against themselves with a wrong number",
)
NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
SPELLED = re.compile(r"\b(" + "|".join(NUMBERS) + r")\b", re.IGNORECASE)


def counterfactual(caption: str, rng: np.random.Generator) -> str | None:
    """The caption with another number from two to ten; None unless it has exactly one, as a word."""
    found = list(SPELLED.finditer(caption))
    if len(found) != 1:
        return None
    (word,) = found
    others = [n for n in NUMBERS if n != word.group().lower()]
    other = others[int(rng.integers(len(others)))]
    other = other.capitalize() if word.group()[0].isupper() else other
    return caption[: word.start()] + other + caption[word.end() :]


@dataclasses.dataclass(frozen=True)
class Counterfactual(Field):
    """The caption of a text field with a wrong number, int32 [L], and `<name>_mask`: whether it has one."""

    name: str = "text_counterfactual"
    """Key in the batch."""
    of: str = "text"
    """The text field whose caption it takes."""

    @property
    def follows(self):
        return (self.of,)

    def spec(self, data):
        return {
            self.name: Spec((data.context_length,), "int32"),
            f"{self.name}_mask": Spec((), "bool"),
        }

    def open(self, data, tokenizer, records):
        return OpenCounterfactual(self, data.context_length, tokenizer)


@dataclasses.dataclass(frozen=True)
class OpenCounterfactual:
    """A `Counterfactual` that knows its tokenizer."""

    field: Counterfactual
    length: int
    tokenizer: Any

    def read(self, example):
        (shown, *_) = example.made[self.field.of]
        return counterfactual(shown.text, example.rng)

    def write(self, values, rows):
        name = self.field.name
        rows[name][:] = self.tokenizer.encode([text or "" for text in values], self.length)
        rows[f"{name}_mask"][:] = [text is not None for text in values]


@dataclasses.dataclass(frozen=True)
class Counting(PerExample):
    """softplus(<u, v'> - <u, v>), a mean over the captions that have a number."""

    counterfactual: str = "text_counterfactual"
    """The field of captions with a wrong number."""
    scaled: bool = False
    """Whether similarities are multiplied by the model's scale."""

    @property
    def needs(self):
        return frozenset({"image", "text", self.counterfactual})

    def totals(self, context):
        mask = field(context.batch, f"{self.counterfactual}_mask", "Counting")
        return {"counted": jnp.maximum(jnp.sum(mask, dtype=jnp.float32), 1.0)}

    def local(self, encoded, context, totals):
        mask = context.batch[f"{self.counterfactual}_mask"]
        gap = encoded[self.counterfactual] - encoded["text"]
        gap = jnp.sum(encoded["image"] * gap, -1)
        gap = encoded.logit_scale * gap if self.scaled else gap
        right = jnp.sum(jnp.where(mask, gap < 0, False), dtype=jnp.float32) / totals["counted"]
        loss = jnp.sum(jnp.where(mask, jax.nn.softplus(gap), 0.0)) / totals["counted"]
        return loss, {"counting/accuracy": right}
