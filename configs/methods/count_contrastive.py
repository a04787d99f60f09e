"""Counting on the common recipe: a few names of emoji have a number, "three o'clock"."""

import dataclasses
from pathlib import Path

from clipjax import Run, load_config
from clipjax.methods.count_contrastive import Counterfactual, Counting
from clipjax.objectives import Softmax


def config() -> Run:
    run = load_config(Path(__file__).with_name("recipe.py"))
    return dataclasses.replace(
        run,
        objective=Softmax() + Counting(),
        data=dataclasses.replace(run.data, fields=(*run.data.fields, Counterfactual())),
    )
