"""Hugging Face `CLIPModel`, `MetaClip2Model`, `SiglipModel` and `Siglip2Model`: names, shapes, config.json."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

from clipjax.data import Resize
from clipjax.errors import ClipjaxError, did_you_mean
from clipjax.interop import family
from clipjax.interop import huggingface_fields as fields
from clipjax.interop.family import HALF, OPENAI_MEAN, OPENAI_STD, Description, Family
from clipjax.interop.rewrite import without_patch_bias
from clipjax.interop.table import (
    Rule,
    Table,
    layered,
    linear,
    norm,
    packed,
    patches,
    same,
    squeezed,
)
from clipjax.interop.tokens import tokenizer_files
from clipjax.models import DualEncoder
from clipjax.pretrained import Pretrained
from clipjax.towers import TextTransformer, ViT

CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
_ACTIVATIONS = {
    "gelu": "gelu",
    "quick_gelu": "quick_gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "silu": "silu",
    "relu": "relu",
}
GEMMA = 256_000
"""Tokens of Gemma's vocabulary, which SigLIP 2 has."""
_RESAMPLE: dict[int, Any] = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers
_CLIPS = ("clip", "metaclip_2")
"""What differs between these: the second looks for the end-of-text token by its number alone."""
_KINDS = {
    "CLIPModel": "clip",
    "MetaClip2Model": "metaclip_2",
    "SiglipModel": "siglip",
    "Siglip2Model": "siglip2",
}


def _claims(kind: str, description: Description) -> bool:
    if not description.has("text_model.embeddings.token_embedding.weight"):
        return False
    if not any(name.startswith("vision_model.") for name in description.shapes):
        raise ClipjaxError(
            "these weights are a text tower alone: CLIP's and SigLIP's are read with both towers"
        )
    if description.has("vision_model.embeddings.class_embedding"):
        second = description.files.get(CONFIG, {}).get("model_type") == "metaclip_2"
        return kind == ("metaclip_2" if second else "clip")
    patch = description.shapes.get("vision_model.embeddings.patch_embedding.weight", ())
    return kind == ("siglip2" if len(patch) == 2 else "siglip")


def _read_model(kind: str, description: Description) -> DualEncoder:
    config = description.files.get(CONFIG)
    if config is None:
        raise ClipjaxError(
            f"there is no {CONFIG} beside the weights, and heads and activation are not to be seen in "
            "them: put it there, or name it with --config"
        )
    family.refuse_unknown(config, CONFIG, **fields.MODEL)
    config = _with_defaults(config, kind)
    text, vision = config["text_config"], config["vision_config"]
    family.refuse_unknown(text, f"{CONFIG}: text_config", **fields.TEXT)
    family.refuse_unknown(vision, f"{CONFIG}: vision_config", **fields.VISION)
    preprocessor = description.files.get(PREPROCESSOR, {})
    family.refuse_unknown(preprocessor, PREPROCESSOR, **fields.PREPROCESSOR)
    clip = kind in _CLIPS
    default = (OPENAI_MEAN, OPENAI_STD) if clip else (HALF, HALF)
    if preprocessor.get("do_normalize") is False:
        preprocessor = preprocessor | {"image_mean": (0.0,) * 3, "image_std": (1.0,) * 3}
    patch = vision["patch_size"]
    size = patch * math.isqrt(vision["num_patches"]) if kind == "siglip2" else vision["image_size"]
    if kind != "siglip2":
        _require_size(preprocessor, size)
    image = ViT(
        patch_size=patch,
        image_size=size,
        pool="class" if clip else "map",
        pre_norm=clip,
        patch_bias=not clip,
        mean=family.three(
            preprocessor.get("image_mean", default[0]), f"{PREPROCESSOR}: image_mean"
        ),
        std=family.three(preprocessor.get("image_std", default[1]), f"{PREPROCESSOR}: image_std"),
        **_transformer(vision, "vision_config"),
    )
    vocab_size = text["vocab_size"]
    tower = _transformer(text, "text_config") | {
        "vocab_size": vocab_size,
        "context_length": text["max_position_embeddings"],
        "pad_id": None,
    }
    if clip:
        # Configurations of CLIP before 2023 say 2 and mean the highest id in the text, which is the last token.
        eos = text["eos_token_id"]
        if not isinstance(eos, int):
            raise ClipjaxError(f"{CONFIG}: text_config.eos_token_id={eos!r} is not supported here")
        eos = vocab_size - 1 if eos == 2 and kind == "clip" else eos
        return DualEncoder(
            image=image,
            text=TextTransformer(pool="eos", eos_id=eos, causal=True, **tower),
            embed_dim=config["projection_dim"],
        )
    embed_dim = text["projection_size"] or text["hidden_size"]
    return DualEncoder(
        image=image,
        text=TextTransformer(pool="last", causal=False, eos_id=min(1, vocab_size - 1), **tower),
        embed_dim=embed_dim,
        image_projection="none",
        text_projection="affine",
        logit_scale_init=10.0,
        logit_scale_max=None,
        logit_bias_init=-10.0,
    )


