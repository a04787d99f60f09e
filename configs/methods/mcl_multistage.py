"""A later stage of MCL on the common recipe: Unicode's groups of emoji stand for the clusters of a first stage.

clipjax train configs/methods/mcl_multistage.py --data.plan.stages stage0.npy
"""

import dataclasses
from pathlib import Path

from clipjax import Run, load_config
from clipjax.methods.mcl_multistage import OneCluster


def config() -> Run:
    run = load_config(Path(__file__).with_name("recipe.py"))
    plan = OneCluster(stages=("label",))
    return dataclasses.replace(run, data=dataclasses.replace(run.data, plan=plan, batch_size=64))
