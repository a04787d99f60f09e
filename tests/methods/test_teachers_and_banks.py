"""Teachers, banks and synthetic negatives against NumPy and closed forms."""

import dataclasses
import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipjax.batch import Encoded
from clipjax.errors import ClipjaxError
from clipjax.methods.clip_distillation import FeatureDistillation, RelationalDistillation
from clipjax.methods.defsent_plus import Entries
from clipjax.methods.dse_pair_distill import PairDistillation
from clipjax.methods.esimcse import ESimCSE, repeated
from clipjax.methods.feat_transform import FeatureTransformation
from clipjax.methods.mochi import MoCHi
from clipjax.methods.nd_kd import NormDirection
from clipjax.methods.xbt import BackwardCompatible, procrustes
from clipjax.objectives import AllGather, Aux, Context, Queue, Ring, Setting
from clipjax.objectives.memory import TABLE_MULTIPLE

sys.path.insert(0, str(Path(__file__).parents[1] / "objectives"))
import oracles
from alone import evaluate
from jax import jit
from linear import ROWS, assert_close, make_batch, one_step

COUPLED = {
    "mochi": MoCHi(hard=4, mixed=3, with_query=3),
    "feat_transform": FeatureTransformation(),
    "relational": RelationalDistillation(),
    "esimcse": ESimCSE(second="text_2", queue=Queue(ROWS)),
}


@functools.cache
def big_batch():
    return one_step(COUPLED, jit, batch=batch())


def batch():
    made = make_batch()
    return made | {"text_2": np.roll(made["text"], 1, 1)}


@pytest.mark.parametrize(
    ("devices", "accumulate", "exchange"), [(8, 1, AllGather()), (4, 4, Ring())]
)
def test_coupled_objectives_are_the_same_on_any_mesh(devices, accumulate, exchange):
    assert_close(
        one_step(COUPLED, jit, devices, accumulate, exchange=exchange, batch=batch()),
        big_batch(),
        2e-5,
    )


def case(n=8, width=6, seed=2):
    c = oracles.case(n, width, seed=seed)
    pair = Encoded.pair(jnp.float32(c["x"]), jnp.float32(c["y"]), jnp.float32(c["s"]))
    return c, pair, {"id": jnp.arange(n)}


def value(objective, encoded, batch, **facts):
    return float(evaluate(objective, encoded, batch, key=jax.random.key(3), **facts)[0])


def test_mochi_adds_negatives_to_the_softmax():
    """Without any, it is the softmax; of a pool of one, mixtures are copies of the hardest negative."""
    c, pair, batch = case()
    assert value(MoCHi(mixed=0, with_query=0), pair, batch) == pytest.approx(
        oracles.softmax(c)[0], rel=1e-6
    )
    logits = c["s"] * c["x"] @ c["y"].T
    others = np.where(np.eye(8, dtype=bool), -np.inf, logits)
    expected = 0.0
    for axis in (1, 0):
        copies = np.log(5) + others.max(axis)
        everything = np.logaddexp(oracles.log_sum_exp(others, axis).ravel(), copies)
        expected += 0.5 * np.logaddexp(0, everything - np.diag(logits)).mean()
    got = value(MoCHi(hard=1, mixed=5, with_query=0), pair, batch)
    assert got == pytest.approx(expected, rel=1e-5)
    # What is mixed with the query itself is nearer to it than the hardest negative.
    assert value(MoCHi(hard=1, mixed=0, with_query=5), pair, batch) > got
    assert value(MoCHi(hard=4, start=9), pair, batch, step=8) == pytest.approx(
        oracles.softmax(c)[0], rel=1e-6
    )
    # None of equal id, none above the cap.
    alike = {"id": jnp.zeros(8, int)}
    assert value(MoCHi(), pair, alike) == pytest.approx(oracles.softmax(c)[0], rel=1e-6)
    assert value(MoCHi(cap=-1.0), pair, batch) == pytest.approx(oracles.softmax(c)[0], rel=1e-6)


def test_feature_transformation_makes_positives_harder_by_its_identity():
    c, pair, batch = case()
    plain = FeatureTransformation(positive=0.0, negative=0.0)
    assert value(plain, pair, batch) == pytest.approx(oracles.softmax(c)[0], rel=1e-6)
    key = jax.random.key(3)
    _, metrics, _ = evaluate(FeatureTransformation(negative=0.0), pair, batch, key=key)
    apart = 1 + float(jax.random.beta(jax.random.split(key, 3)[0], 2.0, 2.0))
    cosine = np.sum(c["x"] * c["y"], 1)
    expected = c["s"] * (cosine - 2 * apart * (apart - 1) * (1 - cosine))
    assert float(metrics["scores/positive"]) == pytest.approx(expected.mean(), rel=1e-5)
    # The statistics that are logged are those of the transformed negatives.
    q = apart * c["x"] + (1 - apart) * c["y"]
    negatives = (c["s"] * q @ c["y"].T)[~np.eye(8, dtype=bool)].reshape(8, 7)
    assert float(metrics["scores/negative"]) == pytest.approx(negatives.mean(), rel=1e-4)
    variance = negatives.var(1).mean()
    assert float(metrics["scores/negative_variance"]) == pytest.approx(variance, rel=1e-4)


