"""Closed forms that the objectives must meet."""

import dataclasses
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipjax.batch import Encoded
from clipjax.errors import ClipjaxError
from clipjax.mesh import MeshShape
from clipjax.objectives import (
    Context,
    Decoupled,
    DecoupledSoftmax,
    Diagnostics,
    Grouped,
    MovingAverage,
    MultiPositive,
    Objective,
    PairEngine,
    Ramp,
    Sigmoid,
    Softmax,
    SoftTarget,
    Weighted,
    pairs,
)
from clipjax.objectives.diagnostics import broken_rows

sys.path.insert(0, str(Path(__file__).parent))
from alone import evaluate
from jax import jit

ENGINE = PairEngine(chunk=5)
N, SCALE = 8, 3.0


def unit(a):
    return a / np.linalg.norm(a, axis=-1, keepdims=True)


def random_pair(n=N, width=12, seed=0):
    rng = np.random.default_rng(seed)
    x = unit(rng.normal(size=(n, width)))
    return jnp.float32(x), jnp.float32(unit(x + 0.7 * rng.normal(size=x.shape)))


def orthonormal(scale=SCALE, bias=None):
    return Encoded.pair(jnp.eye(N), jnp.eye(N), jnp.float32(scale), bias)


def value(objective, encoded, batch=None, engine=ENGINE):
    return float(jit(lambda e, b: evaluate(objective, e, b, engine)[0])(encoded, batch or {}))


def grads(objective, x, y, scale, batch=None):
    def loss(x, y, scale):
        return evaluate(objective, Encoded.pair(x, y, scale), batch)[0]

    return jit(jax.grad(loss, (0, 1, 2)))(x, y, jnp.float32(scale))


def test_orthonormal_pairs():
    own = np.log(1 + (N - 1) * np.exp(-SCALE))
    assert value(Softmax(), orthonormal()) == pytest.approx(own, rel=1e-6)
    assert value(Softmax(image_weight=1), orthonormal()) == pytest.approx(own, rel=1e-6)
    assert value(Decoupled(), orthonormal()) == pytest.approx(np.log(N - 1) - SCALE, rel=1e-6)
    sigmoid = np.log1p(np.exp(-(SCALE - 2))) + (N - 1) * np.log1p(np.exp(-2))
    assert value(Sigmoid(), orthonormal(bias=-2.0)) == pytest.approx(sigmoid, rel=1e-6)


def test_grouped_orthonormal_pairs_meet_their_group_only():
    mesh = MeshShape(group=4).build()
    engine = PairEngine(mesh, Grouped())
    expected = np.log(1 + (N / 4 - 1) * np.exp(-SCALE))
    assert value(Softmax(), orthonormal(), engine=engine) == pytest.approx(expected, rel=1e-6)


def test_smoothed_loss_is_least_at_a_finite_scale():
    smoothing = 0.1
    best = np.log(1 + N * (1 - smoothing) / smoothing)
    eye = jnp.eye(N)
    assert abs(grads(Softmax(label_smoothing=smoothing), eye, eye, best)[2]) < 1e-6
    assert grads(Softmax(label_smoothing=smoothing), eye, eye, best + 0.5)[2] > 1e-3
    assert grads(Softmax(label_smoothing=smoothing), eye, eye, best - 0.5)[2] < -1e-3


def test_a_solved_batch_keeps_its_digits():
    """log(1 + 7 e^-40) = 3e-17: the dense float32 formula gives 0, and no gradient."""
    encoded = orthonormal(scale=40.0)
    expected = (N - 1) * np.exp(-40.0)
    assert value(Softmax(), encoded) == pytest.approx(expected, rel=1e-5)
    d_scale = grads(Softmax(), jnp.eye(N), jnp.eye(N), 40.0)[2]
    assert float(d_scale) == pytest.approx(-expected, rel=1e-5)


def test_unique_ids_make_multi_positive_losses_plain():
    x, y = random_pair()
    batch = {"id": jnp.arange(N)}
    plain = grads(Softmax(), x, y, 5.0)
    for objective in (MultiPositive(), DecoupledSoftmax()):
        for ours, reference in zip(grads(objective, x, y, 5.0, batch), plain, strict=True):
            np.testing.assert_allclose(ours, reference, atol=2e-6)


