"""Weights in: any family's files to `Pretrained`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from clipjax.data import ClipBPE, SentencePiece, TokenizerFile, TokenizerModel
from clipjax.errors import ClipjaxError
from clipjax.interop import big_vision, dinov3, huggingface, open_clip, openai, text_towers, tips
from clipjax.interop.family import Family
from clipjax.interop.resample import with_context_length, with_image_size
from clipjax.interop.source import Source, open_source
from clipjax.models.base import tower_of
from clipjax.params import abstract, paths
from clipjax.pretrained import Pretrained, unflatten

FAMILIES: tuple[Family, ...] = (
    tips.TIPS,
    dinov3.DINOV3,
    huggingface.METACLIP2,
    huggingface.CLIP,
    huggingface.SIGLIP,
    huggingface.SIGLIP2,
    openai.OPENAI,
    open_clip.OPEN_CLIP_CUSTOM,
    open_clip.OPEN_CLIP,
    big_vision.BIG_VISION,
    big_vision.BIG_VISION_SCANNED,
    *text_towers.FAMILIES,
)


def import_weights(
    path: str | Path,
    *,
    config: str | Path | None = None,
    tokenizer: str | Path | None = None,
    family: str | None = None,
    image_size: int | None = None,
    context_length: int | None = None,
) -> Pretrained:
    """Reads a model that another library wrote.

    Args:
      path: the weights, or the folder they are in with their configuration.
      config: a configuration file to use in place of the one beside the weights.
      tokenizer: a tokenizer's file (tokenizer.json, a SentencePiece model, or OpenAI's merges)
        to use in place of the one beside the weights.
      family: "openai" where the tensors' names, which OpenCLIP uses too, do not tell.
      image_size: pixels; position embeddings are resampled to it. None keeps the weights' own.
      context_length: tokens of a text; None keeps the weights' own.

    Raises:
      ClipjaxError: the weights are of no known family, do not fit their configuration, or are damaged.
    """
    source = open_source(path, config)
    try:
        owner = _claimed(source, family)
        source = dataclasses.replace(source, tensors=owner.adapt(source.tensors, source.files))
        model: Any = owner.model(source.description)
        flat = owner.table(model).read(source.tensors, _shapes(model))
    except ClipjaxError as error:
        raise ClipjaxError(f"{source.weights}: {error}") from error
    params, model_state = _divided(model, flat)
    image, text = tower_of(model, "image"), tower_of(model, "text")
    pretrained = Pretrained(
        model=model,
        params=params,
        model_state=model_state,
        tokenizer=None if text is None else _tokenizer(owner, source, tokenizer),
        context_length=0 if text is None else text.context_length,
        image_size=0 if image is None else max(image.image_shape),
        resize=owner.resize(source.description),
    )
    if image_size is not None:
        pretrained = with_image_size(pretrained, image_size)
    if context_length is not None:
        pretrained = with_context_length(pretrained, context_length)
    pretrained.check()
    return pretrained


def _claimed(source: Source, name: str | None) -> Family:
    description = source.description
    if name not in (None, "openai"):
        raise ClipjaxError(
            f"family={name!r}: only 'openai' can be named, all others are recognized"
        )
    if name == "openai":
        return openai.OPENAI
    for family in FAMILIES:
        if family.claims(description):
            return family
    names = ", ".join(family.name for family in FAMILIES)
    some = ", ".join(sorted(description.shapes)[:4])
    raise ClipjaxError(f"the tensors ({some}, ...) are of no family that is known here: {names}")


def _shapes(model: Any) -> dict[str, tuple[int, ...]]:
    _, params, model_state = abstract(lambda: model.build(nnx.Rngs(0)))
    return {p: tuple(leaf.shape) for p, leaf in [*paths(params), *paths(model_state)]}


def _divided(model: Any, flat: dict[str, np.ndarray]) -> tuple[dict, dict]:
    _, params, _ = abstract(lambda: model.build(nnx.Rngs(0)))
    trainable = {path for path, _ in paths(params)}
    return (
        unflatten({p: a for p, a in flat.items() if p in trainable}),
        unflatten({p: a for p, a in flat.items() if p not in trainable}),
    )


def _tokenizer(family: Family, source: Source, named: str | Path | None) -> TokenizerModel | None:
    file = source.tokenizer_file() if named is None else Path(named).expanduser()
    if file is None:
        return None
    settings = family.tokens(source.description)
    if file.name.endswith((".txt", ".txt.gz")):
        return ClipBPE(str(file)).build()
    role = SentencePiece if file.suffix == ".model" else TokenizerFile
    return role(str(file), **settings).build()
