"""CLIP distillation on the common recipe, from the model's own moving average.

Another teacher is one option away, `teacher=Frozen("runs/large")`; vectors from a file, one field
(`Embeddings("teacher_image", "runs/large.parquet")`) and `teacher=None`.
"""

import dataclasses
from pathlib import Path

from clipjax import Run, load_config
from clipjax.methods.clip_distillation import FeatureDistillation, RelationalDistillation
from clipjax.objectives import MovingAverage, Softmax

TEACHER = MovingAverage(0.98)


def config() -> Run:
    run = load_config(Path(__file__).with_name("recipe.py"))
    follow = FeatureDistillation(teacher=TEACHER) + RelationalDistillation(teacher=TEACHER)
    return dataclasses.replace(run, objective=Softmax() + 0.5 * follow)
