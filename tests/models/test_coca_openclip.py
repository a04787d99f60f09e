"""CoCa computes what OpenCLIP's does from the same weights (make_coca_goldens.py made the reference)."""

import re
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from jax import jit

from clipjax.batch import PAIR
from clipjax.models import CaptionDecoder, CoCa, Poolers
from clipjax.params import abstract, merge, paths
from clipjax.towers import TextTransformer, ViT

GOLDENS = Path(__file__).parent / "goldens" / "coca.npz"

CAPTIONS = PAIR | {"captions"}


def block(theirs):
    """A residual block of OpenCLIP's, as (path in our block -> key, how it is turned)."""
    table = {
        f"attn/{p}/{leaf}": (f"{theirs}.attn.in_proj_{name}", f"part{i}{turn}")
        for i, p in enumerate("qkv")
        for leaf, name, turn in (("kernel", "weight", "T"), ("bias", "bias", ""))
    }
    for ours, name in {
        "attn/out": "attn.out_proj",
        "mlp/fc1": "mlp.c_fc",
        "mlp/fc2": "mlp.c_proj",
    }.items():
        table[f"{ours}/kernel"] = (f"{theirs}.{name}.weight", "T")
        table[f"{ours}/bias"] = (f"{theirs}.{name}.bias", "")
    return table | norm("norm1", f"{theirs}.ln_1") | norm("norm2", f"{theirs}.ln_2")


def norm(ours, theirs):
    return {f"{ours}/scale": (f"{theirs}.weight", ""), f"{ours}/bias": (f"{theirs}.bias", "")}


def renamed(table, names):
    """A cross-attention block of OpenCLIP's is a part of ours, under other names."""
    out = {}
    for path, source in table.items():
        head, _, rest = path.partition("/")
        out[f"{names.get(head, head)}/{rest}"] = source
    return out


def pool(ours, theirs, inputs):
    table = {f"{ours}/queries": (f"{theirs}.query", "")}
    table |= norm(f"{ours}/norm_queries", f"{theirs}.ln_q") | norm(inputs, f"{theirs}.ln_k")
    return table | {
        f"{ours}/{path}": source
        for path, source in block(theirs).items()
        if path.startswith("attn/")
    }


CROSS = {
    "norm1": "norm_cross",
    "attn": "cross",
    "norm2": "norm_cross_mlp",
    "mlp": "cross_mlp",
}
PLAIN = {
    "logit_scale": ("logit_scale", ""),
    "image/patch/kernel": ("visual.conv1.weight", "patch"),
    "image/class_token": ("visual.class_embedding", ""),
    "image/positions": ("visual.positional_embedding", ""),
    **norm("image/pre_norm", "visual.ln_pre"),
    "image_projection/kernel": ("visual.proj", ""),
    "text/embedding": ("text.token_embedding.weight", ""),
    # The class token always stands at the end of a full row: its position is a part of it.
    "text/positions": ("text.positional_embedding", "but last"),
    "text/class_token": ("text.cls_emb + text.positional_embedding", "last"),
    **norm("text/norm", "text.ln_final"),
    "text_projection/kernel": ("text.text_projection", ""),
    **norm("decoder/norm", "text_decoder.ln_final"),
    "decoder/head/kernel": ("text_decoder.text_projection", ""),
}
BLOCKS = {
    "image/blocks": block("visual.transformer.resblocks.#"),
    "text/blocks": block("text.transformer.resblocks.#"),
    "decoder/blocks": block("text_decoder.resblocks.#")
    | renamed(block("text_decoder.cross_attn.#"), CROSS)
    | norm("norm_memory", "text_decoder.cross_attn.#.ln_1_kv"),
}
# The tower's last norm comes before any pooler here, and in OpenCLIP with one pooler after it.
SINGLE = pool("memory_pool", "visual.attn_pool", "image/norm") | norm(
    "memory_pool/norm_out", "visual.ln_post"
)
APART = (
    norm("image/norm", "visual.ln_post")
    | pool("memory_pool", "visual.attn_pool", "memory_pool/norm_context")
    | pool("contrast_pool", "visual.attn_pool_contrastive", "contrast_pool/norm_context")
)


