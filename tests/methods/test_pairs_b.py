"""Methods on pairs, second group: values worked out with NumPy, and the same gradients on any mesh."""

import dataclasses
import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

sys.path.insert(0, str(Path(__file__).parents[1] / "objectives"))
from jax import jit
from linear import MODEL, ROWS, TOKENS, WIDTH, assert_close, make_batch, one_step

from clipjax.batch import Encoded, SpecialTokens
from clipjax.data import (
    BPE,
    Array,
    CaptionChoice,
    Data,
    Image,
    Resize,
    Source,
    Stream,
    Text,
)
from clipjax.errors import ClipjaxError
from clipjax.mesh import MeshShape
from clipjax.methods.alip import ALIP
from clipjax.methods.awp_margin import AWP, Property, Right
from clipjax.methods.convirt import ClassPrecision, class_precision, split_classes
from clipjax.methods.debcse_ipw import DebCSE
from clipjax.methods.genview_quality import GenView, quality
from clipjax.methods.icnn_proto import ICNN, ProtoTriplet, icnn
from clipjax.methods.look_loo_knn import LOOK
from clipjax.methods.mcl_multistage import (
    OneCluster,
    combined,
    kmeans,
    side_by_side,
    write_clusters,
)
from clipjax.methods.simlap_gate import Gate, SimLAP
from clipjax.methods.tip_clip_null import (
    NullImage,
    NullSoftmax,
    Visualness,
    distant_labels,
    null_picture,
    visualness_figures,
)
from clipjax.models import Headed
from clipjax.objectives import AllGather, Aux, Context, PairEngine, Ring, Setting, Softmax
from clipjax.towers import Tower

N, E, SCALE = 8, 5, 7.0
LABEL = np.int32([0, 1, 0, 2, 1, 0, 2, 3])
COUPLED = {
    "simlap": SimLAP(),
    "look": LOOK(k=3),
    "proto": ProtoTriplet(classes=4),
    "debcse": DebCSE(most_alike=0.9, buckets=32),
    "alip": ALIP(begin=0.1),
    "null": NullSoftmax(),
    "genview": GenView(gamma=3.0),
}


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def embeddings(*names, rows=N, seed=0):
    rng = np.random.default_rng(seed)
    return {name: unit(rng.normal(size=(rows, E))) for name in names}


def evaluate(objective, rows, batch, **context):
    """Loss and metrics, and the gradient of the rows, of float64 embeddings."""
    rows = {k: np.float32(v) for k, v in rows.items()}
    batch = jax.tree.map(jnp.asarray, batch)

    def loss(rows):
        encoded = Encoded(rows, {"logit_scale": np.float32(SCALE)})
        outcome = objective(encoded, Context(PairEngine(), batch=batch, **context))
        return outcome[0], outcome[1]

    (value, metrics), gradient = jit(jax.value_and_grad(loss, has_aux=True))(rows)
    return float(value), {k: float(v) for k, v in metrics.items()}, gradient


def lse(x):
    top = x.max()
    return top + np.log(np.exp(x - top).sum())


@functools.cache
def batch():
    rng = np.random.default_rng(1)
    return make_batch() | {
        "visual": rng.random(ROWS) < 0.7,
        "label": np.int32(rng.integers(0, 4, ROWS)),
        "image_2": np.uint8(rng.integers(0, 256, (ROWS, 4, 4, 3))),
        "text_2": np.int32(rng.integers(0, TOKENS, (ROWS, 8))),
        "text_candidates": np.int32(rng.integers(0, TOKENS, (ROWS, 3, 8))),
    }


@functools.cache
def whole():
    return one_step(COUPLED, jit, batch=batch(), model=model())


