"""iSogCLR on the common recipe."""

import dataclasses
from pathlib import Path

from clipjax import Run, load_config
from clipjax.methods.isogclr import ISogCLR


def config() -> Run:
    run = load_config(Path(__file__).with_name("recipe.py"))
    return dataclasses.replace(run, objective=ISogCLR(temperature=0.06, cost=3.0, rate=0.003))
