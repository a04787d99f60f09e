"""SLIP: CLIP, and SimCLR on two further views of its pictures.

Mu et al. 2021, "SLIP: Self-supervision meets Language-Image Pre-training" (arXiv 2112.12750). Status: second hand.

The loss is CLIP's on a view and a caption, plus SimCLR's, by its own projection head, on two more strongly
augmented views: `Softmax() + NTXent("image_2_projected", "image_3_projected")`.

What differs here: nothing of the loss; the augmentations are what `clip_rocket` has.
"""

from __future__ import annotations

from clipjax.methods.registry import Method
from clipjax.methods.simclr import NTXent
from clipjax.objectives import Objective, Softmax

METHOD = Method(
    id="slip",
    title="SLIP: Self-supervision meets Language-Image Pre-training",
    arxiv="2112.12750",
    status="second hand",
    summary="CLIP plus SimCLR on two further views",
)


def slip(weight: float = 1.0, temperature: float = 0.1) -> Objective:
    """CLIP's loss plus a weight times SimCLR's on the views `image_2` and `image_3`."""
    return Softmax() + weight * NTXent("image_2_projected", "image_3_projected", temperature)
