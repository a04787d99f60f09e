"""The recipe with negatives mixed from each row's own positive (clipjax/methods/supremix.py)."""

import dataclasses
from pathlib import Path

from clipjax import Run, load_config
from clipjax.methods.supremix import SupReMix


def config() -> Run:
    run = load_config(Path(__file__).with_name("recipe.py"))
    return dataclasses.replace(run, objective=SupReMix())
