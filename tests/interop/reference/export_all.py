"""First half of the round trip, in clipjax's environment: python export_all.py FOLDER

Imports every golden and exports it again; makes models of our own, with our tokenizer, and exports
them too. Then, where the `interop` extra is installed: python check_all.py FOLDER
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
import conftest
import photos
from test_goldens import TO

from clipjax import ClipjaxError, Pretrained
from clipjax.data import BPE, Resize
from clipjax.interop import export_weights, import_weights
from clipjax.interop.timm_towers import KINDS
from clipjax.models import DualEncoder
from clipjax.params import split
from clipjax.towers import TextTransformer, ViT

CAPTIONS = [
    "a red apple", "two green apples on a table", "the cat sat", "ÉTÉ à la plage", "x",
    "A “pattypan” squash – the chef’s", "ﬁsh &amp; chips", "fish &amp;amp; chips", "赤い リンゴ（２個）",
    "सेब", "  spaced\tout\n text ", "👩‍🚀 and 🍎", "<eos> is text, <bos> too", "100 % ＦＵＬＬ width",
]  # fmt: skip
LABELS = ["a red apple", "the cat’s mat", "赤い リンゴ"]


def main(out):
    for name in TO:
        golden = conftest.read_golden(name)
        pretrained = import_weights(golden.write(out / name / "source"))
        for to in filter(None, {TO[name], "hf", "open_clip"}):
            try:
                export_weights(pretrained, out / name / to, to)
            except ClipjaxError as error:
                print(f"{name} -> {to}: {error}")
    for name, (model, resize) in own_models().items():
        tokenizer = BPE(vocab_size=300, clean="repair").build(CAPTIONS)
        _, params, state = split(model.build(nnx.Rngs(1)))
        params = jax.tree.map(lambda x: np.asarray(x) * 1.5, params)
        size = model.image.image_size
        length = model.text.context_length
        pretrained = Pretrained(model, params, state, tokenizer, length, size, resize)
        pretrained.save(out / name / "model")
        files = write_pictures(out / name / "pictures")
        predictor = pretrained.predictor()
        np.savez(
            out / name / "ours.npz",
            image=predictor.encode_image(files),
            text=predictor.encode_text(CAPTIONS),
            probabilities=predictor.classify(files, LABELS).probabilities,
        )
        facts = {"captions": CAPTIONS, "labels": LABELS, "files": files}
        (out / name / "facts.json").write_text(json.dumps(facts))
        for to in ("hf", "hf-siglip2", "open_clip"):
            try:
                export_weights(pretrained, out / name / to, to)
            except ClipjaxError as error:
                print(f"{name} -> {to}: {error}")


def write_pictures(folder):
    """PNG and JPEG files by turns; their paths."""
    folder.mkdir(parents=True)
    files = []
    for i, pixels in enumerate(photos.pictures()):
        files.append(str(folder / f"{i}.{('png', 'jpg')[i % 2]}"))
        Image.fromarray(pixels).save(files[-1])
    return files


def own_models():
    """By name, a model and how it sees pictures: what users have, defaults included."""
    shape = {"width": 64, "depth": 2, "heads": 2}
    text = {"vocab_size": 300, "context_length": 24, **shape}
    sizes = {"image_size": 32, "patch_size": 8, **shape}
    sigmoid = {"embed_dim": 64, "image_projection": "none", "text_projection": "affine"}
    # transformers' pipeline pads SigLIP's texts to 64 tokens, whatever a folder says.
    last = TextTransformer(
        pool="last", causal=False, pad_id=None, **(text | {"context_length": 64})
    )

    def clip(**image):
        return DualEncoder(ViT(**sizes, **image), TextTransformer(**text), embed_dim=24)

    def siglip():
        image = ViT(pool="map", **sizes)
        return DualEncoder(image, last, logit_bias_init=-10.0, **sigmoid)

    # The one of timm's towers that is small at full size.
    pe = next(kind for kind in KINDS if "pe_core" in kind.name).tower("tiny", 16, 384)
    perception = DualEncoder(pe, TextTransformer(**text), embed_dim=24, image_projection="affine")
    return {
        "pe_tiny": (perception, Resize("crop")),
        "clip_down": (clip(pre_norm=True), Resize("crop", half_pixel="down")),
        "clip_even": (clip(), Resize("crop")),
        "clip_squash": (clip(pre_norm=True), Resize("squash", "bilinear")),
        "siglip": (siglip(), Resize("squash")),
        "siglip2": (siglip(), Resize("squash", "bilinear")),
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))
