"""Files of tensors: safetensors, npz and PyTorch's, each checked before anything in it is believed."""

from __future__ import annotations

import json
import math
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import ml_dtypes
import numpy as np

from clipjax.errors import ClipjaxError
from clipjax.interop.torch_file import read_torch

SUFFIXES = (".safetensors", ".npz", ".pt", ".pth", ".bin")
MAX_HEADER = 100_000_000  # bytes, the format's own limit
MAX_EXPANSION = 200  # times the npz file's size
FREE_EXPANSION = 2**30  # bytes that an npz file of any size may expand to
_LFS = b"version https://git-lfs.github.com/"
_DTYPES: dict[str, Any] = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8,
    "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip


def read_tensors(path: str | Path) -> Mapping[str, np.ndarray]:
    """All tensors of a file by name.

    Args:
      path: `.safetensors`, `.npz`, `.pt`, `.pth`, `.bin`, or the `.index.json` of safetensors in
        several files.

    Raises:
      ClipjaxError: the file is missing, damaged, hostile, or of a format that is not read.
    """
    path = Path(path)
    if not path.is_file():
        raise ClipjaxError(f"there is no file {str(path)!r}")
    with path.open("rb") as file:
        if file.read(len(_LFS)) == _LFS:
            raise ClipjaxError(
                f"{path} is a pointer of Git LFS, not the weights themselves: fetch them with `git lfs pull`"
            )
    if path.name.endswith(".index.json"):
        return _read_shards(path)
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    if path.suffix == ".npz":
        return read_npz(path)
    if path.suffix in (".pt", ".pth", ".bin"):
        return read_torch(path)
    raise ClipjaxError(
        f"{path}: weights are read from {', '.join(SUFFIXES)} and .safetensors.index.json"
    )


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file, mapped from it (read when used, never written).

    The whole header is checked first: sizes, dtypes, and that the tensors fill the file without
    gaps or overlaps.
    """
    with path.open("rb") as file:
        size = path.stat().st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ClipjaxError(
                f"{path} is truncated or no safetensors file: {size:,} bytes cannot hold a header of "
                f"{length:,}"
            )
        if length > MAX_HEADER:
            raise ClipjaxError(f"{path}: a header of {length:,} bytes exceeds {MAX_HEADER:,}")
        try:
            header = json.loads(file.read(length), object_pairs_hook=_without_duplicates)
            if not isinstance(header, dict):
                raise ValueError("it is no object")
        except (ValueError, RecursionError) as error:
            raise ClipjaxError(f"{path}: the header is damaged ({error})") from error
    header.pop("__metadata__", None)
    layout = _check_layout(path, header, size - 8 - length)
    # An empty file cannot be mapped.
    empty = size == 8 + length
    data = np.zeros(0, np.uint8) if empty else np.memmap(path, np.uint8, "r", offset=8 + length)
    tensors = {}
    for name, (dtype, shape, begin) in layout.items():
        raw = data[begin : begin + math.prod(shape) * dtype.itemsize]
        try:
            tensors[name] = raw.view(dtype).reshape(shape)
        except ValueError as error:  # too many dimensions, or sizes that a zero among them hides
            raise ClipjaxError(f"{path}: tensor {name!r} cannot be: {error}") from error
    return tensors


def _check_layout(path: Path, header: dict[str, Any], size: int) -> dict[str, Any]:
    layout: dict[str, Any] = {}
    for name, entry in header.items():
        try:
            dtype_name, shape = entry["dtype"], entry["shape"]
            begin, end = entry["data_offsets"]
            numbers = [begin, end, *shape]
        except (TypeError, KeyError, ValueError) as error:
            raise ClipjaxError(
                f"{path}: the header's entry for {name!r} is damaged ({error})"
            ) from error
        if not isinstance(dtype_name, str) or dtype_name not in _DTYPES:
            raise ClipjaxError(
                f"{path}: tensor {name!r} has dtype {dtype_name!r}, which is not read"
            )
        if not all(type(n) is int and n >= 0 for n in numbers):
            raise ClipjaxError(
                f"{path}: tensor {name!r} has a size or offset that is no whole number"
            )
        dtype = np.dtype(_DTYPES[dtype_name])
        if end > size:
            raise ClipjaxError(
                f"{path} is truncated: tensor {name!r} ends at byte {end:,} of {size:,} bytes of data"
            )
        if end - begin != math.prod(shape) * dtype.itemsize:
            raise ClipjaxError(
                f"{path}: tensor {name!r}, {dtype_name} {shape}, does not fill its {end - begin:,} bytes"
            )
        layout[name] = (dtype, tuple(shape), begin)
    position, before = 0, None
    for name in sorted(layout, key=lambda n: header[n]["data_offsets"]):
        begin, end = header[name]["data_offsets"]
        if begin < position:
            raise ClipjaxError(f"{path}: the tensors {before!r} and {name!r} overlap")
        if begin > position:
            raise ClipjaxError(
                f"{path}: {begin - position:,} bytes before tensor {name!r} are no one's"
            )
        position, before = end, name
    if position != size:
        raise ClipjaxError(f"{path}: the last {size - position:,} bytes belong to no tensor")
    return layout


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = dict(pairs)
    if len(names) < len(pairs):
        raise ValueError("it names a tensor twice")
    return names


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an npz file; object arrays, which are pickles, are refused.

    bfloat16, which NumPy saves as two bytes without meaning, is recognized.
    """
    limit = max(FREE_EXPANSION, MAX_EXPANSION * path.stat().st_size)
    try:
        with zipfile.ZipFile(path) as archive:
            total = sum(member.file_size for member in archive.infolist())
            if total > limit:
                raise ClipjaxError(
                    f"{path}: {path.stat().st_size:,} bytes that expand to {total:,} are no weights: refused"
                )
            arrays: dict[str, np.ndarray] = {}
            for member in archive.infolist():
                name = member.filename.removesuffix(".npy")
                if name in arrays:
                    raise ClipjaxError(f"{path} holds {name!r} twice")
                with archive.open(member) as file:
                    arrays[name] = _read_npy(path, member.filename, file, member.file_size)
            return arrays
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, ValueError) as error:
        # RuntimeError and its NotImplementedError: encrypted, or an unknown compression.
        raise ClipjaxError(f"{path} is damaged or no npz file: {error}") from error


