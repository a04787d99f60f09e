"""Methods about pairs, weights and targets: values and derivatives against float64 NumPy, on any mesh."""

import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipjax.batch import Encoded, SpecialTokens
from clipjax.methods.amcl import AMCL
from clipjax.methods.amcl import heads as amcl_heads
from clipjax.methods.cacr import CACR
from clipjax.methods.contrastive_behaviour import Behaviour, HardContrast
from clipjax.methods.contrastive_gap import GapTerms
from clipjax.methods.norton_ot import Transported
from clipjax.methods.sepclr import SepCLR
from clipjax.methods.sepclr import heads as sepclr_heads
from clipjax.methods.soft_topk_loss import SoftTopK
from clipjax.methods.supremix import SupReMix
from clipjax.methods.whitened_cse import Whitened, inverse_sqrt, whitened
from clipjax.methods.zloss_spherical import Spherical, SphericalCaption
from clipjax.models import Headed
from clipjax.objectives import AllGather, PairEngine, Ring, Softmax

sys.path.insert(0, str(Path(__file__).parent.parent / "objectives"))
import linear
from alone import evaluate
from jax import jit
from oracles import log_sum_exp, probabilities, sigmoid

N, E, K = 12, 6, 3
KEY = 7

OBJECTIVES = {
    "hard": HardContrast(share=0.3, image_weight=0.75),
    "simple": HardContrast(share=0.3, simple=1.5),
    "topk": SoftTopK(k=3),
    "topk positives": SoftTopK(k=None),
    "gap": GapTerms(align=1.0, uniform=0.7, cross=0.5),
    "cacr": CACR(attraction=1.5),
    "supremix": SupReMix(),
    "supremix labels": SupReMix(label="label", window=1.0),
    "sepclr": SepCLR(("image", "text"), target="target", salient_weight=2.0, nothing_weight=3.0),
    "spherical": Spherical(b=3.0),
    "whitened": Whitened(channels=3, eps=1e-3),
    "amcl": AMCL(count=2, low=0.1),
    "norton": Transported(beta=0.4, iterations=6),
}


def unit(a):
    return a / np.sqrt((a**2).sum(-1, keepdims=True))


@functools.cache
def case():
    """Inputs that float32 can hold. Rows 0 and 1 share an id and a number, and so do 4 and 5 an id."""
    rng = np.random.default_rng(0)
    x = unit(rng.normal(size=(N, E)))
    values = {
        "image": x,
        "text": x + 0.6 * rng.normal(size=x.shape),
        "text_views": x[:, None] + 0.6 * rng.normal(size=(N, K, E)),
        "image_salient": rng.normal(size=(N, 4)),
        "image_2_salient": rng.normal(size=(N, 4)),
        "scale": np.array(4.0),
        "first": 0.3 * rng.normal(size=(2, E, 5)),
        "second": 0.3 * rng.normal(size=(2, E, 5)),
    }
    ids, label = np.arange(N), np.arange(N) + 1.0
    ids[1], ids[5] = ids[0], ids[4]
    label[:2] = 0  # then 3, 4, 5 ...: one number below and one above, within 1
    mask = np.ones((N, K), bool)
    mask[3, 2] = mask[5, 1:] = False
    batch = {
        "id": ids.astype(np.int32),
        "label": label.astype(np.float32),
        "target": (np.arange(N) % 3 > 0).astype(np.int32),
        "text_views_mask": mask,
    }
    return {k: v.astype(np.float32).astype(np.float64) for k, v in values.items()}, batch


def encode(v, xp):
    """The rows that the objectives compare, from inputs of any norm."""

    def to_unit(a):
        return a / xp.sqrt((a**2).sum(-1, keepdims=True))

    rows = {k: to_unit(v[k]) for k in ("image", "text", "text_views")}
    rows |= {k: v[k] for k in ("image_salient", "image_2_salient")}
    return rows | {
        f"{side}_{name}_{h}": array
        for side, weights in (("image", v["first"]), ("text", v["second"]))
        for h in (0, 1)
        for name, array in (
            ("amcl", rows[side][:, :: 1 - 2 * h]),
            ("temperature", rows[side] @ weights[h]),
        )
    }


@functools.cache
def ours():
    """{name: (loss, gradients)} of all objectives, in one program."""
    values, batch = case()

    def loss(v, name, batch):
        encoded = Encoded(encode(v, jnp), {"logit_scale": v["scale"]})
        key = jax.random.key(KEY)
        return evaluate(OBJECTIVES[name], encoded, batch, PairEngine(chunk=5), key=key)[0]

    def all_of(v, batch):
        return {name: jax.value_and_grad(loss)(v, name, batch) for name in OBJECTIVES}

    single = {k: jnp.asarray(v, jnp.float32) for k, v in values.items()}
    return jax.device_get(jit(all_of)(single, batch))


