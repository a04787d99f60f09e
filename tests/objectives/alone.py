"""An objective by itself, as the step calls it: what `prepare` makes goes to the term that made it."""

import dataclasses

from clipjax.objectives import Context, PairEngine
from clipjax.objectives.base import add_up, leaves, named


def evaluate(objective, encoded, batch=None, engine=None, states=None, **facts):
    """(loss, metrics, results by term) of an objective or a sum; `facts` are fields of the context."""
    context = Context(engine or PairEngine(), batch or {}, **facts)
    parts = leaves(objective)
    encode = {"encode": facts["encode"]} if "encode" in facts else {}
    aux = {
        p.name: p.objective.prepare(
            (states or {}).get(p.name, {}), dataclasses.replace(p.own(context), **encode)
        )
        for p in parts
    }
    outcomes = [p.objective(encoded, p.own(context, aux)) for p in parts]
    loss, metrics, results = add_up(parts, context, outcomes)
    return loss, named(metrics), results
