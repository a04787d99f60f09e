"""Caption and EISL against closed forms and dense float64; which tokens count; what is never whole."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipjax.batch import Encoded, SpecialTokens
from clipjax.bench.program import temporary_bytes
from clipjax.errors import ClipjaxError
from clipjax.mesh import MeshShape
from clipjax.objectives import EISL, Caption, Context, PairEngine
from clipjax.objectives.caption import word_stats

sys.path.insert(0, str(Path(__file__).parent))
from jax import jit

B, T, D, V = 4, 7, 8, 50


def data(seed=0):
    rng = np.random.default_rng(seed)
    features, head = rng.normal(size=(B, T, D)), rng.normal(size=(D, V))
    text = rng.integers(1, V, (B, T + 1)).astype(np.int32)
    for row, end in enumerate((8, 4, 2, 6)):
        text[row, end:] = 0
    text[0, 3] = 0  # a word where padding is: it counts, since words follow
    return features.astype(np.float32), head.astype(np.float32), text


def encoded(features, head):
    return Encoded({"captions": features}, {"caption_head": head})


def context(text, engine=None, pad=0, eos=2):
    tokens = SpecialTokens(bos=1, eos=eos, pad=pad)
    return Context(engine or PairEngine(), {"text": text}, tokens=tokens)


def value_and_grads(objective, features, head, text, engine=None):
    def loss(features, head):
        out = objective(encoded(features, head), context(text, engine))
        return out

    value = jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    (value, metrics), grads = value(features, head)
    return value, metrics, grads


def log_softmax(logits):
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def dense(features, head, text, counts, smoothing):
    """(loss, gradients) in float64, from whole logits."""
    x, w = features.astype(np.float64), head.astype(np.float64)
    log_p, target = log_softmax(x @ w), np.eye(V)[text[:, 1:]]
    target = (1 - smoothing) * target + smoothing / V
    loss = -(target * log_p).sum(-1)[counts].mean()
    d = (np.exp(log_p) - target) * counts[..., None] / counts.sum()
    return loss, np.einsum("btv,dv->btd", d, w), np.einsum("btd,btv->dv", x, d)


@pytest.mark.parametrize(("chunk", "smoothing"), [(50, 0.0), (16, 0.1), (7, 0.0)])
def test_equals_dense_in_any_chunks(chunk, smoothing):
    features, head, text = data()
    counts = text[:, 1:] != 0
    counts[0, 2] = True
    loss, *grads = dense(features, head, text, counts, smoothing)
    got, metrics, got_grads = value_and_grads(
        Caption(chunk=chunk, label_smoothing=smoothing), features, head, text
    )
    assert float(got) == pytest.approx(loss, rel=1e-6)
    for ours, reference in zip(got_grads, grads, strict=True):
        np.testing.assert_allclose(ours, reference, atol=1e-6 * np.abs(reference).max())
    logits = features @ head
    right = (logits.argmax(-1) == text[:, 1:])[counts].mean()
    assert float(metrics["caption/accuracy"]) == pytest.approx(right)
    assert float(metrics["caption/nll"]) == pytest.approx(
        dense(features, head, text, counts, 0.0)[0], rel=1e-6
    )


def test_every_output_of_word_stats_has_its_gradient():
    features, head, text = data()
    targets = text[:, 1:]
    weights = np.random.default_rng(1).normal(size=(3, B, T)).astype(np.float32)

    def mixed(stats):
        return sum((w * s).sum() for w, s in zip(weights, stats[:3], strict=True))

    def ours(x, w):
        return mixed(word_stats(x, w, targets, PairEngine(chunk=16)))

    def plain(x, w):
        logits = x @ w
        target = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
        return mixed((jax.nn.logsumexp(logits, -1), target, logits.mean(-1)))

    got, expected = (jit(jax.value_and_grad(f, (0, 1)))(features, head) for f in (ours, plain))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), got, expected)


def test_two_words_by_hand():
    """Logits (0, ln 3): the likelier word has probability 3/4. Two of three targets count."""
    features, head = np.ones((1, 3, 1), np.float32), np.array([[0.0, np.log(3)]], np.float32)
    loss, metrics, _ = value_and_grads(Caption(), features, head, np.array([[0, 1, 1, 0]]))
    assert float(loss) == pytest.approx(np.log(4 / 3), rel=1e-6)
    assert float(metrics["caption/accuracy"]) == 1.0
    # Padding is the end-of-text token: the first of it is a target too.
    objective = Caption(pad_is_end=True)
    loss, *_ = value_and_grads(objective, features, head, np.array([[0, 1, 0, 0]]))
    assert float(loss) == pytest.approx((np.log(4 / 3) + np.log(4)) / 2, rel=1e-6)
    # A tokenizer that pads with its end-of-text token says so by itself, whatever the token is.
    text = jnp.array([[5, 0, 1, 1, 1]])
    counts = Caption().counts(context(text, pad=1, eos=1))
    np.testing.assert_array_equal(counts, [[True, True, False, False]])
    np.testing.assert_array_equal(
        Caption().counts(context(text, pad=1)), [[True, False, False, False]]
    )


@pytest.mark.parametrize("objective", [Caption(), EISL(orders=(1, 2))])
def test_tokens_weigh_the_same_however_they_are_split(objective):
    """With the totals of the whole batch, parts add up; a mean of parts' means would not."""
    features, head, text = data()
    whole, *_ = value_and_grads(objective, features, head, text)
    totals = objective.totals(context(text))
    local = jit(lambda x, text: objective.local(encoded(x, head), context(text), totals)[0])
    parts = [local(features[rows], text[rows]) for rows in (slice(0, 1), slice(1, 4))]
    assert float(sum(parts)) == pytest.approx(float(whole), rel=1e-6)