def _transformer(config: dict[str, Any], where: str) -> dict[str, Any]:
    return {
        "width": config["hidden_size"],
        "depth": config["num_hidden_layers"],
        "heads": config["num_attention_heads"],
        "mlp_dim": config["intermediate_size"],
        "activation": activation(config["hidden_act"], f"{where}.hidden_act"),
        "eps": config["layer_norm_eps"],
    }


def activation(name: Any, where: str) -> str:
    """Our name of an activation of transformers.

    Raises:
      ClipjaxError: there is none.
    """
    if name not in _ACTIVATIONS:
        raise ClipjaxError(
            f"{CONFIG}: {where}={name!r} is unknown{did_you_mean(str(name), _ACTIVATIONS)}"
        )
    return _ACTIVATIONS[name]


def _with_defaults(config: dict[str, Any], kind: str) -> dict[str, Any]:
    """config.json with what transformers assumes where it is silent (it writes only what differs)."""
    clip = kind in _CLIPS
    common = {
        "hidden_act": "quick_gelu" if clip else "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-5 if clip else 1e-6,
        "num_hidden_layers": 12,
    }
    text = common | {
        "vocab_size": 49408 if clip else 32000,
        "hidden_size": 512 if clip else 768,
        "intermediate_size": 2048 if clip else 3072,
        "num_attention_heads": 8 if clip else 12,
        "max_position_embeddings": 77 if clip else 64,
        "eos_token_id": 49407,
        "projection_size": None,
    }
    vision = common | {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_attention_heads": 12,
        "patch_size": 32 if clip else 16,
        "image_size": 224,
        "num_patches": 256,
        "num_channels": 3,
    }
    # Releases before 2023 repeat both parts under these names, and they win there.
    text |= (config.get("text_config") or {}) | (config.get("text_config_dict") or {})
    vision |= (config.get("vision_config") or {}) | (config.get("vision_config_dict") or {})
    return {
        "text_config": text,
        "vision_config": vision,
        "projection_dim": config.get("projection_dim", 512),
    }


def _table(kind: str, model: Any) -> Table:
    image, text = model.image, model.text
    embeddings = "vision_model.embeddings"
    rules = [
        *same("text_model.embeddings.token_embedding.weight", "text/embedding"),
        *same("text_model.embeddings.position_embedding.weight", "text/positions"),
        *_encoder("text_model.encoder", "text/blocks", text.depth),
        *norm("text_model.final_layer_norm", "text/norm"),
        *same(f"{embeddings}.position_embedding.weight", "image/positions"),
        *_encoder("vision_model.encoder", "image/blocks", image.depth),
        *norm("vision_model.post_layernorm", "image/norm"),
    ]
    patch = f"{embeddings}.patch_embedding"
    if kind == "siglip2":  # takes flat patches, as our kernel does
        rules += linear(patch, "image/patch")
    else:
        bias = image.patch_bias
        rules += patches(patch, "image/patch", image.patch_size, image.width, bias=bias)
    if kind in _CLIPS:
        rules += [
            *same("logit_scale", "logit_scale"),
            *same(f"{embeddings}.class_embedding", "image/class_token"),
            *norm("vision_model.pre_layrnorm", "image/pre_norm"),
            *linear("visual_projection", "image_projection", bias=False),
            *linear("text_projection", "text_projection", bias=False),
        ]
    else:
        attn = "image/pool/attn"
        rules += [
            *squeezed("logit_scale", "logit_scale", ()),
            *squeezed("logit_bias", "logit_bias", ()),
            *linear("text_model.head", "text_projection"),
            *squeezed("vision_model.head.probe", "image/pool/probe", (image.width,), ones=2),
            *packed("vision_model.head.attention.in_proj_", [f"{attn}/{x}" for x in "qkv"]),
            *linear("vision_model.head.attention.out_proj", f"{attn}/out"),
            *norm("vision_model.head.layernorm", "image/pool/norm"),
            *linear("vision_model.head.mlp.fc1", "image/pool/mlp/fc1"),
            *linear("vision_model.head.mlp.fc2", "image/pool/mlp/fc2"),
        ]
    # Position indices, stored by transformers before 4.31.
    return Table(tuple(rules), ignored=(r"(text|vision)_model\.embeddings\.position_ids",))


