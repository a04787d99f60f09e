"""The recipe with a share of the batch's transport plan in the targets (clipjax/methods/norton_ot.py)."""

import dataclasses
from pathlib import Path

from clipjax import Run, load_config
from clipjax.methods.norton_ot import Transported


def config() -> Run:
    run = load_config(Path(__file__).with_name("recipe.py"))
    return dataclasses.replace(run, objective=Transported(iterations=20))
