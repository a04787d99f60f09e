"""The recipe with the hardest tenth of the negatives alone (clipjax/methods/contrastive_behaviour.py)."""

import dataclasses
from pathlib import Path

from clipjax import Run, load_config
from clipjax.data import Array
from clipjax.methods.contrastive_behaviour import Behaviour, HardContrast
from clipjax.objectives import Diagnostics


def config() -> Run:
    run = load_config(Path(__file__).with_name("recipe.py"))
    return dataclasses.replace(
        run,
        objective=HardContrast(share=0.1) + Behaviour() + Diagnostics(),
        data=dataclasses.replace(
            run.data, fields=(*run.data.fields, Array("label", dtype="int32"))
        ),
    )