class Patched(nnx.Module):
    """Four patches of twelve numbers, each times a matrix, and their mean."""

    def __init__(self, rngs):
        self.width = WIDTH
        self.table = nnx.Param(jax.random.normal(rngs.params(), (12, WIDTH)))

    def __call__(self, inputs, *, key=None):
        patches = inputs.reshape(len(inputs), 4, 12).astype(jnp.float32) / 255
        tokens = jnp.matmul(patches, self.table[...], precision="highest")
        return tokens, tokens.mean(1)


@dataclasses.dataclass(frozen=True)
class Patches(Tower):
    def build(self, rngs):
        return Patched(rngs)


def model():
    base = dataclasses.replace(MODEL, image=Patches())
    return Headed(base, heads=(Gate(classes=4, width=6, hidden=8),))


@pytest.mark.parametrize(
    ("devices", "accumulate", "exchange"), [(8, 1, AllGather()), (4, 4, Ring())]
)
def test_gradients_are_the_same_on_any_mesh(devices, accumulate, exchange):
    got = one_step(
        COUPLED, jit, devices, accumulate, exchange=exchange, batch=batch(), model=model()
    )
    assert_close(got, whole())
    assert np.abs(got["simlap"][1]["heads/gate/fc2/kernel"]).max() > 1e-6


def simlap(z, other, gate, label, partner, tau=0.1):
    terms = []
    for i in range(len(z)):
        a, b = gate[i] * z[i], gate[i] * other
        logits = unit(b) @ unit(a) / tau
        negative = logits[(label != label[i]) & (label != partner[i])]
        for n in np.flatnonzero(label == partner[i]):
            terms.append(lse(np.append(negative, logits[n])) - logits[n])
    return np.mean(terms)


def test_simlap_is_the_dense_formula():
    rows = embeddings("image", "text")
    gate = np.random.default_rng(2).uniform(0.1, 1, (N, E))
    key = jax.random.key(3)
    partner = LABEL[np.array(jax.random.permutation(key, N))]

    def head(gate):
        return lambda name, label, partner: np.float32(gate)

    value, _, _ = evaluate(SimLAP(), rows, {"label": LABEL}, head=head(gate), key=key)
    expected = simlap(rows["image"], rows["text"], gate, LABEL, partner)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    # One class a row and a gate that is the same in all dimensions: InfoNCE of cosines / tau.
    alone = np.arange(N, dtype=np.int32)
    value, metrics, _ = evaluate(
        SimLAP(partner="same"), rows, {"label": alone}, head=head(np.full((N, E), 0.3))
    )
    logits = rows["image"] @ rows["text"].T / 0.1
    np.testing.assert_allclose(
        value, np.mean([lse(x) - x[i] for i, x in enumerate(logits)]), rtol=1e-5
    )
    assert metrics["simlap/positives"] == 1
    # No negatives at all: nothing to lose.
    value, _, gradient = evaluate(SimLAP(), rows, {"label": np.zeros(N, np.int32)}, head=head(gate))
    assert value == 0 and np.abs(gradient["image"]).max() == 0


def look(z, label, k, tau):
    s = z @ z.T / tau
    terms = []
    for i in range(len(z)):
        near = [j for j in np.argsort(-s[i]) if j != i]
        chosen = near[:k]
        kin = [j for j in near if label[j] == label[i]]
        if kin and not set(kin) & set(chosen):
            chosen = [*chosen, kin[0]]
        if kin:
            right = [s[i, j] for j in chosen if label[j] == label[i]]
            terms.append(lse(s[i, chosen]) - lse(np.array(right)))
    return np.mean(terms)


@pytest.mark.parametrize("k", [1, 3, N - 1, 20])
def test_look_is_leave_one_out_knn(k):
    rows = embeddings("image")
    value, metrics, gradient = evaluate(LOOK(k=k), rows, {"label": LABEL})
    np.testing.assert_allclose(value, look(rows["image"], LABEL, k, 0.1), rtol=1e-5)
    np.testing.assert_allclose(metrics["look/counted"], 7 / 8)  # class 3 has one member
    assert np.isfinite(gradient["image"]).all()


