"""Heads beside a model's embeddings."""

import types

import jax
import numpy as np
from flax import nnx

from clipjax.models import MlpHead


def test_an_mlp_head_has_a_layer_norm_between_its_layers():
    head = MlpHead(widths=(5, 3), unit=False).build(
        nnx.Rngs(0), types.SimpleNamespace(width=lambda of, reads: 4)
    )
    x = np.random.default_rng(0).normal(size=(2, 4)).astype(np.float32)
    kernels = [np.asarray(layer.kernel[...], np.float64) for layer in head.layers]
    hidden = x @ kernels[0]
    hidden -= hidden.mean(-1, keepdims=True)
    hidden /= np.sqrt(hidden.var(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(jax.jit(head)(x), np.maximum(hidden, 0) @ kernels[1], rtol=1e-4)
