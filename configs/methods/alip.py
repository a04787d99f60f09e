"""ALIP on the common recipe: an emoji's Spanish name stands where a synthetic caption would."""

import dataclasses
from pathlib import Path

from clipjax import Run, load_config
from clipjax.data import CaptionChoice, Image, Text
from clipjax.methods.alip import ALIP


def config() -> Run:
    run = load_config(Path(__file__).with_name("recipe.py"))
    synthetic = Text("text_2", captions=CaptionChoice(languages=("es",)))
    return dataclasses.replace(
        run,
        # So short a run begins with trust: averages from 1 would take some hundred steps.
        objective=ALIP(begin=0.0),
        data=dataclasses.replace(run.data, fields=(Image(), Text(), synthetic)),
    )