def test_look_leaves_far_members_alone():
    """Two modes of class 0 far apart, each with a companion near: no loss, where SupCon would pull them together."""
    x = unit(np.float64([[1, 0.01], [1, -0.01], [-1, 0.01], [-1, -0.01], [0.01, 1], [-0.01, 1]]))
    label = np.int32([0, 0, 0, 0, 1, 1])
    value, metrics, gradient = evaluate(LOOK(k=1), {"image": x}, {"label": label})
    assert abs(value) < 1e-6 and np.abs(gradient["image"]).max() < 1e-6
    assert metrics["look/accuracy"] == 1


def test_proto_triplet_by_hand():
    image = np.float64([[1, 0], [0, 1], [1, 0]])
    text = np.float64([[1, 0], [0, 1], [0.6, 0.8]])
    label = np.int32([0, 1, 0])
    value, metrics, _ = evaluate(
        ProtoTriplet(classes=3, margin=0.5), {"image": image, "text": text}, {"label": label}
    )
    own = np.hypot(0.2, 0.4)  # from (1, 0) to the mean (0.8, 0.4)
    losses = [max(own - np.sqrt(2) + 0.5, 0), max(0 - 1.0 + 0.5, 0), max(own - np.sqrt(2) + 0.5, 0)]
    np.testing.assert_allclose(value, np.mean(losses), atol=2e-6)
    assert metrics["proto/accuracy"] == 1


def test_icnn_knows_clusters_from_noise():
    rng = np.random.default_rng(0)
    label = np.repeat([0, 1], 30)
    tight = np.eye(3)[label] + 1e-4 * rng.normal(size=(60, 3))
    assert icnn(tight, label)["gamma"] == 1 and icnn(tight, label)["score"] > 0.999
    noise = rng.normal(size=(4000, 3))
    classes = rng.integers(0, 4, 4000)
    assert abs(icnn(noise, classes)["gamma"] - 0.25) < 0.02
    turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    np.testing.assert_allclose(
        icnn(noise[:100] @ turn, classes[:100])["score"], icnn(noise[:100], classes[:100])["score"]
    )
    # By hand, k = 2: 0 and 1 are of one class, 3 of the other.
    line, two = np.float64([[0], [1], [3]]), np.array([0, 0, 1])
    rows = [
        ((1 - 1 / 3 + 1) / 2 + 0.5) / 2,
        ((1 - 1 / 2 + 1) / 2 + 0.5) / 2,
        ((0 + 2.5 / 3) / 2 + 0) / 2,
    ]
    np.testing.assert_allclose(icnn(line, two, k=2)["score"], np.mean(rows))
    with pytest.raises(ClipjaxError, match="no two"):
        icnn(line, np.zeros(3, int))


@dataclasses.dataclass(frozen=True)
class Same(Property):
    """No better at all."""

    def __call__(self, drawn, target, counts, key):
        return drawn


def captions(rows=N, length=6, width=5, words=11):
    rng = np.random.default_rng(4)
    text = rng.integers(3, words, (rows, length)).astype(np.int32)
    for i in range(rows):
        text[i, 2 + i % 4 :] = 0
    features = rng.normal(size=(rows, length - 1, width)).astype(np.float32)
    return features, rng.normal(size=(width, words)).astype(np.float32), text


@functools.cache
def awp(objective, devices=1):
    features, head, text = captions()
    mesh = MeshShape().build(jax.devices()[:devices])
    engine = PairEngine(None if devices == 1 else mesh)
    tokens = SpecialTokens(bos=1, eos=2, pad=0)

    def loss(features, head):
        encoded = Encoded({"captions": features}, {"caption_head": head})
        batch = {"text": jnp.asarray(text)}
        context = Context(engine, batch, key=jax.random.key(0), tokens=tokens)
        return objective(encoded, context)

    (value, metrics), gradients = jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(
        features, head
    )
    return float(value), float(metrics["awp/improved"]), [np.array(g) for g in gradients]


