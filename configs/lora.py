"""Low-rank fine-tuning of the quickstart's model on captions in Spanish: the base stays, factors of rank 8 learn.

clipjax train configs/lora.py --start.path runs/quickstart
"""

import dataclasses
from pathlib import Path

from clipjax import Run, StartFrom, load_config
from clipjax.data import CaptionChoice
from clipjax.models import Lora
from clipjax.optim import Duration, Group

LANGUAGES = ("es",)


def config() -> Run:
    run = load_config(Path(__file__).with_name("quickstart.py"))
    return dataclasses.replace(
        run,
        model=Lora(run.model, pattern=r"(attn/(q|v)|mlp/fc\d)/kernel$", rank=8),
        start=StartFrom("runs/quickstart", into="base", fresh="^lora/"),
        data=dataclasses.replace(run.data, captions=CaptionChoice(languages=LANGUAGES)),
        optimizer=dataclasses.replace(run.optimizer, groups=(Group("^base/", frozen=True),)),
        duration=Duration(50),
        evals=tuple(dataclasses.replace(e, languages=LANGUAGES) for e in run.evals),
    )
