"""Feature transformation beside the plain loss, on the common recipe: alone it lets all embeddings become one."""

import dataclasses
from pathlib import Path

from clipjax import Run, load_config
from clipjax.methods.feat_transform import FeatureTransformation
from clipjax.objectives import Softmax


def config() -> Run:
    run = load_config(Path(__file__).with_name("recipe.py"))
    return dataclasses.replace(run, objective=Softmax() + 0.1 * FeatureTransformation())