def test_awp_wants_the_right_word_to_be_likelier():
    value, improved, gradients = awp(AWP(draws=2, margin=0.3))
    assert value > 0 and improved > 0.5 and np.abs(gradients[0]).max() > 1e-3
    # The same draws on eight devices.
    other = awp(AWP(draws=2, margin=0.3), devices=8)
    np.testing.assert_allclose(other[0], value, rtol=1e-5)
    for a, b in zip(other[2], gradients, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    # Nothing better: the margin itself, and no gradient.
    value, improved, gradients = awp(AWP(better=Same(), margin=0.3))
    assert improved == 0
    np.testing.assert_allclose(value, 0.3, rtol=1e-6)
    assert max(np.abs(g).max() for g in gradients) == 0


def test_awp_puts_words_right():
    drawn, target = np.int32([[5, 6, 7, 8], [5, 6, 7, 8]]), np.int32([[5, 9, 9, 9], [5, 6, 9, 9]])
    counts = np.array([[1, 1, 1, 1], [1, 1, 1, 0]], bool)
    one = np.array(Right()(drawn, target, counts, jax.random.key(0)))
    assert ((one != drawn).sum(1) == 1).all() and (one[one != drawn] == 9).all()
    assert one[1].tolist() == [5, 6, 9, 8]  # padding is left alone
    both = np.array(Right(words=2)(drawn, target, counts, jax.random.key(0)))
    assert (both != drawn).sum(1).tolist() == [2, 1]


def debcse(objective, text, candidates, texts, others, key=None):
    """The objective and its aux, of given embeddings, and of a teacher that has the same."""
    rows = {"text": np.float32(text), "text_candidates": np.float32(candidates)}
    batch = {"text": jnp.asarray(texts), "text_candidates": jnp.asarray(others)}
    context = Context(PairEngine(), batch, key=key)
    encode = dataclasses.replace(context, encode=lambda *_: Encoded(rows))
    aux = objective.prepare({}, encode)
    return aux, objective(Encoded(rows), dataclasses.replace(context, aux=aux))[0]


def test_debcse_is_the_weighted_formula():
    rng = np.random.default_rng(5)
    text, candidates = unit(rng.normal(size=(N, E))), unit(rng.normal(size=(N, 3, E)))
    texts, others = rng.integers(3, 40, (N, 6)), rng.integers(3, 40, (N, 3, 6))
    objective = DebCSE(most_alike=0.6, max_weight=2.0)
    aux, loss = debcse(objective, text, candidates, texts, others)

    def weight(a, b, first, second):
        shared = len({*first} & {*second}) / np.sqrt(len({*first}) * len({*second}))
        propensity = max(np.exp(5 * (shared - 1)), 0.05)
        return min(np.exp(5 * (a @ b - 1)) / propensity, 2.0)

    terms = []
    best = []
    for i in range(N):
        w = [weight(text[i], candidates[i, k], texts[i], others[i, k]) for k in range(3)]
        best.append(int(np.argmax(w)))
    assert aux.rows["drawn"].tolist() == best
    key, words = candidates[np.arange(N), best], others[np.arange(N), best]
    for i in range(N):
        meet = [j for j in range(N) if j != i and text[i] @ key[j] <= 0.6]
        w = np.array([weight(text[i], key[j], texts[i], words[j]) for j in meet])
        s = text[i] @ key.T / 0.05
        terms.append(np.log(np.exp(s[i]) + (w / w.mean()) @ np.exp(s[meet])) - s[i])
    np.testing.assert_allclose(loss, np.mean(terms), rtol=1e-5)
    # Weights that are all 1: InfoNCE.
    plain = DebCSE(semantic=0.0, surface=0.0, most_alike=None, temperature=0.5)
    aux, loss = debcse(plain, text, candidates, texts, others)
    logits = text @ candidates[:, 0].T / 0.5
    np.testing.assert_allclose(
        loss, np.mean([lse(x) - x[i] for i, x in enumerate(logits)]), rtol=1e-5
    )


def test_debcse_draws_by_inverse_propensity():
    """Equal meaning; the first candidate has all tokens in common, the second half, the third none."""
    rows, same = 4000, np.tile(unit(np.ones(E)), (4000, 1))
    texts = np.tile([3, 4, 5, 6], (rows, 1))
    others = np.tile([[3, 4, 5, 6], [3, 4, 7, 8], [9, 10, 11, 12]], (rows, 1, 1))
    objective = DebCSE(surface=2.0, floor=0.2, max_weight=100.0)
    rows_of = {"text": same, "text_candidates": np.repeat(same[:, None], 3, 1)}
    context = Context(
        batch={"text": jnp.asarray(texts), "text_candidates": jnp.asarray(others)},
        key=jax.random.key(7),
        encode=lambda *_: Encoded({k: np.float32(v) for k, v in rows_of.items()}),
    )
    drawn = np.array(objective.prepare({}, context).rows["drawn"])
    propensity = np.array([1.0, np.exp(-1), 0.2])
    share = (1 / propensity) / (1 / propensity).sum()
    error = np.sqrt(share * (1 - share) / rows)
    assert (np.abs(np.bincount(drawn, minlength=3) / rows - share) < 3 * error).all()


def infonce(a, b, scale=SCALE):
    s = scale * a @ b.T
    own = np.diag(s)
    return np.array([(lse(s[i]) + lse(s[:, i])) / 2 - own[i] for i in range(len(s))])


def test_alip_weights_and_averages():
    rows = embeddings("image", "text", "text_2")
    x, t, c = rows.values()
    objective = ALIP(begin=0.1, decay=0.9)
    state = objective.init_state(Setting(N, N, lambda _: E))
    aux = objective.prepare(state, Context())
    value, metrics, _ = evaluate(objective, rows, {}, aux=aux)
    alike = {"tc": (t * c).sum(1), "xt": (x * t).sum(1), "xc": (x * c).sum(1)}
    means = {k: 0.9 * 0.1 + 0.1 * v.mean() for k, v in alike.items()}
    sample = np.minimum(1, np.exp(2 * (alike["tc"] - means["tc"])))
    assert 0 < (sample == 1).sum() < N
    pair = {k: np.where(sample == 1, 1, np.exp(2 * (alike[k] - means[k]))) for k in ("xt", "xc")}
    expected = (sample * pair["xt"] * infonce(x, t)).mean() + (
        sample * pair["xc"] * infonce(x, c)
    ).mean()
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["alip/weight"], (sample * pair["xt"]).mean(), rtol=1e-5)
    after = objective.advance(state, alike, Context())
    for name, mean in means.items():
        np.testing.assert_allclose(after[name], mean, rtol=1e-6)
    # All trusted: two contrasts.
    plain = ALIP(gamma_sample=0.0, gamma_pair=0.0)
    value, _, _ = evaluate(plain, rows, {}, aux=Aux(shared=state))
    np.testing.assert_allclose(value, (infonce(x, t) + infonce(x, c)).mean(), rtol=1e-5)