@pytest.mark.parametrize(
    ("shape", "words"), [(MeshShape(tensor=2), 50), (MeshShape(tensor=4), 50), (MeshShape(group=2), 50)]
)  # fmt: skip
def test_the_same_on_any_mesh(shape, words):
    """Words are split over `tensor` where it divides them (2 does, 4 does not), in pieces of 16."""
    devices = 8 if shape.tensor == 2 else 4
    mesh = shape.build(jax.devices()[:devices])
    features, head, text = data()
    objective = Caption(chunk=16, label_smoothing=0.1)
    one = value_and_grads(objective, features, head, text)
    many = value_and_grads(objective, features, head, text, PairEngine(mesh))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), many, one)


def test_bfloat16_features():
    features, head, text = data()
    narrow = jnp.asarray(features, jnp.bfloat16)
    loss, _, grads = value_and_grads(Caption(chunk=16), narrow, head, text)
    rounded = np.asarray(narrow, np.float32)
    head_rounded = np.asarray(jnp.asarray(head, jnp.bfloat16), np.float32)
    counts = text[:, 1:] != 0
    counts[0, 2] = True
    assert float(loss) == pytest.approx(
        dense(rounded, head_rounded, text, counts, 0.0)[0], rel=1e-5
    )
    assert grads[0].dtype == jnp.bfloat16
    assert grads[1].dtype == jnp.float32
    # The head's gradient is a float32 sum to the end: not of numbers rounded on the way.
    rounded = grads[1].astype(jnp.bfloat16).astype(jnp.float32)
    assert np.mean(rounded != grads[1]) > 0.9