@pytest.mark.parametrize("objective", [MultiPositive(), DecoupledSoftmax()])
def test_rows_without_any_negative_are_guarded(objective):
    """One id for all: every negative is masked, and nothing is NaN."""
    x, y = random_pair()
    batch = {"id": jnp.zeros(N, jnp.int32)}

    def loss(x, y, s):
        return evaluate(objective, Encoded.pair(x, y, s), batch)[0]

    value, gradients = jit(jax.value_and_grad(loss, (0, 1, 2)))(x, y, jnp.float32(5.0))
    if isinstance(objective, DecoupledSoftmax):  # nothing to push away: solved
        assert float(value) == 0
        assert all(float(jnp.abs(g).max()) == 0 for g in gradients)
        return
    logits = 5.0 * np.float64(x) @ np.float64(y).T  # cross-entropy to the uniform target
    rows = np.log(np.exp(logits).sum(1)) - logits.mean(1)
    cols = np.log(np.exp(logits).sum(0)) - logits.mean(0)
    assert float(value) == pytest.approx(0.5 * (rows.mean() + cols.mean()), rel=1e-5)
    assert all(np.isfinite(g).all() for g in gradients)


def test_decoupled_softmax_lets_a_strong_positive_be():
    """Two positives, one at logit 20: plain softmax pushes it down, decoupled does not."""
    x = jnp.eye(4)
    y = jnp.eye(4)
    batch = {"id": jnp.array([0, 0, 2, 3])}
    d_plain = grads(MultiPositive(image_weight=1.0), x, y, 20.0, batch)[0][0]
    d_decoupled = grads(DecoupledSoftmax(image_weight=1.0), x, y, 20.0, batch)[0][0]
    # gradient of row 0 with respect to its own logit, over scale / N
    assert float(d_plain[0]) * 4 / 20 == pytest.approx(0.5, abs=1e-3)
    assert abs(float(d_decoupled[0])) * 4 / 20 < 1e-6


def test_equal_teachers_make_weighted_targets_uniform():
    x, y = random_pair()
    batch = {"teacher_image": jnp.tile(jnp.eye(3)[:1], (N, 1))}
    weighted = value(
        Weighted(teacher="teacher_image", locked_weight=1.0),
        Encoded.pair(x, y, jnp.float32(5.0)),
        batch,
    )
    uniform = value(
        Softmax(label_smoothing=1.0, image_weight=1.0), Encoded.pair(x, y, jnp.float32(5.0))
    )
    assert weighted == pytest.approx(uniform, rel=1e-6)


def test_weighted_sends_no_gradient_through_its_weights():
    x, y = random_pair()
    implicit = grads(Weighted(sharpness=2.0), x, y, 5.0)
    explicit = grads(
        Weighted(teacher="teacher_image", sharpness=2.0), x, y, 5.0, {"teacher_image": x}
    )
    for a, b in zip(implicit, explicit, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-7)


def test_soft_target_with_the_student_as_teacher():
    x, y = random_pair()
    batch = {"teacher_image": x, "teacher_text": y}
    zero = grads(SoftTarget(alpha=1.0, teacher=None), x, y, 5.0, batch)
    assert all(float(jnp.abs(g).max()) < 1e-6 for g in zero)
    hard = grads(SoftTarget(alpha=0.0, teacher=None), x, y, 5.0, batch)
    mixed = grads(SoftTarget(alpha=0.4, teacher=None), x, y, 5.0, batch)
    for a, b in zip(mixed, hard, strict=True):
        np.testing.assert_allclose(a, 0.6 * b, atol=1e-6)
    # keys carry no gradient: the image's is that of the image-to-text direction alone
    logits = jax.nn.softmax(5.0 * x @ y.T) - jnp.eye(N)
    np.testing.assert_allclose(hard[0], 0.5 * 5.0 * logits @ y / N, atol=1e-6)


def test_soft_target_asks_its_teacher_and_ramps_its_share():
    objective = SoftTarget(alpha=0.4, ramp_steps=4, teacher=MovingAverage(0.9))
    x, y = random_pair()

    def encode(teacher, needs):
        assert teacher == MovingAverage(0.9) and needs == {"image", "text"}
        return Encoded.pair(2 * x, y, jnp.float32(1.0))

    made = [objective.prepare({}, Context(step=step, encode=encode)) for step in range(6)]
    np.testing.assert_array_equal(made[0].rows["image"], 2 * x)
    shares = [float(aux.shared["share"]) for aux in made]
    np.testing.assert_allclose(shares, [0, 0.1, 0.2, 0.3, 0.4, 0.4], atol=1e-7)


def test_a_moving_average_follows():
    average = MovingAverage(0.9)
    weights = {"w": jnp.float32(1.0)}
    for _ in range(6):
        weights = average.follow(weights, {"w": jnp.float32(2.0)})
    assert float(weights["w"]) == pytest.approx(0.9**6 * 1.0 + (1 - 0.9**6) * 2.0, rel=1e-6)


