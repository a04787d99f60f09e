"""ALBEF on the common recipe: queues of eight batches, and a fusion encoder of two blocks."""

import dataclasses
from pathlib import Path

from clipjax import Run, load_config
from clipjax.methods.albef import QueueContrast
from clipjax.models import FusionEncoder, Headed
from clipjax.objectives import Matching, Queue
from clipjax.towers.transformer import Transformer


def config() -> Run:
    run = load_config(Path(__file__).with_name("recipe.py"))
    blocks = Transformer(width=96, depth=2, heads=3, scan=False)
    return dataclasses.replace(
        run,
        model=Headed(run.model, heads=(FusionEncoder(blocks=blocks),)),
        objective=QueueContrast(queue=Queue(1024), ramp_steps=100) + Matching(),
    )
