"""What travels between the rooms: `Batch` from the data to the model, `Encoded` on to the objective."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from flax import struct

from clipjax.errors import ClipjaxError, did_you_mean

Batch = dict[str, Any]
"""A dict of arrays whose leading axis is the global batch B, split over the mesh axes (group, data).

| key | array | meaning |
|---|---|---|
| `image` | uint8 [B, H, W, 3] | RGB, as decoded; towers normalize |
| `text` | int32 [B, L] | tokens, padded with the tokenizer's pad id |
| `id` | int32 [B] | identity of the underlying sample; equal ids are positives of each other |
| `sample` | int32 [B] | the record's place in the data set, 0 to its length - 1 |

The loader always adds `id` and `sample`; the others are the run's `data.fields`, by name, and a run may
have more: a second view, hard captions [B, K, L], a teacher's vectors [B, E], boxes.
"""


@struct.dataclass
class Encoded:
    """What a model makes of a batch: what was asked of it, by name.

    Attributes:
      rows: one array (or dict of arrays) a name, each with the batch as its leading axis. `image` and `text` are
        embeddings [B, E] float32 of unit norm, and so is that of any other input (`image_2`; of K texts a row
        [B, K, E]). `image_pooled` is the tower's own vector [B, D]; `image_tokens` its tokens, a dict of
        `values` [B, N, D], `mask` bool [B, N] (False where there is only padding) and `places` int32 [B, N].
        `captions` [B, L - 1, D] are the features from which a captioner predicts tokens `text[:, 1:]`.
      shared: what belongs to the whole batch. `logit_scale` [] float32, already exponentiated: similarities are
        `logit_scale * image @ text.T`; `logit_bias` [] float32, where the model has one; `caption_head` [D, V]:
        `captions @ caption_head` are the logits, which only the objective makes, a piece at a time, since they
        are a hundred times larger than the features.
    """

    rows: dict[str, Any]
    shared: dict[str, Any] = struct.field(default_factory=dict)

    @classmethod
    def pair(cls, image: Any, text: Any, logit_scale: Any, logit_bias: Any = None) -> Encoded:
        """The two embeddings [B, E], their scale, and their bias if there is one."""
        shared = {"logit_scale": logit_scale, "logit_bias": logit_bias}
        return cls(
            {"image": image, "text": text}, {k: v for k, v in shared.items() if v is not None}
        )

    def __getitem__(self, name: str) -> Any:
        """`rows[name]`.

        Raises:
          ClipjaxError: the model was not asked for it, or does not make it.
        """
        if name not in self.rows:
            raise ClipjaxError(
                f"the model's output has no {name!r}, only {', '.join(sorted(self.rows)) or 'nothing'}"
                f"{did_you_mean(name, self.rows)}: an objective names what it reads in `needs`"
            )
        return self.rows[name]

    @property
    def logit_scale(self) -> jax.Array:
        """[] float32, what similarities are multiplied by.

        Raises:
          ClipjaxError: the model compares nothing.
        """
        if "logit_scale" not in self.shared:
            raise ClipjaxError("this model only captions: it has no scale of similarities")
        return self.shared["logit_scale"]

    @property
    def logit_bias(self) -> jax.Array | None:
        """[] float32, what is added to scaled similarities; None for a model without it."""
        return self.shared.get("logit_bias")


PAIR = frozenset({"image", "text"})
"""What a model is asked for where nothing else is said: the embeddings of pictures and texts."""


def parse(need: str, batch: Batch) -> tuple[str, str]:
    """The input of the batch that a row of the model's output comes from, and what is made of it.

    `("image_2", "tokens")` of `image_2_tokens`, `("text", "embedding")` of `text`: the longest name in the batch
    that the need begins with, and what follows it.

    Raises:
      ClipjaxError: it begins with no input of the batch.
    """
    fitting = [name for name in batch if need == name or need.startswith(name + "_")]
    if not fitting:
        field(batch, need, f"{need!r} is asked for")
    name = max(fitting, key=len)
    return name, need[len(name) + 1 :] or "embedding"


@dataclasses.dataclass(frozen=True)
class SpecialTokens:
    """The tokens of a vocabulary that are no text; `bos` is None where rows begin without one."""

    bos: int | None
    eos: int
    pad: int


def field(batch: Batch, name: str, why: str = "") -> Any:
    """`batch[name]`, or a refusal that says where to add it.

    Raises:
      ClipjaxError: the batch lacks it.
    """
    if name not in batch:
        raise ClipjaxError(
            f"{why + ': ' if why else ''}the batch has no `{name}`{did_you_mean(name, batch)}. Add a field of "
            "that name to data.fields"
        )
    return batch[name]
