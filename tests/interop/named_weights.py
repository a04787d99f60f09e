"""Weights that need no file: made from a tensor's name and shape, alike wherever they are made.

NumPy promises that a bit generator's raw output never changes, and the rest here is exact, so the
reference libraries' outputs, stored once, stay those of the weights that the tests make.
"""

import math
import zlib

import numpy as np


def tensor(name: str, shape: tuple[int, ...], dtype: str = "float32") -> np.ndarray:
    """A tensor for a model of any kind: around zero, or around one for scales and variances.

    Args:
      name: seeds it, and says what it is.
      shape: of the result.
      dtype: float32, or int64 for a counter or index, which is zero.
    """
    if dtype == "int64":
        return np.zeros(shape, np.int64)
    bits = np.random.PCG64(zlib.crc32(name.encode())).random_raw(max(math.prod(shape), 1))
    uniform = ((bits >> np.uint64(40)).astype(np.float32) / np.float32(2**23) - 1)[
        : math.prod(shape)
    ]
    last = name.replace("/", ".").split(".")
    if last[-1] in ("logit_scale", "t"):
        return np.full(shape, 1.5, np.float32)
    if last[-1] == "temperature":
        return np.full(shape, 0.05, np.float32)
    if last[-1] in ("logit_bias", "b"):
        return np.full(shape, -0.75, np.float32)
    if last[-1] == "running_var" or (len(shape) == 1 and last[-1] in ("weight", "scale", "gamma")):
        return (1 + np.float32(0.25) * uniform).reshape(shape)
    fan_in = shape[1:] if last[-1] == "weight" and len(shape) > 1 else shape[-1:]
    return (uniform * np.float32(2 / math.sqrt(max(math.prod(fan_in), 4)))).reshape(shape)


def pictures(n: int, size: int) -> np.ndarray:
    """uint8 [n, size, size, 3]."""
    bits = np.random.PCG64(size).random_raw(n * size * size * 3)
    return (bits >> np.uint64(56)).astype(np.uint8).reshape(n, size, size, 3)


def texts(n: int, length: int, vocab_size: int, eos: int | None) -> np.ndarray:
    """int32 [n, length]: ids below `vocab_size - 2`, then `eos` at another place in each row, then zeros."""
    bits = np.random.PCG64(length).random_raw(n * length)
    ids = (1 + bits % np.uint64(vocab_size - 4)).astype(np.int32).reshape(n, length)
    if eos is not None:
        for i, row in enumerate(ids):
            row[row == eos] = 1
            row[length - 2 - i] = eos
            row[length - 1 - i :] = 0
    return ids
