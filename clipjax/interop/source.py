"""Source: other people's weights on disk, with the files that lie beside them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from clipjax.errors import ClipjaxError
from clipjax.interop.family import Description
from clipjax.interop.tensors import SUFFIXES, read_tensors

WEIGHTS_FILES = (
    # What a folder's weights may be called; the first that exists is read.
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "model.safetensors",
    "model.safetensors.index.json",
    "open_clip_pytorch_model.bin",
    "pytorch_model.bin",
    "weights.npz",
)
CONFIG_FILES = (
    "config.json",
    "open_clip_config.json",
    "preprocessor_config.json",
    "tokenizer_config.json",
)
_WRAPPERS = ("module.", "_orig_mod.")
TOKENIZER_FILES = (
    "tokenizer.json",
    "spiece.model",
    "tokenizer.model",
    "bpe_simple_vocab_16e6.txt.gz",
)


@dataclasses.dataclass(frozen=True)
class Source:
    """Weights and what is known about them.

    Attributes:
      weights: the file the tensors come from.
      tensors: by name.
      files: the parsed JSON files beside it, by name.
    """

    weights: Path
    tensors: Mapping[str, np.ndarray]
    files: Mapping[str, dict[str, Any]]

    @property
    def description(self) -> Description:
        """All but the numbers."""
        return Description({n: tuple(t.shape) for n, t in self.tensors.items()}, self.files)

    def tokenizer_file(self) -> Path | None:
        """The tokenizer beside the weights, if there is one."""
        files = [self.weights.parent / name for name in TOKENIZER_FILES]
        return next((f for f in files if f.is_file()), None)


def is_source(path: Path) -> bool:
    """Whether `path` is a file of tensors, or a folder that holds one under a usual name."""
    path = Path(path)
    if path.is_dir():
        return any((path / name).is_file() for name in WEIGHTS_FILES)
    return path.is_file() and (path.suffix in SUFFIXES or path.name.endswith(".index.json"))


def open_source(path: str | Path, config: str | Path | None = None) -> Source:
    """Reads weights and the files beside them.

    Args:
      path: a file of tensors, or a folder with one.
      config: a configuration to use in place of the one beside the weights: a Hugging Face
        config.json, or an OpenCLIP open_clip_config.json or model configuration.

    Raises:
      ClipjaxError: there are no weights, or a file is damaged.
    """
    path = Path(path).expanduser()
    weights = _weights_in(path) if path.is_dir() else path
    files = {
        n: _read_json(weights.parent / n) for n in CONFIG_FILES if (weights.parent / n).is_file()
    }
    if config is not None:
        facts = _read_json(Path(config).expanduser())
        name = (
            "open_clip_config.json" if {"model_cfg", "vision_cfg"} & facts.keys() else "config.json"
        )
        files = {n: f for n, f in files.items() if n not in CONFIG_FILES[:2]} | {name: facts}
    tensors = _unwrapped(read_tensors(weights))
    if any(name.startswith("img/") for name in tensors):  # big_vision's older files lack the prefix
        tensors = {f"params/{name}": tensor for name, tensor in tensors.items()}
    return Source(weights, tensors, files)


def _unwrapped(tensors: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    """Without what PyTorch's wrappers put before every name: DistributedDataParallel, torch.compile."""
    while tensors:
        prefix = next((p for p in _WRAPPERS if all(name.startswith(p) for name in tensors)), None)
        if prefix is None:
            break
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def _weights_in(folder: Path) -> Path:
    for name in WEIGHTS_FILES:
        if (folder / name).is_file():
            return folder / name
    raise ClipjaxError(
        f"{folder} holds no weights under a usual name ({', '.join(WEIGHTS_FILES)}): name the file itself"
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ClipjaxError(f"{path} is missing or no JSON file: {error}") from error
    if not isinstance(facts, dict):
        raise ClipjaxError(f"{path} holds no JSON object")
    return facts
