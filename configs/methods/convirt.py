"""ConVIRT on the common recipe: one name of several drawn each time, and precision within Unicode's groups."""

import dataclasses
from pathlib import Path

from clipjax import Run, load_config
from clipjax.data import CaptionChoice, Tfds
from clipjax.methods.convirt import ClassPrecision
from clipjax.objectives import Softmax
from clipjax.optim import Group


def config() -> Run:
    run = load_config(Path(__file__).with_name("recipe.py"))
    fixed = Group("^logit_scale$", frozen=True)
    return dataclasses.replace(
        run,
        model=dataclasses.replace(
            run.model, image_projection="mlp", text_projection="mlp", logit_scale_init=10.0
        ),
        objective=Softmax(image_weight=0.75),
        data=dataclasses.replace(run.data, captions=CaptionChoice(languages=("en", "es", "fr"))),
        optimizer=dataclasses.replace(run.optimizer, groups=(fixed, *run.optimizer.groups)),
        evals=(
            *run.evals,
            ClassPrecision(source=Tfds("twemoji", split="test"), queries=4, ks=(5, 10)),
        ),
    )
