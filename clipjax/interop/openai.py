"""OpenAI's own CLIP files: ViT and ResNet, whose architecture is in the shapes alone."""

from __future__ import annotations

from typing import Any

import numpy as np

from clipjax.data import Resize
from clipjax.interop import family, open_clip_tables
from clipjax.interop.family import OPENAI_MEAN, OPENAI_STD, Description, Family
from clipjax.interop.rewrite import without_patch_bias
from clipjax.interop.table import Table
from clipjax.models import DualEncoder
from clipjax.towers import ResNet, TextTransformer, ViT

_HEAD_WIDTH = 64  # of every attention head
_SCALARS = ("input_resolution", "context_length", "vocab_size")


def _claims(description: Description) -> bool:
    return (
        description.has("token_embedding.weight", "ln_final.weight", *_SCALARS)
        and "open_clip_config.json" not in description.files
    )


def _read(description: Description) -> DualEncoder:
    vocab_size, width = description.shape("token_embedding.weight", 2)
    return _model(
        image=_image(description),
        embed_dim=description.shape("text_projection", 2)[1],
        text={
            "vocab_size": vocab_size,
            "context_length": description.shape("positional_embedding", 2)[0],
            "width": width,
            "depth": description.layers("transformer.resblocks."),
        },
    )


def _model(image: dict[str, Any], text: dict[str, Any], embed_dim: int) -> DualEncoder:
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


def _image(description: Description) -> dict[str, Any]:
    if description.has("visual.proj"):
        width, _, patch, _ = description.shape("visual.conv1.weight", 4)
        places = description.shape("visual.positional_embedding", 2)[0] - 1
        return {
            "width": width,
            "depth": description.layers("visual.transformer.resblocks."),
            "patch_size": patch,
            "image_size": patch * family.side_of(places, "visual.positional_embedding"),
        }
    table = "visual.attnpool.positional_embedding"
    return {
        "blocks": tuple(description.layers(f"visual.layer{stage}.") for stage in (1, 2, 3, 4)),
        "width": description.shape("visual.layer1.0.conv1.weight", 4)[0],
        "image_size": 32 * family.side_of(description.shape(table, 2)[0] - 1, table),
    }


def _table(model: Any) -> Table:
    table = open_clip_tables.table(False, model)
    values = (model.image.image_shape[0], model.text.context_length, model.text.vocab_size)
    scalars = {n: np.array(v, np.int64) for n, v in zip(_SCALARS, values, strict=True)}
    ignored = (*table.ignored, *_SCALARS)
    return Table(table.rules, ignored, {**table.constants, **scalars})


def _nearest(model: Any) -> DualEncoder:
    image, text = model.image, model.text
    names: tuple[str, ...] = ("blocks", "width", "image_size")
    if isinstance(image, ViT):
        names = ("width", "depth", "patch_size", "image_size")
    sizes = ("vocab_size", "context_length", "width", "depth")
    family.square(image)
    return _model(
        {n: getattr(image, n) for n in names}, {n: getattr(text, n) for n in sizes}, model.embed_dim
    )


OPENAI = Family(
    name="OpenAI's CLIP",
    models=(DualEncoder,),
    image_towers=(ViT, ResNet),
    weights_file="model.safetensors",
    claims=_claims,
    model=_read,
    table=_table,
    nearest=_nearest,
    describe=lambda pretrained: {},
    resize=lambda description: Resize("crop"),
    tokens=lambda description: {},
    prepare=without_patch_bias,
)