def tokens(rng, rows=N, count=7, width=E):
    mask = np.ones((rows, count), bool)
    mask[::2, -2:] = False
    places = np.tile(np.arange(count, dtype=np.int32) - 1, (rows, 1))  # a class token in front
    values = rng.normal(size=(rows, count, width))
    values[:, 1:3, 0] += 4.0  # what stands out
    return {"values": np.float32(values), "mask": mask, "places": places}


def genview_quality(first, second):
    held = [t["mask"] & (t["places"] >= 0) for t in (first, second)]
    x = [np.float64(t["values"]) for t in (first, second)]
    patches = np.concatenate([a[h] for a, h in zip(x, held, strict=True)])
    mean = patches.mean(0)
    direction = np.linalg.svd(patches - mean)[2][0]
    direction *= np.sign((((patches - mean) @ direction) ** 3).sum())
    out = []
    for i in range(len(x[0])):
        fore, back = [], []
        for a, h in zip(x, held, strict=True):
            p = (a[i][h[i]] - mean) @ direction
            p = (p - p.min()) / (p.max() - p.min())
            fore.append(p @ a[i][h[i]])
            back.append((1 - p) @ a[i][h[i]])
        out.append(unit(fore[0]) @ unit(fore[1]) - unit(back[0]) @ unit(back[1]))
    return np.array(out)


