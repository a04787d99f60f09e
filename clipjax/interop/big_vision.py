"""big_vision's `.npz` checkpoints of two towers: SigLIP, SigLIP 2 and LiT.

There is no configuration beside them, and none is needed: all sizes are to be seen in the arrays, and
the rest is the same in all of big_vision's transformers. One thing cannot be told: how a text tower
without attention pooling pools. The released ones take the last token, and that is assumed.
"""

from __future__ import annotations

import functools
import math
from typing import Any

from clipjax.data import Resize
from clipjax.errors import ClipjaxError
from clipjax.interop import family
from clipjax.interop.family import HALF, Description, Family
from clipjax.interop.huggingface import GEMMA
from clipjax.interop.table import Reshape, Rule, Table, layered, same, squeezed
from clipjax.models import DualEncoder
from clipjax.towers import TextTransformer, ViT

_ATTENTION = "MultiHeadDotProductAttention_0"


def _claims(scanned: bool, description: Description) -> bool:
    return description.has(f"params/img/Transformer/{_block(scanned, 0)}/LayerNorm_0/scale")


def _block(scanned: bool, layer: int | str) -> str:
    return "encoderblock" if scanned else f"encoderblock_{layer}"


def _read_model(scanned: bool, description: Description) -> DualEncoder:
    img, txt = "params/img", "params/txt"
    vocab_size, text_width = description.shape(f"{txt}/Embed_0/embedding", 2)
    patch, _, _, width = description.shape(f"{img}/embedding/kernel", 4)
    places = description.shape(f"{img}/pos_embedding", 3)[1]
    side = math.isqrt(places)
    if side**2 != places:
        raise ClipjaxError(f"'{img}/pos_embedding' has {places} positions, which make no square")
    pool = "map" if description.has(f"{img}/MAPHead_0/probe") else "mean"
    pool = "class" if description.has(f"{img}/cls") else pool
    text_pool = "map" if description.has(f"{txt}/MAPHead_0/probe") else "last"
    heads = {name: description.has(f"params/{name}/head/kernel") for name in ("img", "txt")}
    has_bias = description.has("params/b")
    embed_dim = description.shape(f"{txt}/head/kernel", 2)[1] if heads["txt"] else text_width
    return DualEncoder(
        image=ViT(
            patch_size=patch,
            image_size=patch * side,
            pool=pool,
            class_position=pool != "class",
            mean=HALF,
            std=HALF,
            **_transformer(scanned, description, f"{img}/Transformer", width),
        ),
        text=TextTransformer(
            vocab_size=vocab_size,
            context_length=description.shape(f"{txt}/pos_embedding", 3)[1],
            causal=False,
            pool=text_pool,
            pad_id=None,
            eos_id=1,
            **_transformer(scanned, description, f"{txt}/Encoder_0", text_width),
        ),
        embed_dim=embed_dim,
        image_projection="affine" if heads["img"] else "none",
        text_projection="affine" if heads["txt"] else "none",
        logit_scale_init=10.0,
        logit_scale_max=None,
        logit_bias_init=-10.0 if has_bias else None,
    )


def _transformer(
    scanned: bool, description: Description, prefix: str, width: int
) -> dict[str, Any]:
    block = f"{prefix}/{_block(scanned, 0)}"
    query = description.shape(f"{block}/{_ATTENTION}/query/kernel", 3 + scanned)
    norms = description.shape(f"{block}/LayerNorm_0/scale", 1 + scanned)
    depth = norms[0] if scanned else description.layers(f"{prefix}/encoderblock_")
    return {
        "width": width,
        "depth": depth,
        "heads": query[-2],
        "mlp_dim": description.shape(f"{block}/MlpBlock_0/Dense_0/bias", 1 + scanned)[-1],
        "activation": "gelu_tanh",
        "eps": 1e-6,
    }


def _table(scanned: bool, model: Any) -> Table:
    image, text = model.image, model.text
    img, txt = "params/img", "params/txt"
    patch = (image.patch_size, image.patch_size, 3, image.width)
    flat = (3 * image.patch_size**2, image.width)
    rows = image.grid[0] * image.grid[1]
    rules = [
        Rule(f"{img}/embedding/kernel", ("image/patch/kernel",), (Reshape(patch, flat),)),
        *same(f"{img}/embedding/bias", "image/patch/bias"),
        *squeezed(f"{img}/pos_embedding", "image/positions", (rows, image.width)),
        *_encoder(scanned, f"{img}/Transformer", "image", image),
        *same(f"{txt}/Embed_0/embedding", "text/embedding"),
        *squeezed(f"{txt}/pos_embedding", "text/positions", (text.context_length, text.width)),
        *_encoder(scanned, f"{txt}/Encoder_0", "text", text),
        *squeezed("params/t", "logit_scale", ()),
        *squeezed("params/b", "logit_bias", ()) * (model.logit_bias_init is not None),
    ]
    if image.pool == "class":
        rules += squeezed(f"{img}/cls", "image/class_token", (image.width,), ones=2)
    for name, side, tower in (("img", "image", image), ("txt", "text", text)):
        if tower.pool == "map":
            rules += _map_head(f"params/{name}/MAPHead_0", f"{side}/pool", tower)
        if getattr(model, f"{side}_projection") == "affine":
            rules += _dense(f"params/{name}/head", f"{side}_projection")
    # What a training checkpoint holds beside the parameters.
    return Table(tuple(rules), ignored=(r"(opt|chrono|extra)/.*",))


