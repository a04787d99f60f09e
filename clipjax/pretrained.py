"""Pretrained: a model with its weights, tokenizer and preprocessing, apart from any run.

It is what importers make, what exporters take, what `clipjax.load` opens whatever the path holds,
and what a run may start from. As a folder:

    model.json          format, the model's configuration, and how pictures and texts come in
    model.safetensors   parameters and model state, by path
    tokenizer/          as `TokenizerModel.save` writes it; absent without a tokenizer
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from clipjax.component import from_json, to_json
from clipjax.data import Resize, TokenizerModel, load_tokenizer
from clipjax.errors import ClipjaxError, did_you_mean
from clipjax.files import replace_file
from clipjax.mesh import MeshShape
from clipjax.models import Model
from clipjax.models.base import tower_of
from clipjax.params import Tree, abstract, paths
from clipjax.predictor import Predictor
from clipjax.sharding import Sharding
from clipjax.stores import delivered, fetched, is_remote, place
from clipjax.towers.base import Tower

FORMAT = 1
MODEL_FILE, WEIGHTS_FILE, TOKENIZER_FOLDER = "model.json", "model.safetensors", "tokenizer"


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A model with its weights and all it takes to read pictures and texts.

    Attributes:
      model: the model's configuration.
      params: nested dict of arrays (NumPy, or jax on any mesh), as `clipjax.params.split` makes it.
      model_state: the model's other arrays (batch statistics), or `{}`.
      tokenizer: turns texts into tokens; None where there is none to be had.
      context_length: tokens of a text, special tokens counted; 0 for a model that reads none.
      image_size: height and width of pictures, in pixels; 0 for a model that sees none.
      resize: how pictures come to that size.
      sharding: where the parameters go on a mesh: as the run laid them out that it comes from.
    """

    model: Model
    params: Tree
    model_state: Tree
    tokenizer: TokenizerModel | None
    context_length: int
    image_size: int
    resize: Resize = Resize()
    sharding: Sharding = Sharding()

    def check(self) -> None:
        """Compares every array with what the model's configuration builds.

        Raises:
          ClipjaxError: an array is missing, unknown, or of another shape; it is named.
        """
        _, params, model_state = abstract(lambda: self.model.build(nnx.Rngs(0)))
        wanted = dict(paths({"params": params, "model_state": model_state}))
        given = dict(paths({"params": self.params, "model_state": self.model_state}))
        for name, leaf in wanted.items():
            if name not in given:
                raise ClipjaxError(f"the weights lack {name!r} {tuple(leaf.shape)}")
            if tuple(given[name].shape) != tuple(leaf.shape):
                raise ClipjaxError(
                    f"{name!r} has shape {tuple(given[name].shape)}, but the model's configuration "
                    f"makes it {tuple(leaf.shape)}"
                )
        for name in given:
            if name not in wanted:
                raise ClipjaxError(
                    f"the weights have {name!r}, which the model lacks{did_you_mean(name, wanted)}"
                )

    def tower(self, name: str) -> Tower:
        """The configuration of the tower called "image" or "text", for a run's model to be built of.

        Raises:
          ClipjaxError: the model has none of that name.
        """
        found = tower_of(self.model, name)
        if not isinstance(found, Tower):
            raise ClipjaxError(f"the model, a {type(self.model).__name__}, has no tower {name!r}")
        return found

    def folded(self) -> Pretrained:
        """The same model without what only training needs, such as LoRA's factors beside the kernels."""
        model, params = self.model.folded(self.params)
        return dataclasses.replace(self, model=model, params=params)

    def predictor(
        self,
        mesh: Mesh | None = None,
        sharding: Sharding | None = None,
        **settings: Any,
    ) -> Predictor:
        """The model on devices, ready to embed.

        Args:
          mesh: default: all devices along the data axis.
          sharding: where the parameters go; default: the model's own.
          **settings: further keyword arguments of `Predictor`, such as `batch_size`.
        """
        mesh = mesh or MeshShape().build()
        graphdef, _, _ = abstract(lambda: self.model.build(nnx.Rngs(0)))
        tree = {"params": self.params, "model_state": self.model_state}
        placed = jax.device_put(tree, (sharding or self.sharding).apply(tree, mesh))
        return Predictor(
            graphdef,
            placed["params"],
            placed["model_state"],
            tokenizer=self.tokenizer,
            context_length=self.context_length,
            image_size=self.image_size,
            resize=self.resize,
            mesh=mesh,
            **settings,
        )

    def fingerprint(self) -> str:
        """32 hex digits that change with the weights, the architecture and the preprocessing.

        Equal fingerprints give equal embeddings, wherever the model was loaded from.
        """
        tree = {"params": self.params, "model_state": self.model_state}
        named = sorted(paths(tree), key=lambda pair: pair[0])

        def digest(pair: tuple[str, Any]) -> bytes:
            name, leaf = pair
            array = np.ascontiguousarray(leaf)
            content = hashlib.blake2b(
                f"{name} {array.dtype} {array.shape}\n".encode(), digest_size=16
            )
            content.update(array.reshape(-1).view(np.uint8))
            return content.digest()

        facts = json.dumps(
            [to_json(self.model), self.context_length, self.image_size, to_json(self.resize)]
        )
        total = hashlib.blake2b(facts.encode(), digest_size=16)
        with ThreadPoolExecutor() as threads:  # hashing releases the interpreter
            for part in threads.map(digest, named):
                total.update(part)
        if self.tokenizer is not None:
            with tempfile.TemporaryDirectory() as scratch:
                self.tokenizer.save(scratch)
                for file in sorted(Path(scratch).iterdir()):
                    total.update(file.read_bytes())
        return total.hexdigest()

    def save(self, folder: str | Path) -> None:
        """Writes the model's folder; `model.json` last, so that a folder that has it is complete.

        Raises:
          ClipjaxError: the folder holds something else.
        """
        from safetensors.numpy import save_file

        folder = place(folder)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ClipjaxError(f"{folder} exists and is not empty: name a new folder for the model")
        tree = {"params": self.params, "model_state": self.model_state}
        flat = {name: np.array(leaf, order="C") for name, leaf in paths(jax.device_get(tree))}
        facts = {
            "format": FORMAT,
            "model": to_json(self.model),
            "context_length": self.context_length,
            "image_size": self.image_size,
            "resize": to_json(self.resize),
        }
        with delivered(folder, last=MODEL_FILE) as target:
            target.mkdir(parents=True, exist_ok=True)
            save_file(flat, target / WEIGHTS_FILE)
            if self.tokenizer is not None:
                self.tokenizer.save(target / TOKENIZER_FOLDER)
            text = json.dumps(facts, indent=2, ensure_ascii=False) + "\n"
            replace_file(target / MODEL_FILE, text)


