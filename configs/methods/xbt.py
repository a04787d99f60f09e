"""XBT on the common recipe: the "old" model is the one that the run began with."""

import dataclasses
from pathlib import Path

from clipjax import Run, load_config
from clipjax.methods.xbt import BackwardCompatible, Translator
from clipjax.models import Headed
from clipjax.objectives import Softmax


def config() -> Run:
    run = load_config(Path(__file__).with_name("recipe.py"))
    return dataclasses.replace(
        run,
        model=Headed(run.model, heads=(Translator(widths=(192, 96)),)),
        objective=Softmax() + BackwardCompatible(),
    )
