"""OpenCLIP: CLIP, CustomTextCLIP and CoCa, by their `open_clip_config.json` or model configuration."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from clipjax.data import Resize
from clipjax.errors import ClipjaxError
from clipjax.interop import family, huggingface, open_clip_tables, timm_towers
from clipjax.interop import open_clip_fields as fields
from clipjax.interop.family import OPENAI_MEAN, OPENAI_STD, Description, Family
from clipjax.interop.rewrite import without_patch_bias
from clipjax.models import DualEncoder
from clipjax.models.coca import CaptionDecoder, CoCa, Poolers
from clipjax.pretrained import Pretrained
from clipjax.towers import ResNet, TextTransformer, ViT

CONFIG = "open_clip_config.json"
_HEAD_WIDTH = 64  # of every attention head, unless the configuration says otherwise
_ACTIVATIONS = {"gelu": None, "gelu_tanh": {"approximate": "tanh"}}  # ours -> act_kwargs


def _claims(custom: bool, description: Description) -> bool:
    prefix = "text." if custom else ""
    return description.has(f"{prefix}token_embedding.weight", f"{prefix}ln_final.weight")


# Architecture


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
    family.refuse_unknown(facts, where, **fields.MODEL)
    family.refuse_unknown(preprocess, f"{CONFIG}: preprocess_cfg", **fields.PREPROCESS)
    if "multimodal_cfg" in facts:
        return _read_coca(facts, preprocess, where)
    vision, text = family.field(facts, "vision_cfg", where), family.field(facts, "text_cfg", where)
    family.refuse_unknown(vision, f"{where}.vision_cfg", **fields.VISION)
    family.refuse_unknown(text, f"{where}.text_cfg", **fields.TEXT)
    embed_dim = family.field(facts, "embed_dim", where)
    quick = bool(facts.get("quick_gelu", False))
    mean, std = OPENAI_MEAN, OPENAI_STD
    if vision.get("timm_model_name"):
        mean, std = timm_towers.kind_named(vision["timm_model_name"], where)[0].pixels
    pixels = {
        "mean": family.three(preprocess.get("mean", mean), "preprocess_cfg.mean"),
        "std": family.three(preprocess.get("std", std), "preprocess_cfg.std"),
    }
    image: ViT | ResNet
    if vision.get("timm_model_name"):
        image = timm_towers.read_image(vision, description, f"{where}.vision_cfg", **pixels)
        projection = timm_towers.read_projection(vision, f"{where}.vision_cfg")
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
    family.refuse_unknown(vision, f"{where}.vision_cfg", **(fields.VISION | coca))
    family.refuse_unknown(text, f"{where}.text_cfg", **(fields.TEXT | coca))
    family.refuse_unknown(decoder, f"{where}.multimodal_cfg", **fields.DECODER)
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
    if timm_towers.is_written_as_timms(model):
        return facts | timm_towers.describe(image, model.image_projection)
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


def _nearest(custom: bool, model: Any) -> Any:
    bare = Pretrained(model, {}, {}, None, model.text.context_length, 0)
    return _read_model(Description({}, _describe(custom, bare)))


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
        table=functools.partial(open_clip_tables.table, custom),
        nearest=functools.partial(_nearest, custom),
        describe=functools.partial(_describe, custom),
        resize=_resize,
        tokens=_tokens,
        prepare=without_patch_bias,
        notes=_notes,
    )


OPEN_CLIP = _family("OpenCLIP's CLIP", custom=False)
OPEN_CLIP_CUSTOM = _family("OpenCLIP's CustomTextCLIP", custom=True)
