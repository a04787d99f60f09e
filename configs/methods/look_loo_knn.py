"""LOOK beside the common recipe's contrast: neighbors should be of one of Unicode's groups of emoji."""

import dataclasses
from pathlib import Path

from clipjax import Run, load_config
from clipjax.data import Array, Image, Text
from clipjax.methods.look_loo_knn import LOOK


def config() -> Run:
    run = load_config(Path(__file__).with_name("recipe.py"))
    fields = (Image(), Text(), Array("label", dtype="int32"))
    return dataclasses.replace(
        run,
        objective=run.objective + 0.1 * LOOK(k=10),
        data=dataclasses.replace(run.data, fields=fields),
    )
