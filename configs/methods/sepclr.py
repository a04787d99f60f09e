"""The recipe with what image and text share apart from the image's own (clipjax/methods/sepclr.py)."""

import dataclasses
from pathlib import Path

from clipjax import Run, load_config
from clipjax.data import Image
from clipjax.methods.sepclr import SepCLR, heads
from clipjax.models import Headed


def config() -> Run:
    run = load_config(Path(__file__).with_name("recipe.py"))
    return dataclasses.replace(
        run,
        model=Headed(run.model, heads()),
        objective=run.objective + 0.1 * SepCLR(salient_weight=1.0, independence_weight=1.0),
        data=dataclasses.replace(run.data, fields=(*run.data.fields, Image("image_2"))),
    )
