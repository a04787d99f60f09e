"""The recipe with three heads and a temperature for each of their pairs (clipjax/methods/amcl.py)."""

import dataclasses
from pathlib import Path

from clipjax import Run, load_config
from clipjax.methods.amcl import AMCL, heads
from clipjax.models import Headed


def config() -> Run:
    run = load_config(Path(__file__).with_name("recipe.py"))
    return dataclasses.replace(
        run,
        model=Headed(run.model, heads(3, hidden=96, width=48)),
        objective=run.objective + 0.3 * AMCL(),
    )