def test_genview_weights_pairs_by_quality():
    rng = np.random.default_rng(6)
    first, second = tokens(rng), tokens(rng)
    expected = genview_quality(first, second)
    np.testing.assert_allclose(quality(first, second), expected, atol=1e-5)
    rows = embeddings("image", "image_2")
    encode = Encoded({"image_tokens": first, "image_2_tokens": second})
    prepare = Context(encode=lambda *_: encode)
    aux = GenView(gamma=3.0).prepare({}, prepare)
    weight = N * np.exp(3 * expected) / np.exp(3 * expected).sum()
    np.testing.assert_allclose(aux.rows["weight"], weight, rtol=1e-4)
    value, metrics, _ = evaluate(GenView(gamma=3.0), rows, {}, aux=aux)
    nce = infonce(rows["image"], rows["image_2"])
    np.testing.assert_allclose(value, (weight * nce).mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics["genview/largest_weight"], weight.max(), rtol=1e-4)
    plain = GenView(gamma=0.0).prepare({}, prepare).rows["weight"]
    np.testing.assert_allclose(plain, 1.0)


def test_null_pictures_have_no_floor():
    rng = np.random.default_rng(8)
    x, t = unit(rng.normal(size=(N, E))), unit(rng.normal(size=(N, E)))
    visual = np.array([1, 1, 0, 1, 0, 0, 1, 1], bool)
    x[~visual] = x[2]  # one NULL picture
    value, metrics, _ = evaluate(NullSoftmax(), {"image": x, "text": t}, {"visual": visual})
    s, m = SCALE * x @ t.T, (~visual).sum()
    losses = []
    for i in range(N):
        row = s[i, i] if visual[i] else s[i, ~visual].mean() + np.log(m)
        column = s[i, i] + (0 if visual[i] else np.log(m))
        losses.append((lse(s[i]) - row + lse(s[:, i]) - column) / 2)
    np.testing.assert_allclose(value, np.mean(losses), rtol=1e-5)
    np.testing.assert_allclose(metrics["null/share"], 3 / 8)
    # Without such rows: Softmax. Where all is as it should be: 0, and Softmax stays at (m / N) log m.
    everything = {"visual": np.ones(N, bool)}
    value, _, _ = evaluate(NullSoftmax(), {"image": x, "text": t}, everything)
    plain, _, _ = evaluate(Softmax(), {"image": x, "text": t}, {})
    np.testing.assert_allclose(value, plain, rtol=1e-6)
    right = 3 * np.eye(N)[np.where(visual, np.arange(N), 2)]
    value, _, _ = evaluate(NullSoftmax(), {"image": right, "text": right}, {"visual": visual})
    floor, _, _ = evaluate(Softmax(), {"image": right, "text": right}, {})
    assert abs(value) < 1e-5
    np.testing.assert_allclose(floor, m / N * np.log(m), rtol=1e-5)


