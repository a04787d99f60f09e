"""The quickstart: a small CLIP learns from emoji and their names, on a CPU, in a few minutes.

Pictures and names come from two Python packages (see README.md); nothing is downloaded besides.
"""

from clipjax import Checkpointing, Run
from clipjax.data import BPE, CaptionChoice, Data, Shift, Tfds
from clipjax.evals import Every, Retrieval
from clipjax.models import DualEncoder
from clipjax.objectives import Softmax
from clipjax.optim import AdamW, Cosine, Duration
from clipjax.towers import TextTransformer, ViT

LANGUAGES = ("en", "zh")


def config() -> Run:
    width, depth, heads = 128, 4, 4
    return Run(
        model=DualEncoder(
            image=ViT(
                image_size=72,
                patch_size=9,
                width=width,
                depth=depth,
                heads=heads,
                pool="mean",
                activation="quick_gelu",
                remat="activation",
            ),
            text=TextTransformer(
                vocab_size=4096,
                context_length=24,
                width=width,
                depth=depth,
                heads=heads,
                eos_id=2,
                activation="quick_gelu",
                remat="activation",
            ),
            embed_dim=128,
        ),
        objective=Softmax(),
        data=Data(
            source=Tfds("twemoji", split="train"),
            tokenizer=BPE(vocab_size=4096),
            image_size=72,
            batch_size=256,
            context_length=24,
            augment=(Shift(),),
            captions=CaptionChoice(languages=LANGUAGES),
            cache=True,
        ),
        optimizer=AdamW(lr=1e-3, schedule=Cosine(warmup=Duration(20))),
        duration=Duration(150),
        evals=(
            Retrieval(source=Tfds("twemoji", split="test"), languages=LANGUAGES, every=Every(50)),
            Retrieval(
                source=Tfds("twemoji", split="test_novel"), name="novel", languages=LANGUAGES
            ),
        ),
        checkpoint=Checkpointing(every=Duration(50), best="retrieval/image_to_text/R@1"),
    )