def _encoder(theirs: str, ours: str, depth: int) -> list[Rule]:
    layer = f"{theirs}.layers.{{i}}"
    projections = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "out_proj": "out"}
    rules = [
        *norm(f"{layer}.layer_norm1", f"{ours}/norm1"),
        *norm(f"{layer}.layer_norm2", f"{ours}/norm2"),
        *linear(f"{layer}.mlp.fc1", f"{ours}/mlp/fc1"),
        *linear(f"{layer}.mlp.fc2", f"{ours}/mlp/fc2"),
    ]
    for name, ours_name in projections.items():
        rules += linear(f"{layer}.self_attn.{name}", f"{ours}/attn/{ours_name}")
    return layered(rules, range(depth))


def _describe(kind: str, pretrained: Pretrained) -> dict[str, Any]:
    model: Any = pretrained.model
    image, text = model.image, model.text
    activations = {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}

    def transformer(tower: Any) -> dict[str, Any]:
        return {
            "hidden_size": tower.width,
            "num_hidden_layers": tower.depth,
            "num_attention_heads": tower.heads,
            "intermediate_size": tower.hidden,
            "hidden_act": activations[tower.activation],
            "layer_norm_eps": tower.eps,
            "attention_dropout": 0.0,
        }

    side = family.square(image)
    text_config = transformer(text) | {
        "vocab_size": text.vocab_size,
        "max_position_embeddings": text.context_length,
        "bos_token_id": None,
        "eos_token_id": text.eos_id,
        "pad_token_id": text.eos_id if text.pad_id is None else text.pad_id,
    }
    tokenizer = pretrained.tokenizer
    if tokenizer is not None:
        pad_id = tokenizer_files(pretrained, siglip=kind not in _CLIPS).pad_id
        text_config |= {"bos_token_id": tokenizer.bos_id, "pad_token_id": pad_id}
    vision_config = transformer(image) | {"patch_size": image.patch_size}
    architecture = next(name for name, known in _KINDS.items() if known == kind)
    config: dict[str, Any] = {"architectures": [architecture], "model_type": kind}
    if kind in _CLIPS:
        vision_config |= {"image_size": side, "projection_dim": model.embed_dim}
        text_config |= {"projection_dim": model.embed_dim}
        config |= {"projection_dim": model.embed_dim}
    else:
        text_config |= {"projection_size": model.embed_dim}
        sizes = {"siglip": {"image_size": side}, "siglip2": {"num_patches": math.prod(image.grid)}}
        vision_config |= sizes[kind]
    config |= {
        "text_config": text_config | {"model_type": f"{kind}_text_model"},
        "vision_config": vision_config | {"model_type": f"{kind}_vision_model"},
        "dtype": "float32",
    }
    return {CONFIG: config, PREPROCESSOR: _preprocessor(kind, pretrained, side)}


def _preprocessor(kind: str, pretrained: Pretrained, side: int) -> dict[str, Any]:
    model: Any = pretrained.model
    image, resize = model.image, pretrained.resize
    numbers = {method: number for number, method in _RESAMPLE.items()}
    facts: dict[str, Any] = {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(image.mean),
        "image_std": list(image.std),
        "resample": numbers[resize.method],
        "rescale_factor": 1 / 255,
    }
    if kind == "siglip2":
        if resize.mode != "squash":
            raise ClipjaxError("resize.mode='crop': there it is 'squash'")
        return facts | {
            "image_processor_type": "Siglip2ImageProcessor",
            "max_num_patches": math.prod(image.grid),
            "patch_size": image.patch_size,
        }
    square = {"height": side, "width": side}
    crop = resize.mode == "crop"
    # CLIP's processor is the one that can crop; SigLIP's cannot, and needs no more than a size.
    facts["image_processor_type"] = "CLIPImageProcessor" if crop else "SiglipImageProcessor"
    if crop:
        facts |= {"size": {"shortest_edge": side}, "do_center_crop": True, "crop_size": square}
    else:
        facts |= {"size": square}
    return facts