def is_pretrained(path: Path) -> bool:
    """Whether `path` is a folder that `Pretrained.save` wrote."""
    return (place(path) / MODEL_FILE).is_file()


def read_pretrained(folder: str | Path) -> Pretrained:
    """Opens what `Pretrained.save` wrote; components of the user's own must have been imported first.

    Raises:
      ClipjaxError: something is missing, damaged, or does not fit the model's configuration.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    folder = place(folder)
    if is_remote(folder):
        with fetched(folder) as copy:
            return read_pretrained(copy)
    try:
        facts = json.loads((folder / MODEL_FILE).read_text())
        flat = load_file(folder / WEIGHTS_FILE)
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise ClipjaxError(f"{folder} holds no complete model: {error}") from error
    if not isinstance(facts, dict):
        raise ClipjaxError(f"{folder / MODEL_FILE} holds no JSON object")
    if facts.get("format") != FORMAT:
        raise ClipjaxError(
            f"{folder} was written in format {facts.get('format')}, and this clipjax reads {FORMAT}"
        )
    for key in ("model", "context_length", "image_size", "resize"):
        if key not in facts:
            raise ClipjaxError(f"{folder / MODEL_FILE} lacks {key!r}")
    model = from_json(facts["model"])
    if not isinstance(model, Model):
        raise ClipjaxError(f"{folder / MODEL_FILE} describes a {type(model).__name__}, not a model")
    tree = unflatten(flat)
    pretrained = Pretrained(
        model=model,
        params=tree.get("params", {}),
        model_state=tree.get("model_state", {}),
        tokenizer=load_tokenizer(folder / TOKENIZER_FOLDER)
        if (folder / TOKENIZER_FOLDER).is_dir()
        else None,
        context_length=facts["context_length"],
        image_size=facts["image_size"],
        resize=from_json(facts["resize"]),
    )
    try:
        pretrained.check()
    except ClipjaxError as error:
        raise ClipjaxError(f"{folder}: {error}") from error
    return pretrained


def unflatten(flat: dict[str, Any]) -> Tree:
    """`{"a/b": x}` -> `{"a": {"b": x}}`: the inverse of `dict(paths(tree))`."""
    tree: Tree = {}
    for name, leaf in flat.items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree
