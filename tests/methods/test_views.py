"""Methods on several views, captions and modalities, against NumPy and closed forms."""

import collections
import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipjax.batch import Encoded
from clipjax.errors import ClipjaxError
from clipjax.methods.clip_rocket import (
    BarLIP,
    Blur,
    Gray,
    MultiView,
    Reworded,
    SiamLIP,
    Sometimes,
    SwALIP,
    barlow,
    reworded,
)
from clipjax.methods.count_contrastive import NUMBERS, Counting, counterfactual
from clipjax.methods.dreamlip import Grouping, MultiCaption
from clipjax.methods.filter_fusion import SelfTeaching
from clipjax.methods.metrix_mixup import MixedContrast
from clipjax.methods.simclr import NTXent
from clipjax.methods.slip import slip
from clipjax.methods.symile import Symile
from clipjax.objectives import AllGather, Ring, Softmax

sys.path.insert(0, str(Path(__file__).parents[1] / "objectives"))
import oracles
from alone import evaluate
from jax import jit
from linear import assert_close, make_batch, one_step

COUPLED = {
    "simclr": NTXent("image", "image_2"),
    "swalip": SwALIP("image_2", "text_2", entropy=0.2),
    "barlip": BarLIP("image", "text", scale=1.0),
    "metrix": MixedContrast(),
    "dreamlip": MultiCaption(second="text_several"),
    "symile": Symile(("image", "text", "text_2")),
    "symile squared": Symile(("image", "text", "text_2"), "n_squared"),
    "self-teaching": SelfTeaching(),
}


def batch():
    made = make_batch()
    several = np.stack([np.roll(made["text"], k, 0) for k in (1, 2)], 1)
    second = {"image_2": 255 - made["image"], "text_2": np.roll(made["text"], 3, 0)}
    return made | second | {"text_several": several}


@functools.cache
def big_batch():
    return one_step(COUPLED, jit, batch=batch())


@pytest.mark.parametrize(
    ("devices", "accumulate", "exchange"), [(8, 1, AllGather()), (4, 4, Ring())]
)
def test_coupled_objectives_are_the_same_on_any_mesh(devices, accumulate, exchange):
    got = one_step(COUPLED, jit, devices, accumulate, exchange=exchange, batch=batch())
    assert_close(got, big_batch())
    for name, (_, grads) in got.items():
        assert np.abs(grads["text/table"]).max() > 1e-7 or name == "simclr"


def case(n=6, width=5, seed=2):
    c = oracles.case(n, width, seed=seed)
    return c, {k: jnp.float32(c[k]) for k in "xyuv"}


def value(objective, rows, scale=1.0, batch=None, **facts):
    encoded = Encoded(rows, {"logit_scale": jnp.float32(scale)})
    batch = {"id": jnp.arange(len(next(iter(rows.values()))))} if batch is None else batch
    return float(evaluate(objective, encoded, batch, key=jax.random.key(4), **facts)[0])


def infonce(logits, target=None):
    """Mean cross-entropy of rows and of columns."""
    n = len(logits)
    target = np.eye(n) if target is None else target
    both = 0.0
    for axis in (1, 0):
        both -= 0.5 * (target * (logits - oracles.log_sum_exp(logits, axis))).sum() / n
    return both


def test_nt_xent_among_all_views():
    c, rows = case()
    views = np.concatenate([c["x"], c["y"]])
    logits = views @ views.T / 0.2
    np.fill_diagonal(logits, -np.inf)
    partner = np.roll(np.arange(12), 6)
    expected = (oracles.log_sum_exp(logits, 1).ravel() - logits[np.arange(12), partner]).mean()
    got = value(NTXent("a", "b", 0.2), {"a": rows["x"], "b": rows["y"]})
    assert got == pytest.approx(expected, rel=1e-5)
    pair = {"image": rows["x"], "text": rows["y"]}
    both = pair | {"image_2_projected": rows["u"], "image_3_projected": rows["v"]}
    alone = value(NTXent("a", "b", 0.1), {"a": rows["u"], "b": rows["v"]})
    together = value(slip(0.5), both, 5.0)
    assert together == pytest.approx(value(Softmax(), pair, 5.0) + 0.5 * alone, rel=1e-5)


