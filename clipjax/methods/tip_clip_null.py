"""TIP-CLIP: texts that show nothing are matched with one NULL picture.

Verma et al. 2023, "Learning the Visualness of Text Using Large Vision-Language Models" (arXiv 2305.10434). Status:
second hand, from the paper's text; no code was read.

The picture beside every text that is not visual is replaced by one NULL picture of random pixels, always the same.
CLIP's contrast then draws such texts to it, and 1 - cosine with it says how visual a text is (the paper calls a text
visual from 0.79 on). Visual texts are those of a document with an image-text cosine above 0.35, others those
whose every cosine is below 0.18 (`distant_labels`).

What differs here: with m NULL pictures in a batch of N plain contrast cannot fall below (m / N) log m, since equal
pictures ask for different texts. `NullSoftmax` takes that floor away: a NULL picture's target is spread over all texts
that are not visual (less its entropy, log m), and a text that is not visual may find any of the NULL pictures. Without
such rows it is `Softmax`; the paper's own loss is `Softmax` with the field `NullImage`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clipjax.batch import field
from clipjax.data import Image, Source, Spec, View, load_eval
from clipjax.data.fields import entry
from clipjax.errors import ClipjaxError
from clipjax.evals import Evaluator
from clipjax.methods.registry import Method
from clipjax.objectives import Pairwise
from clipjax.objectives.pairs import LogSumExp, Sum

METHOD = Method(
    id="tip_clip_null",
    title="Learning the Visualness of Text Using Large Vision-Language Models",
    arxiv="2305.10434",
    status="second hand",
    summary="texts that show nothing are matched with one picture of noise",
)


def null_picture(size: int, seed: int = 0) -> np.ndarray:
    """The NULL picture: random pixels, uint8 [size, size, 3], a function of size and seed."""
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)


def distant_labels(
    largest: np.ndarray, visual: float = 0.35, not_visual: float = 0.18
) -> np.ndarray:
    """What to take texts for, int [n]: 1 visual, 0 not, -1 undecided.

    Args:
      largest: [n], of each text the largest cosine with any picture of its document.
      visual: above this a text is visual.
      not_visual: below this it is not.
    """
    return np.where(largest > visual, 1, np.where(largest < not_visual, 0, -1))


@dataclasses.dataclass(frozen=True)
class NullImage(Image):
    """The picture, or the NULL picture where the record's text is not visual; `visual`, bool, says which."""

    label: str = "label"
    """Entry of the record, a whole number, that tells."""
    not_visual: tuple[int, ...] = (0,)
    """Its values for texts that are not visual."""
    seed: int = 0
    """Of the NULL picture."""

    @property
    def entries(self):
        return (*super().entries, self.label)

    def spec(self, data):
        return super().spec(data) | {"visual": Spec((), "bool")}

    def open(self, data, tokenizer, records):
        picture = null_picture(self.size or data.image_size, self.seed)
        return _OpenNull(self, super().open(data, tokenizer, records), picture)


class _OpenNull:
    def __init__(self, config: NullImage, image: Any, picture: np.ndarray):
        self._config, self._image, self._picture = config, image, picture

    def read(self, example) -> View:
        if int(entry(example.record, self._config.label)) in self._config.not_visual:
            return View(self._picture, self._picture.shape[:2], None)
        return self._image.read(example)

    def write(self, values, rows) -> None:
        self._image.write(values, rows)
        rows["visual"][:] = [view.image is not self._picture for view in values]


@dataclasses.dataclass(frozen=True)
class NullSoftmax(Pairwise):
    """`Softmax` for batches in which some pictures are the NULL picture."""

    visual: str = "visual"
    """The field of the batch that says of which rows the picture is a real one, bool [B]."""

    def __call__(self, encoded, context):
        engine, visual = context.engine, field(context.batch, self.visual, "NullSoftmax")
        first, second = encoded.logit_scale * encoded[self.first], encoded[self.second]

        def tile(row, col, shared):
            logits = engine.dot(row["first"], col["second"])
            other = row["index"][:, None] != col["index"]
            null = ~row["visual"][:, None] & ~col["visual"]
            negatives = LogSumExp(logits, other)
            return {"negatives": negatives, "sum": Sum(logits, null)}, {
                "negatives": negatives,
                "null": LogSumExp(logits, null),
            }

        rows, cols = engine.reduce(
            tile, {"first": first, "visual": visual}, {"second": second, "visual": visual}
        )
        own = jnp.sum(first * second, -1)
        count = jnp.maximum(jnp.sum(~visual), 1)
        # Of a NULL picture the mean over its texts; of a text that is not visual any NULL picture.
        target = jnp.where(visual, own, rows["sum"] / count + jnp.log(count))
        found = jnp.where(visual, own, cols["null"])
        first_loss = jax.nn.softplus(rows["negatives"] - own) + own - target
        second_loss = jax.nn.softplus(cols["negatives"] - own) + own - found
        metrics = {"null/share": 1 - jnp.mean(visual)}
        return (jnp.mean(first_loss) + jnp.mean(second_loss)) / 2, metrics


@dataclasses.dataclass(frozen=True, kw_only=True)
class Visualness(Evaluator):
    """How well 1 - cosine with the NULL picture tells visual texts from others.

    Of each record's main caption: `{name}/accuracy` and `{name}/f1` (of visual texts) at the threshold, and
    `{name}/auc`, the share of pairs of the two kinds in the right order.
    """

    source: Source
    """Split to judge by; its labels say what is visual."""
    not_visual: tuple[int, ...] = (0,)
    """Labels of texts that are not visual."""
    name: str = "visualness"
    """First part of the figures' names."""
    threshold: float = 0.79
    """A text is called visual from here on."""
    seed: int = 0
    """Of the NULL picture."""
    limit: int | None = None
    """Most records to use; None: all."""

    def run(self, predictor):
        data = load_eval(self.source, predictor.image_size, self.limit, predictor.resize)
        if data.labels is None:
            raise ClipjaxError(f"{self.source} has no labels, which {self.name} asks for")
        rows = [i for i, texts in enumerate(data.captions) if texts and data.labels[i] >= 0]
        text = predictor.encode_text([data.captions[i][0] for i in rows])
        null = predictor.encode_image(null_picture(predictor.image_size, self.seed))
        visual = ~np.isin(data.labels[rows], self.not_visual)
        figures = visualness_figures(1 - text @ null, visual, self.threshold)
        return {f"{self.name}/{key}": value for key, value in figures.items()}


def visualness_figures(score: np.ndarray, visual: np.ndarray, threshold: float) -> dict[str, float]:
    """`accuracy`, `f1` and `auc` of scores [n] for texts of which bool [n] are visual."""
    called = score >= threshold
    hits = np.sum(called & visual)
    order = np.sort(score[~visual])
    below = np.searchsorted(order, score[visual], side="left")
    ties = np.searchsorted(order, score[visual], side="right") - below
    return {
        "accuracy": float(np.mean(called == visual)),
        "f1": float(2 * hits / max(np.sum(called) + np.sum(visual), 1)),
        "auc": float(np.mean(below + ties / 2) / max(len(order), 1)),
    }
