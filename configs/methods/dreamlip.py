"""DreamLIP on the common recipe: each picture with its names in three languages."""

import dataclasses
from pathlib import Path

from clipjax import Run, load_config
from clipjax.data import CaptionChoice, Image, Text
from clipjax.methods.dreamlip import Grouping, MultiCaption, Patches
from clipjax.models import Headed


def config() -> Run:
    run = load_config(Path(__file__).with_name("recipe.py"))
    several = Text("text_several", count=3, captions=CaptionChoice(languages=("en", "de", "es")))
    return dataclasses.replace(
        run,
        model=Headed(run.model, heads=(Patches(width=96),)),
        objective=MultiCaption() + 0.1 * Grouping(),
        data=dataclasses.replace(run.data, fields=(Image(), Text(), several)),
    )