def _encoder(scanned: bool, theirs: str, ours: str, tower: Any) -> list[Rule]:
    block, blocks = f"{theirs}/{_block(scanned, '{i}')}", f"{ours}/blocks"
    lead = (tower.depth,) if scanned else ()
    rules = [
        *_norm(f"{block}/LayerNorm_0", f"{blocks}/norm1"),
        *_attention(f"{block}/{_ATTENTION}", f"{blocks}/attn", tower, lead),
        *_norm(f"{block}/LayerNorm_1", f"{blocks}/norm2"),
        *_dense(f"{block}/MlpBlock_0/Dense_0", f"{blocks}/mlp/fc1"),
        *_dense(f"{block}/MlpBlock_0/Dense_1", f"{blocks}/mlp/fc2"),
    ]
    rules = rules if scanned else layered(rules, range(tower.depth))
    return rules + _norm(f"{theirs}/encoder_norm", f"{ours}/norm")


def _map_head(theirs: str, ours: str, tower: Any) -> list[Rule]:
    return [
        *squeezed(f"{theirs}/probe", f"{ours}/probe", (tower.width,), ones=2),
        *_attention(f"{theirs}/{_ATTENTION}", f"{ours}/attn", tower, ()),
        *_norm(f"{theirs}/LayerNorm_0", f"{ours}/norm"),
        *_dense(f"{theirs}/MlpBlock_0/Dense_0", f"{ours}/mlp/fc1"),
        *_dense(f"{theirs}/MlpBlock_0/Dense_1", f"{ours}/mlp/fc2"),
    ]


def _attention(theirs: str, ours: str, tower: Any, lead: tuple[int, ...]) -> list[Rule]:
    """Theirs has an axis for the heads and one for the channels of each; `lead` is the layer axis."""
    width, heads = tower.width, tower.heads
    split, whole = (heads, width // heads), (width,)
    rules = []
    for name, letter in (("query", "q"), ("key", "k"), ("value", "v")):
        for leaf, inputs in (("kernel", whole), ("bias", ())):
            step = Reshape(lead + inputs + split, lead + inputs + whole)
            rules.append(Rule(f"{theirs}/{name}/{leaf}", (f"{ours}/{letter}/{leaf}",), (step,)))
    out = Reshape(lead + split + whole, lead + whole + whole)
    rules.append(Rule(f"{theirs}/out/kernel", (f"{ours}/out/kernel",), (out,)))
    return rules + same(f"{theirs}/out/bias", f"{ours}/out/bias")


def _dense(theirs: str, ours: str) -> list[Rule]:
    return same(f"{theirs}/kernel", f"{ours}/kernel") + same(f"{theirs}/bias", f"{ours}/bias")


def _norm(theirs: str, ours: str) -> list[Rule]:
    return same(f"{theirs}/scale", f"{ours}/scale") + same(f"{theirs}/bias", f"{ours}/bias")


def _nearest(model: Any) -> DualEncoder:
    image, text = model.image, model.text
    family.square(image)
    sizes = {
        tower: {name: getattr(tower, name) for name in ("width", "depth", "heads", "mlp_dim")}
        | {"activation": "gelu_tanh", "eps": 1e-6}
        for tower in (image, text)
    }
    affine = {
        side: "none" if getattr(model, f"{side}_projection") == "none" else "affine"
        for side in ("image", "text")
    }
    return DualEncoder(
        image=ViT(
            patch_size=image.patch_size,
            image_size=image.image_size,
            pool=image.pool,
            class_position=image.pool != "class",
            mean=HALF,
            std=HALF,
            **sizes[image],
        ),
        text=TextTransformer(
            vocab_size=text.vocab_size,
            context_length=text.context_length,
            causal=False,
            pool="map" if text.pool == "map" else "last",
            pad_id=None,
            **sizes[text],
        ),
        embed_dim=model.embed_dim,
        image_projection=affine["image"],
        text_projection=affine["text"],
        logit_bias_init=model.logit_bias_init,
        logit_scale_max=None,
        logit_scale_init=10.0,
    )


def _tokens(description: Description) -> dict[str, Any]:
    vocab_size = description.shape("params/txt/Embed_0/embedding", 2)[0]
    if vocab_size == GEMMA:
        return {"bos": "", "eos": "<eos>", "pad": "<pad>", "clean": "lower"}
    # SigLIP fills up its texts with the end token.
    return {"bos": "", "eos": "</s>", "pad": "</s>", "clean": "canonical"}


def _family(name: str, scanned: bool) -> Family:
    return Family(
        name=name,
        models=(DualEncoder,),
        image_towers=(ViT,),
        weights_file="weights.npz",
        claims=functools.partial(_claims, scanned),
        model=functools.partial(_read_model, scanned),
        table=functools.partial(_table, scanned),
        nearest=_nearest,
        describe=lambda pretrained: {},
        resize=lambda description: Resize("squash"),
        tokens=_tokens,
    )


BIG_VISION = _family("big_vision", scanned=False)
BIG_VISION_SCANNED = _family("big_vision, scanned", scanned=True)
