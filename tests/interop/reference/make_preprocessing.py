"""Makes goldens/preprocessing.npz: what the reference pipelines make of pictures.

OpenCLIP's and OpenAI's is torchvision's Resize, CenterCrop and Normalize; transformers' are its image
processors, on Pillow.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import transforms as T
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

sys.path.insert(0, str(Path(__file__).parent.parent))
import photos

SIZE = 36
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


def unnormalized(x, mean, std):
    x = torch.as_tensor(np.asarray(x)).squeeze(0).permute(1, 2, 0).double().numpy()
    return np.rint((x * std + mean) * 255).astype(np.uint8)


def torchvision_pipeline(image):
    steps = [T.Resize(SIZE, T.InterpolationMode.BICUBIC), T.CenterCrop(SIZE), T.ToTensor(),
             T.Normalize(MEAN, STD)]  # fmt: skip
    return unnormalized(T.Compose(steps)(Image.fromarray(image)), MEAN, STD)


def squash(image):
    steps = [T.Resize((SIZE, SIZE), T.InterpolationMode.BICUBIC), T.ToTensor()]
    return unnormalized(T.Compose(steps)(Image.fromarray(image)), 0, 1)


def clip(image):
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}
    )
    return unnormalized(processor(Image.fromarray(image))["pixel_values"], MEAN, STD)


def siglip(image):
    processor = SiglipImageProcessorPil(size={"height": SIZE, "width": SIZE}, resample=2)
    return unnormalized(processor(Image.fromarray(image))["pixel_values"], 0.5, 0.5)


pipelines = {
    "open_clip": torchvision_pipeline,
    "open_clip_squash": squash,
    "clip": clip,
    "siglip_bilinear": siglip,
}
goldens = {name: np.stack([make(p) for p in photos.pictures()]) for name, make in pipelines.items()}
np.savez_compressed(Path(__file__).parent.parent / "goldens" / "preprocessing.npz", **goldens)
