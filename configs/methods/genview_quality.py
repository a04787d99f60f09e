"""GenView's weights on a contrast of two views, beside the common recipe's contrast of pictures and texts."""

import dataclasses
from pathlib import Path

from clipjax import Run, load_config
from clipjax.data import Image, Text
from clipjax.methods.genview_quality import GenView


def config() -> Run:
    run = load_config(Path(__file__).with_name("recipe.py"))
    return dataclasses.replace(
        run,
        objective=run.objective + 0.5 * GenView(),
        data=dataclasses.replace(run.data, fields=(Image(), Text(), Image("image_2"))),
    )
