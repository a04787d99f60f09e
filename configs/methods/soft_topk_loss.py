"""The recipe with positives among the five most similar (clipjax/methods/soft_topk_loss.py)."""

import dataclasses
from pathlib import Path

from clipjax import Run, load_config
from clipjax.methods.soft_topk_loss import SoftTopK


def config() -> Run:
    run = load_config(Path(__file__).with_name("recipe.py"))
    return dataclasses.replace(run, objective=SoftTopK(k=5))
