"""MoCHi on the common recipe, from the step on at which the hardest negatives mean something."""

import dataclasses
from pathlib import Path

from clipjax import Run, load_config
from clipjax.methods.mochi import MoCHi


def config() -> Run:
    run = load_config(Path(__file__).with_name("recipe.py"))
    return dataclasses.replace(run, objective=MoCHi(mixed=8, with_query=4, start=100))
