"""The recipe with attraction to three captions of an emoji, in three languages (clipjax/methods/cacr.py)."""

import dataclasses
from pathlib import Path

from clipjax import Run, load_config
from clipjax.data import CaptionChoice, Text
from clipjax.methods.cacr import CACR

LANGUAGES = ("en", "de", "es")


def config() -> Run:
    run = load_config(Path(__file__).with_name("recipe.py"))
    views = Text("text_views", count=3, captions=CaptionChoice(languages=LANGUAGES))
    return dataclasses.replace(
        run,
        objective=CACR(),
        data=dataclasses.replace(run.data, fields=(*run.data.fields, views)),
    )
