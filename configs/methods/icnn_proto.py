"""Prototypes with a margin beside the common recipe's contrast; Unicode's groups are the classes, and are scored."""

import dataclasses
from pathlib import Path

from clipjax import Run, load_config
from clipjax.data import Array, Image, Text, Tfds
from clipjax.methods.icnn_proto import ICNN, ProtoTriplet


def config() -> Run:
    run = load_config(Path(__file__).with_name("recipe.py"))
    fields = (Image(), Text(), Array("label", dtype="int32"))
    return dataclasses.replace(
        run,
        objective=run.objective + 0.5 * ProtoTriplet(classes=10),
        data=dataclasses.replace(run.data, fields=fields),
        evals=(*run.evals, ICNN(source=Tfds("twemoji", split="test"))),
    )
