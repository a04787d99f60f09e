"""Goldens: what the reference libraries compute, with the folders that they would load it from."""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

sys.path.insert(0, str(Path(__file__).parent))
import named_weights as weights

GOLDENS = Path(__file__).parent / "goldens"
OPEN_CLIP = ("CLIP", "CustomTextCLIP", "CoCa", "OpenAI")


@dataclasses.dataclass(frozen=True)
class Golden:
    family: str
    files: dict
    tensors: dict
    images: np.ndarray | None
    texts: np.ndarray | None
    outputs: dict

    def write(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        for name, facts in self.files.items():
            (folder / name).write_text(json.dumps(facts))
        if self.family == "big_vision":
            np.savez(folder / "weights.npz", **self.tensors)
            return folder / "weights.npz"
        own = "open_clip_model" if self.family in OPEN_CLIP else "model"
        save_file(self.tensors, folder / f"{own}.safetensors")
        return folder


def read_golden(name: str) -> Golden:
    facts = json.loads((GOLDENS / f"{name}.json").read_text())
    tensors = {
        name: weights.tensor(name, tuple(shape), dtype)
        for name, (shape, dtype) in facts["tensors"].items()
    }
    inputs = facts["inputs"]
    if facts["family"] == "OpenAI":  # as in OpenAI's own files
        scalars = (inputs["image_size"], inputs["context_length"], inputs["vocab_size"])
        names = ("input_resolution", "context_length", "vocab_size")
        tensors |= {n: np.array(s, np.int64) for n, s in zip(names, scalars, strict=True)}
    size, length = inputs["image_size"], inputs["context_length"]
    texts = None
    if length is not None:
        texts = weights.texts(3, length, inputs["vocab_size"], inputs["eos"])
    if "cut" in inputs:  # where padding begins in one of the texts
        row, start = inputs["cut"]
        texts[row, start:] = 0
    return Golden(
        facts["family"],
        facts["files"],
        tensors,
        None if size is None else weights.pictures(3, size),
        texts,
        {k: np.array(v) for k, v in facts["outputs"].items()},
    )


@pytest.fixture(scope="session")
def golden():
    """Name -> golden, read once."""
    read: dict[str, Golden] = {}

    def get(name):
        if name not in read:
            read[name] = read_golden(name)
        return read[name]

    return get