def _nearest(kind: str, model: Any) -> DualEncoder:
    """The same sizes in the only arrangement that these models have."""
    clip = kind in _CLIPS
    image, text = model.image, model.text
    image = ViT(
        patch_size=image.patch_size,
        image_size=image.image_size,
        pool="class" if clip else "map",
        pre_norm=clip,
        patch_bias=not clip,
        mean=image.mean,
        std=image.std,
        **_sizes(image),
    )
    pooling: dict[str, Any] = (
        {"pool": "eos", "causal": True} if clip else {"pool": "last", "causal": False}
    )
    text = TextTransformer(
        vocab_size=text.vocab_size,
        context_length=text.context_length,
        eos_id=text.eos_id,
        pad_id=None,
        **pooling,
        **_sizes(text),
    )
    projections = ("linear", "linear") if clip else ("none", "affine")
    return DualEncoder(
        image=image,
        text=text,
        embed_dim=model.embed_dim if clip else image.width,
        logit_bias_init=None if clip else -10.0,
        image_projection=projections[0],
        text_projection=projections[1],
    )


def _sizes(tower: Any) -> dict[str, Any]:
    names = ("width", "depth", "heads", "mlp_dim", "activation", "eps")
    sizes = {name: getattr(tower, name) for name in names}
    if sizes["activation"] not in _ACTIVATIONS.values():
        sizes["activation"] = "gelu"
    return sizes


def resample_of(description: Description, default: int) -> Any:
    """How a preprocessor's configuration resizes; `default` is the library's, in Pillow's numbers."""
    return _RESAMPLE[description.files.get(PREPROCESSOR, {}).get("resample", default)]


def _resize(kind: str, description: Description) -> Resize:
    facts = description.files.get(PREPROCESSOR, {})
    method = resample_of(description, 2 if kind == "siglip2" else 3)
    crop = _crops(kind, facts)
    if crop and kind in _CLIPS and _edges(facts.get("size"))[0] is None:
        crop = False  # brought to the size before, so nothing is left to cut
    return Resize("crop" if crop else "squash", method, "down" if crop else "even")


def _crops(kind: str, facts: Mapping[str, Any]) -> bool:
    """Whether pictures keep their aspect ratio and lose their margins."""
    if "do_center_crop" in facts:
        return bool(facts["do_center_crop"])
    siglip = "siglip" in str(facts.get("image_processor_type", "")).lower()
    return kind in _CLIPS and not siglip


def _edges(size: Any) -> tuple[int | None, tuple[int, int] | None]:
    """(shortest edge, (height, width)) that a size in a preprocessor's configuration says."""
    if size is None:
        return 0, None  # what the library takes for itself
    if isinstance(size, int):
        return size, (size, size)
    if not isinstance(size, Mapping):
        raise ClipjaxError(f"{PREPROCESSOR}: size={size!r} is neither a number nor an object")
    if "shortest_edge" in size:
        return int(size["shortest_edge"]), None
    if {"height", "width"} <= size.keys():
        return None, (int(size["height"]), int(size["width"]))
    raise ClipjaxError(
        f"{PREPROCESSOR}: size={dict(size)!r} is not supported here (only shortest_edge, or height and width)"
    )


def _require_size(facts: Mapping[str, Any], side: int) -> None:
    """Refuses pictures that come to another size on the way than the tower's."""
    for name in ("size", "crop_size"):
        if facts.get(name) is None:
            continue
        if name == "crop_size" and facts.get("do_center_crop") is False:
            continue
        edge, shape = _edges(facts[name])
        if (edge if shape is None else shape) not in (side, (side, side)):
            raise ClipjaxError(
                f"{PREPROCESSOR}: {name}={facts[name]!r} is not the size of the tower's pictures, {side}"
            )
    if facts.get("do_center_crop") is False and "shortest_edge" in (facts.get("size") or ()):
        raise ClipjaxError(
            f"{PREPROCESSOR}: size has shortest_edge and do_center_crop is false: pictures that are no "
            "squares would not fit the tower"
        )