def test_repeated_tokens_stand_beside_themselves():
    tokens = np.array([1, *range(10, 40), 2, 0, 0, 0])
    text = tokens[:32]
    lengths = set()
    for seed in range(40):
        rng = np.random.default_rng(seed)
        made = repeated(tokens, 0.32, rng, 48, eos=2, pad=0)
        held = made[: np.flatnonzero(made == 2)[0] + 1]
        np.testing.assert_array_equal(held[np.append(True, held[1:] != held[:-1])], text)
        assert (made[len(held) :] == 0).all() and made.dtype == np.int32
        lengths.add(len(held) - len(text))
    assert lengths == set(range(10)) - (set(range(10)) - lengths) and max(lengths) <= 9
    assert len(lengths) > 5  # fewer than min(10, 0.32 x 32) = 10 are doubled
    np.testing.assert_array_equal(
        repeated(tokens, 0.0, np.random.default_rng(0), 35, eos=2, pad=0), tokens
    )
    cut = repeated(tokens, 1.0, np.random.default_rng(1), 20, eos=2, pad=0)
    assert len(cut) == 20 and cut[0] == 1 and cut[-1] == 2


def test_esimcse_with_a_queue():
    c, _, batch = case()
    rng = np.random.default_rng(1)
    bank = rng.normal(size=(4, 6))
    bank_ids = np.array([40, 2, 41, -1])
    objective = ESimCSE(queue=Queue(4), temperature=0.1)
    state = {"rows": {"key": jnp.float32(bank), "id": jnp.int32(bank_ids)}}
    encoded = Encoded({"text": jnp.float32(c["x"]), "text_2": jnp.float32(c["y"])})
    new = Encoded({"text": jnp.ones((8, 6))})
    got = evaluate(
        objective, encoded, batch, states={"esimcse": state}, encode=lambda teacher, needs: new
    )
    logits = np.concatenate([c["x"] @ c["y"].T, c["x"] @ bank.T], 1) / 0.1
    met = (bank_ids >= 0) & (np.arange(8)[:, None] != bank_ids)
    logits = np.where(np.concatenate([np.ones((8, 8), bool), met], 1), logits, -np.inf)
    own = np.sum(c["x"] * c["y"], 1) / 0.1
    expected = (oracles.log_sum_exp(logits, 1).ravel() - own).mean()
    assert float(got[0]) == pytest.approx(expected, rel=1e-5)
    np.testing.assert_array_equal(got[2]["esimcse"]["key"], new["text"])


def test_relational_distillation_is_a_divergence():
    c, pair, batch = case()
    teacher = {"teacher_image": jnp.float32(c["u"]), "teacher_text": jnp.float32(c["v"])}
    got = value(RelationalDistillation(teacher_scale=7.0), pair, batch | teacher)
    expected = 0.0
    for axis in (1, 0):
        p = oracles.probabilities(7.0 * c["u"] @ c["v"].T, axis)
        q = oracles.probabilities(c["s"] * c["x"] @ c["y"].T, axis)
        expected += 0.5 * (p * np.log(p / q)).sum() / 8
    assert got == pytest.approx(expected, rel=1e-4)
    # A student that is its teacher, even in another basis, has nothing to learn.
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(6, 6)))[0]
    same = {
        k: jnp.float32(v @ rotation)
        for k, v in (("teacher_image", c["x"]), ("teacher_text", c["y"]))
    }
    assert value(RelationalDistillation(), pair, batch | same) == pytest.approx(0, abs=1e-5)


def test_feature_distillation_and_its_refusal():
    c, pair, batch = case()
    teacher = {"teacher_image": jnp.float32(3 * c["u"]), "teacher_text": jnp.float32(c["v"])}
    expected = 0.5 * (
        ((c["x"] - c["u"]) ** 2).sum(1).mean() + ((c["y"] - c["v"]) ** 2).sum(1).mean()
    )
    assert value(FeatureDistillation(), pair, batch | teacher) == pytest.approx(expected, rel=1e-5)
    wide = teacher | {"teacher_text": jnp.ones((8, 9))}
    with pytest.raises(ClipjaxError, match="head of the teacher's width"):
        value(FeatureDistillation(), pair, batch | wide)


def test_norm_and_direction_has_two_regimes():
    """A short student is pushed along -e / |t|; a long one feels no pressure on its norm."""
    rng = np.random.default_rng(9)
    e = oracles.case(4, 5)["x"]
    s = rng.normal(size=(4, 5))
    for stretch in (0.1, 10.0):
        student = stretch * s
        aux = Aux({"norm": jnp.full(4, 2.0), "direction": jnp.float32(e)})
        context = Context(batch={"id": jnp.arange(4)}, aux=aux)

        def loss(x, context=context):
            return NormDirection()(Encoded({"image_feature": x}), context)[0]

        got, gradient = jax.value_and_grad(loss)(jnp.float32(student))
        along, length = (student * e).sum(1), np.linalg.norm(student, axis=1)
        assert float(got) == pytest.approx((1 - along / np.maximum(length, 2.0)).mean(), rel=1e-5)
        if stretch < 1:
            np.testing.assert_allclose(gradient, -e / 2 / 4, atol=1e-6)
        else:
            np.testing.assert_allclose((np.asarray(gradient) * student).sum(1), 0, atol=1e-5)
    perfect = NormDirection()(Encoded({"image_feature": jnp.float32(2 * e)}), context)[0]
    assert float(perfect) == pytest.approx(0, abs=1e-6)