def table(layout):
    """Our path -> (OpenCLIP's key, how it is turned), `#` standing for each layer in turn."""
    out = PLAIN | (SINGLE if layout == "single" else APART)
    for prefix, entries in BLOCKS.items():
        out |= {f"{prefix}/{path}": source for path, source in entries.items()}
    return out


def fetch(weights, key, turn):
    if "#" in key:
        layer = re.compile(re.escape(key).replace(r"\#", r"(\d+)") + "$")
        layers = {int(found[1]) for name in weights if (found := layer.match(name))}
        return np.stack([fetch(weights, key.replace("#", str(i)), turn) for i in sorted(layers)])
    if "+" in key:
        return sum(weights[k][-1] if weights[k].ndim == 2 else weights[k] for k in key.split(" + "))
    if turn.startswith("part"):
        i, whole = int(turn[4]), key
        split = key.replace("in_proj_weight", f"{'qkv'[i]}_proj_weight")
        if split in weights and split != whole:
            return weights[split].T
        part = np.split(weights[whole], 3)[i]
        return part.T if turn.endswith("T") else part
    value = weights[key]
    if turn == "T":
        return value.T
    if turn == "patch":
        return value.transpose(2, 3, 1, 0).reshape(-1, len(value))
    return value[:-1] if turn == "but last" else value


@pytest.fixture(scope="module")
def goldens():
    return dict(np.load(GOLDENS))


@pytest.mark.parametrize("case", ["single_legacy", "single", "parallel", "cascade"])
def test_agrees_with_openclip(goldens, case):
    layout = case.partition("_")[0]
    shape = {"depth": 2, "width": 16, "heads": 2}
    single = layout == "single"
    model = CoCa(
        image=ViT(
            image_size=16, patch_size=8, pre_norm=True, patch_bias=False,
            depth=2, width=24 if single else 16, heads=3 if single else 2,
        ),
        text=TextTransformer(
            vocab_size=64, context_length=8, pool="class",
            legacy_class_mask=case.endswith("legacy"), **shape,
        ),
        decoder=CaptionDecoder(cross_mlp=True, **shape),
        poolers=Poolers(6, layout, heads=4, norm_context=not single, norm_out=single),
        embed_dim=16,
    )  # fmt: skip
    weights = {
        key.removeprefix(f"{case}/weights/"): value.astype(np.float32)
        for key, value in goldens.items()
        if key.startswith(f"{case}/weights/")
    }
    graphdef, shapes, _ = abstract(lambda: model.build(nnx.Rngs(0)))
    sources, params = table(layout), {}
    for path, leaf in paths(shapes):
        node = params
        *folders, name = path.split("/")
        for folder in folders:
            node = node.setdefault(folder, {})
        node[name] = fetch(weights, *sources.pop(path))
        assert node[name].shape == leaf.shape, path
    assert not sources, f"weights left behind: {sorted(sources)}"

    encoded = jit(lambda params, image, text: merge(graphdef, params, {})(
        {"image": image, "text": text}, needs=CAPTIONS))(params, goldens["image"], goldens["text"])  # fmt: skip
    np.testing.assert_allclose(encoded["image"], goldens[f"{case}/image_features"], atol=1e-4)
    np.testing.assert_allclose(encoded["text"], goldens[f"{case}/text_features"], atol=1e-4)
    logits = np.asarray(encoded["captions"]) @ np.asarray(encoded.shared["caption_head"])
    counts = goldens["text"][:, 1:] != 0  # what follows the end is nobody's prediction
    expected = goldens[f"{case}/logits"]
    np.testing.assert_allclose(logits[counts], expected[counts], atol=1e-4 * np.abs(expected).max())
    if case == "single":  # the flag matters: the two masks give different embeddings
        legacy = goldens["single_legacy/text_features"]
        assert np.abs(legacy - goldens["single/text_features"]).max() > 1e-3
