"""A checksum of every array of a state, the same on any mesh: what tells a damaged checkpoint from a whole one."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from clipjax.params import paths


def checksums(tree: Any) -> dict[str, int]:
    """Path -> sum of the array's bits as unsigned integers, modulo 2^32.

    One changed byte changes it. It does not depend on how arrays are laid out over devices, and is
    computed where they lie.
    """
    named = paths(tree)
    sums = np.asarray(_sums([leaf for _, leaf in named])) if named else np.zeros(0, np.uint32)
    return {name: int(value) for (name, _), value in zip(named, sums, strict=True)}


@jax.jit
def _sums(leaves: list[jax.Array]) -> jax.Array:
    return jnp.stack([_sum(leaf) for leaf in leaves])


def _sum(x: jax.Array) -> jax.Array:
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}.get(x.dtype.itemsize)
    if unsigned is None:  # 64 bits, where they are switched on
        return _sum(lax.bitcast_convert_type(x, jnp.uint32))
    return lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32).sum(dtype=jnp.uint32)
