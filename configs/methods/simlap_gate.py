"""SimLAP beside the common recipe's contrast: Unicode's groups of emoji are the classes."""

import dataclasses
from pathlib import Path

from clipjax import Run, load_config
from clipjax.data import Array, Image, Text
from clipjax.methods.simlap_gate import Gate, SimLAP
from clipjax.models import Headed


def config() -> Run:
    run = load_config(Path(__file__).with_name("recipe.py"))
    fields = (Image(), Text(), Array("label", dtype="int32"))
    return dataclasses.replace(
        run,
        model=Headed(run.model, heads=(Gate(classes=10, width=64, hidden=128),)),
        objective=run.objective + 0.1 * SimLAP(),
        data=dataclasses.replace(run.data, fields=fields),
    )
