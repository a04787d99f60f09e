"""Weights out: which formats can hold a model, what their libraries do otherwise, and the folder."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any, cast

import numpy as np

from clipjax.errors import ClipjaxError, did_you_mean
from clipjax.interop import big_vision, huggingface, open_clip, openai, tokens
from clipjax.interop.family import Family, differences
from clipjax.params import paths
from clipjax.pretrained import Pretrained
from clipjax.stores import delivered, is_remote, place
from clipjax.towers import TextTransformer

logger = logging.getLogger(__name__)

FORMATS: dict[str, tuple[Family, ...]] = {
    # `clipjax export --to`: the families that may hold the model; the first that can is taken.
    "hf": (huggingface.CLIP, huggingface.SIGLIP),
    "hf-siglip2": (huggingface.SIGLIP2,),
    "hf-metaclip2": (huggingface.METACLIP2,),
    "open_clip": (open_clip.OPEN_CLIP, open_clip.OPEN_CLIP_CUSTOM),
    "open_clip-custom": (open_clip.OPEN_CLIP_CUSTOM,),
    "openai": (openai.OPENAI,),
    "big_vision": (big_vision.BIG_VISION,),
    "big_vision-scanned": (big_vision.BIG_VISION_SCANNED,),
}


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Whether a format can hold a model.

    Attributes:
      to: the format, one of `FORMATS`.
      family: what the folder would be of; None where no family of the format can hold the model.
      refusals: by family's name, all that it cannot express; empty where one can.
      notes: what that family's library does otherwise with texts and pictures, in sentences.
    """

    to: str
    family: Family | None
    refusals: dict[str, tuple[str, ...]]
    notes: tuple[str, ...]

    def refusal(self) -> str:
        """All refusals in one message, a line a family."""
        by_reasons: dict[tuple[str, ...], list[str]] = {}
        for name, found in self.refusals.items():
            by_reasons.setdefault(found, []).append(name)
        lines = [
            f"{' and '.join(names)} cannot express {'; '.join(found)}"
            for found, names in by_reasons.items()
        ]
        return "\n  ".join(lines)


def judge(pretrained: Pretrained, to: str) -> Verdict:
    """Whether a format can hold a model, before anything is trained or written.

    Args:
      pretrained: the model; its arrays are not looked at, and params may be `{}`.
      to: one of `FORMATS`.

    Raises:
      ClipjaxError: there is no such format.
    """
    if to not in FORMATS:
        raise ClipjaxError(f"no format {to!r}{did_you_mean(to, FORMATS)}")
    refusals: dict[str, tuple[str, ...]] = {}
    for family in FORMATS[to]:
        prepared = family.prepare(pretrained)
        found = _refused(prepared, family)
        if not found:
            return Verdict(to, family, {}, tuple(family.notes(prepared)))
        refusals[family.name] = tuple(found)
    return Verdict(to, None, refusals, ())


def export_weights(pretrained: Pretrained, folder: str | Path, to: str) -> Family:
    """Writes a model as another library's folder: weights, configuration, preprocessing, tokenizer.

    What that library does otherwise with texts or pictures goes to the log as a warning.

    Args:
      pretrained: the model; what only training needs of it is folded in (`Pretrained.folded`).
      folder: a new or empty folder.
      to: one of `FORMATS`.

    Returns:
      The family that the folder is of.

    Raises:
      ClipjaxError: the format cannot express the model (all fields are named), or the folder is not
        empty. Nothing has been written then.
    """
    from safetensors.numpy import save_file

    folder = place(folder)
    if is_remote(folder):
        with delivered(folder) as target:
            return export_weights(pretrained, target, to)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ClipjaxError(f"{folder} exists and is not empty: name a new folder for the export")
    pretrained = pretrained.folded()
    verdict = judge(pretrained, to)
    family = verdict.family
    if family is None:
        raise ClipjaxError(verdict.refusal())
    pretrained = family.prepare(pretrained)
    model: Any = pretrained.model
    if family is huggingface.CLIP and model.text.eos_id == tokens.LEGACY_EOS:
        pretrained = tokens.renumbered(pretrained)
    files = {
        name: (json.dumps(facts, indent=2, ensure_ascii=False) + "\n").encode()
        for name, facts in family.describe(pretrained).items()
    }
    if files and _takes_tokenizer(family, pretrained):
        files |= _tokenizer_files(family, pretrained)
    flat = dict(paths(pretrained.params)) | dict(paths(pretrained.model_state))
    tensors = family.table(pretrained.model).write(flat)
    folder.mkdir(parents=True, exist_ok=True)
    if family.weights_file.endswith(".npz"):
        np.savez(folder / family.weights_file, **cast(Any, tensors))
    else:
        save_file(tensors, folder / family.weights_file, {"format": "pt"})
    for name, contents in files.items():
        (folder / name).write_bytes(contents)
    for note in verdict.notes:
        logger.warning("%s: %s", folder, note)
    return family


def _refused(pretrained: Pretrained, family: Family) -> list[str]:
    """All that a family cannot express of a model."""
    found = _wrong_types(pretrained.model, family)
    if found:
        return found
    try:
        found = differences(pretrained.model, family.nearest(pretrained.model))
    except ClipjaxError as error:
        found = [str(error)]
    found += _tokenizer_fault(pretrained, family)
    if not found:
        found = _description_fault(pretrained, family)
    return found


def _tokenizer_fault(pretrained: Pretrained, family: Family) -> list[str]:
    if family in _WITHOUT_TOKENIZER or not _takes_tokenizer(family, pretrained):
        return []
    try:
        _tokenizer_files(family, pretrained)
    except ClipjaxError as error:
        return [str(error)]
    return []


def _description_fault(pretrained: Pretrained, family: Family) -> list[str]:
    try:
        family.describe(pretrained)
    except ClipjaxError as error:
        return [str(error)]
    return []


_WITHOUT_TOKENIZER = (openai.OPENAI, big_vision.BIG_VISION, big_vision.BIG_VISION_SCANNED)


def _takes_tokenizer(family: Family, pretrained: Pretrained) -> bool:
    return pretrained.tokenizer is not None and not open_clip.has_own_tokenizer(family, pretrained)


def _tokenizer_files(family: Family, pretrained: Pretrained) -> dict[str, bytes]:
    siglip = family in (huggingface.SIGLIP, huggingface.SIGLIP2)
    mends = family in (open_clip.OPEN_CLIP, open_clip.OPEN_CLIP_CUSTOM)
    return tokens.tokenizer_files(pretrained, siglip, mends).files


def _wrong_types(model: Any, family: Family) -> list[str]:
    found = []
    for where, part, types in (
        ("model", model, family.models),
        ("model.image", getattr(model, "image", None), family.image_towers),
        ("model.text", getattr(model, "text", None), (TextTransformer,)),
    ):
        if type(part) not in types:
            names = " or ".join(t.__name__ for t in types)
            kind = type(part).__name__ if part is not None else "None"
            found.append(f"{where}, a {kind}: only {names}")
    return found
