"""OpenAI's CLIP and OpenCLIP, which kept OpenAI's names: ViT, ResNet, custom text, timm's SigLIP.

OpenAI's files say nothing of the architecture but by their shapes; OpenCLIP's come with an
`open_clip_config.json` (or one of its model configurations).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from typing import Any

import numpy as np

from clipjax.data import Resize
from clipjax.errors import ClipjaxError
from clipjax.interop import family, huggingface
from clipjax.interop.family import HALF, OPENAI_MEAN, OPENAI_STD, Description, Family
from clipjax.interop.rewrite import without_patch_bias
from clipjax.interop.table import (
    Rule,
    Split,
    Table,
    Transpose,
    layered,
    linear,
    norm,
    packed,
    patches,
    same,
    squeezed,
)
from clipjax.models import DualEncoder
from clipjax.models.coca import CaptionDecoder, CoCa, Poolers
from clipjax.pretrained import Pretrained
from clipjax.towers import ResNet, TextTransformer, ViT

CONFIG = "open_clip_config.json"
_HEAD_WIDTH = 64  # of every attention head in OpenAI's models
_OPENAI_SCALARS = ("input_resolution", "context_length", "vocab_size")
_ACTIVATIONS = {"gelu": None, "gelu_tanh": {"approximate": "tanh"}}  # ours -> act_kwargs
_TIMM = {
    # timm's SigLIP vision transformers, whose sizes stand in its code: (width, depth, heads, mlp_dim)
    "base": (768, 12, 12, 3072),
    "large": (1024, 24, 16, 4096),
    "so400m": (1152, 27, 16, 4304),
    "giantopt": (1536, 40, 16, 6144),
}
_EITHER: dict[str, tuple[Any, ...]] = {
    # What OpenCLIP's towers can be, and ours cannot.
    **dict.fromkeys(("qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner"), (False,)),
    **dict.fromkeys(("scale_attn", "scale_fc", "final_ln_after_pool"), (False,)),
    "ls_init_value": (None,),
    "block_type": (None, "default"),
    "pool_type": ("tok", "argmax", "eos", "last"),
    # What is read.
    **dict.fromkeys(("width", "layers", "mlp_ratio", "act_kwargs", "norm_kwargs"), family.ANY),
    "output_tokens": family.ANY,
}
_VISION_FIELDS = _EITHER | {
    "pos_embed_type": ("learnable",),
    "attentional_pool": (False,),
    "global_average_pool": (False,),  # this and the next are of releases before 2.20
    "input_patchnorm": (False,),
    "timm_pool": ("map",),
    "timm_proj": ("none", "linear", None),
    **dict.fromkeys(("head_width", "patch_size", "image_size", "no_ln_pre"), family.ANY),
    **dict.fromkeys(("timm_model_name", "timm_proj_bias"), family.ANY),
    **dict.fromkeys(("attn_pooler_queries", "attn_pooler_heads"), family.ANY),
    # What only training sees.
    **dict.fromkeys(("patch_dropout", "timm_model_pretrained", "timm_drop"), family.ANY),
    "timm_drop_path": family.ANY,
}
_TEXT_FIELDS = _EITHER | {
    "embed_cls": (False,),
    "hf_model_name": (None, ""),
    "tokenizer_mode": (None, ""),
    **dict.fromkeys(("context_length", "vocab_size", "heads", "pad_id", "eos_id"), family.ANY),
    **dict.fromkeys(("no_causal_mask", "proj_bias", "proj_type"), family.ANY),
    **dict.fromkeys(("hf_tokenizer_name", "tokenizer_kwargs"), family.ANY),
    # What says something of hf_model_name alone.
    **dict.fromkeys(("hf_model_pretrained", "hf_proj_type", "hf_pooler_type"), family.ANY),
}
_DECODER_FIELDS = _TEXT_FIELDS | {
    "mlp_ratio": (4,),
    **dict.fromkeys(("dim_head", "n_queries", "attn_pooler_heads"), family.ANY),
}
_MODEL_FIELDS = {
    "nonscalar_logit_scale": (False,),
    "quick_gelu": (False, True),
    **dict.fromkeys(("embed_dim", "vision_cfg", "text_cfg", "multimodal_cfg"), family.ANY),
    **dict.fromkeys(("custom_text", "init_logit_scale", "init_logit_bias"), family.ANY),
    **dict.fromkeys(("cast_dtype", "output_dict", "preprocess_cfg"), family.ANY),
}
_PREPROCESS_FIELDS = {
    "mode": ("RGB",),
    **dict.fromkeys(("size", "mean", "std", "interpolation", "resize_mode"), family.ANY),
    "fill_color": family.ANY,  # of a resize_mode that is refused
}
_TIMM_TANH = ("giantopt_patch16", "base_patch32")  # the others have the exact GELU


def _claims(custom: bool, description: Description) -> bool:
    prefix = "text." if custom else ""
    return description.has(f"{prefix}token_embedding.weight", f"{prefix}ln_final.weight")


def _claims_openai(description: Description) -> bool:
    return (
        _claims(False, description)
        and CONFIG not in description.files
        and description.has(*_OPENAI_SCALARS)
    )


# Architecture


def _read_openai(description: Description) -> DualEncoder:
    vocab_size, width = description.shape("token_embedding.weight", 2)
    return _openai(
        image=_openai_image(description),
        embed_dim=description.shape("text_projection", 2)[1],
        text={
            "vocab_size": vocab_size,
            "context_length": description.shape("positional_embedding", 2)[0],
            "width": width,
            "depth": description.layers("transformer.resblocks."),
        },
    )


def _openai(image: dict[str, Any], text: dict[str, Any], embed_dim: int) -> DualEncoder:
    """The one arrangement of OpenAI's models, by the sizes that differ between them."""
    pixels: dict[str, Any] = {"mean": OPENAI_MEAN, "std": OPENAI_STD}
    resnet = "blocks" in image
    tower: Any
    if resnet:
        heads = max(1, image["width"] * 32 // _HEAD_WIDTH)
        tower = ResNet(**image, output_dim=embed_dim, heads=heads, **pixels)
    else:
        heads = max(1, image["width"] // _HEAD_WIDTH)
        common: dict[str, Any] = {
            "pool": "class",
            "pre_norm": True,
            "patch_bias": False,
            "activation": "quick_gelu",
        }
        tower = ViT(**image, heads=heads, mlp_dim=4 * image["width"], **common, **pixels)
    words = TextTransformer(
        **text,
        heads=max(1, text["width"] // _HEAD_WIDTH),
        mlp_dim=4 * text["width"],
        activation="quick_gelu",
        pool="eos",
        eos_id=text["vocab_size"] - 1,
        pad_id=None,
    )
    projection = "none" if resnet else "linear"
    return DualEncoder(image=tower, text=words, embed_dim=embed_dim, image_projection=projection)


def _openai_image(description: Description) -> dict[str, Any]:
    if description.has("visual.proj"):
        width, _, patch, _ = description.shape("visual.conv1.weight", 4)
        places = description.shape("visual.positional_embedding", 2)[0] - 1
        return {
            "width": width,
            "depth": description.layers("visual.transformer.resblocks."),
            "patch_size": patch,
            "image_size": patch * _side(places, "visual.positional_embedding"),
        }
    table = "visual.attnpool.positional_embedding"
    return {
        "blocks": tuple(description.layers(f"visual.layer{stage}.") for stage in (1, 2, 3, 4)),
        "width": description.shape("visual.layer1.0.conv1.weight", 4)[0],
        "image_size": 32 * _side(description.shape(table, 2)[0] - 1, table),
    }


def _side(places: int, table: str) -> int:
    side = math.isqrt(max(places, 0))
    if side**2 != places or not places:
        raise ClipjaxError(
            f"tensor {table!r} has positions for {places} places, which make no square"
        )
    return side


def _read_model(description: Description) -> Any:
    config = description.files.get(CONFIG)
    if config is None:
        raise ClipjaxError(
            f"there is no {CONFIG} beside the weights, and heads and activation are not to be seen in them: "
            "put it there, name a model configuration of OpenCLIP with --config, or, if the weights are "
            "OpenAI's own, say --family openai"
        )
    preprocess = config.get("preprocess_cfg", {})
    facts = config.get("model_cfg", config)
    where = f"{CONFIG}: model_cfg"
    family.refuse_unknown(facts, where, **_MODEL_FIELDS)
    family.refuse_unknown(preprocess, f"{CONFIG}: preprocess_cfg", **_PREPROCESS_FIELDS)
    if "multimodal_cfg" in facts:
        return _read_coca(facts, preprocess, where)
    vision, text = family.field(facts, "vision_cfg", where), family.field(facts, "text_cfg", where)
    family.refuse_unknown(vision, f"{where}.vision_cfg", **_VISION_FIELDS)
    family.refuse_unknown(text, f"{where}.text_cfg", **_TEXT_FIELDS)
    embed_dim = family.field(facts, "embed_dim", where)
    quick = bool(facts.get("quick_gelu", False))
    half = HALF if "siglip" in str(vision.get("timm_model_name")) else None
    pixels = {
        "mean": family.three(preprocess.get("mean", half or OPENAI_MEAN), "preprocess_cfg.mean"),
        "std": family.three(preprocess.get("std", half or OPENAI_STD), "preprocess_cfg.std"),
    }
    image: ViT | ResNet
    if vision.get("timm_model_name"):
        image, projection = _timm_image(vision, description, pixels), _timm_projection(vision)
    elif isinstance(vision.get("layers"), (list, tuple)):
        image, projection = _resnet(vision, embed_dim, pixels), "none"
    else:
        image, projection = _vit(vision, quick, pixels), "linear"
    _require_size(preprocess, image)
    proj = text.get("proj_type", "linear")
    if proj not in ("linear", "none"):
        raise ClipjaxError(f"{where}.text_cfg: proj_type={proj!r} is not supported here")
    bias = facts.get("init_logit_bias")
    return DualEncoder(
        image=image,
        text=_text(text, quick, f"{where}.text_cfg"),
        embed_dim=embed_dim,
        image_projection=projection,
        text_projection="none"
        if proj == "none"
        else "affine"
        if text.get("proj_bias")
        else "linear",
        logit_bias_init=None if bias is None else float(bias),
        logit_scale_max=None if bias is not None else 100.0,
    )


def _read_coca(facts: dict[str, Any], preprocess: dict[str, Any], where: str) -> CoCa:
    vision, text = family.field(facts, "vision_cfg", where), family.field(facts, "text_cfg", where)
    decoder = family.field(facts, "multimodal_cfg", where)
    embed_dim, quick = family.field(facts, "embed_dim", where), bool(facts.get("quick_gelu", False))
    coca = {"attentional_pool": (True,), "embed_cls": (True,), "timm_model_name": (None,)}
    family.refuse_unknown(vision, f"{where}.vision_cfg", **(_VISION_FIELDS | coca))
    family.refuse_unknown(text, f"{where}.text_cfg", **(_TEXT_FIELDS | coca))
    family.refuse_unknown(decoder, f"{where}.multimodal_cfg", **_DECODER_FIELDS)
    for name, tower in (("vision_cfg", vision), ("text_cfg", text)):
        needed = "attentional_pool" if name == "vision_cfg" else "embed_cls"
        family.field(tower, needed, f"{where}.{name}")
    width, bias = decoder.get("width", 512), facts.get("init_logit_bias")
    pixels = {
        "mean": family.three(preprocess.get("mean", OPENAI_MEAN), "preprocess_cfg.mean"),
        "std": family.three(preprocess.get("std", OPENAI_STD), "preprocess_cfg.std"),
    }
    words = _text({k: v for k, v in text.items() if k != "pool_type"}, quick, f"{where}.text_cfg")
    image = _vit(vision, quick, pixels)
    _require_size(preprocess, image)
    return CoCa(
        image=image,
        text=dataclasses.replace(
            words,
            pool="class",
            pad_id=text.get("pad_id", 0),
            class_position=True,
            legacy_class_mask=True,
        ),
        decoder=CaptionDecoder(
            width=width,
            depth=decoder.get("layers", 12),
            heads=decoder.get("heads", 8),
            activation="quick_gelu" if quick else "gelu",
            cross_mlp=True,
        ),
        poolers=Poolers(
            queries=vision.get("attn_pooler_queries", 256),
            layout="single",
            heads=vision.get("attn_pooler_heads", 8),
            norm_context=False,  # the tower's last norm does it
            norm_out=True,
        ),
        embed_dim=embed_dim,
        logit_bias_init=None if bias is None else float(bias),
    )


def _require_size(preprocess: dict[str, Any], image: ViT | ResNet) -> None:
    """Refuses pictures that are brought to another size than the tower's."""
    size = preprocess.get("size")
    shape = (size, size) if isinstance(size, int) else size
    if shape is not None and tuple(shape) != image.image_shape:
        raise ClipjaxError(
            f"{CONFIG}: preprocess_cfg.size={size!r} is not the size of the tower's pictures, "
            f"{list(image.image_shape)}"
        )


def _vit(vision: dict[str, Any], quick: bool, pixels: dict[str, Any]) -> ViT:
    width = vision.get("width", 768)
    size = vision.get("image_size", 224)
    return ViT(
        width=width,
        depth=vision.get("layers", 12),
        heads=width // vision.get("head_width", _HEAD_WIDTH),
        mlp_dim=int(width * vision.get("mlp_ratio", 4.0)),
        patch_size=vision.get("patch_size", 16),
        image_size=tuple(size) if isinstance(size, list) else size,
        pool="class",
        pre_norm=not vision.get("no_ln_pre", False),
        patch_bias=False,
        activation=_activation(vision, quick),
        eps=_eps(vision),
        **pixels,
    )


def _resnet(vision: dict[str, Any], embed_dim: int, pixels: dict[str, Any]) -> ResNet:
    width, size = vision.get("width", 64), vision.get("image_size", 224)
    return ResNet(
        blocks=tuple(vision["layers"]),
        width=width,
        output_dim=embed_dim,
        heads=width * 32 // vision.get("head_width", _HEAD_WIDTH),
        image_size=tuple(size) if isinstance(size, list) else size,
        **pixels,
    )


def _timm_image(vision: dict[str, Any], description: Description, pixels: dict[str, Any]) -> ViT:
    name = vision["timm_model_name"]
    match = re.fullmatch(r"vit_([a-z0-9]+)_patch(\d+)_siglip_(\d+)", name)
    if match is None or match[1] not in _TIMM:
        known = ", ".join(f"vit_{size}_patch*_siglip_*" for size in _TIMM)
        raise ClipjaxError(
            f"{CONFIG}: timm_model_name={name!r} is not supported here (only {known})"
        )
    sizes: dict[str, Any] = dict(
        zip(("width", "depth", "heads", "mlp_dim"), _TIMM[match[1]], strict=True)
    )
    size = int(match[3])
    if description.shapes:  # they win: timm lets its callers change the sizes of a name
        width = description.shape("visual.trunk.patch_embed.proj.bias", 1)[0]
        places = description.shape("visual.trunk.pos_embed", 3)[1]
        size = int(match[2]) * _side(places, "visual.trunk.pos_embed")
        sizes |= {
            "width": width,
            "depth": description.layers("visual.trunk.blocks."),
            "mlp_dim": description.shape("visual.trunk.blocks.0.mlp.fc1.bias", 1)[0],
        }
    return ViT(
        **sizes,
        patch_size=int(match[2]),
        image_size=size,
        pool="map",
        activation="gelu_tanh" if f"{match[1]}_patch{match[2]}" in _TIMM_TANH else "gelu",
        eps=1e-6,
        **pixels,
    )


def _timm_projection(vision: dict[str, Any]) -> str:
    if (vision.get("timm_proj") or "none") == "none":
        return "none"
    return "affine" if vision.get("timm_proj_bias") else "linear"


def _text(text: dict[str, Any], quick: bool, where: str) -> TextTransformer:
    width, vocab_size = text.get("width", 512), text.get("vocab_size", 49408)
    pool = text.get("pool_type", "argmax")
    if pool not in ("argmax", "eos", "last"):
        raise ClipjaxError(
            f"{where}: pool_type={pool!r} is not supported here (argmax, eos or last)"
        )
    return TextTransformer(
        width=width,
        depth=text.get("layers", 12),
        heads=text.get("heads", 8),
        mlp_dim=int(width * text.get("mlp_ratio", 4.0)),
        vocab_size=vocab_size,
        context_length=text.get("context_length", 77),
        causal=not text.get("no_causal_mask", False),
        pool="last" if pool == "last" else "eos",
        # argmax takes the highest id of the text, and that is the end-of-text token's.
        eos_id=text.get("eos_id", 2) if pool == "eos" else vocab_size - 1,
        pad_id=None,
        activation=_activation(text, quick),
        eps=_eps(text),
    )


def _activation(tower: dict[str, Any], quick: bool) -> str:
    if quick:
        return "quick_gelu"
    arguments = tower.get("act_kwargs") or None
    for ours, theirs in _ACTIVATIONS.items():
        if arguments == theirs:
            return ours
    raise ClipjaxError(f"{CONFIG}: act_kwargs={arguments!r} is not supported here")


def _eps(tower: dict[str, Any]) -> float:
    arguments = tower.get("norm_kwargs") or {}
    if arguments.keys() - {"eps"}:
        raise ClipjaxError(f"{CONFIG}: norm_kwargs={arguments!r} is not supported here (only eps)")
    return float(arguments.get("eps", 1e-5))


# Tensors


def _table(custom: bool, model: Any) -> Table:
    if isinstance(model, CoCa):
        return _table_coca(model)
    text = "text." if custom else ""
    constants: dict[str, np.ndarray] = {}
    rules = [
        *same("logit_scale", "logit_scale"),
        *same(f"{text}token_embedding.weight", "text/embedding"),
        *same(f"{text}positional_embedding", "text/positions"),
        *_blocks(f"{text}transformer.resblocks", "text/blocks", model.text.depth),
        *norm(f"{text}ln_final", "text/norm"),
        *same("logit_bias", "logit_bias") * (model.logit_bias_init is not None),
    ]
    if model.text_projection == "affine":
        rules += linear(f"{text}text_projection", "text_projection")
    elif model.text_projection == "linear":
        rules += same(f"{text}text_projection", "text_projection/kernel")
    if isinstance(model.image, ResNet):
        rules += _resnet_rules(model.image)
        constants = {
            rule.theirs.replace("running_var", "num_batches_tracked"): np.zeros((), np.int64)
            for rule in _unrolled(rules)
            if rule.theirs.endswith("running_var")
        }
    elif model.image.pool == "map":
        rules += _timm_rules(model.image)
        if model.image_projection != "none":
            bias = model.image_projection == "affine"
            rules += linear("visual.head.proj", "image_projection", bias=bias)
    else:
        rules += _vit_rules(model.image)
    ignored = (r"(text\.)?attn_mask", r".*\.num_batches_tracked")
    return Table(tuple(rules), ignored, constants)


def _table_coca(model: CoCa) -> Table:
    image: Any = model.image
    text: Any = model.text
    pool, ours, decoder = "visual.attn_pool", "memory_pool", "text_decoder"
    qkv = [f"{ours}/attn/{x}" for x in "qkv"]
    if image.width == model.decoder.width:  # PyTorch packs projections of the same width
        attention = packed(f"{pool}.attn.in_proj_", qkv)
    else:
        attention = [
            Rule(f"{pool}.attn.{x}_proj_weight", (f"{ours}/attn/{x}/kernel",), (Transpose((1, 0)),))
            for x in "qkv"
        ]
        biases = tuple(f"{path}/bias" for path in qkv)
        attention.append(Rule(f"{pool}.attn.in_proj_bias", biases, (Split(3),)))
    layer, blocks = f"{decoder}.cross_attn.{{i}}", "decoder/blocks"
    cross = [
        *norm(f"{layer}.ln_1", f"{blocks}/norm_cross"),
        *norm(f"{layer}.ln_1_kv", f"{blocks}/norm_memory"),
        *packed(f"{layer}.attn.in_proj_", [f"{blocks}/cross/{x}" for x in "qkv"]),
        *linear(f"{layer}.attn.out_proj", f"{blocks}/cross/out"),
        *norm(f"{layer}.ln_2", f"{blocks}/norm_cross_mlp"),
        *linear(f"{layer}.mlp.c_fc", f"{blocks}/cross_mlp/fc1"),
        *linear(f"{layer}.mlp.c_proj", f"{blocks}/cross_mlp/fc2"),
    ]
    rules = [
        *same("logit_scale", "logit_scale"),
        *same("logit_bias", "logit_bias") * (model.logit_bias_init is not None),
        *_vit_rules(image, last_norm=f"{pool}.ln_k"),
        *same(f"{pool}.query", f"{ours}/queries"),
        *norm(f"{pool}.ln_q", f"{ours}/norm_queries"),
        *attention,
        *linear(f"{pool}.attn.out_proj", f"{ours}/attn/out"),
        *norm("visual.ln_post", f"{ours}/norm_out"),
        *same("text.token_embedding.weight", "text/embedding"),
        *same("text.positional_embedding", "text/positions"),
        *same("text.cls_emb", "text/class_token"),
        *_blocks("text.transformer.resblocks", "text/blocks", text.depth),
        *norm("text.ln_final", "text/norm"),
        *same("text.text_projection", "text_projection/kernel"),
        *_blocks(f"{decoder}.resblocks", blocks, model.decoder.depth),
        *layered(cross, range(model.decoder.depth)),
        *norm(f"{decoder}.ln_final", "decoder/norm"),
        *same(f"{decoder}.text_projection", "decoder/head/kernel"),
    ]
    return Table(tuple(rules), ignored=(r"(text|text_decoder)\.attn_mask",))


def _table_openai(model: Any) -> Table:
    table = _table(False, model)
    values = (model.image.image_shape[0], model.text.context_length, model.text.vocab_size)
    scalars = {n: np.array(v, np.int64) for n, v in zip(_OPENAI_SCALARS, values, strict=True)}
    ignored = (*table.ignored, *_OPENAI_SCALARS)
    return Table(table.rules, ignored, {**table.constants, **scalars})


def _blocks(theirs: str, ours: str, depth: int) -> list[Rule]:
    layer = f"{theirs}.{{i}}"
    rules = [
        *norm(f"{layer}.ln_1", f"{ours}/norm1"),
        *packed(f"{layer}.attn.in_proj_", [f"{ours}/attn/{x}" for x in "qkv"]),
        *linear(f"{layer}.attn.out_proj", f"{ours}/attn/out"),
        *norm(f"{layer}.ln_2", f"{ours}/norm2"),
        *linear(f"{layer}.mlp.c_fc", f"{ours}/mlp/fc1"),
        *linear(f"{layer}.mlp.c_proj", f"{ours}/mlp/fc2"),
    ]
    return layered(rules, range(depth))


def _vit_rules(image: ViT, last_norm: str = "visual.ln_post") -> list[Rule]:
    return [
        *same("visual.class_embedding", "image/class_token"),
        *same("visual.positional_embedding", "image/positions"),
        *patches("visual.conv1", "image/patch", image.patch_size, image.width, bias=False),
        *norm("visual.ln_pre", "image/pre_norm") * image.pre_norm,
        *_blocks("visual.transformer.resblocks", "image/blocks", image.depth),
        *norm(last_norm, "image/norm"),
        *same("visual.proj", "image_projection/kernel"),
    ]


def _timm_rules(image: ViT) -> list[Rule]:
    trunk, pool = "visual.trunk", "image/pool"
    block, ours = f"{trunk}.blocks.{{i}}", "image/blocks"
    places = image.grid[0] * image.grid[1]
    blocks = [
        *norm(f"{block}.norm1", f"{ours}/norm1"),
        *packed(f"{block}.attn.qkv.", [f"{ours}/attn/{x}" for x in "qkv"]),
        *linear(f"{block}.attn.proj", f"{ours}/attn/out"),
        *norm(f"{block}.norm2", f"{ours}/norm2"),
        *linear(f"{block}.mlp.fc1", f"{ours}/mlp/fc1"),
        *linear(f"{block}.mlp.fc2", f"{ours}/mlp/fc2"),
    ]
    return [
        *squeezed(f"{trunk}.pos_embed", "image/positions", (places, image.width)),
        *patches(
            f"{trunk}.patch_embed.proj", "image/patch", image.patch_size, image.width, bias=True
        ),
        *layered(blocks, range(image.depth)),
        *norm(f"{trunk}.norm", "image/norm"),
        *squeezed(f"{trunk}.attn_pool.latent", f"{pool}/probe", (image.width,), ones=2),
        *linear(f"{trunk}.attn_pool.q", f"{pool}/attn/q"),
        *packed(f"{trunk}.attn_pool.kv.", [f"{pool}/attn/{x}" for x in "kv"]),
        *linear(f"{trunk}.attn_pool.proj", f"{pool}/attn/out"),
        *norm(f"{trunk}.attn_pool.norm", f"{pool}/norm"),
        *linear(f"{trunk}.attn_pool.mlp.fc1", f"{pool}/mlp/fc1"),
        *linear(f"{trunk}.attn_pool.mlp.fc2", f"{pool}/mlp/fc2"),
    ]


def _resnet_rules(image: ResNet) -> list[Rule]:
    rules = _convolutions("visual", "image/stem")
    for stage, depth in enumerate(image.blocks, start=1):
        theirs, ours = f"visual.layer{stage}", f"image/layer{stage}"
        rules += _convolutions(f"{theirs}.0", f"{ours}/first")
        rules += _convolution(f"{theirs}.0.downsample.0", f"{ours}/first/downsample_conv")
        rules += _batch_norm(f"{theirs}.0.downsample.1", f"{ours}/first/downsample_bn")
        if depth > 1:
            blocks = _convolutions(f"{theirs}.{{i}}", f"{ours}/blocks")
            rules += layered(blocks, range(1, depth))
    pool = "visual.attnpool"
    rules += same(f"{pool}.positional_embedding", "image/pool/positions")
    for name, ours in {"q_proj": "q", "k_proj": "k", "v_proj": "v", "c_proj": "out"}.items():
        rules += linear(f"{pool}.{name}", f"image/pool/{ours}")
    return rules


def _convolutions(theirs: str, ours: str) -> list[Rule]:
    rules = []
    for i in (1, 2, 3):
        rules += _convolution(f"{theirs}.conv{i}", f"{ours}/conv{i}")
        rules += _batch_norm(f"{theirs}.bn{i}", f"{ours}/bn{i}")
    return rules


def _convolution(theirs: str, ours: str) -> list[Rule]:
    return [Rule(f"{theirs}.weight", (f"{ours}/kernel",), (Transpose((2, 3, 1, 0)),))]


def _batch_norm(theirs: str, ours: str) -> list[Rule]:
    statistics = same(f"{theirs}.running_mean", f"{ours}/mean")
    return norm(theirs, ours) + statistics + same(f"{theirs}.running_var", f"{ours}/var")


def _unrolled(rules: list[Rule]) -> list[Rule]:
    return [Rule(name, rule.ours, rule.steps) for rule in rules for name in rule.names()]


# What an export says


def _describe(custom: bool, pretrained: Pretrained) -> dict[str, Any]:
    model: Any = pretrained.model
    image, text = model.image, model.text
    quick = text.activation == "quick_gelu"
    facts: dict[str, Any] = {"embed_dim": model.embed_dim}
    if quick:
        facts["quick_gelu"] = True
    if custom:
        facts["custom_text"] = True
    if model.logit_bias_init is not None:
        facts["init_logit_bias"] = model.logit_bias_init
    words: dict[str, Any] = {
        "context_length": text.context_length,
        "vocab_size": text.vocab_size,
        "width": text.width,
        "heads": text.heads,
        "layers": text.depth,
    } | _variants(text, quick)
    if not text.causal:
        words["no_causal_mask"] = True
    if isinstance(model, CoCa):
        words |= {"embed_cls": True, "output_tokens": True}
    elif text.pool == "last":
        words["pool_type"] = "last"
    elif text.eos_id != text.vocab_size - 1:
        words |= {"pool_type": "eos", "eos_id": text.eos_id}
    if text.pad_id:
        words["pad_id"] = text.pad_id
    projection = getattr(model, "text_projection", "linear")
    if projection == "none":
        words["proj_type"] = "none"
    elif projection == "affine":
        words["proj_bias"] = True
    if pretrained.tokenizer is not None and pretrained.tokenizer.clean != "clip":
        words["hf_tokenizer_name"] = "."  # what stands beside the configuration
        if pretrained.tokenizer.clean in ("repair_lower", "repair_canonical"):
            theirs = {ours: theirs for theirs, ours in _CLEAN.items()}
            words["tokenizer_kwargs"] = {"clean": theirs[pretrained.tokenizer.clean]}
    facts |= {"vision_cfg": _describe_image(model, quick), "text_cfg": words}
    if isinstance(model, CoCa):
        facts |= _describe_coca(model)
    preprocess = {
        "mean": list(image.mean),
        "std": list(image.std),
        "interpolation": pretrained.resize.method,
        "resize_mode": {"squash": "squash", "crop": "shortest"}[pretrained.resize.mode],
    }
    return {CONFIG: {"model_cfg": facts, "preprocess_cfg": preprocess}}


def has_own_tokenizer(owner: Family, pretrained: Pretrained) -> bool:
    """Whether OpenCLIP has the tokenizer itself: OpenAI's, which it takes unless told otherwise."""
    tokenizer = pretrained.tokenizer
    return (
        owner in (OPEN_CLIP, OPEN_CLIP_CUSTOM)
        and tokenizer is not None
        and tokenizer.clean == "clip"
    )


def _describe_coca(model: CoCa) -> dict[str, Any]:
    decoder, poolers, text = model.decoder, model.poolers or Poolers(), model.first_half
    vision = {
        **_describe_image(model, decoder.activation == "quick_gelu"),
        "attentional_pool": True,
        "attn_pooler_queries": poolers.queries,
        "attn_pooler_heads": poolers.heads,
        "output_tokens": True,
    }
    facts = {
        "context_length": text.context_length,
        "vocab_size": text.vocab_size,
        "width": decoder.width,
        "heads": decoder.heads,
        "layers": decoder.depth,
        "attn_pooler_heads": poolers.heads,
    }
    return {"vision_cfg": vision, "multimodal_cfg": facts}


def _describe_image(model: Any, quick: bool) -> dict[str, Any]:
    image = model.image
    size = image.image_size
    facts: dict[str, Any] = {"image_size": list(size) if isinstance(size, tuple) else size}
    if isinstance(image, ResNet):
        facts |= {"layers": list(image.blocks), "width": image.width, "patch_size": None}
        return facts | {"head_width": image.width * 32 // image.num_heads}
    if image.pool == "map":
        facts |= {
            "timm_model_name": _timm_name(image),
            "timm_model_pretrained": False,
            "timm_pool": "map",
            "timm_proj": "none" if model.image_projection == "none" else "linear",
        }
        if model.image_projection == "affine":
            facts["timm_proj_bias"] = True
        return facts
    facts |= {
        "layers": image.depth,
        "width": image.width,
        "head_width": image.width // image.heads,
        "patch_size": image.patch_size,
    }
    if not image.pre_norm:
        facts["no_ln_pre"] = True
    return facts | _variants(image, quick)


def _variants(tower: Any, quick: bool) -> dict[str, Any]:
    """What is said of a transformer only where it is not OpenCLIP's default."""
    facts: dict[str, Any] = {}
    if tower.hidden != 4 * tower.width:
        ratio = tower.hidden / tower.width
        # OpenCLIP rounds width * ratio down.
        facts["mlp_ratio"] = ratio if int(tower.width * ratio) == tower.hidden else ratio + 1e-6
    if not quick and tower.activation != "gelu":
        facts["act_kwargs"] = _ACTIVATIONS.get(tower.activation)
    if tower.eps != 1e-5:
        facts["norm_kwargs"] = {"eps": tower.eps}
    return facts


def _timm_name(image: ViT) -> str:
    sizes = (image.width, image.depth, image.heads, image.hidden)
    side = family.square(image)
    for name, known in _TIMM.items():
        if known == sizes:
            return f"vit_{name}_patch{image.patch_size}_siglip_{side}"
    raise ClipjaxError(
        f"model.image: OpenCLIP's attention-pooled ViTs are timm's, and none has "
        f"width {image.width}, depth {image.depth}, heads {image.heads}, mlp_dim {image.hidden}"
    )


def _nearest(custom: bool, model: Any) -> Any:
    bare = Pretrained(model, {}, {}, None, model.text.context_length, 0)
    return _read_model(Description({}, _describe(custom, bare)))


def _nearest_openai(model: Any) -> DualEncoder:
    image, text = model.image, model.text
    names: tuple[str, ...] = ("blocks", "width", "image_size")
    if isinstance(image, ViT):
        names = ("width", "depth", "patch_size", "image_size")
    sizes = ("vocab_size", "context_length", "width", "depth")
    family.square(image)
    return _openai(
        {n: getattr(image, n) for n in names}, {n: getattr(text, n) for n in sizes}, model.embed_dim
    )


def _resize(description: Description) -> Resize:
    preprocess = description.files.get(CONFIG, {}).get("preprocess_cfg", {})
    facts = description.files.get(CONFIG, {})
    vision = facts.get("model_cfg", facts).get("vision_cfg", {})
    siglip = "siglip" in str(vision.get("timm_model_name"))
    mode = preprocess.get("resize_mode", "squash" if siglip else "shortest")
    method = preprocess.get("interpolation", "bicubic")
    if mode not in ("squash", "shortest") or method not in ("bicubic", "bilinear"):
        raise ClipjaxError(
            f"{CONFIG}: preprocess_cfg has resize_mode={mode!r} and interpolation={method!r}; supported here "
            "are shortest and squash, bicubic and bilinear"
        )
    return Resize("squash" if mode == "squash" else "crop", method)


_CLEAN = {"canonicalize": "repair_canonical", "lower": "repair_lower", "whitespace": "repair"}
"""OpenCLIP mends the text (ftfy, HTML entities) before any of these; theirs -> ours."""


def _tokens(description: Description) -> dict[str, Any]:
    settings = huggingface.special_tokens(description)
    facts = description.files.get(CONFIG, {})
    text = facts.get("model_cfg", facts).get("text_cfg", {})
    options = text.get("tokenizer_kwargs") or {}
    family.refuse_unknown(
        options, f"{CONFIG}: tokenizer_kwargs", clean=family.ANY, strip_sep_token=(False,)
    )
    clean = options.get("clean", "whitespace")
    if clean not in _CLEAN:
        raise ClipjaxError(f"{CONFIG}: tokenizer_kwargs.clean={clean!r} is not supported here")
    bare = {"bos": ""} if text.get("pool_type") == "last" else {}
    return settings | bare | {"clean": _CLEAN[clean]}


def _notes(pretrained: Pretrained) -> list[str]:
    found = []
    resize, tokenizer = pretrained.resize, pretrained.tokenizer
    if resize.mode == "crop" and resize.half_pixel == "down":
        found.append(
            "OpenCLIP rounds an odd margin to even where this model's pictures were cut half a pixel "
            "higher or further left (resize.half_pixel='down'): embeddings of such pictures differ"
        )
    if tokenizer is not None and not tokenizer.repairs:
        found.append(
            "OpenCLIP mends every text before it is tokenized (curly quotes, full-width letters, "
            "ligatures, HTML entities, mojibake, runs of spaces), and this model's tokenizer does "
            "not: such texts get other tokens there. Train with BPE(clean='repair') to agree"
        )
    return found


def _family(name: str, custom: bool) -> Family:
    return Family(
        name=name,
        models=(DualEncoder, CoCa) if custom else (DualEncoder,),
        image_towers=(ViT, ResNet),
        weights_file="open_clip_model.safetensors",
        claims=functools.partial(_claims, custom),
        model=_read_model,
        table=functools.partial(_table, custom),
        nearest=functools.partial(_nearest, custom),
        describe=functools.partial(_describe, custom),
        resize=_resize,
        tokens=_tokens,
        prepare=without_patch_bias,
        notes=_notes,
    )


OPENAI = Family(
    name="OpenAI's CLIP",
    models=(DualEncoder,),
    image_towers=(ViT, ResNet),
    weights_file="model.safetensors",
    claims=_claims_openai,
    model=_read_openai,
    table=_table_openai,
    nearest=_nearest_openai,
    describe=lambda pretrained: {},
    resize=lambda description: Resize("crop"),
    tokens=lambda description: {},
    prepare=without_patch_bias,
)
OPEN_CLIP = _family("OpenCLIP's CLIP", custom=False)
OPEN_CLIP_CUSTOM = _family("OpenCLIP's CustomTextCLIP", custom=True)
