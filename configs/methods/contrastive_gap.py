"""The recipe with the terms that close the contrastive gap (clipjax/methods/contrastive_gap.py)."""

import dataclasses
from pathlib import Path

from clipjax import Run, load_config
from clipjax.methods.contrastive_gap import GapTerms
from clipjax.objectives import Diagnostics


def config() -> Run:
    run = load_config(Path(__file__).with_name("recipe.py"))
    return dataclasses.replace(run, objective=run.objective + GapTerms() + Diagnostics())
