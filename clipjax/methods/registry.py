"""What methods there are: each file of this package says of itself what it is; what stands elsewhere is said here."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from typing import Literal

Status = Literal["official", "second hand", "reconstructed", "ours elsewhere"]


@dataclasses.dataclass(frozen=True)
class Method:
    """A published method, and where it is."""

    id: str
    """Its short name: of the file here, and of the config in `configs/methods/`."""
    title: str
    """The paper's title."""
    arxiv: str | None
    """The paper's arXiv number, where known."""
    status: Status
    """What it was written from: official (the authors' code), second hand (others' code or text),
    reconstructed (from the abstract); ours elsewhere: it is part of the core."""
    summary: str
    """One line."""
    place: str | None = None
    """Where it stands, if not in this package: `module:Class`."""


def _core(id: str, title: str, arxiv: str, summary: str, place: str) -> Method:
    return Method(id, title, arxiv, "ours elsewhere", summary, place)


ELSEWHERE = (
    _core(
        "clip",
        "Learning Transferable Visual Models From Natural Language Supervision",
        "2103.00020",
        "softmax over all pairs of the batch",
        "clipjax.objectives:Softmax",
    ),
    _core(
        "align",
        "Scaling Up Visual and Vision-Language Representation Learning With Noisy Text Supervision",
        "2102.05918",
        "label smoothing over the batch",
        "clipjax.objectives:Softmax",
    ),
    _core(
        "siglip",
        "Sigmoid Loss for Language Image Pre-Training",
        "2303.15343",
        "every pair a yes or no of its own",
        "clipjax.objectives:Sigmoid",
    ),
    _core(
        "coca",
        "CoCa: Contrastive Captioners are Image-Text Foundation Models",
        "2205.01917",
        "contrast and captions from one decoder",
        "clipjax.models:CoCa",
    ),
    _core(
        "cappa",
        "Image Captioners Are Scalable Vision Learners Too",
        "2306.07915",
        "captions alone, some predicted in parallel",
        "clipjax.models:CoCa",
    ),
    _core(
        "mammut",
        "MaMMUT: A Simple Architecture for Joint Learning for MultiModal Tasks",
        "2303.16839",
        "one decoder for contrast and captions",
        "clipjax.models:CoCa",
    ),
    _core(
        "cwcl",
        "CWCL: Cross-Modal Transfer with Continuously Weighted Contrastive Loss",
        "2309.14580",
        "targets follow similarities within the locked modality",
        "clipjax.objectives:Weighted",
    ),
    _core(
        "dcl",
        "Decoupled Contrastive Learning",
        "2110.06848",
        "no positive in the denominator",
        "clipjax.objectives:Decoupled",
    ),
    _core(
        "unicl",
        "Unified Contrastive Learning in Image-Text-Label Space",
        "2204.03610",
        "several positives by equal id",
        "clipjax.objectives:MultiPositive",
    ),
    _core(
        "decoupled_softmax",
        "Dual-Encoders for Extreme Multi-Label Classification",
        "2310.10636",
        "each positive against the negatives alone",
        "clipjax.objectives:DecoupledSoftmax",
    ),
    _core(
        "albef_distillation",
        "Align before Fuse: Vision and Language Representation Learning with Momentum Distillation",
        "2107.07651",
        "soft targets of a momentum teacher",
        "clipjax.objectives:SoftTarget",
    ),
    _core(
        "m2_encoder",
        "M2-Encoder: Advancing Bilingual Image-Text Understanding by Large-scale Efficient "
        "Pretraining",
        "2401.15896",
        "negatives of one group of devices",
        "clipjax.objectives:Grouped",
    ),
    _core(
        "eisl_caption",
        "Don't Take It Literally: An Edit-Invariant Sequence Loss for Text Generation",
        "2106.15078",
        "captions whose words may stand elsewhere",
        "clipjax.objectives:EISL",
    ),
    _core(
        "lion",
        "Symbolic Discovery of Optimization Algorithms",
        "2302.06675",
        "the sign of a momentum",
        "clipjax.optim:Lion",
    ),
    _core(
        "lit",
        "LiT: Zero-Shot Transfer with Locked-image text Tuning",
        "2111.07991",
        "a frozen image tower",
        "clipjax.optim:Group",
    ),
    _core(
        "lora",
        "LoRA: Low-Rank Adaptation of Large Language Models",
        "2106.09685",
        "low-rank updates beside some weights",
        "clipjax.models:Lora",
    ),
    _core(
        "wise_ft",
        "Robust fine-tuning of zero-shot models",
        "2109.01903",
        "a mean of the weights before and after",
        "clipjax.start:Average",
    ),
    _core(
        "flip",
        "Scaling Language-Image Pre-training via Masking",
        "2212.00794",
        "a random part of the patches in training",
        "clipjax.towers:ViT",
    ),
    _core(
        "gradcache",
        "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup",
        "2101.06983",
        "accumulation that equals the big batch",
        "clipjax.train.step:make_step",
    ),
)
"""Methods that are part of the core."""


def methods() -> tuple[Method, ...]:
    """All of them: this package's by name, then those that stand elsewhere."""
    import clipjax.methods as package

    found = []
    for module in sorted(pkgutil.iter_modules(package.__path__), key=lambda m: m.name):
        if module.name == "registry":
            continue
        found.append(importlib.import_module(f"{package.__name__}.{module.name}").METHOD)
    return (*found, *ELSEWHERE)
