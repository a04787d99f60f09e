"""Two views of every picture against all others, beside the image-text loss, on the common recipe."""

import dataclasses
from pathlib import Path

from clipjax import Run, load_config
from clipjax.data import Image, Text
from clipjax.methods.simclr import NTXent
from clipjax.models import Headed, MlpHead
from clipjax.objectives import Softmax


def config() -> Run:
    run = load_config(Path(__file__).with_name("recipe.py"))
    return dataclasses.replace(
        run,
        model=Headed(run.model, heads=(MlpHead(widths=(192, 64)),)),
        objective=Softmax() + 0.2 * NTXent(),
        data=dataclasses.replace(run.data, fields=(Image(), Image("image_2"), Text())),
    )
