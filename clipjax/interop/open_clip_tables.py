"""The tensors of OpenAI's CLIP and OpenCLIP's models, which kept their names."""

from __future__ import annotations

from typing import Any

import numpy as np

from clipjax.interop import timm_towers
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
)
from clipjax.models.coca import CoCa
from clipjax.towers import ResNet, ViT


def table(custom: bool, model: Any) -> Table:
    """The tensors of a CLIP, or with `custom` of a CustomTextCLIP or CoCa."""
    if isinstance(model, CoCa):
        return _coca(model)
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
    elif timm_towers.is_timms(model):
        rules += timm_towers.rules(model.image, model.image_projection)
    else:
        rules += _vit_rules(model.image)
    ignored = (r"(text\.)?attn_mask", r".*\.num_batches_tracked")
    return Table(tuple(rules), ignored, constants)


def _coca(model: CoCa) -> Table:
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
