"""Metrix beside the plain loss, on the common recipe."""

import dataclasses
from pathlib import Path

from clipjax import Run, load_config
from clipjax.methods.metrix_mixup import MixedContrast
from clipjax.objectives import Softmax


def config() -> Run:
    run = load_config(Path(__file__).with_name("recipe.py"))
    return dataclasses.replace(run, objective=Softmax() + 0.4 * MixedContrast())
