"""A fusion head learns to match, and the two towers learn its scores, on the common recipe."""

import dataclasses
from pathlib import Path

from clipjax import Run, load_config
from clipjax.methods.dse_pair_distill import PairDistillation
from clipjax.models import FusionEncoder, Headed
from clipjax.objectives import Matching, Ramp, Softmax
from clipjax.towers.transformer import Transformer


def config() -> Run:
    run = load_config(Path(__file__).with_name("recipe.py"))
    blocks = Transformer(width=96, depth=2, heads=3, scan=False)
    late = Ramp(0.0, 0.01, steps=100, start=50)  # when the head knows something
    return dataclasses.replace(
        run,
        model=Headed(run.model, heads=(FusionEncoder(blocks=blocks),)),
        objective=Softmax() + Matching() + late * PairDistillation(),
    )
