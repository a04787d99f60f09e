"""AWP on a small CoCa with the common recipe's image tower: the words it would write, with one put right."""

import dataclasses
from pathlib import Path

from clipjax import Run, load_config
from clipjax.methods.awp_margin import AWP
from clipjax.models import CaptionDecoder, CoCa, Poolers
from clipjax.objectives import Caption, Softmax
from clipjax.towers import TextTransformer


def config() -> Run:
    run = load_config(Path(__file__).with_name("recipe.py"))
    tower = dict(width=96, heads=3, depth=2, activation="quick_gelu", scan=False)
    return dataclasses.replace(
        run,
        model=CoCa(
            image=run.model.image,
            text=TextTransformer(
                vocab_size=2048, context_length=12, eos_id=2, pool="class", **tower
            ),
            decoder=CaptionDecoder(tie=True, **tower),
            poolers=Poolers(queries=8, heads=3),
            embed_dim=96,
        ),
        objective=Softmax() + 2.0 * Caption() + 0.5 * AWP(margin=0.1),
    )
