"""TIP-CLIP on the common recipe: emoji of Unicode's group of symbols stand for texts that show nothing."""

import dataclasses
from pathlib import Path

from clipjax import Run, load_config
from clipjax.data import Text, Tfds
from clipjax.methods.tip_clip_null import NullImage, NullSoftmax, Visualness

SYMBOLS = (7,)


def config() -> Run:
    run = load_config(Path(__file__).with_name("recipe.py"))
    return dataclasses.replace(
        run,
        objective=NullSoftmax(),
        data=dataclasses.replace(run.data, fields=(NullImage(not_visual=SYMBOLS), Text())),
        evals=(*run.evals, Visualness(source=Tfds("twemoji", split="test"), not_visual=SYMBOLS)),
    )
