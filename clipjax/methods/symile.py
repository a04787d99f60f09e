"""Symile: three modalities or more, all at once.

Saporta et al. 2024, "Contrasting with Symile: Simple Model-Agnostic Representation Learning for Unlimited
Modalities" (arXiv 2411.01053). Status: the authors' code (rajesh-lab/symile) read.

The score of one element of each modality is the multilinear product sum_d x_d y_d z_d. Each modality in turn is the
anchor and classifies which combination of the others is its own. Negatives "n": the others are each permuted at
random and multiplied, N - 1 combinations. "n_squared": all N^2 combinations, for three modalities. The mean over
the anchors.

What differs here: of "n", a permuted combination that happens to be the row's own is left out instead of standing
as a negative. Products of unit vectors shrink as E^-1/2 with each modality: give the model a `logit_scale_max`
above 100.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp

from clipjax.errors import ClipjaxError
from clipjax.methods.registry import Method
from clipjax.objectives import Objective
from clipjax.objectives.pairs import LogSumExp

METHOD = Method(
    id="symile",
    title="Contrasting with Symile: Simple Model-Agnostic Representation Learning for Unlimited Modalities",
    arxiv="2411.01053",
    status="official",
    summary="the multilinear product of three modalities or more",
)


@dataclasses.dataclass(frozen=True)
class Symile(Objective):
    """Cross-entropy of each modality's element over combinations of all others."""

    modalities: tuple[str, ...] = ("image", "text", "audio")
    """Names of the model's outputs, three or more."""
    negatives: Literal["n", "n_squared"] = "n"
    """How many combinations of the others each anchor is compared with."""

    def __post_init__(self):
        if len(self.modalities) < 3:
            raise ClipjaxError(
                f"Symile: modalities={self.modalities}: name three or more; two are Softmax's"
            )
        if self.negatives not in ("n", "n_squared"):
            raise ClipjaxError(
                f"Symile: negatives={self.negatives!r} is neither 'n' nor 'n_squared'"
            )
        if self.negatives == "n_squared" and len(self.modalities) != 3:
            raise ClipjaxError("Symile: negatives='n_squared' is for three modalities; choose 'n'")

    @property
    def needs(self):
        return frozenset(self.modalities)

    def __call__(self, encoded, context):
        keys = jax.random.split(context.key, len(self.modalities))
        losses = []
        for anchor, key in zip(self.modalities, keys, strict=True):
            others = [encoded[name] for name in self.modalities if name != anchor]
            rows = encoded.logit_scale * encoded[anchor]
            positive = jnp.sum(rows * functools.reduce(jnp.multiply, others), -1)
            find = self._permuted if self.negatives == "n" else self._all
            negatives = find(rows, others, key, context.engine)
            losses.append(jnp.mean(jax.nn.softplus(negatives - positive)))
        return sum(losses) / len(losses), {}

    def _permuted(self, rows, others, key, engine):
        """log sum exp over N - 1 combinations of permuted others, [N]."""
        orders = [
            jax.random.permutation(k, len(rows)).astype(jnp.int32)
            for k in jax.random.split(key, len(others))
        ]
        columns = functools.reduce(
            jnp.multiply, (engine.rows_at(o, at) for o, at in zip(others, orders, strict=True))
        )

        def tile(row, col, shared):
            own = row["index"][:, None]
            same = functools.reduce(
                jnp.logical_and, (own == col[f"from_{i}"] for i in range(len(orders)))
            )
            logits = engine.dot(row["anchor"], col["others"])
            return {"negatives": LogSumExp(logits, (own != col["index"]) & ~same)}, {}

        sides = {f"from_{i}": at for i, at in enumerate(orders)} | {"others": columns}
        return engine.reduce(tile, {"anchor": rows}, sides)[0]["negatives"]

    def _all(self, rows, others, key, engine):
        """log sum exp over all combinations but the row's own, [N]: N passes, one for each shift."""
        first, second = others
        n = len(rows)

        def tile(row, col, shift):
            own = (row["index"][:, None] == col["index"]) & (shift == 0)
            return {"sum": LogSumExp(engine.dot(row["anchor"], col["others"]), ~own)}, {}

        def add(total, shift):
            at = (jnp.arange(n, dtype=jnp.int32) + shift) % n
            columns = first * engine.rows_at(second, at)
            seen, _ = engine.reduce(tile, {"anchor": rows}, {"others": columns}, shift)
            return jnp.logaddexp(total, seen["sum"]), None

        return jax.lax.scan(add, jnp.full(n, -jnp.inf), jnp.arange(n, dtype=jnp.int32))[0]