def test_diagnostics_on_known_embeddings():
    diagnose = jit(lambda e: Diagnostics()(e, Context(ENGINE)))
    loss, metrics = diagnose(orthonormal(scale=50.0))
    assert float(loss) == 0
    expected = {"alignment": 0, "modality_gap": 0, "temperature": 0.02}
    expected |= {f"uniformity/{k}": -4 for k in ("image", "text", "cross")}
    assert {k: pytest.approx(float(v), abs=1e-5) for k, v in metrics.items()} == expected

    poles = jnp.array([[1.0, 0.0], [-1.0, 0.0]])
    east = jnp.array([[1.0, 0.0], [1.0, 0.0]])
    _, metrics = diagnose(Encoded.pair(poles, east, jnp.float32(1.0)))
    assert float(metrics["uniformity/image"]) == pytest.approx(-8, abs=1e-5)
    assert float(metrics["uniformity/text"]) == pytest.approx(0, abs=1e-5)
    assert float(metrics["alignment"]) == pytest.approx(2, abs=1e-5)
    assert float(metrics["modality_gap"]) == pytest.approx(1, abs=1e-5)


def test_objectives_add_and_scale():
    x, y = random_pair()
    encoded = Encoded.pair(x, y, jnp.float32(5.0), jnp.float32(-2.0))
    objective = Softmax() + 0.5 * Sigmoid() + Diagnostics()
    total, metrics, _ = jit(lambda e: objective(e, Context(ENGINE)))(encoded)
    parts = value(Softmax(), encoded) + 0.5 * value(Sigmoid(), encoded)
    assert float(total) == pytest.approx(parts, rel=1e-6)
    assert {"loss/softmax", "loss/sigmoid", "alignment"} <= set(metrics)


def soft_targets(momentum, alpha):
    return SoftTarget(alpha=alpha, teacher=MovingAverage(momentum))


def encode_by(teacher, needs):
    """Another teacher for each decay."""
    rng = np.random.default_rng(int(100 * getattr(teacher, "decay", 0)))
    rows = {n: jnp.float32(unit(rng.normal(size=(N, 12)))) for n in sorted(needs)}
    return Encoded(rows, {})


SUMMANDS = {
    "two soft targets": (soft_targets(0.0, 0.1), soft_targets(0.9, 0.9)),
    "a teacher of one's own beside a locked tower": (
        Weighted(sharpness=4.0),
        soft_targets(0.9, 0.4),
    ),
    "two of a class": (Softmax(), Softmax(label_smoothing=0.3)),
    "a sum in a sum": (Softmax() + 0.5 * Decoupled(), MultiPositive() + soft_targets(0.5, 0.2)),
}


