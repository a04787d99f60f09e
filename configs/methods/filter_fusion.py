"""Self-teaching on the common recipe: German names are taught to choose what English ones do."""

import dataclasses
from pathlib import Path

from clipjax import Run, load_config
from clipjax.data import CaptionChoice, Image, Text
from clipjax.methods.filter_fusion import SelfTeaching
from clipjax.objectives import Softmax


def config() -> Run:
    run = load_config(Path(__file__).with_name("recipe.py"))
    german = Text("text_2", captions=CaptionChoice(languages=("de",)))
    return dataclasses.replace(
        run,
        objective=Softmax() + 0.5 * SelfTeaching(),
        data=dataclasses.replace(run.data, fields=(Image(), Text(), german)),
    )