# Oracles: v are the inputs, at those at which what has no gradient is held.


def off_diagonal(a):
    return a[~np.eye(N, dtype=bool)]


def logits_of(v):
    r = encode(v, np)
    return v["scale"] * r["image"] @ r["text"].T


def square(a, b):
    return ((a[:, None] - b[None]) ** 2).sum(-1)


def hard(v, at, simple=None, weight=0.75):
    s = logits_of(v) if simple is None else logits_of(v | {"scale": 1.0})
    at, loss, count = logits_of(at), 0.0, round(0.3 * (N - 1))
    for axis, w in ((1, weight), (0, 1 - weight)):
        others = np.where(np.eye(N, dtype=bool), -np.inf, at)
        least = np.sort(others, axis).take([N - count], axis)
        kept = others >= least
        assert (kept.sum(axis) == count).all()
        if simple is None:
            hardest = np.where(kept | np.eye(N, dtype=bool), s, -np.inf)
            loss += w * (log_sum_exp(hardest, axis).mean() - np.diag(s).mean())
        else:
            loss += w * (simple * s[kept].mean() - np.diag(s).mean())
    return loss


def topk(v, at, k=3, alpha=2.0):
    s, ids, loss = logits_of(v), case()[1]["id"], 0.0
    same = ids[:, None] == ids
    for logits in (s, s.T):
        for i in range(N):
            low, high = -100.0, 100.0
            for _ in range(200):
                t = 0.5 * (low + high)
                more = sigmoid(alpha * (logits[i] + t)).sum() > (k or same[i].sum())
                low, high = (low, t) if more else (t, high)
            loss -= np.log(sigmoid(alpha * (logits[i, same[i]] + t))).mean() / (2 * N)
    return loss


def gap(v, at):
    x, y = (encode(v, np)[k] for k in ("image", "text"))

    def uniform(a, b):
        return np.log(np.exp(-2 * off_diagonal(square(a, b))).mean())

    align = ((x - y) ** 2).sum(-1).mean()
    return align + 0.7 * 0.5 * (uniform(x, x) + uniform(y, y)) + 0.5 * uniform(x, y)


def cacr(v, at, plus=1.5, minus=2.0):
    there = case()[1]["text_views_mask"]

    def distances(v):
        r = encode(v, np)
        return ((r["image"][:, None, None] - r["text_views"][None]) ** 2).sum(-1)  # [N, N, K]

    d, held, image, text = distances(v), distances(at), 0.0, 0.0
    for i in range(N):
        pull = probabilities(np.where(there[i], plus * held[i, i], -np.inf), 0)
        other = there & (np.arange(N) != i)[:, None]
        push = probabilities(-minus * held[i][other], 0)
        image += ((pull * d[i, i]).sum() - (push * d[i][other]).sum()) / N
        for k in np.flatnonzero(there[i]):
            push = probabilities(-minus * np.delete(held[:, i, k], i), 0)
            one = d[i, i, k] - (push * np.delete(d[:, i, k], i)).sum()
            text += one / there.sum()
    return 0.5 * (image + text)


def supremix(v, at, labeled=False):
    share = np.array(
        jax.random.beta(jax.random.split(jax.random.key(KEY))[0], 2.0, 8.0, (2, N)), np.float64
    )
    t = case()[1]["label"].astype(float) if labeled else np.arange(N)
    r, held, loss = encode(v, np), encode(at, np), 0.0
    for a, anchor, other in ((share[0], "image", "text"), (share[1], "text", "image")):
        for i in range(N):
            z = v["scale"] * r[anchor][i]
            zh = at["scale"] / at["scale"] * held[other]
            logits, terms = r[other] @ z, []
            for j in range(N):
                far = abs(t[i] - t[j]) if labeled else 0
                terms.append((1 + far) * np.exp(logits[j]))
                if t[i] != t[j]:
                    mixture = a[i] * zh[i] + (1 - a[i]) * zh[j]
                    terms.append((1 + (1 - a[i]) * far) * np.exp(mixture @ z))
            positives = [*logits[t == t[i]]]
            if labeled and {t[i] - 1, t[i] + 1} <= {*t}:
                j, k = (list(t).index(t[i] + d) for d in (-1, 1))
                positives.append(0.5 * (zh[j] + zh[k]) @ z)
                terms.append(np.exp(positives[-1]))
            loss += (np.log(np.sum(terms)) - np.mean(positives)) / (2 * N)
    return loss


