"""SimLAP: any two classes are alike in some subspace; a gate finds it.

Wu et al. 2024, "Rethinking Positive Pairs in Contrastive Learning" (arXiv 2410.18200; Hydra in its first version).
Status: the authors' code (erow/vitookit) read.

Each example of class y gets a partner class y', whatever it is. A gate g = sigmoid(MLP((E[y] + E[y']) / 2)) in (0, 1)^D
says which dimensions the two classes share, and similarity is taken there: l_in = cos(g_i * z_i, g_i * z_n) / tau.
Positives of i are all n of class y'_i, negatives all of neither class, others are left out:

    loss = mean over positives (i, n) of log(exp l_in + sum over negatives m of exp l_im) - l_in

Gated vectors never exist for pairs: with g^2 the numerator is (g_i^2 z_i) . z_n, the norm (g_i^2 . z_n^2)^(1/2).

What differs here: the two sides are pictures and their texts (`SimLAP("image", "image_2")` compares views, as the
paper does), of the whole batch; layer norms in the place of batch norms; no linear classifier beside the loss. The
authors shift exponents by a row's mean, here it is the largest, as everywhere.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from clipjax.batch import field
from clipjax.errors import ClipjaxError
from clipjax.methods.registry import Method
from clipjax.models import Head
from clipjax.objectives import Pairwise
from clipjax.objectives.pairs import LogSumExp, Sum
from clipjax.towers import layers

METHOD = Method(
    id="simlap_gate",
    title="Rethinking Positive Pairs in Contrastive Learning",
    arxiv="2410.18200",
    status="official",
    summary="classes in pairs, compared in the subspace that a gate finds for the two",
)


@dataclasses.dataclass(frozen=True)
class Gate(Head):
    """The subspace of two classes: `gate(y, y') -> [B, D]` in (0, 1)."""

    name: str = "gate"
    """What an objective calls it."""
    of: str | None = None
    """None: it reads no encoder's output."""
    classes: int = 1000
    """Classes that there are."""
    width: int = 512
    """Dimensions of a class's embedding."""
    hidden: int = 1024
    """Dimensions of the hidden layer."""
    gated: str = "image"
    """The encoder whose embeddings it is for."""

    def build(self, rngs, base):
        return GateModule(self, rngs, base.width(self.gated, "embedding"))


class GateModule(nnx.Module):
    """The module of `Gate`."""

    def __init__(self, config: Gate, rngs: nnx.Rngs, width: int):
        self.embedding = layers.normal(rngs, (config.classes, config.width), 1.0)
        self.norm1 = layers.Norm("layer", config.width, 1e-5)
        self.fc1 = layers.Linear(config.width, config.hidden, rngs)
        self.norm2 = layers.Norm("layer", config.hidden, 1e-5)
        self.fc2 = layers.Linear(config.hidden, width, rngs)

    def __call__(self, label: jax.Array, partner: jax.Array, *, key=None) -> jax.Array:
        """int32 [B], int32 [B] -> [B, D] float32, the same for either order of the two."""
        both = jnp.stack([label, partner], 1)
        x = layers.lookup(self.embedding[...], both, jnp.float32).mean(1)
        x = self.fc1(jax.nn.relu(self.norm1(x)))
        return jax.nn.sigmoid(self.fc2(jax.nn.relu(self.norm2(x))).astype(jnp.float32))


@dataclasses.dataclass(frozen=True)
class SimLAP(Pairwise):
    """Contrast of classes in pairs, each pair in its own subspace; needs a `Gate` among the model's heads."""

    label: str = "label"
    """The field of the batch with the classes, int32 [B]."""
    partner: Literal["shuffled", "same"] = "shuffled"
    """The partner's class: that of a row drawn from the batch, or the row's own."""
    temperature: float = 0.1
    """tau."""
    gate: str = "gate"
    """The head's name."""

    def __post_init__(self):
        if self.partner not in ("shuffled", "same"):
            raise ClipjaxError(f"SimLAP: partner={self.partner!r} is neither 'shuffled' nor 'same'")
        if self.temperature <= 0:
            raise ClipjaxError(f"SimLAP: temperature={self.temperature} must be above 0")

    def __call__(self, encoded, context):
        engine = context.engine
        label = field(context.batch, self.label, "SimLAP")
        partner = label
        if self.partner == "shuffled" and context.key is not None:
            partner = label[jax.random.permutation(context.key, len(label))]
        z, gate = encoded[self.first], context.head(self.gate, label, partner)
        squared = gate * gate
        gated = squared * z
        norm = jnp.sqrt(jnp.sum(gated * z, -1, keepdims=True))
        rows = {
            "gated": gated / (self.temperature * norm),
            "squared": squared,
            "label": label,
            "partner": partner,
        }
        cols = {"z": encoded[self.second], "label": label}

        def logits_and_places(row, col):
            length = engine.dot(row["squared"], jnp.square(col["z"]))
            logits = engine.dot(row["gated"], col["z"]) * jax.lax.rsqrt(length)
            other = (row["index"][:, None] != col["index"]) | (self.first != self.second)
            positive = other & (row["partner"][:, None] == col["label"])
            return logits, positive, ~positive & (row["label"][:, None] != col["label"])

        def first_pass(row, col, shared):
            logits, _, negative = logits_and_places(row, col)
            return {"negatives": LogSumExp(logits, negative)}, {}

        def second_pass(row, col, shared):
            logits, positive, _ = logits_and_places(row, col)
            losses = jax.nn.softplus(row["negatives"][:, None] - logits)
            count = Sum(positive.astype(jnp.float32))
            return {"loss": Sum(losses, positive), "positives": count}, {}

        found, _ = engine.reduce(first_pass, rows, cols)
        found, _ = engine.reduce(second_pass, rows | found, cols)
        loss = jnp.sum(found["loss"]) / jnp.maximum(jnp.sum(found["positives"]), 1)
        return loss, {"simlap/positives": jnp.mean(found["positives"])}
