"""ESimCSE's text-text term beside the image-text loss, on the common recipe."""

import dataclasses
from pathlib import Path

from clipjax import Run, load_config
from clipjax.methods.esimcse import ESimCSE, Repeated
from clipjax.objectives import Queue, Softmax


def config() -> Run:
    run = load_config(Path(__file__).with_name("recipe.py"))
    return dataclasses.replace(
        run,
        objective=Softmax() + 0.1 * ESimCSE(queue=Queue(256)),
        data=dataclasses.replace(run.data, fields=(*run.data.fields, Repeated())),
    )
