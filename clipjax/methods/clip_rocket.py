"""CLIP-rocket: several views of pictures and captions, each kind with its own head; and non-contrastive terms.

Fini et al. 2023, "Improved baselines for vision-language pre-training" (arXiv 2305.08675). Status: the authors'
code (facebookresearch/clip-rocket) read.

A weak view and a weak caption are compared by the model's own embeddings (the global term). n strong views and n
strong captions are compared by local heads, all n x n combinations, with label smoothing 0.1 and a temperature of
0.1: L = (L_global + n x mean L_local) / (1 + n). To it may be added, between heads of the two sides: SiamLIP, 2 - 2
cos of one side's predictor and the other side's projection held fixed; BarLIP, 0.025 x (sum_i (C_ii - 1)^2 + 0.005
sum_ij C_ij^2) of the batch's cross-correlation C; SwALIP, cross-entropy against Sinkhorn-balanced assignments of
the batch (3 iterations at 0.05), swapped between views.

What differs here: the local temperature is fixed; heads norm with layer norm; of the caption augmentations, stop
words, swaps and deletions, no synonyms (they need a thesaurus). The gradient passes through the gathered keys,
which that code's gather stops.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clipjax.batch import Encoded
from clipjax.data import Augmentation, ColorJitter, Flip, RandomResizedCrop
from clipjax.data.fields import Field, Spec
from clipjax.errors import ClipjaxError
from clipjax.methods.registry import Method
from clipjax.objectives import Objective, Pairwise, PerExample, Softmax
from clipjax.objectives.contrast import both_directions
from clipjax.objectives.pairs import Expectation, LogSumExp

METHOD = Method(
    id="clip_rocket",
    title="Improved baselines for vision-language pre-training",
    arxiv="2305.08675",
    status="official",
    summary="several views of both sides with heads of their own; SiamLIP, BarLIP, SwALIP",
)


@dataclasses.dataclass(frozen=True)
class MultiView(Objective):
    """(global + n x mean of local) / (1 + n), all combinations of strong views and captions."""

    images: tuple[str, ...] = ("image_2_local", "image_3_local")
    """Strong views: a local head's output, of unit norm."""
    texts: tuple[str, ...] = ("text_2_local", "text_3_local")
    """Strong captions, alike."""
    temperature: float = 0.1
    """Of the local comparisons."""
    label_smoothing: float = 0.1
    """Of the local comparisons."""

    def __post_init__(self):
        if self.temperature <= 0:
            raise ClipjaxError(f"MultiView: temperature={self.temperature} must be above 0")
        if len(self.images) != len(self.texts):
            raise ClipjaxError(
                f"MultiView: images={self.images} and texts={self.texts} must be as many"
            )

    @property
    def needs(self):
        return frozenset({"image", "text", *self.images, *self.texts})

    def __call__(self, encoded, context):
        whole, metrics = Softmax()(encoded, context)
        local = Encoded(encoded.rows, {"logit_scale": jnp.float32(1 / self.temperature)})
        parts = [
            Softmax(image, text, label_smoothing=self.label_smoothing)(local, context)[0]
            for image in self.images
            for text in self.texts
        ]
        n = len(self.images)
        if n:
            whole = (whole + n * sum(parts) / len(parts)) / (1 + n)
        return whole, metrics


@dataclasses.dataclass(frozen=True)
class SiamLIP(PerExample):
    """2 - 2 cos(predicted, other side's projection held fixed), both directions."""

    predicted: tuple[str, str] = ("image_predicted", "text_predicted")
    """What a predictor head makes of each side's projection, of unit norm."""
    projected: tuple[str, str] = ("image_projected", "text_projected")
    """The projections, of unit norm."""

    @property
    def needs(self):
        return frozenset({*self.predicted, *self.projected})

    def local(self, encoded, context, totals):
        loss = jnp.zeros((), jnp.float32)
        for mine, others in zip(self.predicted, reversed(self.projected), strict=True):
            target = jax.lax.stop_gradient(encoded[others])
            loss += jnp.sum(2 - 2 * jnp.sum(encoded[mine] * target, -1))
        return loss / (2 * totals["examples"]), {}


@dataclasses.dataclass(frozen=True)
class BarLIP(Pairwise):
    """Barlow Twins' loss between the sides: the cross-correlation of their features is the identity."""

    first: str = "image_features"
    """Features of one side, not normalized: a head with `unit=False`."""
    second: str = "text_features"
    """Of the other side, as wide."""
    off_diagonal: float = 5e-3
    """Weight of the other entries."""
    scale: float = 0.025
    """Of the whole."""

    def __call__(self, encoded, context):
        def standard(x):
            mean, var = jnp.mean(x, 0), jnp.var(x, 0)
            return (x - mean) * jax.lax.rsqrt(var + 1e-5)

        a, b = standard(encoded[self.first]), standard(encoded[self.second])
        c = jnp.matmul(a.T, b, precision="highest") / len(a)
        return self.scale * barlow(c, self.off_diagonal), {}


def barlow(c: jax.Array, off_diagonal: float) -> jax.Array:
    """sum_i (C_ii - 1)^2 + w sum_(i != j) C_ij^2 of a matrix [D, D]."""
    diagonal = jnp.diagonal(c)
    return jnp.sum((diagonal - 1) ** 2) + off_diagonal * (jnp.sum(c**2) - jnp.sum(diagonal**2))