def sepclr(v, at, tau=0.5):
    target, r = case()[1]["target"].astype(float), encode(v, np)
    c, c2, s, s2 = (r[k] for k in ("image", "text", "image_salient", "image_2_salient"))

    def unif(a):
        return np.log(np.exp(-off_diagonal(square(a, a)) / (2 * tau)).mean())

    def align(a, b, weight):
        return (weight * ((a - b) ** 2).sum(-1)).sum() / weight.sum() / (2 * tau)

    zeroed, zeroed2 = s * target[:, None], s2 * target[:, None]
    common = align(c, c2, np.ones(N)) + unif(c) + unif(c2)
    salient = align(s, s2, target) + unif(zeroed) + unif(zeroed2)
    joint = np.exp(-square(zeroed, zeroed) / (2 * tau)) * np.exp(-square(c, c) / (2 * tau))
    nothing = align(s, 0 * s, 1 - target)
    return common + 2 * salient + 3 * nothing + 10 * np.log(joint.mean(1)).mean()


def spherical(v, at, b=3.0):
    s, loss = logits_of(v), 0.0
    for logits in (s, s.T):
        z = (np.diag(logits) - logits.mean(1)) / logits.std(1)
        loss += 0.5 * np.log1p(np.exp(b - z)).mean()
    return loss


def whiten(z, key, channels=3, eps=1e-3):
    order, out = np.array(jax.random.permutation(key, E)), np.empty_like(z)
    for at in order.reshape(-1, channels):
        centered = z[:, at] - z[:, at].mean(0)
        c = centered.T @ centered / N
        values, u = np.linalg.eigh(c + eps * np.trace(c) / channels * np.eye(channels))
        out[:, at] = centered @ u @ np.diag(values**-0.5) @ u.T
    return unit(out)


def whitened_cse(v, at):
    keys, r, loss = jax.random.split(jax.random.key(KEY), 3), encode(v, np), 0.0
    for key in keys[1:]:
        s = v["scale"] * whiten(r["image"], keys[0]) @ whiten(r["text"], key).T
        for axis in (0, 1):
            loss += 0.25 * (log_sum_exp(s, axis).mean() - np.diag(s).mean())
    return loss


def amcl(v, at, low=0.1, high=2.0, beta=0.1):
    r, loss = encode(v, np), 0.0
    for h in (0, 1):
        first, second = r[f"image_amcl_{h}"], r[f"text_amcl_{h}"]
        u, w = r[f"image_temperature_{h}"], r[f"text_temperature_{h}"]
        hidden = np.maximum(u[:, None] + w[None], 0)
        tau = low + (high - low) * sigmoid(hidden @ [1, -1, 1, -1, 1])
        s = first @ second.T / tau
        for axis in (0, 1):
            loss += 0.5 * (log_sum_exp(s, axis).mean() - np.diag(s).mean())
        loss += beta * (E / 2 * np.log(tau) + 1 / tau).mean()
    return loss


def norton(v, at, beta=0.4):
    s, held, v_ = logits_of(v), logits_of(at), np.zeros((1, N))
    for _ in range(6):
        u = -log_sum_exp(held + v_, 1)
        v_ = -log_sum_exp(held + u, 0)
    loss = 0.0
    for axis, plan in ((1, probabilities(held + v_, 1)), (0, probabilities(held + u, 0))):
        target = (1 - beta) * np.eye(N) + beta * plan
        loss += 0.5 * (log_sum_exp(s, axis).mean() - (target * s).sum() / N)
    return loss


