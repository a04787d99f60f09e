"""Norm and direction on the common recipe: the teacher is the model's own moving average."""

import dataclasses
from pathlib import Path

from clipjax import Run, load_config
from clipjax.methods.nd_kd import NormDirection
from clipjax.models import Headed, MlpHead
from clipjax.objectives import MovingAverage, Softmax


def config() -> Run:
    run = load_config(Path(__file__).with_name("recipe.py"))
    head = MlpHead("feature", widths=(96,), unit=False)
    return dataclasses.replace(
        run,
        model=Headed(run.model, heads=(head,)),
        objective=Softmax() + 0.5 * NormDirection(teacher=MovingAverage(0.98)),
    )
