"""Embeddings of a split's pictures, streamed."""

from __future__ import annotations

from typing import Literal

import jax
import numpy as np
from jax.experimental import multihost_utils

from clipjax.data.evalset import Pictures
from clipjax.errors import RunFailed
from clipjax.predictor import Predictor

Output = Literal["embedding", "pooled"]


def embed_images(
    predictor: Predictor,
    images: Pictures,
    rows: np.ndarray | None = None,
    output: Output = "embedding",
) -> np.ndarray:
    """Embeds pictures of a split; no more than a few batches of them are in memory.

    Each process reads and decodes the pictures of its own devices, and gets all embeddings.
    Afterwards `images.unreadable` says, alike in every process, which could not be decoded: their
    embeddings mean nothing.

    Args:
      predictor: the model.
      images: the pictures.
      rows: [k] int, which of them, ascending; None: all.
      output: the embedding, or what the image tower makes before any projection.

    Returns:
      float32 [k, E], unit norm; of "pooled" [k, D], as they are.

    Raises:
      RunFailed: none of them decodes.
    """
    rows = np.arange(len(images)) if rows is None else rows
    other = {} if output == "embedding" else {"output": output}
    embedded = predictor.encode_image_rows(lambda index: images[rows[index]], len(rows), **other)
    if jax.process_count() > 1:
        everywhere = multihost_utils.process_allgather(images.unreadable)
        images.unreadable |= np.asarray(everywhere).any(axis=0)
    if len(rows) and images.unreadable[rows].all():
        raise RunFailed(f"none of {len(rows)} pictures can be read (the log names them)")
    return embedded
