"""First states for tests of the step."""

import dataclasses

import jax
import numpy as np

from clipjax.params import map_with_path


def begin(blueprint):
    """A first state, drawn by NumPy: compiling JAX's own drawing takes longer than all else here."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        spread = leaf.shape[-2] ** -0.5 if path.endswith(("kernel", "queries")) else 0.02
        value = spread * rng.normal(size=leaf.shape)
        if path == "logit_scale":
            value = np.log(5.0)
        if path == "logit_bias":
            value = -2.0
        return np.asarray(value + path.endswith("/scale"), leaf.dtype)

    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), blueprint.abstract)
    params = map_with_path(draw, blueprint.abstract.params)
    moving = jax.tree.map(np.copy, params) if zeros.ema else {}
    state = dataclasses.replace(zeros, params=params, ema=moving)
    return jax.device_put(state, blueprint.shardings)
