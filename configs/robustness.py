"""ImageNet and the sets that ask whether ImageNet accuracy holds elsewhere.

    clipjax eval RUN_OR_MODEL --evals configs/robustness.py --table md

The data sets must have been prepared with TFDS (file_format="array_record"). ObjectNet has no TFDS builder, and
its map to ImageNet's classes is its authors': docs/evaluation.md says how to read it with `class_map`.
"""

from clipjax.data import Tfds
from clipjax.evals import Evaluator, ZeroShot


def evals() -> tuple[Evaluator, ...]:
    def imagenet(name: str, data: str, split: str = "test", prompts: str = "imagenet") -> ZeroShot:
        return ZeroShot(Tfds(data, split), name=name, prompts=prompts)

    return (
        imagenet("imagenet", "imagenet2012", split="validation"),
        imagenet("imagenet_v2", "imagenet_v2/matched-frequency"),
        imagenet("imagenet_sketch", "imagenet_sketch"),
        # 200 of the 1,000 classes each: only those are choices
        imagenet("imagenet_r", "imagenet_r", prompts="imagenet_r"),
        imagenet("imagenet_a", "imagenet_a", prompts="imagenet_a"),
    )