def _read_npy(path: Path, name: str, file: Any, size: int) -> np.ndarray:
    try:
        version = np.lib.format.read_magic(file)
        read_header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, fortran_order, dtype = read_header(file)
    except (ValueError, KeyError) as error:
        raise ClipjaxError(f"{path}: {name!r} is damaged or no array ({error})") from error
    if dtype.hasobject:
        raise ClipjaxError(
            f"{path}: {name!r} holds Python objects, which could run code when loaded: refused, "
            "nothing was executed"
        )
    if math.prod(shape) * dtype.itemsize > size:
        raise ClipjaxError(
            f"{path}: {name!r} claims shape {list(shape)}, more than its {size:,} bytes"
        )
    raw = file.read(math.prod(shape) * dtype.itemsize)
    array = np.frombuffer(raw, ml_dtypes.bfloat16 if dtype == np.dtype("V2") else dtype)
    if array.size != math.prod(shape):
        raise ClipjaxError(f"{path} is truncated: {name!r} ends early")
    return array.reshape(shape, order="F" if fortran_order else "C")


def _read_shards(index: Path) -> dict[str, np.ndarray]:
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        files = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ClipjaxError(f"{index} is no index of safetensors files ({error})") from error
    tensors: dict[str, np.ndarray] = {}
    for name in files:
        if not isinstance(name, str) or PurePosixPath(name).name != name or "\\" in name:
            raise ClipjaxError(
                f"{index} names the file {name!r}: parts must lie beside their index, under a plain name"
            )
        if not name.endswith(".safetensors"):
            raise ClipjaxError(f"{index} names {name!r}: only parts in safetensors are read")
        part = read_tensors(index.parent / name)
        announced = {tensor for tensor, file in weight_map.items() if file == name}
        if announced != set(part):
            odd = sorted(announced ^ set(part))[0]
            raise ClipjaxError(f"{index} and {name} disagree about tensor {odd!r}")
        tensors |= part
    return tensors