@dataclasses.dataclass(frozen=True)
class Kinds(Source):
    """Record i has label i % kinds, and a picture of gray 20 * label; every `broken`th does not decode."""

    records: int = 60
    kinds: int = 3
    broken: int = 0

    def open(self):
        def record(i):
            label = i % self.kinds
            image = np.full((4, 4, 3), 20 * label, np.uint8)
            bad = self.broken and i % self.broken == 0
            return {
                "image": b"no picture" if bad else image,
                "captions": (f"kind {label}",),
                "id": i,
                "key": f"record {i}",
                "label": label,
                "shape": (i // 3) % 2,
            }

        return [record(i) for i in range(self.records)]


class Gray:
    """A stand-in for a model: the angle on a circle is a picture's gray, or a text's kind."""

    image_size, resize, context_length = 4, Resize(), 8

    def encode_image(self, image):
        angle = np.mean(image, (-3, -2, -1)) / 60
        return np.stack([np.cos(angle), np.sin(angle)], -1).astype(np.float32)

    def encode_image_rows(self, read, count):
        return self.encode_image(read(np.arange(count)))

    def encode_text(self, texts):
        return self.encode_image(
            np.stack([np.full((1, 1, 3), 20.0 * int(t.split()[-1])) for t in texts])
        )


TOKENIZER = BPE(300).build(["kind 1"])


def data(source, **changes):
    fields = (Image(), Array("label", dtype="int32"), Array("shape", dtype="int32"))
    given = {"image_size": 4, "batch_size": 4, "fields": fields, "num_threads": 1}
    return Data(source, **(given | changes))


def test_batches_are_of_one_group(tmp_path):
    """Two stages: what the first model tells apart (gray), and another file; shards of a batch are disjoint."""
    source = Kinds(broken=10)
    found = write_clusters(Gray(), source, tmp_path / "stage0.npy", clusters=3)
    assert (found[::10] == -1).all() and len(set(found[found >= 0].tolist())) == 3
    for kind in range(3):
        assert len(set(found[[i for i in range(60) if i % 3 == kind and i % 10]].tolist())) == 1
    plan = OneCluster(stages=(str(tmp_path / "stage0.npy"), "shape"))
    one = data(source, plan=plan).build(TOKENIZER, 5)
    halves = [data(source, plan=plan).build(TOKENIZER, 5, part, 2) for part in range(2)]
    steps = [one.batch(step) for step in range(12)]
    for step, batch in enumerate(steps):
        assert len(set(batch["label"])) == len(set(batch["shape"])) == 1
        assert len(set(batch["sample"])) == 4
        parts = [half.batch(step)["sample"] for half in halves]
        np.testing.assert_array_equal(np.concatenate(parts), batch["sample"])
    epoch = np.concatenate([b["sample"] for b in steps])  # 6 groups of 9 records: 12 batches of 4
    assert len(set(epoch)) == 48
    again = np.concatenate([one.batch(step)["sample"] for step in range(12, 24)])
    assert len(set(again)) == 48 and not np.array_equal(epoch, again)
    np.testing.assert_array_equal(combined([np.array([3]), np.array([7])], clusters=10), [37])
    # What cannot be used is replaced from its own group.
    loader = data(source, plan=OneCluster(stages=("label",)), max_error_rate=1.0).build(
        TOKENIZER, 0
    )
    for step in range(15):
        assert len(set(loader.batch(step)["label"])) == 1
    assert loader.skipped > 0


def test_one_group_is_a_shuffle():
    loader = data(Kinds(), plan=OneCluster()).build(TOKENIZER, 0)
    epoch = np.concatenate([loader.batch(step)["sample"] for step in range(15)])
    assert sorted(epoch) == list(range(60)) and not np.array_equal(epoch, np.arange(60))
    in_order = data(Kinds(), plan=OneCluster(), shuffle=False).build(TOKENIZER, 0)
    np.testing.assert_array_equal(in_order.batch(1)["sample"], [4, 5, 6, 7])


def test_plans_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(ClipjaxError, match="drop one"):
        data(Kinds(), plan=OneCluster(), stream=Stream())
    with pytest.raises(ClipjaxError, match="largest of 3 groups has 20 records"):
        data(Kinds(), plan=OneCluster(("label",)), batch_size=32).build(TOKENIZER, 0)
    np.save(tmp_path / "short.npy", np.zeros(7, np.int32))
    with pytest.raises(ClipjaxError, match="write it anew"):
        data(Kinds(), plan=OneCluster((str(tmp_path / "short.npy"),))).build(TOKENIZER, 0)
    with pytest.raises(ClipjaxError, match="cannot be read"):
        data(Kinds(), plan=OneCluster((str(tmp_path / "none.npy"),))).build(TOKENIZER, 0)


def test_kmeans_finds_clusters_and_stages_stand_side_by_side():
    rng = np.random.default_rng(0)
    label = rng.integers(0, 4, 200)
    x = 10 * np.eye(4)[label] + 0.1 * rng.normal(size=(200, 4))
    found = kmeans(x, 4)
    assert len({*zip(label.tolist(), found.tolist(), strict=True)}) == 4
    with pytest.raises(ClipjaxError, match="of 3 points"):
        kmeans(x[:3], 4)
    both = side_by_side([unit(x), unit(x[:, ::-1])])
    assert both.shape == (200, 8)
    np.testing.assert_allclose(np.linalg.norm(both, axis=1), 1.0)


def test_null_pictures_stand_in_the_batch():
    config = data(
        Kinds(kinds=4),
        fields=(
            NullImage(not_visual=(1, 3)),
            Text(captions=CaptionChoice()),
            Array("label", dtype="int32"),
        ),
        batch_size=12,
        context_length=8,
    )
    batch = config.build(TOKENIZER, 0).batch(0)
    np.testing.assert_array_equal(batch["visual"], batch["label"] % 2 == 0)
    for image, label in zip(batch["image"], batch["label"], strict=True):
        expected = null_picture(4) if label % 2 else np.full((4, 4, 3), 20 * label)
        np.testing.assert_array_equal(image, expected)
    assert np.array_equal(null_picture(4), null_picture(4))
    assert not np.array_equal(null_picture(4, seed=1), null_picture(4))
    np.testing.assert_array_equal(distant_labels(np.array([0.4, 0.1, 0.2])), [1, 0, -1])


def test_evaluators_by_hand():
    assert visualness_figures(
        np.array([0.9, 0.8, 0.8, 0.1]), np.array([1, 1, 0, 0], bool), 0.79
    ) == {
        "accuracy": 0.75,
        "f1": pytest.approx(2 * 2 / (3 + 2)),
        "auc": pytest.approx((2 + 1.5) / 4),
    }
    queries, candidates = split_classes(np.array([0, 1, 0, -1, 0, 1, 0, 2]), 1, 2)
    assert queries.tolist() == [0, 1] and candidates.tolist() == [2, 4, 5]
    x = unit(np.float64([[1, 0], [1, 1], [1, 2], [0, 1]]))
    found = class_precision(x[:1], np.array([0]), x[1:], np.array([0, 1, 0]), (1, 2, 3, 9))
    assert found == {1: 1.0, 2: 0.5, 3: pytest.approx(2 / 3), 9: pytest.approx(2 / 3)}
    source = Kinds(records=30)
    figures = ClassPrecision(source=source, queries=2, ks=(5, 8)).build()(Gray())
    assert set(figures.values()) == {1.0} and len(figures) == 4
    assert "class_precision/text_to_image/P@8" in figures
    with pytest.raises(ClipjaxError, match="lower queries"):
        ClassPrecision(source=source).build()(Gray())
    assert ICNN(source=source).build()(Gray())["icnn/gamma"] == 1
    # The NULL picture is gray 127 or so, a third of a turn from kind 0.
    figures = Visualness(source=source, not_visual=(2,), threshold=0.0).build()(Gray())
    assert figures["visualness/auc"] == 1.0 and figures["visualness/accuracy"] == pytest.approx(
        2 / 3
    )
