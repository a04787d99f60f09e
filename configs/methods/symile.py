"""Symile on the common recipe, with a third modality: the names in German, which have a tower of their own.

A pair of the three is told by retrieval; so the pairwise loss stands beside it.
"""

import dataclasses
from pathlib import Path

from clipjax import Run, load_config
from clipjax.data import CaptionChoice, Image, Text
from clipjax.methods.symile import Symile
from clipjax.models import Encoder, MultiEncoder
from clipjax.objectives import Softmax


def config() -> Run:
    run = load_config(Path(__file__).with_name("recipe.py"))
    german = Text("german", captions=CaptionChoice(languages=("de",)))
    return dataclasses.replace(
        run,
        model=MultiEncoder(
            towers=(
                Encoder("image", run.model.image),
                Encoder("text", run.model.text),
                Encoder("german", run.model.text),
            ),
            embed_dim=96,
            logit_scale_max=1000.0,
        ),
        objective=Softmax() + 0.5 * Symile(("image", "text", "german")),
        data=dataclasses.replace(run.data, fields=(Image(), Text(), german)),
    )
