"""The recipe that all methods share: a smaller quickstart, with `Softmax()`, against which they are measured.

A minute on two CPU cores. A method's config replaces the objective, and what else the method is about:

    run = load_config(Path(__file__).with_name("recipe.py"))
    return dataclasses.replace(run, objective=...)
"""

from clipjax import Checkpointing, Run
from clipjax.data import BPE, CaptionChoice, Data, RandomResizedCrop, Shift, Tfds
from clipjax.evals import Retrieval
from clipjax.models import DualEncoder
from clipjax.objectives import Softmax
from clipjax.optim import Cosine, Duration, Muon
from clipjax.towers import TextTransformer, ViT

LANGUAGES = ("en",)


def config() -> Run:
    tower = dict(
        width=96, depth=3, heads=3, activation="quick_gelu", remat="activation", scan=False
    )
    return Run(
        model=DualEncoder(
            image=ViT(image_size=48, patch_size=12, pool="mean", **tower),
            text=TextTransformer(vocab_size=2048, context_length=12, eos_id=2, **tower),
            embed_dim=96,
        ),
        objective=Softmax(),
        data=Data(
            source=Tfds("twemoji", split="train"),
            tokenizer=BPE(vocab_size=2048),
            image_size=48,
            batch_size=128,
            context_length=12,
            augment=(RandomResizedCrop(scale=(0.7, 1.0)), Shift()),
            captions=CaptionChoice(languages=LANGUAGES),
            cache=True,
        ),
        optimizer=Muon(lr=2e-3, weight_decay=0.2, schedule=Cosine(warmup=Duration(10))),
        duration=Duration(200),
        evals=(
            Retrieval(source=Tfds("twemoji", split="test"), languages=LANGUAGES),
            Retrieval(
                source=Tfds("twemoji", split="test_novel"), name="novel", languages=LANGUAGES
            ),
        ),
        checkpoint=Checkpointing(every=None),
    )
