"""What the towers' tests share: modules as functions of arrays, with parameters that are nowhere trivial."""

import functools
import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from clipjax.params import abstract, map_with_path, merge

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""Machine code that is quick to make: a run takes no time here, compiling it does."""


def _load_oracles():
    spec = importlib.util.spec_from_file_location("oracles", Path(__file__).with_name("oracles.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def oracles():
    return _load_oracles()


def _drawn(build):
    """(graphdef, params): every leaf is random, so that no zero bias or unit scale hides a mistake."""
    graphdef, shapes, _ = abstract(build)
    rng = np.random.default_rng(0)

    def draw(name, leaf):
        noise = rng.standard_normal(leaf.shape)
        if name.endswith("scale"):
            return jnp.asarray(1 + 0.2 * noise, jnp.float32)
        if name.endswith("kernel"):
            return jnp.asarray(noise * leaf.shape[-2] ** -0.5, jnp.float32)
        return jnp.asarray(0.3 * noise, jnp.float32)

    return graphdef, map_with_path(draw, shapes)


@pytest.fixture(scope="session")
def drawn():
    """`drawn(build) -> (graphdef, params)`."""
    return _drawn


@functools.cache
def _tower(config):
    graphdef, params = _drawn(lambda: config.build(nnx.Rngs(0)))

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(params, inputs, key=None):
        return merge(graphdef, params, {})(inputs, key=key)

    return params, run


@pytest.fixture(scope="session")
def tower():
    """`tower(config) -> (params, run)`, `run(params, inputs, key=None) -> (tokens, pooled)`, compiled once."""
    return _tower
