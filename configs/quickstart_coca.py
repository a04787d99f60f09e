"""The quickstart that writes: a small CoCa learns to match emoji with their English names, and to name them.

Data, image tower, optimizer and length are the quickstart's (quickstart.py). A few minutes on a CPU.
"""

import dataclasses
from pathlib import Path

from clipjax import Run, load_config
from clipjax.data import BPE, CaptionChoice, Tfds
from clipjax.evals import Captioning, Every, Retrieval
from clipjax.models import CaptionDecoder, CoCa, Poolers
from clipjax.objectives import Caption, Softmax
from clipjax.towers import TextTransformer

LANGUAGES = ("en",)


def config() -> Run:
    run = load_config(Path(__file__).with_name("quickstart.py"))
    # The decoder's halves share the depth that the text tower has there.
    tower = dict(width=128, heads=4, activation="quick_gelu", scan=False)
    return dataclasses.replace(
        run,
        model=CoCa(
            image=dataclasses.replace(run.model.image, pool="mean", pre_norm=False),
            text=TextTransformer(
                vocab_size=2048, context_length=16, eos_id=2, pool="class", depth=2, **tower
            ),
            decoder=CaptionDecoder(depth=2, tie=True, **tower),
            poolers=Poolers(queries=16, heads=4),
            embed_dim=128,
        ),
        objective=Softmax() * 1.0 + Caption(label_smoothing=0.1) * 2.0,
        data=dataclasses.replace(
            run.data,
            tokenizer=BPE(vocab_size=2048),
            captions=CaptionChoice(languages=LANGUAGES),
        ),
        evals=(
            Retrieval(source=Tfds("twemoji", split="test"), languages=LANGUAGES, every=Every(100)),
            Captioning(
                source=Tfds("twemoji", split="test"),
                languages=LANGUAGES,
                training=Tfds("twemoji", split="train"),
            ),
        ),
    )
