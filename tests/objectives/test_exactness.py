"""Every objective, on every exchange and number of devices, against dense float64 NumPy."""

import functools
import math
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipjax.batch import Encoded
from clipjax.mesh import MeshShape, batch_sharding, replicated
from clipjax.objectives import (
    AllGather,
    Decoupled,
    DecoupledSoftmax,
    Grouped,
    Hierarchical,
    MultiPositive,
    PairEngine,
    Ring,
    Sigmoid,
    Softmax,
    SoftTarget,
    Weighted,
)

sys.path.insert(0, str(Path(__file__).parent))
import oracles
from alone import evaluate
from jax import jit

ROWS = 24

# objective, its oracle, the oracle's options
OBJECTIVES = {
    "softmax": (Softmax(), oracles.softmax, {}),
    "smoothed": (
        Softmax(label_smoothing=0.2, image_weight=0.75),
        oracles.softmax,
        {"smoothing": 0.2, "weight": 0.75},
    ),
    "sigmoid": (Sigmoid(), oracles.pairwise_sigmoid, {}),
    "sigmoid by id": (Sigmoid(positives_by_id=True), oracles.pairwise_sigmoid, {"by_id": True}),
    "dcl": (Decoupled(), oracles.decoupled, {}),
    "dclw": (Decoupled(sigma=0.5), oracles.decoupled, {"sigma": 0.5}),
    "multi": (MultiPositive(), oracles.multi_positive, {}),
    "xmc": (DecoupledSoftmax(), oracles.decoupled_softmax, {}),
    "cwcl": (Weighted(teacher="teacher_image"), oracles.weighted, {}),
    "cwcl sharp": (
        Weighted(locked="text", teacher="teacher_text", sharpness=4.0, locked_weight=0.75),
        oracles.weighted,
        {"sharpness": 4.0, "locked": "text", "weight": 0.75},
    ),
    "albef": (SoftTarget(alpha=0.4, teacher=None), oracles.soft_target, {"alpha": 0.4}),
}


def relative(ours, reference):
    """Largest absolute difference over the largest absolute reference value."""
    reference = np.asarray(reference, np.float64)
    difference = np.abs(np.asarray(ours, np.float64) - reference).max()
    return difference / max(np.abs(reference).max(), 1e-30)


def inputs(c, mesh=None):
    encoded = {
        "image": jnp.asarray(c["x"], jnp.float32),
        "text": jnp.asarray(c["y"], jnp.float32),
        "logit_scale": jnp.float32(c["s"]),
        "logit_bias": jnp.float32(c["b"]),
    }
    batch = {
        "id": jnp.asarray(c["ids"], jnp.int32),
        "teacher_image": jnp.asarray(c["u"], jnp.float32),
        "teacher_text": jnp.asarray(c["v"], jnp.float32),
    }
    if mesh is not None:
        split, whole = batch_sharding(mesh), replicated(mesh)
        encoded, batch = jax.tree.map(
            lambda a: jax.device_put(a, split if a.ndim else whole), (encoded, batch)
        )
    return encoded, batch


@functools.cache
def compiled(name, engine):
    """(loss, gradients) of one objective; scale and bias are inputs.

    A program each: in one program, XLA's CPU client, restoring it from the persistent compilation
    cache, runs the rings of several objectives at once and aborts when they meet.
    """

    def loss(encoded, batch):
        return evaluate(OBJECTIVES[name][0], Encoded.pair(**encoded), batch, engine)[0]

    return jit(jax.value_and_grad(loss))


def errors(names, engine, c, groups=1):
    """Yields (name of the figure, reference, relative error) of every loss and gradient."""
    arguments = inputs(c, engine.mesh)
    for name in names:
        _, oracle, options = OBJECTIVES[name]
        ours, our_grads = jax.device_get(compiled(name, engine)(*arguments))
        loss, grads = oracles.grouped(oracle, c, groups, **options)
        yield f"{name}: loss", loss, relative(ours, loss)
        for key, grad in grads.items():
            yield f"{name}: {key}", grad, relative(our_grads[key], grad)


def check(names, engine, rows=ROWS, groups=1):
    for scale in (10, 30):
        c = oracles.case(rows, scale=scale)
        for figure, _, error in errors(names, engine, c, groups):
            assert error < 1e-5, (scale, figure, error)


@pytest.mark.parametrize("chunk", [7, None])
def test_one_device(chunk):
    check(OBJECTIVES, PairEngine(chunk=chunk))


@pytest.mark.parametrize("spread,scale", [(0.8, 100), (0.3, 100), (0.1, 30)])
def test_no_worse_than_dense_float32_where_float32_is_the_limit(spread, scale):
    """Scale 100 and nearly solved batches: the bound is the dense formula's error on float32."""
    c = oracles.case(ROWS, spread=spread, scale=scale, seed=3)
    single = {k: np.float32(v) if k != "ids" else v for k, v in c.items()}
    ours = errors(OBJECTIVES, PairEngine(chunk=7), c)
    for name, (_, oracle, options) in OBJECTIVES.items():
        with np.errstate(all="ignore"):
            loss, grads = oracle(single, **options)
        for value in (loss, *grads.values()):
            figure, reference, error = next(ours)
            dense = relative(value, reference)
            if np.isfinite(dense):
                assert error <= max(1.5 * dense, 1e-6), (figure, error, dense)
            assert np.isfinite(error), (figure, name)


def uneven_chunk(exchange, mesh):
    """A tile that divides neither the columns at hand nor, where a device has more, its rows."""
    route = exchange.route(mesh)
    columns = ROWS * math.prod(mesh.shape[a] for a in route.gather) // mesh.size
    return columns // 2 + 1


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
@pytest.mark.parametrize("exchange", [AllGather(), Ring(), Hierarchical()], ids=str)
def test_exact_on_any_mesh(exchange, devices):
    mesh = MeshShape(group=min(2, devices)).build(jax.devices()[:devices])
    check(OBJECTIVES, PairEngine(mesh, exchange, uneven_chunk(exchange, mesh)))


@pytest.mark.parametrize("devices,groups", [(1, 1), (2, 2), (4, 2), (8, 2), (8, 4)])
def test_grouped_is_block_diagonal(devices, groups):
    mesh = MeshShape(group=groups).build(jax.devices()[:devices])
    check(OBJECTIVES, PairEngine(mesh, Grouped(), uneven_chunk(Grouped(), mesh)), groups=groups)


def test_one_row_a_device():
    check(("smoothed", "dclw", "albef"), PairEngine(MeshShape().build(), Ring()), rows=8)
