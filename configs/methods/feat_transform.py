"""Feature transformation on the common recipe."""

import dataclasses
from pathlib import Path

from clipjax import Run, load_config
from clipjax.methods.feat_transform import FeatureTransformation


def config() -> Run:
    run = load_config(Path(__file__).with_name("recipe.py"))
    return dataclasses.replace(run, objective=FeatureTransformation())