def test_pair_distillation_ends_where_the_student_is_its_teacher():
    c, pair, batch = case()
    tokens = {
        side: {"values": jnp.float32(c[k])[:, None]} for side, k in (("image", "x"), ("text", "y"))
    }
    rows = dict(pair.rows) | {f"{side}_tokens": t for side, t in tokens.items()}
    encoded = Encoded(rows, dict(pair.shared) | {"logit_bias": jnp.float32(-1.0)})
    fields = batch | {"image": jnp.zeros(8), "text": jnp.zeros(8)}

    def judge(offset):
        def head(name, text, image):
            match = c["s"] * jnp.sum(text["values"] * image["values"], (1, 2)) - 1.0 + offset
            return jnp.stack([jnp.zeros(8), match], 1)

        return head

    assert value(PairDistillation(), encoded, fields, head=judge(0.0)) == pytest.approx(0, abs=1e-8)
    assert value(PairDistillation(), encoded, fields, head=judge(2.0)) == pytest.approx(4, rel=1e-5)
    cosine = np.where(np.eye(8, dtype=bool), -2, c["x"] @ c["y"].T)
    chosen = PairDistillation().choose(pair, Context(batch=fields))
    np.testing.assert_array_equal(chosen["text"], cosine.argmax(1))


def test_procrustes_finds_a_rotation():
    rng = np.random.default_rng(0)
    new = rng.normal(size=(40, 6))
    rotation = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    np.testing.assert_allclose(procrustes(new, new @ rotation), rotation, atol=1e-9)
    np.testing.assert_allclose(procrustes(new, new), np.eye(6), atol=1e-9)
    with pytest.raises(ClipjaxError, match="40 new embeddings and 39 old"):
        procrustes(new, new[:39])
    c, *_ = case()
    encoded = Encoded({"text_old": jnp.float32(c["x"])})
    got = value(
        BackwardCompatible(), encoded, {"id": jnp.arange(8)},
        encode=lambda teacher, needs: Encoded({"text": jnp.float32(c["y"])}),
    )  # fmt: skip
    assert got == pytest.approx(1 - (c["x"] * c["y"]).sum(1).mean(), rel=1e-5)


def test_entries_are_all_records_met_so_far():
    """With the batch's own texts as entries it is InfoNCE from text to entry; nothing unmet counts."""
    c, pair, _ = case()
    objective = Entries(share=0.25)
    sample = np.array([3, 17, 4, 0, 9, 30, 12, 25])
    state = objective.init_state(Setting(40, 8, lambda name: 6))
    assert len(state["rows"]["seen"]) == TABLE_MULTIPLE
    batch = {"sample": jnp.int32(sample)}
    met = np.r_[sample[:6], 39]
    entry = np.zeros((TABLE_MULTIPLE, 6))
    entry[met] = np.r_[c["x"][:6], c["u"][:1]]
    seen = np.zeros(TABLE_MULTIPLE)
    seen[met] = 1
    state = {"rows": {"entry": jnp.float32(entry), "seen": jnp.float32(seen)}}
    new = Encoded({"text": jnp.float32(c["v"])})
    got = evaluate(
        objective, pair, batch, states={"entries": state}, encode=lambda teacher, needs: new
    )
    logits = c["s"] * c["y"] @ entry[met].T
    expected = -np.diag(logits - oracles.log_sum_exp(logits, 1))[:6].mean()
    assert float(got[0]) == pytest.approx(expected, rel=1e-5)
    after = objective.advance(state, got[2]["entries"], Context(batch=batch))["rows"]
    mixed = 0.75 * c["x"][:6] + 0.25 * c["v"][:6]
    mixed /= np.linalg.norm(mixed, axis=1, keepdims=True)
    kept = np.asarray(after["entry"])
    np.testing.assert_allclose(kept[sample], np.r_[mixed, c["v"][6:]], atol=1e-6)
    np.testing.assert_allclose(kept[39], c["u"][0], atol=1e-6)
    assert float(after["seen"].sum()) == 9


@pytest.mark.parametrize(
    "make",
    [
        lambda: MoCHi(hard=0),
        lambda: FeatureTransformation(positive=-1.0),
        lambda: FeatureDistillation(rows=("image",)),
        lambda: Entries(share=2.0),
        lambda: dataclasses.replace(Queue(), size=0),
    ],
)
def test_bad_fields_are_refused(make):
    with pytest.raises(ClipjaxError):
        make()
