"""LiT (arXiv:2111.07991): the quickstart's image tower is locked, a new text tower learns to read it. The image
tower's last projection joins in after a third of the run (staged unfreezing).

    clipjax train configs/lit.py --start.path runs/quickstart
"""

import dataclasses
from pathlib import Path

from clipjax import Run, StartFrom, load_config
from clipjax.optim import Duration, Group


def config() -> Run:
    run = load_config(Path(__file__).with_name("quickstart.py"))
    groups = (
        Group("^image/", frozen=True),
        Group("^image_projection/", lr=0.1, starts=Duration(50)),
    )
    return dataclasses.replace(
        run,
        model=dataclasses.replace(run.model, text_projection="mlp"),
        start=StartFrom("runs/quickstart", fresh="^text(_projection)?/"),
        optimizer=dataclasses.replace(run.optimizer, groups=groups),
    )
