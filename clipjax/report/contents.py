"""What a report shows besides figures: examples of retrieval, of captions, a matrix of similarities."""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Guess:
    """A caption that a picture retrieved."""

    caption: str
    score: float
    """Cosine similarity."""
    right: bool
    """Whether it is one of the picture's own."""


@dataclasses.dataclass(frozen=True)
class Ranking:
    """The best captions for a picture, best first."""

    language: str
    """Code of the candidates' language; empty where unknown."""
    guesses: tuple[Guess, ...]
    rank: int
    """Where the picture's best own caption stands among all candidates, from 1."""


@dataclasses.dataclass(frozen=True)
class Example:
    """A picture with what it retrieved."""

    image: np.ndarray
    """uint8 [H, W, 3]."""
    caption: str
    """Its own main caption."""
    rankings: tuple[Ranking, ...]
    """One for each language."""


@dataclasses.dataclass(frozen=True)
class Similarities:
    """Cosine similarities of n pictures with their n captions; the diagonal is right."""

    scores: np.ndarray
    """float [n, n], pictures by captions."""
    images: np.ndarray
    """uint8 [n, H, W, 3]."""
    captions: tuple[str, ...]
    """n captions."""


@dataclasses.dataclass(frozen=True)
class Confusion:
    """What a classifier took for what."""

    name: str
    """The evaluator's."""
    classes: tuple[str, ...]
    """C names."""
    counts: np.ndarray
    """int [C, C]: pictures of a class (row) taken for a class (column)."""


@dataclasses.dataclass(frozen=True)
class ScoredCaption:
    """A caption beside a picture."""

    text: str
    score: float | None
    """Cosine similarity with the picture; None for a model that does not embed texts."""


@dataclasses.dataclass(frozen=True)
class CaptionExample:
    """A picture with the caption that the model wrote."""

    image: np.ndarray
    """uint8 [H, W, 3]."""
    caption: ScoredCaption
    """The model's."""
    references: tuple[ScoredCaption, ...]
    """People's."""
    retrieved: ScoredCaption | None
    """The nearest training caption, where there is such a baseline."""
    right: bool
    """Whether the caption is one of the references, word by word."""
