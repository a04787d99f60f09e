"""DreamLIP: several captions of a picture at once, and each caption against the patches that it speaks of.

Zheng et al. 2024, "DreamLIP: Language-Image Pre-training with Long Captions" (arXiv 2403.17007). Status: the
authors' code (zyf0619sjtu/DreamLIP) read.

Of K captions of a picture each slot gives a symmetric InfoNCE with the pictures; their mean, so that captions of
one picture are never each other's negatives. Grouping: with e_p the patches in the common space and v_k a caption,
weights w_kp = <v_k, e_p>, stretched to [0, 1] over p, cut below `least` and made to sum to 1, give g_k = unit(sum_p
w_kp e_p), which is classified among the captions of the same picture.

What differs here: grouping is the paper's form, inside a picture, not the code's over the whole batch (which,
besides, pairs captions with the wrong pictures); a record with fewer captions shows some of them more than once.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from clipjax.batch import Encoded, field
from clipjax.errors import ClipjaxError
from clipjax.layout import batch_first
from clipjax.methods.registry import Method
from clipjax.models import Head
from clipjax.objectives import Pairwise, PerExample, Softmax
from clipjax.objectives.contrast import unit
from clipjax.towers.layers import Linear

METHOD = Method(
    id="dreamlip",
    title="DreamLIP: Language-Image Pre-training with Long Captions",
    arxiv="2403.17007",
    status="official",
    summary="several captions at once, each against its patches",
)


@dataclasses.dataclass(frozen=True)
class MultiCaption(Pairwise):
    """The mean over K captions a picture of the symmetric InfoNCE of each."""

    second: str = "text_several"
    """Captions: a text field with `count=K`."""

    def __call__(self, encoded, context):
        texts = encoded[self.second]  # [B, K, E]
        slots = [
            Softmax(self.first, self.second)(
                Encoded(encoded.rows | {self.second: texts[:, k]}, encoded.shared), context
            )
            for k in range(texts.shape[1])
        ]
        return sum(loss for loss, _ in slots) / len(slots), slots[0][1]


@dataclasses.dataclass(frozen=True)
class Patches(Head):
    """An image's tokens in the common space, of unit norm: [B, N, width]."""

    name: str = "patches"
    """What it makes is called `<input>_patches`."""
    reads: str = "tokens"
    """It reads tokens."""
    width: int = 512
    """Dimensions of the common space."""

    def build(self, rngs: nnx.Rngs, base: Any) -> PatchesModule:
        """Makes the module."""
        return PatchesModule(self, rngs, base.width(self.of, self.reads))


class PatchesModule(nnx.Module):
    """The module of `Patches`."""

    def __init__(self, config: Patches, rngs: nnx.Rngs, width: int):
        self.width = config.width
        self.projection = Linear(width, config.width, rngs, bias=False)

    def __call__(self, tokens: dict[str, jax.Array], *, key: jax.Array | None = None) -> jax.Array:
        """Tokens -> float32 [B, N, width]."""
        return unit(batch_first(self.projection(tokens["values"]).astype(jnp.float32)))


@dataclasses.dataclass(frozen=True)
class Grouping(PerExample):
    """Each caption's group of patches is classified among the captions of the picture."""

    patches: str = "image_patches"
    """Patches in the common space, [B, N, E]."""
    captions: str = "text_several"
    """Captions [B, K, E]; the batch has `<captions>_mask` [B, K]."""
    least: float = 0.3
    """Stretched weights below this are zero."""

    def __post_init__(self):
        if not 0 <= self.least < 1:
            raise ClipjaxError(f"Grouping: least={self.least} must be at least 0 and below 1")

    @property
    def needs(self):
        return frozenset({self.patches, self.captions})

    def totals(self, context):
        mask = field(context.batch, f"{self.captions}_mask", "Grouping")
        return {"captions": jnp.maximum(jnp.sum(mask, dtype=jnp.float32), 1.0)}

    def local(self, encoded, context, totals):
        mask = context.batch[f"{self.captions}_mask"]
        patches, captions = encoded[self.patches], encoded[self.captions]
        similar = jnp.einsum("bkd,bnd->bkn", captions, patches, precision="highest")
        low, high = similar.min(-1, keepdims=True), similar.max(-1, keepdims=True)
        weights = (similar - low) / jnp.maximum(high - low, 1e-6)
        weights = jnp.where(weights < self.least, 0.0, weights)
        weights /= jnp.maximum(weights.sum(-1, keepdims=True), 1e-6)
        groups = unit(jnp.einsum("bkn,bnd->bkd", weights, patches, precision="highest"))
        logits = encoded.logit_scale * jnp.einsum(
            "bkd,bjd->bkj", groups, captions, precision="highest"
        )
        log_p = jax.nn.log_softmax(jnp.where(mask[:, None], logits, -1e9))
        own = jnp.diagonal(log_p, axis1=1, axis2=2)
        return -jnp.sum(jnp.where(mask, own, 0.0)) / totals["captions"], {}