def special_tokens(description: Description) -> dict[str, Any]:
    """The special tokens that a tokenizer_config.json names."""
    config = description.files.get("tokenizer_config.json", {})

    def content(role: str) -> str | None:
        token = config.get(f"{role}_token")
        return token.get("content") if isinstance(token, dict) else token

    return {role: content(role) for role in ("pad", "bos", "eos")}


def _tokens(kind: str, description: Description) -> dict[str, Any]:
    settings = special_tokens(description)
    if kind in _CLIPS:
        return settings
    config = description.files.get("tokenizer_config.json", {})
    named = str(config.get("tokenizer_class"))
    vocab_size = description.shape("text_model.embeddings.token_embedding.weight", 2)[0]
    if named in ("PreTrainedTokenizerFast", "TokenizersBackend"):
        clean = "keep"  # what such a tokenizer does is all in its tokenizer.json
    elif "Gemma" in named or "Siglip2" in named or vocab_size == GEMMA or kind == "siglip2":
        clean = "lower"  # SigLIP 2, also where its one resolution makes it a SiglipModel
    else:
        clean = "canonical"
    return settings | {"bos": "", "clean": clean}


def _notes(kind: str, pretrained: Pretrained) -> list[str]:
    found = []
    model: Any = pretrained.model
    resize, tokenizer, image = pretrained.resize, pretrained.tokenizer, model.image
    if resize.mode == "crop" and resize.half_pixel == "even":
        found.append(
            "transformers rounds an odd margin down where this model's pictures were cut with it "
            "rounded to even: embeddings of such pictures differ (cosines down to 0.996 were seen). "
            "Train with Resize('crop', half_pixel='down') to agree"
        )
    if tokenizer is not None and tokenizer.repairs:
        left = "" if tokenizer.clean == "clip" else "rare "
        found.append(
            "transformers does not mend texts as this model's tokenizer does: those with mojibake or "
            f"{left}HTML entities get other tokens there"
        )
    if kind == "siglip" and pretrained.context_length < 64:
        found.append(
            "transformers' zero-shot pipeline pads texts for SigLIP to 64 tokens whatever the folder "
            "says, which is more than this model takes: call model and processor yourself, or train "
            "with context_length=64"
        )
    if kind == "siglip2":
        patches = math.prod(image.grid)
        found.append(
            "Siglip2's processor keeps the aspect ratio of pictures, and this model has seen squares: "
            "resize to a square first"
        )
        if (image.patch_size, patches) != (16, 256) or pretrained.context_length != 64:
            found.append(
                "Siglip2Processor goes by numbers of its own, not the folder's: call it with "
                f"patch_size={image.patch_size}, max_num_patches={patches}, "
                f"max_length={pretrained.context_length}"
            )
        if tokenizer is not None and tokenizer.standalone()[0] == "tokenizer.json":
            found.append(
                "AutoProcessor and AutoTokenizer take Gemma's tokenizer for Siglip2 whatever the folder "
                "holds, and fail: read this one with PreTrainedTokenizerFast.from_pretrained(FOLDER)"
            )
    return found


def _family(kind: str, name: str) -> Family:
    return Family(
        name=name,
        models=(DualEncoder,),
        image_towers=(ViT,),
        weights_file="model.safetensors",
        claims=functools.partial(_claims, kind),
        model=functools.partial(_read_model, kind),
        table=functools.partial(_table, kind),
        nearest=functools.partial(_nearest, kind),
        describe=functools.partial(_describe, kind),
        resize=functools.partial(_resize, kind),
        tokens=functools.partial(_tokens, kind),
        notes=functools.partial(_notes, kind),
        prepare=without_patch_bias if kind in _CLIPS else lambda pretrained: pretrained,
    )


_FAMILIES = {kind: _family(kind, name) for name, kind in _KINDS.items()}
CLIP, SIGLIP, SIGLIP2 = _FAMILIES["clip"], _FAMILIES["siglip"], _FAMILIES["siglip2"]
METACLIP2 = _FAMILIES["metaclip_2"]
