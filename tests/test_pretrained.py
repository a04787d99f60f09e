"""A model as a folder: what is saved comes back, and what does not fit is refused by name."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax import nnx

from clipjax import ClipjaxError, Pretrained, load
from clipjax.data import BPE, Resize
from clipjax.models import DualEncoder
from clipjax.params import paths, split
from clipjax.pretrained import read_pretrained
from clipjax.towers import TextTransformer, ViT

SHAPE = {"width": 16, "depth": 2, "heads": 2}
MODEL = DualEncoder(
    image=ViT(image_size=16, patch_size=8, **SHAPE),
    text=TextTransformer(vocab_size=270, context_length=8, **SHAPE),
    embed_dim=8,
)


@pytest.fixture
def pretrained():
    _, params, model_state = split(MODEL.build(nnx.Rngs(0)))
    tokenizer = BPE(vocab_size=270).build(["a red square", "a blue circle"])
    return Pretrained(MODEL, params, model_state, tokenizer, 8, 16, Resize("crop"))


def test_a_model_comes_back_from_its_folder(pretrained, tmp_path):
    pretrained.save(tmp_path / "model")
    again = read_pretrained(tmp_path / "model")
    assert (again.model, again.context_length, again.image_size) == (MODEL, 8, 16)
    assert again.resize == Resize("crop")
    saved, read = dict(paths(pretrained.params)), dict(paths(again.params))
    assert saved.keys() == read.keys()
    for name, leaf in saved.items():
        np.testing.assert_array_equal(read[name], leaf)
    image = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3)).astype(np.uint8)
    ours, opened = pretrained.predictor(), load(tmp_path / "model")
    np.testing.assert_array_equal(opened.encode_image(image), ours.encode_image(image))
    np.testing.assert_array_equal(opened.encode_text(["a red"]), ours.encode_text(["a red"]))


def test_weights_that_do_not_fit_are_named(pretrained, tmp_path):
    folder = tmp_path / "model"
    pretrained.save(folder)
    facts = json.loads((folder / "model.json").read_text())
    facts["model"]["embed_dim"] = 9
    (folder / "model.json").write_text(json.dumps(facts))
    with pytest.raises(ClipjaxError, match=r"image_projection/kernel' has shape \(16, 8\)"):
        read_pretrained(folder)
    for content, message in (
        ("[]", "holds no JSON object"),
        ('{"format": 1}', "lacks 'model'"),
        ("[" * 100_000, "holds no complete model"),
    ):
        (folder / "model.json").write_text(content)
        with pytest.raises(ClipjaxError, match=message):
            read_pretrained(folder)
    (folder / "model.json").write_text(json.dumps(facts))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(ClipjaxError, match="holds no complete model"):
        read_pretrained(folder)
    with pytest.raises(ClipjaxError, match="is not empty"):
        pretrained.save(folder)


def test_missing_and_unknown_arrays_are_named(pretrained):
    params = jax.tree.map(np.asarray, pretrained.params)
    scale = params.pop("logit_scale")
    with pytest.raises(ClipjaxError, match="lack 'params/logit_scale'"):
        Pretrained(MODEL, params, {}, None, 8, 16).check()
    extra = params | {"logit_scale": scale, "logit_scales": scale}
    with pytest.raises(ClipjaxError, match="'params/logit_scales', which the model lacks"):
        Pretrained(MODEL, extra, {}, None, 8, 16).check()


def test_the_fingerprint_follows_what_decides_embeddings(pretrained, tmp_path):
    mark = pretrained.fingerprint()
    pretrained.save(tmp_path / "model")
    assert read_pretrained(tmp_path / "model").fingerprint() == mark
    params = jax.tree.map(np.array, pretrained.params)
    params["image_projection"]["kernel"][0, 0] += 1e-6
    others = [
        dataclasses.replace(pretrained, params=params),
        dataclasses.replace(pretrained, resize=Resize("squash")),
        dataclasses.replace(pretrained, model=dataclasses.replace(MODEL, logit_scale_max=None)),
        dataclasses.replace(pretrained, tokenizer=BPE(vocab_size=270).build(["other words"])),
    ]
    assert len({mark, *(other.fingerprint() for other in others)}) == 5