def test_multi_view_is_the_weighted_mean_of_its_tables():
    c, rows = case()
    pair = {"image": rows["x"], "text": rows["y"]}
    assert value(MultiView(images=(), texts=()), pair, 9.0) == pytest.approx(
        infonce(9.0 * c["x"] @ c["y"].T), rel=1e-5
    )
    local = {"a": rows["u"], "b": rows["x"], "c": rows["v"], "d": rows["y"]}
    got = value(MultiView(("a", "b"), ("c", "d"), temperature=0.2), pair | local, 9.0)
    target = 0.9 * np.eye(6) + 0.1 / 6
    tables = [infonce(a @ b.T / 0.2, target) for a in (c["u"], c["x"]) for b in (c["v"], c["y"])]
    expected = (infonce(9.0 * c["x"] @ c["y"].T) + 2 * np.mean(tables)) / 3
    assert got == pytest.approx(expected, rel=1e-5)


def test_barlow_s_loss_in_closed_form():
    eye, ones = jnp.eye(7), jnp.ones((7, 7))
    assert float(barlow(eye, 5e-3)) == 0
    assert float(barlow(0 * eye, 5e-3)) == 7
    assert float(barlow(ones, 5e-3)) == pytest.approx(5e-3 * 7 * 6, rel=1e-6)
    c, rows = case()
    a, b = (v - v.mean(0) for v in (c["x"], c["y"]))
    cross = (a / np.sqrt(a.var(0) + 1e-5)).T @ (b / np.sqrt(b.var(0) + 1e-5)) / 6
    off = cross - np.diag(np.diag(cross))
    expected = 0.025 * (((np.diag(cross) - 1) ** 2).sum() + 5e-3 * (off**2).sum())
    assert value(BarLIP("x", "y"), rows) == pytest.approx(expected, rel=1e-4)


def test_siamlip_follows_the_other_side():
    c, rows = case()
    sides = {"image_predicted": rows["x"], "text_predicted": rows["y"]}
    sides |= {"image_projected": rows["u"], "text_projected": rows["v"]}
    cosine = (c["x"] * c["v"]).sum(1).mean() + (c["y"] * c["u"]).sum(1).mean()
    assert value(SiamLIP(), sides) == pytest.approx(2 - cosine, rel=1e-5)


def test_swalip_s_targets_are_balanced():
    c, rows = case()
    objective = SwALIP("x", "y", target_first="u", target_second="v", entropy=0.1, iterations=3)
    target = np.exp(c["u"] @ c["v"].T / 0.1)
    for _ in range(3):
        target /= target.sum(0)
        target /= target.sum(1, keepdims=True)
    logits = 8.0 * c["x"] @ c["y"].T
    expected = 0.0
    for axis in (1, 0):
        balanced = target / target.sum(axis, keepdims=True)
        expected -= 0.5 * (balanced * (logits - oracles.log_sum_exp(logits, axis))).sum() / 6
    assert value(objective, rows, 8.0) == pytest.approx(expected, rel=1e-4)
    # With many rounds and one target for all, nothing is preferred.
    same = {"x": rows["x"], "y": rows["y"], "u": jnp.ones((6, 5)), "v": jnp.ones((6, 5))}
    assert value(objective, same, 8.0) == pytest.approx(
        infonce(logits, np.full((6, 6), 1 / 6)), rel=1e-4
    )


def test_augmentations_for_views():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (8, 8, 3)).astype(np.uint8)
    gray = Gray()(image, 8, rng)
    from PIL import Image

    expected = np.asarray(Image.fromarray(image).convert("L"), int)
    assert (gray == gray[..., :1]).all() and np.abs(gray[..., 0] - expected).max() <= 1
    blurred = Blur(2.0, 2.0)(image, 8, rng)
    assert blurred.std() < 0.5 * image.std() and blurred.shape == image.shape
    turned = [Sometimes(Gray(), 0.3)(image, 8, rng) is not image for _ in range(2000)]
    assert np.mean(turned) == pytest.approx(0.3, abs=0.04)


