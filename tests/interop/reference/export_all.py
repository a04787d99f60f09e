"""First half of the round trip, in clipjax's environment: python export_all.py FOLDER

Imports every golden and exports it again; makes two models of our own, with our tokenizer, and
exports them too. Then, where the `interop` extra is installed: python check_all.py FOLDER
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np
from flax import nnx

sys.path.insert(0, str(Path(__file__).parent.parent))
import conftest
import photos
from test_goldens import TO

from clipjax import ClipjaxError, Pretrained
from clipjax.data import BPE, Resize
from clipjax.interop import export_weights, import_weights
from clipjax.models import DualEncoder
from clipjax.params import split
from clipjax.towers import TextTransformer, ViT

CAPTIONS = ["a red apple", "two green apples on a table", "the cat sat", "ÉTÉ à la plage", "x"]


def main(out):
    for name in TO:
        golden = conftest.read_golden(name)
        pretrained = import_weights(golden.write(out / name / "source"))
        for to in filter(None, {TO[name], "hf", "open_clip"}):
            try:
                export_weights(pretrained, out / name / to, to)
            except ClipjaxError as error:
                print(f"{name} -> {to}: {error}")
    for name, model in own_models().items():
        tokenizer = BPE(vocab_size=300).build(CAPTIONS)
        _, params, state = split(model.build(nnx.Rngs(1)))
        params = jax.tree.map(lambda x: np.asarray(x) * 1.5, params)
        resize = Resize("crop", half_pixel="down") if name == "clip" else Resize("squash")
        pretrained = Pretrained(model, params, state, tokenizer, 16, 32, resize)
        predictor = pretrained.predictor()
        pictures = list(photos.pictures())
        (out / name).mkdir(parents=True)
        np.savez(
            out / name / "ours.npz",
            image=predictor.encode_image(pictures),
            text=predictor.encode_text(CAPTIONS),
            **{f"picture{i}": p for i, p in enumerate(pictures)},
        )
        (out / name / "captions.json").write_text(json.dumps(CAPTIONS))
        for to in ("hf", "open_clip"):
            try:
                export_weights(pretrained, out / name / to, to)
            except ClipjaxError as error:
                print(f"{name} -> {to}: {error}")


def own_models():
    shape = {"width": 64, "depth": 2, "heads": 2}
    text = {"vocab_size": 300, "context_length": 16, **shape}
    clip_image = ViT(image_size=32, patch_size=8, pre_norm=True, patch_bias=False, **shape)
    siglip_image = ViT(image_size=32, patch_size=8, pool="map", **shape)
    return {
        "clip": DualEncoder(clip_image, TextTransformer(**text), embed_dim=24),
        "siglip": DualEncoder(
            siglip_image,
            TextTransformer(pool="last", causal=False, pad_id=None, **text),
            embed_dim=64,
            image_projection="none",
            text_projection="affine",
            logit_bias_init=-10.0,
        ),
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))