@dataclasses.dataclass(frozen=True)
class SwALIP(Pairwise):
    """Cross-entropy of one pair of sides against balanced assignments by another pair."""

    target_first: str = "image"
    """The side whose similarities to `target_second` are balanced."""
    target_second: str = "text"
    """The other."""
    entropy: float = 0.05
    """What similarities are divided by in the balancing."""
    iterations: int = 3
    """Rounds of the balancing: each makes the columns, then the rows, sum alike."""

    def __post_init__(self):
        if self.entropy <= 0 or self.iterations < 1:
            raise ClipjaxError(
                f"SwALIP: entropy={self.entropy} must be above 0 and iterations={self.iterations} at least 1"
            )

    @property
    def needs(self):
        return frozenset({self.first, self.second, self.target_first, self.target_second})

    def __call__(self, encoded, context):
        engine, scale = context.engine, encoded.logit_scale
        a, b = (jax.lax.stop_gradient(encoded[n]) for n in (self.target_first, self.target_second))
        a = a / self.entropy

        def balance(row, col, shared):
            logits = engine.dot(row["a"], col["b"])
            return (
                {"sum": LogSumExp(logits + col["potential"])},
                {"sum": LogSumExp(logits + row["potential"][:, None])},
            )

        f, g = jnp.zeros(len(a)), jnp.zeros(len(b))
        for _ in range(self.iterations):
            g = -engine.reduce(balance, {"a": a, "potential": f}, {"b": b, "potential": g})[1][
                "sum"
            ]
            f = -engine.reduce(balance, {"a": a, "potential": f}, {"b": b, "potential": g})[0][
                "sum"
            ]

        def tile(row, col, shared):
            target = engine.dot(row["a"], col["b"])
            logits = engine.dot(row["x"], col["y"])
            return (
                {
                    "all": LogSumExp(logits),
                    "target": Expectation(target + col["potential"], logits),
                },
                {
                    "all": LogSumExp(logits),
                    "target": Expectation(target + row["potential"][:, None], logits),
                },
            )

        rows, cols = engine.reduce(
            tile,
            {"x": scale * encoded[self.first], "a": a, "potential": f},
            {"y": encoded[self.second], "b": b, "potential": g},
        )
        loss = both_directions(rows["all"] - rows["target"], cols["all"] - cols["target"], 0.5)
        return loss, {}


@dataclasses.dataclass(frozen=True)
class Sometimes(Augmentation):
    """Another augmentation, with some probability."""

    augmentation: Augmentation
    """What is done."""
    probability: float = 0.8
    """How often."""

    def __call__(self, image, size, rng):
        if rng.random() >= self.probability:
            return image
        return self.augmentation(image, size, rng)


@dataclasses.dataclass(frozen=True)
class Gray(Augmentation):
    """The picture without its colors."""

    def __call__(self, image, size, rng):
        weights = np.array([299, 587, 114])  # ITU-R 601, as torchvision and Pillow do
        return np.repeat((image @ weights // 1000).astype(np.uint8)[..., None], 3, 2)


@dataclasses.dataclass(frozen=True)
class Blur(Augmentation):
    """A Gaussian blur of a random width."""

    least: float = 0.1
    """Smallest standard deviation, in pixels of the run's size."""
    greatest: float = 2.0
    """Largest."""

    def __call__(self, image, size, rng):
        from PIL import Image, ImageFilter

        radius = rng.uniform(self.least, self.greatest) * max(image.shape[:2]) / size
        return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(radius)))


STRONG = (
    RandomResizedCrop(scale=(0.08, 1.0)),
    Sometimes(ColorJitter(0.4, 0.4, 0.4, 0.1), 0.8),
    Sometimes(Gray(), 0.2),
    Sometimes(Blur(), 0.5),
    Flip(),
)
"""The recipe for strong views. (Where captions speak of left and right, drop the last.)"""
WEAK = (RandomResizedCrop(scale=(0.5, 1.0)),)
"""The recipe for weak ones."""
STOP_WORDS = frozenset(
    [
        "a",
        "an",
        "and",
        "are",
        "as",
        "at",
        "be",
        "by",
        "for",
        "from",
        "has",
        "he",
        "her",
        "his",
        "in",
        "is",
        "it",
        "its",
        "of",
        "on",
        "or",
        "she",
        "that",
        "the",
        "their",
        "this",
        "to",
        "was",
        "were",
        "will",
        "with",
    ]
)


@dataclasses.dataclass(frozen=True)
class Reworded(Field):
    """The words of another text field, some of them gone or changed over: int32 [L]."""

    name: str = "text_2"
    """Key in the batch."""
    of: str = "text"
    """The text field whose caption it takes."""
    stop_words: float = 0.8
    """Probability that stop words are dropped, unless nothing would be left."""
    swap: float = 0.4
    """Probability that two words change places."""
    delete: float = 0.2
    """Probability that one of several words goes."""

    @property
    def follows(self):
        return (self.of,)

    def spec(self, data):
        return {self.name: Spec((data.context_length,), "int32")}

    def open(self, data, tokenizer, records):
        return OpenReworded(self, data.context_length, tokenizer)


@dataclasses.dataclass(frozen=True)
class OpenReworded:
    """A `Reworded` that knows its tokenizer."""

    field: Reworded
    length: int
    tokenizer: Any

    def read(self, example):
        (shown, *_) = example.made[self.field.of]
        return reworded(shown.text, self.field, example.rng)

    def write(self, values, rows):
        rows[self.field.name][:] = self.tokenizer.encode(list(values), self.length)


def reworded(text: str, how: Reworded, rng: np.random.Generator) -> str:
    """A text with stop words dropped, then one of: two words swapped, one dropped, nothing."""
    words = text.split()
    if rng.random() < how.stop_words:
        words = [word for word in words if word.lower() not in STOP_WORDS] or words
    draw = rng.random()
    if len(words) > 1 and draw < how.swap:
        i, j = rng.choice(len(words), 2, replace=False)
        words[i], words[j] = words[j], words[i]
    elif len(words) > 1 and draw < how.swap + how.delete:
        del words[int(rng.integers(len(words)))]
    return " ".join(words)