def test_captions_are_reworded_as_often_as_told():
    rng = np.random.default_rng(0)
    how = Reworded(stop_words=0.5, swap=0.4, delete=0.2)
    kinds = collections.Counter()
    for _ in range(4000):
        words = reworded("a red cat on the mat", how, rng).split()
        kinds["stopped"] += "the" not in words and "a" not in words and "on" not in words
        whole = ["red", "cat", "mat"] if len(words) < 4 else ["a", "red", "cat", "on", "the", "mat"]
        kinds["swapped"] += sorted(words) == sorted(whole) and words != whole
        kinds["deleted"] += len(words) in (2, 5)
    assert kinds["stopped"] / 4000 == pytest.approx(0.5, abs=0.03)
    assert kinds["swapped"] / 4000 == pytest.approx(0.4, abs=0.03)
    assert kinds["deleted"] / 4000 == pytest.approx(0.2, abs=0.03)
    assert reworded("of the", Reworded(stop_words=1.0, swap=0.0, delete=0.0), rng) == "of the"


def test_mixed_texts_have_mixed_targets():
    c, rows = case()
    pair = {"image": rows["x"], "text": rows["y"]}
    plain = infonce(6.0 * c["x"] @ c["y"].T)
    assert value(MixedContrast(share=1.0), pair, 6.0) == pytest.approx(plain, rel=1e-5)
    partner = np.asarray(jax.random.permutation(jax.random.split(jax.random.key(4))[1], 6))
    mixed = 0.7 * c["y"] + 0.3 * c["y"][partner]
    mixed /= np.linalg.norm(mixed, axis=1, keepdims=True)
    target = 0.7 * np.eye(6) + 0.3 * (np.arange(6)[:, None] == partner)
    expected = infonce(6.0 * c["x"] @ mixed.T, target)
    assert value(MixedContrast(share=0.7), pair, 6.0) == pytest.approx(expected, rel=1e-5)


def test_captions_of_one_picture_are_not_each_other_s_negatives():
    c, rows = case()
    several = jnp.stack([rows["y"], rows["v"], rows["u"]], 1)
    expected = np.mean([infonce(7.0 * c["x"] @ c[k].T) for k in "yvu"])
    got = value(MultiCaption(), {"image": rows["x"], "text_several": several}, 7.0)
    assert got == pytest.approx(expected, rel=1e-5)
    swapped = value(MultiCaption(), {"image": rows["x"], "text_several": several[:, ::-1]}, 7.0)
    assert swapped == pytest.approx(got, rel=1e-6)


def test_grouping_by_loops():
    rng = np.random.default_rng(0)
    patches, captions = (rng.normal(size=s) for s in ((2, 5, 4), (2, 3, 4)))
    patches, captions = (v / np.linalg.norm(v, axis=-1, keepdims=True) for v in (patches, captions))
    mask = np.array([[1, 1, 1], [1, 1, 0]], bool)
    total = 0.0
    for i in range(2):
        for k in np.flatnonzero(mask[i]):
            w = patches[i] @ captions[i, k]
            w = (w - w.min()) / (w.max() - w.min())
            w = np.where(w < 0.3, 0, w)
            g = (w / w.sum()) @ patches[i]
            logits = 5.0 * captions[i][mask[i]] @ (g / np.linalg.norm(g))
            total -= logits[k] - np.log(np.exp(logits).sum())
    rows = {"image_patches": jnp.float32(patches), "text_several": jnp.float32(captions)}
    masks = {"text_several_mask": jnp.asarray(mask)}
    assert value(Grouping(), rows, 5.0, masks) == pytest.approx(total / 5, rel=1e-4)
    one = {"image_patches": rows["image_patches"], "text_several": rows["text_several"][:, :1]}
    assert value(Grouping(), one, 5.0, {"text_several_mask": jnp.ones((2, 1), bool)}) == 0


def test_numbers_are_words():
    rng = np.random.default_rng(0)
    for caption in ("someone often weighs a phone", "two of the three", "no number", "tenth"):
        assert counterfactual(caption, rng) is None
    seen = {counterfactual("Seven cats, often", rng) for _ in range(300)}
    assert seen == {f"{n.capitalize()} cats, often" for n in NUMBERS if n != "seven"}


def test_counting_is_a_softplus():
    c, rows = case()
    mask = np.array([1, 0, 1, 1, 0, 0], bool)
    named = {"image": rows["x"], "text": rows["y"], "text_counterfactual": rows["v"]}
    masks = {"text_counterfactual_mask": jnp.asarray(mask)}
    gap = (c["x"] * (c["v"] - c["y"])).sum(1)[mask]
    assert value(Counting(), named, 9.0, masks) == pytest.approx(
        np.logaddexp(0, gap).mean(), rel=1e-5
    )
    scaled = np.logaddexp(0, 9.0 * gap).mean()
    assert value(Counting(scaled=True), named, 9.0, masks) == pytest.approx(scaled, rel=1e-5)
    equal = named | {"text_counterfactual": rows["y"]}
    assert value(Counting(), equal, 1.0, masks) == pytest.approx(np.log(2), rel=1e-6)
    nothing = {"text_counterfactual_mask": jnp.zeros(6, bool)}
    assert value(Counting(), named, 1.0, nothing) == 0