ORACLES = {
    "hard": hard,
    "simple": functools.partial(hard, simple=1.5, weight=0.5),
    "topk": topk,
    "topk positives": functools.partial(topk, k=None),
    "gap": gap,
    "cacr": cacr,
    "supremix": supremix,
    "supremix labels": functools.partial(supremix, labeled=True),
    "sepclr": sepclr,
    "spherical": spherical,
    "whitened": whitened_cse,
    "amcl": amcl,
    "norton": norton,
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_value_and_derivative_are_the_formulas(name):
    values, oracle = case()[0], ORACLES[name]
    loss, grads = ours()[name]
    assert loss == pytest.approx(oracle(values, values), rel=1e-5)
    rng = np.random.default_rng(1)
    for _ in range(2):
        way = {k: rng.normal(size=v.shape) for k, v in values.items()}
        ahead, behind = ({k: values[k] + h * way[k] for k in way} for h in (1e-5, -1e-5))
        slope = (oracle(ahead, values) - oracle(behind, values)) / 2e-5
        size = np.sqrt(sum((g**2).sum() for g in grads.values()))
        got = sum((grads[k] * way[k]).sum() for k in way)
        assert abs(got - slope) < 2e-5 * size * 10, (got, slope, size)


MODEL = Headed(linear.MODEL, (*sepclr_heads(width=4, hidden=8), *amcl_heads(2, 8, 6)))
IN_A_STEP = OBJECTIVES | {
    "sepclr": SepCLR(target="target", salient_weight=2.0, nothing_weight=3.0),
    "supremix labels": SupReMix(label="label", window=3.0),
}
for _name in ("simple", "topk positives", "supremix"):  # the same path as one that stays
    del IN_A_STEP[_name]


@functools.cache
def step(devices=1, accumulate=1, exchange=None):
    batch, rng = linear.make_batch(), np.random.default_rng(2)
    rows = linear.ROWS
    batch |= {
        "image_2": batch["image"][::-1].copy(),
        "text_views": rng.integers(0, linear.TOKENS, (rows, K, 8)).astype(np.int32),
        "text_views_mask": rng.random((rows, K)) < 0.8,
        "label": (np.arange(rows) // 2 * 2).astype(np.float32),
        "target": (np.arange(rows) % 3 > 0).astype(np.int32),
    }
    batch["text_views_mask"][:, 0] = True
    return linear.one_step(
        IN_A_STEP, jit, devices, accumulate, exchange=exchange, batch=batch, model=MODEL
    )


@pytest.mark.parametrize(
    ("devices", "accumulate", "exchange"), [(8, 1, AllGather()), (4, 4, Ring())]
)
def test_any_mesh_exchange_and_accumulation_is_one_batch(devices, accumulate, exchange):
    """The real step: loss and gradients of every parameter, heads included."""
    linear.assert_close(step(devices, accumulate, exchange), step())
    for name, reached in (("sepclr", "heads/text_common"), ("amcl", "heads/text_temperature_1")):
        grads = step()[name][1]
        assert any(np.abs(g).max() > 0 for path, g in grads.items() if path.startswith(reached))


def test_identities():
    """What part each method is of another, and its closed forms."""
    values, batch = case()
    rows = {k: jnp.asarray(v, jnp.float32) for k, v in encode(values, np).items()}
    eye = {"image": jnp.eye(N), "text": jnp.eye(N)}
    one = {"image": jnp.ones((N, 1)), "text": jnp.ones((N, 1))}
    image, text = rows["image"], rows["text"]

    scale = 4.0
    cases = {
        "softmax": (Softmax(), rows),
        "hard, all": (HardContrast(share=1.0), rows),
        "hard, one": (HardContrast(share=1e-9, image_weight=1.0), rows),
        "amcl": (AMCL(count=1, low=1 / scale, high=1 / scale, beta=0.0), rows),
        "no plan": (Transported(beta=0.0), rows),
        "flat plan": (Transported(beta=0.3, iterations=3), one),
        "near": (CACR(second="text", repulsion=1e4, image_weight=1.0), rows),
        "even": (CACR(second="text", repulsion=0.0, image_weight=1.0), rows),
        "gap": (GapTerms(align=1.0, uniform=2.0, cross=3.0), eye),
        "all one": (GapTerms(align=1.0, uniform=2.0, cross=0.0), one),
        "hinge": (Spherical(a=50.0, b=10.0), eye),
        "z plain": (Spherical(image_weight=1.0), rows),
        "z": (Spherical(image_weight=1.0), {"image": 3 * image, "text": 5 * text + 0.4}),
    }

    def all_of(cases_rows):
        return {
            name: evaluate(
                cases[name][0],
                Encoded(encoded, {"logit_scale": jnp.float32(scale)}),
                batch,
                PairEngine(),
            )[0]
            for name, encoded in cases_rows.items()
        }

    got = jit(all_of)({k: v for k, (_, v) in cases.items()})
    s = logits_of(values)
    others = np.where(np.eye(N, dtype=bool), -np.inf, s)
    far = np.where(np.eye(N, dtype=bool), np.nan, 2 - 2 * s / scale)
    pulled = np.diag(2 - 2 * s / scale).mean()
    expected = {
        "hard, all": got["softmax"],
        "hard, one": np.log1p(np.exp(others.max(1) - np.diag(s))).mean(),
        "amcl": got["softmax"],
        "no plan": got["softmax"],
        "flat plan": np.log(N),
        "near": pulled - np.nanmin(far, 1).mean(),
        "even": pulled - np.nanmean(far, 1).mean(),
        "gap": 0 - 2 * 4 - 3 * 4,
        "all one": 0,
        "hinge": 10 - np.sqrt(N - 1),
        "z": got["z plain"],
    }
    for name, value in expected.items():
        assert float(got[name]) == pytest.approx(float(value), rel=2e-5, abs=2e-5), name


def test_soft_top_k_sums_to_k_and_hardens():
    """Probabilities sum to k whatever is added to a row; a large alpha marks the k largest."""
    values, batch = case()
    x, y = (jnp.asarray(encode(values, np)[k], jnp.float32) for k in ("image", "text"))

    def shifts(alpha, x, y):
        sides = ({"first": x, "id": batch["id"]}, {"second": y, "id": batch["id"]})
        return SoftTopK(k=3, alpha=alpha).shifts(*sides, PairEngine())

    soft, _, hard, _ = jit(lambda x, y: (*shifts(2.0, x, y), *shifts(2000.0, x, y)))(x, y)
    s = encode(values, np)["image"] @ encode(values, np)["text"].T
    np.testing.assert_allclose(sigmoid(2 * (s + np.array(soft)[:, None])).sum(1), 3, rtol=1e-5)
    marked = s + np.array(hard, np.float64)[:, None] > 0
    np.testing.assert_array_equal(marked, s >= np.sort(s, 1)[:, -3, None])


def test_behaviour_is_measured():
    values, _ = case()
    label = np.array([0, 0, 0, 1, 1, 2, -1, -1, 3, 3, 3, 3], np.int32)
    rows = {k: jnp.asarray(v, jnp.float32) for k, v in encode(values, np).items()}

    def metrics(rows):
        encoded = Encoded(rows, {"logit_scale": jnp.float32(4.0)})
        return evaluate(Behaviour(), encoded, {"label": label}, PairEngine(chunk=5))[1]

    got, x = jit(metrics)(rows), encode(values, np)["image"]
    same = (label[:, None] == label) & (label >= 0) & ~np.eye(N, dtype=bool)
    r = probabilities(np.where(np.eye(N, dtype=bool), -np.inf, logits_of(values)), 1)
    count = np.exp(-(off_diagonal(r) * np.log(off_diagonal(r))).reshape(N, -1).sum(1)).mean()
    total = (x @ x.T)[same].sum()
    expected = {
        "negatives/image_to_text": count,
        "tolerance/image": total / (N * (N - 1)),
        "closeness/image": total / same.sum(),
    }
    for name, value in expected.items():
        assert float(got[name]) == pytest.approx(value, rel=1e-5), name


def test_whitening_makes_covariances_the_identity():
    z = np.random.default_rng(3).normal(size=(64, 8)) @ np.random.default_rng(4).normal(size=(8, 8))
    white = np.array(whitened(jnp.asarray(z, jnp.float32), 4, 0.0), np.float64)
    for part in np.split(white, 2, 1):
        np.testing.assert_allclose(part.T @ part / 64, np.eye(4), atol=2e-4)
    alone = np.array(whitened(jnp.asarray(z, jnp.float32), 1, 0.0))
    np.testing.assert_allclose(alone, (z - z.mean(0)) / z.std(0), atol=1e-4)
    # Equal eigenvalues: d tr(a^(-1/2)) = -1/2 tr(a^(-3/2) da).
    grad = jax.grad(lambda a: jnp.trace(inverse_sqrt(a)[0]))(4 * jnp.eye(3)[None])
    np.testing.assert_allclose(grad[0], -np.eye(3) / 16, atol=1e-6)


def test_captions_by_z_loss_are_the_dense_ones():
    rng = np.random.default_rng(5)
    features, head = rng.normal(size=(3, 4, 6)), rng.normal(size=(6, 9))
    text = np.array([[1, 3, 4, 2, 0], [1, 5, 2, 0, 0], [1, 6, 7, 8, 2]], np.int32)

    def loss(features, head):
        encoded = Encoded({"captions": features}, {"caption_head": head})
        tokens = SpecialTokens(1, 2, 0)
        return evaluate(SphericalCaption(a=2.0, b=1.5), encoded, {"text": text}, tokens=tokens)[0]

    logits = features @ head
    z = (logits - logits.mean(-1, keepdims=True)) / logits.std(-1, keepdims=True)
    right = np.take_along_axis(z, text[:, 1:, None], -1)[text[:, 1:] != 0]
    expected = (np.log1p(np.exp(2 * (1.5 - right))) / 2).mean()
    got = jit(loss)(jnp.asarray(features, jnp.float32), jnp.asarray(head, jnp.float32))
    assert float(got) == pytest.approx(expected, rel=1e-5)
