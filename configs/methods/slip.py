"""SLIP on the common recipe."""

import dataclasses
from pathlib import Path

from clipjax import Run, load_config
from clipjax.data import Image, RandomResizedCrop, Text
from clipjax.methods.slip import slip
from clipjax.models import Headed, MlpHead


def config() -> Run:
    run = load_config(Path(__file__).with_name("recipe.py"))
    strong = (RandomResizedCrop(scale=(0.3, 1.0)),)
    views = (Image(), Image("image_2", augment=strong), Image("image_3", augment=strong))
    return dataclasses.replace(
        run,
        model=Headed(run.model, heads=(MlpHead(widths=(192, 64)),)),
        objective=slip(0.2),
        data=dataclasses.replace(run.data, fields=(*views, Text())),
    )