def test_symile_compares_with_all_combinations():
    c, rows = case(4)
    x, y, z = c["x"], c["y"], c["u"]
    expected = 0.0
    for anchor, one, two in ((x, y, z), (y, x, z), (z, x, y)):
        for i in range(4):
            logits = np.array(
                [[6.0 * (anchor[i] * one[j] * two[k]).sum() for k in range(4)] for j in range(4)]
            )
            expected += np.log(np.exp(logits).sum()) - logits[i, i]
    three = {"a": rows["x"], "b": rows["y"], "c": rows["u"]}
    got = value(Symile(("a", "b", "c"), "n_squared"), three, 6.0)
    assert got == pytest.approx(expected / 12, rel=1e-5)
    # A third modality that says nothing: InfoNCE of the other two at scale s / sqrt(E), plus log N.
    d = x.shape[1]
    flat = {"a": rows["x"], "b": rows["y"], "c": jnp.full((4, d), d**-0.5)}
    logits = 6.0 / np.sqrt(d) * x @ y.T
    pairs = sum(
        (oracles.log_sum_exp(table, 1).ravel() - np.diag(table)).mean() + np.log(4)
        for table in (logits, logits.T)
    )
    third = np.log(np.exp(logits).sum()) - np.diag(logits)
    got = value(Symile(("a", "b", "c"), "n_squared"), flat, 6.0)
    assert got == pytest.approx((pairs + third.mean()) / 3, rel=1e-5)


def test_symile_with_permuted_others_and_four_modalities():
    c, rows = case()
    names = ("a", "b", "c", "d")
    vectors = dict(zip(names, (c[k] for k in "xyuv"), strict=True))
    expected = 0.0
    for anchor, key in zip(names, jax.random.split(jax.random.key(4), 4), strict=True):
        others = [name for name in names if name != anchor]
        orders = [np.asarray(jax.random.permutation(k, 6)) for k in jax.random.split(key, 3)]
        product = np.prod([vectors[n][o] for n, o in zip(others, orders, strict=True)], 0)
        logits = 6.0 * vectors[anchor] @ product.T
        own = 6.0 * np.prod([vectors[n] for n in names], 0).sum(1)
        i = np.arange(6)
        left_out = np.all([i[:, None] == o for o in orders], 0) | np.eye(6, dtype=bool)
        logits = np.where(left_out, -np.inf, logits)
        expected += np.logaddexp(0, oracles.log_sum_exp(logits, 1).ravel() - own).mean() / 4
    four = dict(zip(names, (rows[k] for k in "xyuv"), strict=True))
    assert value(Symile(names), four, 6.0) == pytest.approx(expected, rel=1e-5)


def test_self_teaching_is_a_divergence_that_vanishes_on_itself():
    c, rows = case()
    named = {"image": rows["x"], "text": rows["y"], "text_2": rows["v"]}
    p = oracles.probabilities(3.0 * c["y"] @ c["x"].T, 1)
    q = oracles.probabilities(3.0 * c["v"] @ c["x"].T, 1)
    expected = 4 * (p * np.log(p / q)).sum() / 6
    assert value(SelfTeaching(), named, 6.0) == pytest.approx(expected, rel=1e-4)
    assert value(SelfTeaching(), named | {"text_2": rows["y"]}, 6.0) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    "make",
    [
        lambda: NTXent(temperature=0.0),
        lambda: MultiView(images=("a",)),
        lambda: SwALIP(iterations=0),
        lambda: MixedContrast(concentration=0.0),
        lambda: Grouping(least=1.0),
        lambda: Symile(("image", "text")),
        lambda: Symile(("a", "b", "c", "d"), "n_squared"),
        lambda: SelfTeaching(temperature=0.0),
    ],
)
def test_bad_fields_are_refused(make):
    with pytest.raises(ClipjaxError):
        make()
