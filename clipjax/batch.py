"""What travels between the rooms: `Batch` from the data to the model, `Encoded` on to the objective."""

from __future__ import annotations

from typing import Any

import jax
from flax import struct

Batch = dict[str, Any]
"""A dict of arrays whose leading axis is the global batch B, split over the mesh axes (group, data).

| key | array | meaning |
|---|---|---|
| `image` | uint8 [B, H, W, 3] | RGB, as decoded; towers normalise |
| `text` | int32 [B, L] | tokens, padded with the tokenizer's pad id |
| `id` | int32 [B] | identity of the underlying sample; equal ids are positives of each other |
| `teacher_image`, `teacher_text` | float32 [B, E] | embeddings of a teacher, where an objective asks for one |
"""


@struct.dataclass
class Encoded:
    """What a model makes of a batch.

    Attributes:
      image: [B, E] float32, unit norm.
      text: [B, E] float32, unit norm; None for a model that only captions.
      logit_scale: [] float32, already exponentiated: similarities are `logit_scale * image @ text.T`;
        None for a model that only captions.
      logit_bias: [] float32, or None for a model without one.
      image_tokens: [B, N, D] tokens of the image tower before pooling, or None when not asked for.
      text_tokens: [B, L, D] tokens of the text tower before pooling, or None when not asked for.
      caption_features: [B, L - 1, D] from which tokens `text[:, 1:]` are predicted, each position from the tokens
        before it and the image, in the compute dtype; or None when not asked for.
      caption_head: [D, V] float32, of the whole batch: `caption_features @ caption_head` are the logits. They are a
        hundred times larger than the features, so it is the objective that makes them, a piece at a time.
    """

    image: jax.Array
    text: jax.Array
    logit_scale: jax.Array
    logit_bias: jax.Array | None = None
    image_tokens: jax.Array | None = None
    text_tokens: jax.Array | None = None
    caption_features: jax.Array | None = None
    caption_head: jax.Array | None = None


SHARED = ("logit_scale", "logit_bias", "caption_head")
"""Fields of `Encoded` that belong to the whole batch; all others have a row for each example."""
