"""PyTorch's `.pt`, `.pth` and `.bin` files without PyTorch, and without running what they say.

Such a file is a zip of a pickle and of raw storages. A pickle is a program; this reader knows only
the few names with which PyTorch describes tensors, gives each a harmless stand-in, and refuses the
file at the first other name, before anything of it is called. Both what `torch.save` writes and
TorchScript archives (OpenAI's releases) are read; of the latter, only the tensors that the modules hold.
"""

from __future__ import annotations

import collections
import math
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from clipjax.errors import ClipjaxError

MAX_PICKLE = 64 * 2**20  # bytes; that of a model with 10,000 tensors has two million
MAX_NODES = 1_000_000  # modules, dicts and tensors; a small pickle can describe an endless tree

_DTYPES = {
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "DoubleStorage": np.float64,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}


def read_torch(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a file by name; those of a checkpoint's `state_dict` if it has one.

    Raises:
      ClipjaxError: it is damaged, of PyTorch's format before 1.6, or names anything but tensors.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return _tensors(_Archive(archive, path).load(), path)
    except zipfile.BadZipFile as error:
        raise ClipjaxError(
            f"{path} is no zip file, as PyTorch has written since 1.6: it is damaged or older (load and "
            "save it again in PyTorch, or convert it to safetensors)"
        ) from error
    except ClipjaxError:
        raise
    except Exception as error:  # a damaged pickle can raise almost anything
        raise ClipjaxError(f"{path} is damaged: {type(error).__name__}: {error}") from error


class _Module(dict):
    """Stands in for a TorchScript object: its attributes, nothing else."""

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.update(state)


class _Archive:
    def __init__(self, archive: zipfile.ZipFile, path: Path):
        self.archive, self.path = archive, path
        members = archive.infolist()
        pickles = [m.filename for m in members if m.filename.split("/")[1:] == ["data.pkl"]]
        if len(pickles) != 1:
            raise ClipjaxError(
                f"{path} is a zip file, but not one that PyTorch wrote (no data.pkl)"
            )
        self.root = pickles[0].removesuffix("data.pkl")
        self.sizes = {m.filename: m.file_size for m in members}
        stored = sum(m.file_size for m in members if m.filename.startswith(f"{self.root}data/"))
        deflated = [m.filename for m in members if m.compress_type != zipfile.ZIP_STORED]
        tensors = [name for name in deflated if name.startswith(f"{self.root}data")]
        if tensors or stored > path.stat().st_size:
            raise ClipjaxError(
                f"{path}: its tensors are compressed or overlap ({stored:,} bytes in a file of "
                f"{path.stat().st_size:,}), which PyTorch never does: refused"
            )
        order = f"{self.root}byteorder"
        if order in self.sizes and archive.read(order) != b"little":
            raise ClipjaxError(f"{path} holds big-endian tensors: save it again on another machine")

    def load(self) -> Any:
        name = f"{self.root}data.pkl"
        if self.sizes[name] > MAX_PICKLE:
            raise ClipjaxError(
                f"{self.path}: its pickle has {self.sizes[name]:,} bytes; one that describes tensors "
                f"alone stays below {MAX_PICKLE:,}"
            )
        with self.archive.open(name) as file:
            return _Unpickler(file, self).load()

    def tensor(self, storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> np.ndarray:
        """What `torch._utils._rebuild_tensor_v2` does."""
        array: np.ndarray = storage
        numbers = [offset, *size, *stride]
        whole = all(type(n) is int and n >= 0 for n in numbers) and len(size) == len(stride)
        count = math.prod(size)
        last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) if count else 0
        if not whole or count > array.size or last >= max(array.size, 1):
            raise ClipjaxError(
                f"{self.path}: a tensor of shape {list(size)} reaches past the end of its storage"
            )
        steps = [s * array.itemsize for s in stride]
        return np.lib.stride_tricks.as_strided(array[offset:], size, steps, writeable=False)

    def storage(self, key: Any) -> np.ndarray:
        kind, type_name, name, _, count = key
        member = f"{self.root}data/{name}"
        if kind != "storage" or type_name not in _DTYPES or member not in self.sizes:
            raise ClipjaxError(f"{self.path} refers to a storage {name!r} that it does not hold")
        raw, dtype = self.archive.read(member), np.dtype(_DTYPES[type_name])
        if len(raw) != count * dtype.itemsize:
            raise ClipjaxError(
                f"{self.path}: storage {name!r} has {len(raw):,} bytes, but {count:,} {dtype} were "
                "announced"
            )
        return np.frombuffer(raw, dtype)


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: Any, archive: _Archive):
        super().__init__(file)
        self._archive = archive
        self._storages: dict[Any, np.ndarray] = {}
        self._known: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): collections.OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): archive.tensor,
            ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
            ("torch", "Size"): lambda sizes=(): tuple(sizes),
            ("torch", "device"): lambda *_: None,
        }
        self._known |= {("torch", name): name for name in _DTYPES}
        builders = ("build_intlist", "build_doublelist", "build_boollist", "build_tensorlist")
        self._known |= {("torch.jit._pickle", name): list for name in builders}

    def find_class(self, module: str, name: str) -> Any:
        if module == "__torch__" or module.startswith("__torch__."):
            return _Module
        if (module, name) not in self._known:
            raise ClipjaxError(
                f"{self._archive.path} names {module}.{name}, which a file of weights has no use for and "
                "which could run code when loaded: refused, nothing was executed. If you trust its "
                "source, load it in PyTorch and save its state_dict alone, or as safetensors"
            )
        return self._known[module, name]

    def persistent_load(self, key: Any) -> np.ndarray:
        name = key[2]
        if name not in self._storages:
            self._storages[name] = self._archive.storage(key)
        return self._storages[name]


def _tensors(loaded: Any, path: Path) -> dict[str, np.ndarray]:
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]  # a training checkpoint, as OpenCLIP writes it
    found = dict(_named(loaded, path))
    if not found:
        raise ClipjaxError(f"{path} holds no tensors")
    return found


def _named(root: Any, path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor in nested dicts and modules, named by the keys on the way to it."""
    open_nodes, seen = [("", root)], 0
    while open_nodes:
        name, node = open_nodes.pop()
        seen += 1
        if seen > MAX_NODES:
            raise ClipjaxError(f"{path} nests its tensors without end: refused")
        if isinstance(node, np.ndarray):
            yield name, node
        elif isinstance(node, dict):
            prefix = f"{name}." if name else ""
            open_nodes += [(f"{prefix}{key}", value) for key, value in reversed(node.items())]
