"""TIPS v2 as Hugging Face writes it (`Tipsv2Model`): no projections, texts averaged, a fixed temperature."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from clipjax.data import Resize
from clipjax.errors import ClipjaxError
from clipjax.interop import family
from clipjax.interop import huggingface_fields as fields
from clipjax.interop.family import ANY, Description, Family, Tensors
from clipjax.interop.huggingface import (
    CONFIG,
    PREPROCESSOR,
    activation,
    resample_of,
    special_tokens,
)
from clipjax.interop.table import Rule, Table, layered, linear, norm, patches, same, squeezed
from clipjax.models import DualEncoder
from clipjax.towers import TextTransformer, ViT

TEMPERATURE = 0.005065968260169029
_COMMON = ("hidden_size", "num_hidden_layers", "num_attention_heads", "hidden_act")
_VISION: dict[str, Any] = {
    "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "mlp_ratio": 4,
    "hidden_act": "gelu", "layer_norm_eps": 1e-6, "image_size": 448, "patch_size": 14,
    "num_register_tokens": 1, "layerscale_value": 1.0, "use_swiglu_ffn": False,
}  # fmt: skip
_TEXT: dict[str, Any] = {
    "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "hidden_act": "relu",
    "intermediate_size": 3072, "layer_norm_eps": 1e-5, "vocab_size": 32000,
    "max_position_embeddings": 64, "pad_token_id": 0, "scale_sqrt_depth": True,
}  # fmt: skip
_KNOWN_VISION = fields.GENERIC | {
    "num_channels": (3,),
    "qkv_bias": (True,),
    **dict.fromkeys(_VISION, ANY),
    # Of training, and of its use as a backbone.
    **dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), ANY),
    **dict.fromkeys(("drop_path_rate", "apply_layernorm", "reshape_hidden_states"), ANY),
    **dict.fromkeys(("out_features", "out_indices", "stage_names"), ANY),
}
_KNOWN_TEXT = fields.GENERIC | {
    **dict.fromkeys((*_TEXT, "attention_dropout"), ANY),
    "pooling_epsilon": ANY,  # too small to be seen in float32
}
_KNOWN = fields.GENERIC | dict.fromkeys(
    ("text_config", "vision_config", "temperature_init_value"), ANY
)


def _claims(description: Description) -> bool:
    return description.files.get(CONFIG, {}).get("model_type") == "tipsv2"


def _model(description: Description) -> DualEncoder:
    config = description.files[CONFIG]
    family.refuse_unknown(config, CONFIG, **_KNOWN)
    vision, text = ({**config.get(f"{name}_config", {})} for name in ("vision", "text"))
    family.refuse_unknown(vision, f"{CONFIG}: vision_config", **_KNOWN_VISION)
    family.refuse_unknown(text, f"{CONFIG}: text_config", **_KNOWN_TEXT)
    preprocessor = description.files.get(PREPROCESSOR, {})
    family.refuse_unknown(preprocessor, PREPROCESSOR, **fields.PREPROCESSOR)
    vision, text = _VISION | vision, _TEXT | text
    if vision["hidden_size"] != text["hidden_size"]:
        raise ClipjaxError(f"{CONFIG}: the towers' hidden_size must be equal")
    hidden, gated = int(vision["hidden_size"] * vision["mlp_ratio"]), bool(vision["use_swiglu_ffn"])
    if gated:  # two thirds of it, in eights
        hidden = (int(hidden * 2 / 3) + 7) // 8 * 8
    size = vision["image_size"]
    zero, one = (0.0,) * 3, (1.0,) * 3
    image = ViT(
        patch_size=vision["patch_size"],
        image_size=tuple(size) if isinstance(size, list) else size,
        mlp_dim=hidden,
        gated=gated,
        registers=vision["num_register_tokens"],
        layer_scale=float(vision["layerscale_value"]),
        activation="silu" if gated else activation(vision["hidden_act"], "hidden_act"),
        mean=family.three(preprocessor.get("image_mean", zero), f"{PREPROCESSOR}: image_mean"),
        std=family.three(preprocessor.get("image_std", one), f"{PREPROCESSOR}: image_std"),
        **_sizes(vision),
    )
    words = TextTransformer(
        vocab_size=text["vocab_size"],
        context_length=text["max_position_embeddings"],
        mlp_dim=text["intermediate_size"],
        activation=activation(text["hidden_act"], "hidden_act"),
        positions="sinusoidal",
        embed_scale=bool(text["scale_sqrt_depth"]),
        causal=False,
        pool="mean",
        pad_id=text["pad_token_id"],
        eos_id=1,
        **_sizes(text),
    )
    return DualEncoder(
        image=image,
        text=words,
        embed_dim=image.width,
        image_projection="none",
        text_projection="none",
        logit_scale_init=1 / config.get("temperature_init_value", TEMPERATURE),
        logit_scale_max=None,
    )


def _sizes(config: dict[str, Any]) -> dict[str, Any]:
    return {
        "width": config["hidden_size"],
        "depth": config["num_hidden_layers"],
        "heads": config["num_attention_heads"],
        "eps": float(config["layer_norm_eps"]),
    }


def _adapt(tensors: Tensors, files: Mapping[str, Any]) -> Tensors:
    """The temperature as CLIP's scale: the released files lack it, and their configuration says it."""
    found = dict(tensors)
    said = files.get(CONFIG, {}).get("temperature_init_value", TEMPERATURE)
    temperature = np.asarray(found.pop("temperature", said)).astype(np.float64)
    return found | {"logit_scale": np.float32(-np.log(temperature)).reshape(())}