@pytest.mark.parametrize("name", SUMMANDS)
def test_a_sum_is_the_sum_of_what_its_terms_give_alone(name):
    a, b = SUMMANDS[name]
    x, y = random_pair()
    batch = {"id": jnp.arange(N) // 2}

    def loss(objective):
        def f(x, y, s):
            encoded = Encoded.pair(x, y, s)
            return evaluate(objective, encoded, batch, encode=encode_by)[0]

        return jit(jax.value_and_grad(f, (0, 1, 2)))(x, y, jnp.float32(5.0))

    whole = loss(a + Ramp(0.5, 0.5) * b)
    for got, one, other in zip(*map(jax.tree.leaves, (whole, loss(a), loss(b))), strict=True):
        np.testing.assert_allclose(got, one + 0.5 * other, rtol=2e-6, atol=2e-6)


def test_metrics_that_two_terms_call_alike_bear_the_term_s_name():
    x, y = random_pair()
    two = Softmax() + Softmax(label_smoothing=0.1) + Diagnostics()
    _, metrics, _ = evaluate(two, Encoded.pair(x, y, jnp.float32(5.0)))
    assert {"softmax_0/accuracy/image_to_text", "softmax_1/accuracy/image_to_text"} <= set(metrics)
    assert {"loss/softmax_0", "loss/softmax_1", "loss/diagnostics", "alignment"} <= set(metrics)


def test_weights_follow_the_step():
    ramp = Ramp(1.0, 3.0, steps=4, start=2)
    assert [float(ramp.at(s)) for s in (0, 2, 3, 6, 9)] == [1.0, 1.0, 1.5, 3.0, 3.0]
    cosine = Ramp(0.0, 1.0, steps=4, shape="cosine")
    np.testing.assert_allclose(
        [cosine.at(s) for s in range(5)], [0, 0.5 - 0.5**1.5, 0.5, 0.5 + 0.5**1.5, 1], atol=1e-6
    )
    encoded = Encoded.pair(*random_pair(), jnp.float32(5.0))
    alone = float(evaluate(Softmax(), encoded)[0])
    for step, weight in ((0, 1.0), (3, 1.5), (9, 3.0)):
        objective = 2.0 * (ramp * Softmax())
        assert float(evaluate(objective, encoded, step=step)[0]) == pytest.approx(
            2 * weight * alone
        )


def test_weights_may_be_written_as_people_write_them():
    ramp = Ramp(0.0, 1.0, 5e3)
    assert ramp.steps == 5000 and type(ramp.steps) is int
    assert 0.5 * ramp * Softmax() == Ramp(0.0, 0.5, 5000) * Softmax() == ramp * 0.5 * Softmax()
    assert sum([Softmax(), Sigmoid()]) == Softmax() + Sigmoid()
    with pytest.raises(ClipjaxError, match="steps=2.5 must be a whole number"):
        Ramp(steps=2.5)
    with pytest.raises(ClipjaxError, match="weight is nan"):
        float("nan") * Softmax()


def test_sides_of_different_width_are_refused():
    encoded = Encoded.pair(jnp.eye(4), jnp.eye(4, 3), jnp.float32(1.0))
    with pytest.raises(ClipjaxError, match=r"one side are \(4,\) and of the other \(3,\)"):
        evaluate(Softmax(), encoded)


def test_in_batch_accuracy():
    x = jnp.eye(4)
    y = jnp.eye(4)[jnp.array([0, 1, 3, 2])]  # two pairs are crossed
    _, metrics = Softmax()(Encoded.pair(x, y, jnp.float32(1.0)), Context(ENGINE))
    assert float(metrics["accuracy/image_to_text"]) == 0.5
    assert float(metrics["accuracy/text_to_image"]) == 0.5


@pytest.mark.parametrize(
    "objective,missing",
    [
        (MultiPositive(), "MultiPositive needs `id`"),
        (DecoupledSoftmax(), "DecoupledSoftmax needs `id`"),
        (Sigmoid(), "needs a model with a logit_bias"),
        (SoftTarget(teacher=None), "SoftTarget: the batch has no `teacher_image`"),
    ],
)
def test_what_an_objective_lacks_is_named(objective, missing):
    with pytest.raises(ClipjaxError, match=missing):
        evaluate(objective, orthonormal())


def test_sigmoid_by_id_needs_ids():
    with pytest.raises(ClipjaxError, match="positives_by_id"):
        Sigmoid(positives_by_id=True)(orthonormal(bias=-1.0), Context(ENGINE))


def test_decoupled_needs_a_negative():
    one = Encoded.pair(jnp.eye(1), jnp.eye(1), jnp.float32(1.0))
    with pytest.raises(ClipjaxError, match="at least two rows"):
        Decoupled()(one, Context(ENGINE))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Softmax(label_smoothing=1.5),
        lambda: Softmax(image_weight=-0.1),
        lambda: Decoupled(sigma=0.0),
        lambda: Weighted(sharpness=-1.0),
        lambda: Weighted(locked="audio"),
        lambda: SoftTarget(alpha=2.0),
        lambda: SoftTarget(ramp_steps=-1),
    ],
)
def test_bad_fields_are_refused(make):
    with pytest.raises(ClipjaxError):
        make()


def test_broken_embeddings_are_counted_by_name():
    x, y = random_pair()
    counts = broken_rows(
        Encoded.pair(x.at[3, 0].set(jnp.nan).at[5].set(jnp.inf), y, jnp.float32(1.0))
    )
    assert {k: int(v) for k, v in counts.items()} == {
        "broken_rows/image": 2,
        "broken_rows/text": 0,
    }


def test_the_objective_that_the_documentation_writes():
    """docs/objectives.md, "Writing one": the code there runs, and is a hinge on the negatives."""
    text = (Path(__file__).parents[2] / "docs" / "objectives.md").read_text()
    names = {
        "dataclasses": dataclasses,
        "jax": jax,
        "jnp": jnp,
        "Objective": Objective,
        "Sum": pairs.Sum,
    }
    exec(text.split("```python\n")[1].split("```")[0], names)
    x, y = random_pair()
    ours = value(names["Margin"](0.3), Encoded.pair(x, y, jnp.float32(1.0)))
    cosine = np.float64(x) @ np.float64(y).T
    over = np.maximum(0.3 + cosine - np.diag(cosine)[:, None], 0)
    assert ours == pytest.approx((over.sum() - 0.3 * N) / N, rel=1e-5)
