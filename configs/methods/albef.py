"""ALBEF on the common recipe: queues of eight batches, and a fusion encoder of two blocks."""

import dataclasses
from pathlib import Path

from clipjax import Run, load_config
from clipjax.methods.albef import QueueContrast
from clipjax.models import FusionEncoder, Headed
from clipjax.objectives import Matching, MovingAverage, Queue
from clipjax.towers.transformer import Transformer


def config() -> Run:
    run = load_config(Path(__file__).with_name("recipe.py"))
    blocks = Transformer(width=96, depth=2, heads=3, scan=False)
    # A teacher that keeps up with a run of two hundred steps.
    contrast = QueueContrast(queue=Queue(1024), ramp_steps=200, teacher=MovingAverage(0.9))
    return dataclasses.replace(
        run,
        model=Headed(run.model, heads=(FusionEncoder(blocks=blocks),)),
        objective=contrast + 0.5 * Matching(),
    )