def test_logits_are_never_whole():
    """Temporary memory of loss and gradient, an eighth of the dense formula's at a caption's size."""
    b, t, d, v = 64, 75, 64, 49408
    shapes = (
        jax.ShapeDtypeStruct((b, t, d), jnp.float32),
        jax.ShapeDtypeStruct((d, v), jnp.float32),
        jax.ShapeDtypeStruct((b, t + 1), jnp.int32),
    )

    def chunked(features, head, text):
        return Caption()(encoded(features, head), context(text))[0]

    def plain(features, head, text):
        log_p = jax.nn.log_softmax(features @ head)
        return -jnp.take_along_axis(log_p, text[:, 1:, None], -1).mean()

    ours, theirs = (
        temporary_bytes(jax.jit(jax.grad(f, (0, 1))).lower(*shapes).compile())
        for f in (chunked, plain)
    )
    assert theirs >= 8 * ours


def scores_by_loops(log_p, words, n):
    """EISL's scores of one caption, straight from the formula."""
    places = len(words) - n + 1
    out = []
    for j in range(places):
        b = np.array(
            [
                np.mean([max(log_p[t + r, words[j + r]], -20.0) for r in range(n)])
                for t in range(places)
            ]
        )
        weights = np.exp(b - b.max())
        out.append((weights / weights.sum() * b).sum())
    return out


@pytest.mark.parametrize("orders", [(1,), (2, 3)])
def test_eisl_is_its_formula(orders):
    features, head, text = data()
    features *= 3  # some log-probabilities fall below the floor
    got, _, grads = value_and_grads(EISL(orders=orders, chunk=16), features, head, text)
    log_p = log_softmax(features.astype(np.float64) @ head)
    expected = []
    for n in orders:
        scores = []
        for row, length in enumerate((7, 3, 1, 5)):  # targets that count
            if length >= n:
                scores += scores_by_loops(log_p[row, :length], text[row, 1 : 1 + length], n)
        expected.append(-np.mean(scores))
    assert log_p.min() < -20
    assert float(got) == pytest.approx(np.mean(expected), rel=1e-5)
    assert all(np.isfinite(g).all() for g in grads)


def test_eisl_of_whole_captions_is_caption():
    features, head, _ = data()
    text = np.random.default_rng(2).integers(1, V, (B, T + 1)).astype(np.int32)
    a, b = (value_and_grads(o, features, head, text) for o in (EISL(orders=(T,)), Caption()))
    assert float(a[0]) == pytest.approx(float(b[0]), rel=1e-6)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), a[2], b[2])


def test_eisl_forgives_a_shift():
    """A sure prediction of 1 2 3 4 5 6, told that the caption is 9 1 2 3 4 5."""
    words = np.array([[0, 1, 2, 3, 4, 5, 6]])
    features = 12 * np.eye(10, dtype=np.float32)[words[:, 1:]]
    head = np.eye(10, dtype=np.float32)
    shifted = np.array([[0, 9, 1, 2, 3, 4, 5]])
    cost = {
        (type(o).__name__, name): float(value_and_grads(o, features, head, text)[0])
        for o in (Caption(), EISL(orders=(2,)))
        for name, text in (("right", words), ("shifted", shifted))
    }
    assert cost["Caption", "right"] < 1e-3
    assert cost["EISL", "right"] < 1e-3
    assert cost["Caption", "shifted"] > 10
    assert cost["EISL", "shifted"] < 2.5  # one of five pairs of words fits nowhere


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Caption(chunk=0), "chunk=0 must be at least 1"),
        (lambda: Caption(label_smoothing=1.5), r"label_smoothing=1.5 must lie in \[0, 1\]"),
        (lambda: EISL(orders=()), "must be whole numbers"),
        (lambda: EISL(temperature=0.0), "temperature=0.0 must be above 0"),
        (lambda: value_and_grads(EISL(orders=(9,)), *data()), "all longer than the 7 tokens"),
        (
            lambda: Caption()(Encoded({"image": 0}), context(data()[2])),
            "needs a model that returns `captions`",
        ),
        (
            lambda: Caption()(encoded(*data()[:2]), Context(batch={"text": data()[2]})),
            "which token is padding",
        ),
    ],
)  # fmt: skip
def test_refusals(make, message):
    with pytest.raises(ClipjaxError, match=message):
        make()
