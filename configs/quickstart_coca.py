"""The quickstart that writes: a small CoCa learns to match emoji with their English names, and to name them.

Pictures and names come from two Python packages (see README.md); nothing is downloaded besides. A few
minutes on a CPU.
"""

from clipjax import Checkpointing, Run
from clipjax.data import BPE, CaptionChoice, Data, RandomResizedCrop, Shift, Tfds
from clipjax.evals import Captioning, Every, Retrieval
from clipjax.models import CaptionDecoder, CoCa, Poolers
from clipjax.objectives import Caption, Softmax
from clipjax.optim import Cosine, Duration, Muon
from clipjax.towers import TextTransformer, ViT

LANGUAGES = ("en",)


def config() -> Run:
    # As in quickstart.py, on a CPU overhead counts for more than products: few tokens, blocks unrolled,
    # activations recomputed. The decoder's halves share the depth that the text tower has there.
    tower = dict(width=128, heads=4, activation="quick_gelu", remat="activation", scan=False)
    return Run(
        model=CoCa(
            image=ViT(
                image_size=72, patch_size=12, patch_dropout=0.25, pool="mean", depth=4, **tower
            ),
            text=TextTransformer(
                vocab_size=2048, context_length=16, eos_id=2, pool="class", depth=2, **tower
            ),
            decoder=CaptionDecoder(depth=2, tie=True, **tower),
            poolers=Poolers(queries=16, heads=4),
            embed_dim=128,
        ),
        objective=Softmax() * 1.0 + Caption(label_smoothing=0.1) * 2.0,
        data=Data(
            source=Tfds("twemoji", split="train"),
            tokenizer=BPE(vocab_size=2048),
            image_size=72,
            batch_size=128,
            context_length=16,
            augment=(RandomResizedCrop(scale=(0.7, 1.0)), Shift()),
            captions=CaptionChoice(languages=LANGUAGES),
            cache=True,
        ),
        optimizer=Muon(lr=2e-3, weight_decay=0.2, schedule=Cosine(warmup=Duration(30))),
        duration=Duration(400),
        evals=(
            Retrieval(source=Tfds("twemoji", split="test"), languages=LANGUAGES, every=Every(100)),
            Captioning(
                source=Tfds("twemoji", split="test"),
                languages=LANGUAGES,
                training=Tfds("twemoji", split="train"),
            ),
        ),
        checkpoint=Checkpointing(every=Duration(100), best="retrieval/image_to_text/R@1"),
    )
