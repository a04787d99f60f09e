"""Classifier: labels in words, embedded once, and what pictures show of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from clipjax.predictor import Picture, Predictor


@dataclasses.dataclass(frozen=True)
class Classification:
    """What pictures show, of a set of labels.

    Attributes:
      labels: C labels, in the order they were given.
      probabilities: float32 [n, C], or [C] of a single picture. Of a softmax model a row sums to 1;
        of a sigmoid model each is the probability of that label by itself.
    """

    labels: tuple[str, ...]
    probabilities: np.ndarray

    def top(self, k: int = 5) -> Any:
        """The `k` most probable labels with their probabilities, the most probable first.

        Returns:
          By picture, a list of (label, probability); of a single picture, that list alone.
        """
        if self.probabilities.ndim == 2:
            return [Classification(self.labels, row).top(k) for row in self.probabilities]
        order = np.argsort(-self.probabilities, kind="stable")[:k]
        return [(self.labels[i], float(self.probabilities[i])) for i in order]


class Classifier:
    """Zero-shot classification (CLIP, arXiv:2103.00020, section 3.1) among labels that stay.

    With s the cosine similarity of a picture and a class: a model without `logit_bias` was trained to
    choose (softmax), so its probabilities are softmax(logit_scale * s) over the labels. One with it
    was trained to accept or refuse each pair by itself (SigLIP, arXiv:2303.15343), so they are
    sigmoid(logit_scale * s + logit_bias), label by label, and need not sum to 1.

    Attributes:
      labels: C labels.
      classes: float32 [C, E], their embeddings: made once, when the classifier is.
    """

    def __init__(
        self, predictor: Predictor, labels: Sequence[str], templates: str | Sequence[str] = "{}"
    ):
        """Embeds the labels.

        Args:
          predictor: the model.
          labels: C distinct names.
          templates: as for `Predictor.class_embeddings`.
        """
        self.labels = (labels,) if isinstance(labels, str) else tuple(labels)
        self.classes = predictor.class_embeddings(self.labels, templates)
        self._predictor = predictor

    def __call__(self, images: Picture | Sequence[Picture] | np.ndarray) -> Classification:
        """What pictures show, of the labels.

        Args:
          images: as for `Predictor.encode_image`.
        """
        scale, bias = self._predictor.logit_scale, self._predictor.logit_bias
        similar = (self._predictor.encode_image(images) @ self.classes.T).astype(np.float64)
        logits = scale * similar + (bias or 0.0)
        if bias is None:
            powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
            probabilities = powers / powers.sum(axis=-1, keepdims=True)
        else:
            probabilities = 0.5 * (1.0 + np.tanh(0.5 * logits))  # sigmoid without overflow
        return Classification(self.labels, probabilities.astype(np.float32))
