"""Fused tiles, interpreted on the CPU, beside the compiler's own; and gradients that travel otherwise."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipjax.batch import Encoded
from clipjax.errors import ClipjaxError
from clipjax.mesh import MeshShape
from clipjax.objectives import AllGather, PairEngine, Ring, Sigmoid, Softmax

sys.path.insert(0, str(Path(__file__).parent))
import oracles
from alone import evaluate
from jax import jit

BLOCK = 8  # rows and columns of a kernel's block on a CPU


def graded(objective, engine, rows=24, scale=10.0):
    """(traced program, loss, gradients of image, text, scale and bias) and what float64 says of them."""
    c = oracles.case(rows, scale=scale)
    encoded = {"image": c["x"], "text": c["y"], "logit_scale": c["s"], "logit_bias": c["b"]}
    encoded = {k: jnp.asarray(v, jnp.float32) for k, v in encoded.items()}
    batch = {"id": jnp.asarray(c["ids"], jnp.int32)}

    def loss(encoded):
        return evaluate(objective, Encoded.pair(**encoded), batch, engine)[0]

    step = jit(jax.value_and_grad(loss))
    oracle = oracles.pairwise_sigmoid if isinstance(objective, Sigmoid) else oracles.softmax
    by_id = {"by_id": True} if getattr(objective, "positives_by_id", False) else {}
    return step.trace(encoded), *step(encoded), *oracle(c, **by_id)


def apart(ours, reference):
    """Largest difference over the largest reference value."""
    difference = np.abs(np.asarray(ours, np.float64) - reference).max()
    return difference / max(np.abs(reference).max(), 1e-30)


@pytest.mark.parametrize(
    ("objective", "devices", "exchange", "chunk"),
    [
        (Softmax(), 1, AllGather(), 2 * BLOCK),  # a rest of one block
        (Sigmoid(positives_by_id=True), 2, AllGather(), BLOCK),  # a rest of half a block, which is no kernel
        (Sigmoid(), 1, AllGather(), None),
        (Softmax(image_weight=0.75), 2, Ring(), BLOCK),
    ],
)  # fmt: skip
def test_a_kernel_is_exact(objective, devices, exchange, chunk):
    mesh = MeshShape().build(jax.devices()[:devices]) if devices > 1 else None
    engine = PairEngine(mesh, exchange, chunk, kernel="fused")
    weight = getattr(objective, "image_weight", 0.5)
    traced, loss, grads, expected, expected_grads = graded(objective, engine)
    if weight != 0.5:
        c = oracles.case(24)
        expected, expected_grads = oracles.softmax(c, weight=weight)
    assert str(traced.jaxpr).count("pallas_call") >= 2
    assert apart(loss, expected) < 1e-5
    for name, reference in expected_grads.items():
        assert apart(grads[name], reference) < 1e-5, name


@pytest.mark.parametrize("kernel", ["auto", "generic"])
def test_a_cpu_and_who_asks_for_none_has_no_kernels(kernel):
    traced, *_ = graded(Softmax(), PairEngine(dtype="bfloat16", kernel=kernel))
    assert "pallas_call" not in str(traced.jaxpr)


@pytest.mark.parametrize("exchange", [AllGather(), Ring()], ids=str)
def test_a_gradient_that_travels_in_bfloat16_is_rounded_once_a_hop(exchange):
    mesh = MeshShape().build(jax.devices()[:4])
    _, loss, grads, expected, expected_grads = graded(
        Softmax(), PairEngine(mesh, exchange, chunk=3, grads="bfloat16")
    )
    assert apart(loss, expected) < 1e-5
    assert apart(grads["image"], expected_grads["image"]) < 1e-5  # rows stay at home
    hops = 4 if isinstance(exchange, Ring) else 1
    assert 1e-5 < apart(grads["text"], expected_grads["text"]) < hops * 2**-8


def test_parts_sent_to_every_device_add_up(monkeypatch):
    """What TPUs are given in place of a reduce-scatter."""
    monkeypatch.setattr(PairEngine, "platform", "tpu")
    engine = PairEngine(MeshShape().build(jax.devices()[:4]), AllGather(), chunk=5)
    traced, loss, grads, expected, expected_grads = graded(Softmax(), engine)
    assert "reduce_scatter" not in str(traced.jaxpr)
    assert apart(loss, expected) < 1e-5
    for name, reference in expected_grads.items():
        assert apart(grads[name], reference) < 1e-5, name


@pytest.mark.parametrize("precision", ["high", "highest"])
def test_float32_products_in_the_precision_asked_for(precision):
    traced, loss, _, expected, _ = graded(Softmax(), PairEngine(precision=precision))
    products = str(traced.jaxpr).split("dot_general[")[1:]
    asked = [p.split("precision=")[1].split("\n")[0] for p in products if "precision=" in p]
    named = f"Precision.{precision.upper()}"
    assert sum(text.count(named) for text in asked) >= 3  # forward, and two backward
    assert apart(loss, expected) < 1e-5


def test_unknown_choices():
    with pytest.raises(ClipjaxError, match="kernel='fast': choose 'auto', 'fused' or 'generic'"):
        PairEngine(kernel="fast")
    with pytest.raises(ClipjaxError, match="grads='float16'"):
        PairEngine(grads="float16")
