"""CoCa-Large (arXiv:2205.01917) on WebDataset shards, for a pod: a recipe to start from.

Put your own shards into `source`, then start the same command on every host of the pod:

    clipjax train configs/coca_large_webscale.py --workdir /shared/coca_large

The paper's batch of 65,536 in 8 micro-batches: contrast is exact over all of it, captions ride in the
second pass, and a device never holds caption features of more than its 32 pairs of a micro-batch
(on 256 devices). Parameters and optimizer state are split over the devices of a group and copied
between the 8 groups; embeddings are gathered within a group and pass round between groups, so the
slow links carry least.
"""

from clipjax import Checkpointing, MeshShape, Run, Sharding
from clipjax.data import BPE, Data, RandomResizedCrop, WebDataset
from clipjax.models import CoCa
from clipjax.objectives import Caption, Hierarchical, Softmax
from clipjax.optim import Adafactor, Duration, Every, Linear

VOCABULARY, TOKENS, PIXELS = 64000, 76, 288


def config() -> Run:
    return Run(
        model=CoCa.preset(
            "coca_large",
            image_size=PIXELS,
            vocab_size=VOCABULARY,
            context_length=TOKENS,
            dtype="bfloat16",
            remat="dots",
        ),
        objective=Softmax() * 1.0 + Caption() * 2.0,
        data=Data(
            source=WebDataset("data/{00000..09999}.tar"),
            tokenizer=BPE(vocab_size=VOCABULARY),
            image_size=PIXELS,
            batch_size=65536,
            context_length=TOKENS,
            augment=(RandomResizedCrop(),),
        ),
        optimizer=Adafactor(lr=8e-4, weight_decay=0.01, schedule=Linear(warmup=Duration(10_000))),
        duration=Duration(500_000),
        mesh=MeshShape(group=8),
        sharding=Sharding(fsdp=True),
        exchange=Hierarchical(),
        pair_dtype="bfloat16",
        accumulate=8,
        checkpoint=Checkpointing(every=Every(1000), milestones=Every(50_000)),
        log_every=Every(50),
    )
