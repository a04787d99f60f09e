"""Weights in, weights out: any family's files to `Pretrained`, and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import numpy as np
from flax import nnx

from clipjax.data import ClipBPE, SentencePiece, TokenizerFile, TokenizerModel
from clipjax.errors import ClipjaxError, did_you_mean
from clipjax.interop import big_vision, huggingface, open_clip, tokens
from clipjax.interop.family import Family, require_expressible
from clipjax.interop.resample import with_context_length, with_image_size
from clipjax.interop.source import Source, open_source
from clipjax.params import abstract, paths
from clipjax.pretrained import Pretrained, unflatten
from clipjax.stores import delivered, is_remote, place
from clipjax.towers import TextTransformer

FAMILIES: tuple[Family, ...] = (
    huggingface.CLIP,
    huggingface.SIGLIP,
    huggingface.SIGLIP2,
    open_clip.OPENAI,
    open_clip.OPEN_CLIP_CUSTOM,
    open_clip.OPEN_CLIP,
    big_vision.BIG_VISION,
    big_vision.BIG_VISION_SCANNED,
)
FORMATS: dict[str, tuple[Family, ...]] = {
    # `clipjax export --to`: the families that may hold the model; the first that can is taken.
    "hf": (huggingface.CLIP, huggingface.SIGLIP),
    "hf-siglip2": (huggingface.SIGLIP2,),
    "open_clip": (open_clip.OPEN_CLIP, open_clip.OPEN_CLIP_CUSTOM),
    "open_clip-custom": (open_clip.OPEN_CLIP_CUSTOM,),
    "openai": (open_clip.OPENAI,),
    "big_vision": (big_vision.BIG_VISION,),
    "big_vision-scanned": (big_vision.BIG_VISION_SCANNED,),
}


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
        model: Any = owner.model(source.description)
        flat = owner.table(model).read(source.tensors, _shapes(model))
    except ClipjaxError as error:
        raise ClipjaxError(f"{source.weights}: {error}") from error
    params, model_state = _divided(model, flat)
    pretrained = Pretrained(
        model=model,
        params=params,
        model_state=model_state,
        tokenizer=_tokenizer(owner, source, tokenizer),
        context_length=model.text.context_length,
        image_size=max(model.image.image_shape),
        resize=owner.resize(source.description),
    )
    if image_size is not None:
        pretrained = with_image_size(pretrained, image_size)
    if context_length is not None:
        pretrained = with_context_length(pretrained, context_length)
    pretrained.check()
    return pretrained


def export_weights(pretrained: Pretrained, folder: str | Path, to: str) -> Family:
    """Writes a model as another library's folder: weights, configuration, preprocessing, tokenizer.

    Args:
      pretrained: the model; what only training needs of it is folded in (`Pretrained.folded`).
      folder: a new or empty folder.
      to: one of `FORMATS`.

    Returns:
      The family that the folder is of.

    Raises:
      ClipjaxError: the format cannot express the model (the field is named), or the folder is not
        empty. Nothing has been written then.
    """
    from safetensors.numpy import save_file

    if to not in FORMATS:
        raise ClipjaxError(f"no format {to!r}{did_you_mean(to, FORMATS)}")
    folder = place(folder)
    if is_remote(folder):
        with delivered(folder) as target:
            return export_weights(pretrained, target, to)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ClipjaxError(f"{folder} exists and is not empty: name a new folder for the export")
    pretrained = pretrained.folded()
    family = _expressing(pretrained, FORMATS[to])
    model: Any = pretrained.model
    if family is huggingface.CLIP and model.text.eos_id == tokens.LEGACY_EOS:
        pretrained = tokens.renumbered(pretrained)
    files = {
        name: (json.dumps(facts, indent=2, ensure_ascii=False) + "\n").encode()
        for name, facts in family.describe(pretrained).items()
    }
    if (
        pretrained.tokenizer is not None
        and files
        and not open_clip.has_own_tokenizer(family, pretrained)
    ):
        siglip = family in (huggingface.SIGLIP, huggingface.SIGLIP2)
        files |= tokens.tokenizer_files(pretrained, siglip).files
    flat = dict(paths(pretrained.params)) | dict(paths(pretrained.model_state))
    tensors = family.table(pretrained.model).write(flat)
    folder.mkdir(parents=True, exist_ok=True)
    if family.weights_file.endswith(".npz"):
        np.savez(folder / family.weights_file, **cast(Any, tensors))
    else:
        save_file(tensors, folder / family.weights_file, {"format": "pt"})
    for name, contents in files.items():
        (folder / name).write_bytes(contents)
    return family


def _claimed(source: Source, name: str | None) -> Family:
    description = source.description
    if name not in (None, "openai"):
        raise ClipjaxError(
            f"family={name!r}: only 'openai' can be named, all others are recognized"
        )
    if name == "openai":
        return open_clip.OPENAI
    for family in FAMILIES:
        if family.claims(description):
            return family
    names = ", ".join(family.name for family in FAMILIES)
    some = ", ".join(sorted(description.shapes)[:4])
    raise ClipjaxError(f"the tensors ({some}, ...) are of no family that is known here: {names}")


def _expressing(pretrained: Pretrained, families: tuple[Family, ...]) -> Family:
    refusals = []
    for family in families:
        try:
            _require_types(pretrained.model, family)
            require_expressible(pretrained.model, family.nearest(pretrained.model), family.name)
            family.describe(pretrained)
        except ClipjaxError as error:
            refusals.append(str(error))
        else:
            return family
    raise ClipjaxError("; ".join(dict.fromkeys(refusals)))


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


def _require_types(model: Any, family: Family) -> None:
    for where, part, types in (
        ("model", model, family.models),
        ("model.image", getattr(model, "image", None), family.image_towers),
        ("model.text", getattr(model, "text", None), (TextTransformer,)),
    ):
        if type(part) not in types:
            names = " or ".join(t.__name__ for t in types)
            kind = type(part).__name__ if part is not None else "None"
            raise ClipjaxError(f"{family.name} cannot express {where}, a {kind}: only {names}")


def _tokenizer(family: Family, source: Source, named: str | Path | None) -> TokenizerModel | None:
    file = source.tokenizer_file() if named is None else Path(named).expanduser()
    if file is None:
        return None
    settings = family.tokens(source.description)
    if file.name.endswith((".txt", ".txt.gz")):
        return ClipBPE(str(file)).build()
    role = SentencePiece if file.suffix == ".model" else TokenizerFile
    return role(str(file), **settings).build()