def _table(model: Any) -> Table:
    image, text = model.image, model.text
    embeddings = "vision_model.embeddings"
    places, width = image.grid[0] * image.grid[1] + 1, image.width
    projection = f"{embeddings}.patch_embeddings.projection"
    rules = [
        *same("logit_scale", "logit_scale"),
        *squeezed(f"{embeddings}.cls_token", "image/class_token", (width,), ones=2),
        *squeezed(f"{embeddings}.position_embeddings", "image/positions", (places, width)),
        *patches(projection, "image/patch", image.patch_size, width, bias=True),
        *layered(_vision_layer(image), range(image.depth)),
        *norm("vision_model.layernorm", "image/norm"),
        *same("text_model.embeddings.token_embedding.weight", "text/embedding"),
        *layered(_text_layer(), range(text.depth)),
        *norm("text_model.final_layer_norm", "text/norm"),
    ]
    if image.registers:
        registers = (image.registers, width)
        rules += squeezed(f"{embeddings}.register_tokens", "image/registers", registers)
    ignored = (r"vision_model\.embeddings\.(mask_token|register_tokens)", r".*\.position_ids")
    return Table(tuple(rules), ignored)


def _vision_layer(image: ViT) -> list[Rule]:
    layer, ours = "vision_model.encoder.layer.{i}", "image/blocks"
    names = {"fc1": "fc1", "fc2": "fc2"}
    if image.gated:
        names = {"gate_proj": "gate", "up_proj": "fc1", "down_proj": "fc2"}
    rules = [
        *norm(f"{layer}.norm1", f"{ours}/norm1"),
        *norm(f"{layer}.norm2", f"{ours}/norm2"),
        *same(f"{layer}.layer_scale1.lambda1", f"{ours}/scale1"),
        *same(f"{layer}.layer_scale2.lambda1", f"{ours}/scale2"),
        *linear(f"{layer}.attention.o_proj", f"{ours}/attn/out"),
    ]
    for theirs, name in names.items():
        rules += linear(f"{layer}.mlp.{theirs}", f"{ours}/mlp/{name}")
    for x in "qkv":
        rules += linear(f"{layer}.attention.{x}_proj", f"{ours}/attn/{x}")
    return rules


def _text_layer() -> list[Rule]:
    layer, ours = "text_model.encoder.layers.{i}", "text/blocks"
    rules = [
        *norm(f"{layer}.layer_norm1", f"{ours}/norm1"),
        *norm(f"{layer}.layer_norm2", f"{ours}/norm2"),
        *linear(f"{layer}.mlp.fc1", f"{ours}/mlp/fc1"),
        *linear(f"{layer}.mlp.fc2", f"{ours}/mlp/fc2"),
        *linear(f"{layer}.self_attn.out_proj", f"{ours}/attn/out"),
    ]
    for x in "qkv":
        rules += linear(f"{layer}.self_attn.{x}_proj", f"{ours}/attn/{x}")
    return rules


TIPS = Family(
    name="Hugging Face's TIPS v2",
    models=(DualEncoder,),
    image_towers=(ViT,),
    weights_file="model.safetensors",
    claims=_claims,
    model=_model,
    table=_table,
    nearest=lambda model: model,
    describe=lambda pretrained: {},
    resize=lambda description: Resize("squash", resample_of(description, 2)),
    tokens=lambda description: (
        special_tokens(description)
        | {
            "bos": "",
            "ends": False,
            "clean": "lower",
        }
    ),
    adapt=_adapt,
)
