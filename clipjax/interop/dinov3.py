"""DINOv3's vision transformers as Hugging Face writes them: an image tower alone, for a run to start from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from clipjax.data import Resize
from clipjax.interop import family
from clipjax.interop import huggingface_fields as fields
from clipjax.interop.family import ANY, Description, Family, Tensors
from clipjax.interop.huggingface import CONFIG, PREPROCESSOR, activation, resample_of
from clipjax.interop.table import Table, layered, linear, norm, patches, same, squeezed
from clipjax.models import Encoder, MultiEncoder
from clipjax.models.base import tower_of
from clipjax.towers import ViT

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
_NAMES = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6}
_DEFAULTS: dict[str, Any] = _NAMES | {
    "intermediate_size": 1536,
    "patch_size": 16,
    "image_size": 224,
}
_KNOWN = fields.GENERIC | {
    "num_channels": (3,),
    "query_bias": (True,),
    "value_bias": (True,),
    "proj_bias": (True,),
    "mlp_bias": (True,),
    **dict.fromkeys((*_DEFAULTS, "hidden_act", "layer_norm_eps", "rope_theta", "key_bias"), ANY),
    **dict.fromkeys(("use_gated_mlp", "num_register_tokens", "layerscale_value"), ANY),
    # Of training, and of its use as a backbone.
    **dict.fromkeys(("drop_path_rate", "pos_embed_shift", "pos_embed_jitter"), ANY),
    **dict.fromkeys(("pos_embed_rescale", "attention_dropout", "apply_layernorm"), ANY),
    **dict.fromkeys(("reshape_hidden_states", "out_features", "out_indices", "stage_names"), ANY),
}


def _claims(description: Description) -> bool:
    return description.files.get(CONFIG, {}).get("model_type") == "dinov3_vit"


def _model(description: Description) -> MultiEncoder:
    config = description.files[CONFIG]
    family.refuse_unknown(config, CONFIG, **_KNOWN)
    preprocessor = description.files.get(PREPROCESSOR, {})
    family.refuse_unknown(preprocessor, PREPROCESSOR, **fields.PREPROCESSOR)
    facts = _DEFAULTS | config
    size = facts["image_size"]
    tower = ViT(
        width=facts["hidden_size"],
        depth=facts["num_hidden_layers"],
        heads=facts["num_attention_heads"],
        mlp_dim=facts["intermediate_size"],
        patch_size=facts["patch_size"],
        image_size=tuple(size) if isinstance(size, list) else size,
        activation=activation(facts.get("hidden_act", "gelu"), "hidden_act"),
        eps=float(facts.get("layer_norm_eps", 1e-5)),
        gated=bool(facts.get("use_gated_mlp", False)),
        key_bias=bool(facts.get("key_bias", False)),
        layer_scale=float(facts.get("layerscale_value", 1.0)),
        registers=facts.get("num_register_tokens", 0),
        positions="none",
        rope="dinov3",
        rope_theta=float(facts.get("rope_theta", 100.0)),
        mean=family.three(preprocessor.get("image_mean", _MEAN), f"{PREPROCESSOR}: image_mean"),
        std=family.three(preprocessor.get("image_std", _STD), f"{PREPROCESSOR}: image_std"),
    )
    return MultiEncoder((Encoder("image", tower, "none"),), embed_dim=tower.width)


def _adapt(tensors: Tensors, files: Mapping[str, Any]) -> Tensors:
    found = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    # Of one tower alone nothing is compared: the scale is where CLIP's starts.
    return found | {"logit_scale": np.full((), math.log(1 / 0.07), np.float32)}


def _table(model: Any) -> Table:
    tower = tower_of(model, "image")
    layer, ours = "layer.{i}", "image/blocks"
    names = {"up_proj": "fc1", "down_proj": "fc2"} | ({"gate_proj": "gate"} if tower.gated else {})
    rules = [
        *norm(f"{layer}.norm1", f"{ours}/norm1"),
        *norm(f"{layer}.norm2", f"{ours}/norm2"),
        *same(f"{layer}.layer_scale1.lambda1", f"{ours}/scale1"),
        *same(f"{layer}.layer_scale2.lambda1", f"{ours}/scale2"),
        *linear(f"{layer}.attention.q_proj", f"{ours}/attn/q"),
        *linear(f"{layer}.attention.k_proj", f"{ours}/attn/k", bias=tower.key_bias),
        *linear(f"{layer}.attention.v_proj", f"{ours}/attn/v"),
        *linear(f"{layer}.attention.o_proj", f"{ours}/attn/out"),
    ]
    for theirs, name in names.items():
        rules += linear(f"{layer}.mlp.{theirs}", f"{ours}/mlp/{name}")
    patch, width = "embeddings.patch_embeddings", tower.width
    registers = (tower.registers, width)
    return Table(
        (
            *same("logit_scale", "logit_scale"),
            *squeezed("embeddings.cls_token", "image/class_token", (width,), ones=2),
            *squeezed("embeddings.register_tokens", "image/registers", registers)
            * bool(tower.registers),
            *patches(patch, "image/patch", tower.patch_size, width, bias=True),
            *layered(rules, range(tower.depth)),
            *norm("norm", "image/norm"),
        ),
        # What stands for masked patches in DINOv3's own training; registers that there are none of.
        ignored=(r"embeddings\.mask_token", r"rope_embeddings\..*", r"embeddings\.register_tokens"),
    )


def _resize(description: Description) -> Resize:
    return Resize("squash", resample_of(description, 2))


DINOV3 = Family(
    name="Hugging Face's DINOv3",
    models=(MultiEncoder,),
    image_towers=(ViT,),
    weights_file="model.safetensors",
    claims=_claims,
    model=_model,
    table=_table,
    nearest=lambda model: model,
    describe=lambda pretrained: {},
    resize=_resize,
    tokens=lambda description: {},
    adapt=_adapt,
)
