"""A small CoCa on the recipe, with Z-losses for pairs and captions (clipjax/methods/zloss_spherical.py)."""

import dataclasses
from pathlib import Path

from clipjax import Run, load_config
from clipjax.methods.zloss_spherical import Spherical, SphericalCaption
from clipjax.models import CaptionDecoder, CoCa, Poolers


def config() -> Run:
    run = load_config(Path(__file__).with_name("recipe.py"))
    tower = dict(width=96, heads=3, activation="quick_gelu", remat="activation", scan=False)
    model = CoCa(
        image=run.model.image,
        text=dataclasses.replace(run.model.text, pool="class"),
        decoder=CaptionDecoder(depth=1, tie=True, **tower),
        poolers=Poolers(queries=8, heads=3),
        embed_dim=96,
    )
    return dataclasses.replace(run, model=model, objective=Spherical() + SphericalCaption())
