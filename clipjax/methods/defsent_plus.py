"""DefSent+: descriptions to the entries they describe, among all entries at once.

Liu et al. 2024, "DefSent+: Improving sentence embeddings of language models by projecting definition sentences into
a quasi-isotropic or isotropic vector space of unlimited dictionary entries" (arXiv 2405.16153). Status: the
authors' code (ryuliuxiaodong/DefSent-Plus) read.

Each entry of a dictionary has a frozen vector W_e, a previous encoder's mean over its definitions; a definition is
classified among all of them: -log softmax(W f(definition))_e. Then entries are embedded again by the new encoder.

What differs here: entries are the records, definitions their captions: a record's vector is the mean that a moving
average of the model has made of the captions met so far, kept by record in the train state, and a caption is
classified among the records seen up to now. Entries are renewed as they are met instead of in rounds; they are
of unit norm, scaled by the model's logit_scale; no whitening by ICA.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from clipjax.batch import field
from clipjax.methods.registry import Method
from clipjax.objectives import Aux, MovingAverage, Objective, Table, Teacher
from clipjax.objectives.contrast import check_share, unit
from clipjax.objectives.pairs import LogSumExp

METHOD = Method(
    id="defsent_plus",
    title="DefSent+: Improving sentence embeddings of language models by projecting definition sentences into a "
    "quasi-isotropic or isotropic vector space of unlimited dictionary entries",
    arxiv="2405.16153",
    status="official",
    summary="a caption classified among the frozen vectors of all records",
)


@dataclasses.dataclass(frozen=True)
class Entries(Objective):
    """Cross-entropy of each text over the vectors of all records."""

    input: str = "text"
    """What is classified."""
    share: float = 0.5
    """Share of the newest text in a record's vector."""
    teacher: Teacher = MovingAverage(0.99)
    """Who makes the vectors."""

    def __post_init__(self):
        check_share(self, "share")

    @property
    def needs(self):
        return frozenset({self.input})

    @property
    def teachers(self):
        return (self.teacher,)

    def init_state(self, setting):
        return Table().init(setting, entry=(0.0, setting.width(self.input)), seen=0.0)

    def prepare(self, state, context):
        sample = field(context.batch, "sample", "Entries")
        own = Table().read(context.engine, state, sample)
        new = context.encode(self.teacher, self.needs)[self.input]
        return Aux(own | {"new": new}, state["rows"])

    def __call__(self, encoded, context):
        engine, aux, sample = context.engine, context.aux, context.batch["sample"]
        text = encoded.logit_scale * encoded[self.input]

        def tile(row, col, shared):
            logits = engine.dot(row["text"], col["entry"])
            other = (
                row["sample"][:, None] != col["index"]
            )  # a column's index is its record's number
            return {"others": LogSumExp(logits, other & (col["seen"] > 0))}, {}

        rows, _ = engine.reduce(
            tile,
            {"text": text, "sample": sample},
            {"entry": aux.shared["entry"], "seen": aux.shared["seen"]},
        )
        known = aux.rows["seen"]
        own = jnp.sum(text * aux.rows["entry"], -1)
        loss = known * jnp.logaddexp(0.0, jnp.where(known > 0, rows["others"] - own, 0.0))
        count = jnp.maximum(jnp.sum(known), 1.0)
        mixed = (1 - self.share) * aux.rows["entry"] + self.share * aux.rows["new"]
        entry = unit(jnp.where(known[:, None] > 0, mixed, aux.rows["new"]))
        metrics = {"entries/known": jnp.mean(known)}
        return jnp.sum(loss) / count, metrics, {"entry": entry, "seen": jnp.ones_like(known)}

    def advance(self, state, results, context):
        return Table().write(context.engine, state, context.batch["sample"], **results)
