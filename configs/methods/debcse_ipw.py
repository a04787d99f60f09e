"""DebCSE beside the common recipe's contrast: an emoji's names in other languages are the candidates."""

import dataclasses
from pathlib import Path

from clipjax import Run, load_config
from clipjax.data import CaptionChoice, Image, Text
from clipjax.methods.debcse_ipw import DebCSE

OTHERS = CaptionChoice(languages=("es", "fr", "de"))


def config() -> Run:
    run = load_config(Path(__file__).with_name("recipe.py"))
    fields = (Image(), Text(), Text("text_candidates", captions=OTHERS, count=3))
    return dataclasses.replace(
        run,
        objective=run.objective + 0.2 * DebCSE(),
        data=dataclasses.replace(run.data, fields=fields),
    )
