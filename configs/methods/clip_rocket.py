"""CLIP-rocket on the common recipe: a weak view and caption, two strong ones, local heads, and BarLIP."""

import dataclasses
from pathlib import Path

from clipjax import Run, load_config
from clipjax.data import Image, Text
from clipjax.methods.clip_rocket import STRONG, BarLIP, MultiView, Reworded
from clipjax.models import Headed, MlpHead


def config() -> Run:
    run = load_config(Path(__file__).with_name("recipe.py"))
    views = (Image("image_2", augment=STRONG), Image("image_3", augment=STRONG))
    # Names of emoji are short: most of the words stay.
    texts = tuple(Reworded(name, stop_words=0.2, delete=0.1) for name in ("text_2", "text_3"))
    local = {"widths": (192, 192, 96)}
    features = {"widths": (192, 192), "unit": False}
    return dataclasses.replace(
        run,
        model=Headed(
            run.model,
            heads=(
                MlpHead("local", of="image", **local),
                MlpHead("local", of="text", **local),
                MlpHead("features", of="image", **features),
                MlpHead("features", of="text", **features),
            ),
        ),
        objective=MultiView() + 0.1 * BarLIP(),
        data=dataclasses.replace(run.data, fields=(Image(), *views, Text(), *texts)),
    )
