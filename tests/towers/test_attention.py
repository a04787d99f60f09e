"""Every way to attend against NumPy float64 and against the plain one's gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from clipjax.layout import on_mesh, per_shard, platform
from clipjax.mesh import MeshShape
from clipjax.towers.attention import attend, attention

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
HEADS = 2
RNG = np.random.default_rng(5)


def arrays(rows, n, m, width=8):
    shapes = (rows, n, width), (rows, m, width), (rows, m, width), (rows, n, width)
    return [RNG.standard_normal(shape).astype(np.float32) for shape in shapes]


def reference(q, k, v, mask=None):
    """One row and one head at a time, in float64."""
    out = np.zeros(q.shape)
    size = q.shape[-1] // HEADS
    for b in range(len(q)):
        for h in range(HEADS):
            part = slice(h * size, (h + 1) * size)
            scores = q[b][:, part].astype(np.float64) @ k[b][:, part].T / np.sqrt(size)
            if mask is not None:
                scores = np.where(
                    np.broadcast_to(mask, (len(q), HEADS, *scores.shape))[b, h], scores, -np.inf
                )
            e = np.exp(scores - scores.max(-1, keepdims=True))
            out[b][:, part] = e / e.sum(-1, keepdims=True) @ v[b][:, part]
    return out


@functools.partial(jax.jit, static_argnums=(5,), compiler_options=QUICK)
def with_gradients(q, k, v, g, mask, kind):
    def f(q, k, v):
        return attention(q, k, v, mask, HEADS, kind)

    out, vjp = jax.vjp(f, q, k, v)
    return out, vjp(g)


def assert_like_the_plain_one(kind, q, k, v, g, mask=None):
    out, gradients = with_gradients(q, k, v, g, mask, kind)
    np.testing.assert_allclose(out, reference(q, k, v, mask), atol=1e-5)
    for got, expected in zip(gradients, with_gradients(q, k, v, g, mask, "xla")[1], strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max())


CAUSAL = np.tril(np.ones((5, 5), bool))[None, None]
PADDED = np.arange(5) < np.array([5, 3])[:, None, None, None]


@pytest.mark.parametrize(
    ("m", "mask"),
    [(5, None), (5, CAUSAL), (5, PADDED), (5, CAUSAL & PADDED), (7, None)],
    ids=["all", "causal", "padding", "both", "cross"],
)
def test_lean_attention_is_attention(m, mask):
    assert_like_the_plain_one("lean", *arrays(2, 5, m), mask)


def test_a_cache_is_read_like_the_rest():
    q, k, v, _ = arrays(2, 5, 5)
    heads = [x.reshape(2, 5, HEADS, 4).swapaxes(1, 2) for x in (q, k, v)]
    np.testing.assert_allclose(attend(*heads, CAUSAL), reference(q, k, v, CAUSAL), atol=1e-5)


def test_splash_in_its_interpreter():
    """197 tokens in rows of 256; queries of another number than keys."""
    assert_like_the_plain_one("splash", *arrays(1, 197, 129))


def test_kernels_are_lean_under_a_mask():
    f = with_gradients.__wrapped__
    jaxprs = {
        kind: str(jax.make_jaxpr(f, static_argnums=5)(*arrays(2, 5, 5), CAUSAL, kind))
        for kind in ("lean", "cudnn", "splash")
    }
    assert jaxprs["cudnn"] == jaxprs["splash"] == jaxprs["lean"]


def test_a_kernel_runs_on_each_devices_rows_and_heads():
    mesh = MeshShape(tensor=2).build(jax.devices()[:4])
    x, seen = jnp.arange(4.0 * 3 * 8).reshape(4, 3, 8), []

    def kernel(x):
        seen.append(x.shape)
        return 2 * x

    @jax.jit
    def run(x):
        with on_mesh(mesh):
            assert platform() == "cpu"
            return per_shard(kernel, len(x), HEADS)(x)

    split = jax.sharding.NamedSharding(mesh, PartitionSpec(("group", "data"), None, "tensor"))
    np.testing.assert_array_equal(run(jax.device_put(x, split)), 2 * x)
    assert seen == [(2, 3, 4)]
    three = jax.device_put(x[:3], jax.sharding.NamedSharding(mesh, PartitionSpec()))
    np.testing.assert_array_equal(run(three), 2 * x[:3])  # they do not divide: left whole
    assert seen[1] == (3, 3, 4)
    assert platform() is None and per_shard(kernel, 4, HEADS) is kernel
