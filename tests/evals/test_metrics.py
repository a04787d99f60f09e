import math
from pathlib import Path

import numpy as np
import pytest

from clipjax.errors import ClipjaxError
from clipjax.evals import metrics
from clipjax.evals.features import class_figures


def unit(rng, *shape):
    x = rng.normal(size=shape)
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def ranks_by_sorting(image, text, owner):
    """Both directions from the full float64 matrix, a query at a time, wrong ones first on ties."""
    score = image.astype(np.float64) @ text.astype(np.float64).T
    i2t, t2i = [], []
    for i in range(len(image)):
        wrong = owner != i
        order = sorted(range(len(text)), key=lambda j: (-score[i, j], not wrong[j]))
        i2t.append(1 + next(p for p, j in enumerate(order) if not wrong[j]))
    for j in range(len(text)):
        order = sorted(range(len(image)), key=lambda i: (-score[i, j], i == owner[j]))
        t2i.append(1 + order.index(owner[j]))
    return np.array(i2t), np.array(t2i)


def test_hand_made_matrix():
    # Rows are images, columns captions; captions 0 and 1 belong to image 0, caption 2 to image 1.
    # With text = identity, the embeddings of the images are the rows of scores.
    score = np.array([[0.1, 0.5, 0.9], [0.7, 0.2, 0.6]], np.float32)
    ranks = metrics.retrieval_ranks(score, np.eye(3, dtype=np.float32), np.array([0, 0, 1]))
    # Image 0: its best caption (.5) is behind .9 only. Image 1: .6 is behind .7.
    assert ranks.image_to_text.tolist() == [2, 2]
    # Caption 0: .1 against .7; caption 1: .5 against .2; caption 2: .6 against .9.
    assert ranks.text_to_image.tolist() == [2, 1, 2]


@pytest.mark.parametrize("tile", [1, 3, 7, 64])
def test_ranks_agree_with_sorting_the_full_matrix(tile):
    rng = np.random.default_rng(0)
    image, text = unit(rng, 23, 16), unit(rng, 51, 16)
    owner = np.concatenate([np.arange(23), rng.integers(0, 23, 28)])
    text += 0.4 * image[owner]
    ranks = metrics.retrieval_ranks(image, text, owner, tile=tile)
    i2t, t2i = ranks_by_sorting(image, text, owner)
    np.testing.assert_array_equal(ranks.image_to_text, i2t)
    np.testing.assert_array_equal(ranks.text_to_image, t2i)
    assert 1 < np.median(i2t) < 23  # the case is neither solved nor hopeless


@pytest.mark.parametrize("tile", [1, 5, 13, 100])
def test_ties_count_against_the_model_at_any_tile_size(tile):
    # Image 3 is a copy of image 0 and caption 5 of caption 0. Width 257 and odd tiles make an
    # ordinary matrix product round the copies differently.
    rng = np.random.default_rng(1)
    image = unit(rng, 37, 257)
    image[3] = image[0]
    text = image.copy()
    text[5] = text[0]
    ranks = metrics.retrieval_ranks(image, text, np.arange(37), tile=tile)
    # Image 0 sees captions 0, 3 and 5 alike; image 3 the same; image 5 prefers three others or so.
    assert ranks.image_to_text[0] == 3 and ranks.image_to_text[3] == 3
    assert ranks.text_to_image[0] == 2 and ranks.text_to_image[3] == 2
    clean = np.setdiff1d(np.arange(37), [0, 3, 5])
    assert (ranks.image_to_text[clean] == 1).all() and (ranks.text_to_image[clean] == 1).all()


def test_scores_do_not_depend_on_how_the_product_is_cut_up():
    rng = np.random.default_rng(2)
    u = metrics._FixedPoint("u", unit(rng, 64, 768))[:]
    v = metrics._FixedPoint("v", unit(rng, 64, 768))[:]
    whole = u @ v.T
    pieces = np.stack([[np.dot(a[::-1], b[::-1]) for b in v] for a in u])
    np.testing.assert_array_equal(whole, pieces)
    exact = np.array([[math.fsum(a * b) for b in v[:4]] for a in u[:4]])
    np.testing.assert_array_equal(whole[:4, :4], exact)


def test_fixed_point_moves_a_score_less_than_float32_would():
    rng = np.random.default_rng(3)
    a, b = unit(rng, 200, 512), unit(rng, 200, 512)
    exact = a.astype(np.float64) @ b.astype(np.float64).T
    moved = metrics._FixedPoint("a", a)[:] @ metrics._FixedPoint("b", b)[:].T
    assert np.abs(moved - exact).max() < 1e-7


def test_scale_of_the_embeddings_does_not_matter():
    rng = np.random.default_rng(4)
    image, text = unit(rng, 20, 8), unit(rng, 20, 8)
    ranks = metrics.retrieval_ranks(image, text, np.arange(20))
    scaled = metrics.retrieval_ranks(37.0 * image, 1e-3 * text, np.arange(20))
    np.testing.assert_array_equal(ranks.image_to_text, scaled.image_to_text)
    np.testing.assert_array_equal(ranks.text_to_image, scaled.text_to_image)


def test_a_collapsed_model_scores_nothing():
    same = np.ones((6, 4), np.float32) / 2
    ranks = metrics.retrieval_ranks(same, same, np.arange(6))
    assert ranks.image_to_text.tolist() == [6] * 6 and ranks.text_to_image.tolist() == [6] * 6
    zero = metrics.retrieval_ranks(np.zeros((3, 2)), np.zeros((3, 2)), np.arange(3))
    assert zero.image_to_text.tolist() == [3] * 3


def test_rounding_noise_does_not_break_ties():
    rng = np.random.default_rng(6)
    image, owner = unit(rng, 8, 64), np.arange(12) % 8
    image[4:] = image[:4]
    text = image[owner]
    clean = metrics.retrieval_ranks(image, text, owner)
    assert clean.image_to_text.tolist() == [2, 2, 2, 2, 3, 3, 3, 3]
    assert clean.text_to_image.tolist() == [2] * 12
    for _ in range(5):
        noise = [rng.normal(scale=1e-8, size=x.shape) for x in (image, text)]
        noisy = metrics.retrieval_ranks(image + noise[0], text + noise[1], owner)
        np.testing.assert_array_equal(noisy.image_to_text, clean.image_to_text)
        np.testing.assert_array_equal(noisy.text_to_image, clean.text_to_image)
        ranks, _ = metrics.classified(image + noise[0], image + noise[0], np.arange(8))
        assert ranks.tolist() == [2] * 8
        right = owner == 0
        assert metrics.rank_of_best(image[0] + noise[0][0], text + noise[1], right) == 2


def test_own_captions_that_tie_do_not_compete_with_each_other():
    image = np.eye(2, dtype=np.float32)
    text = np.array([[1, 0], [1, 0], [0.5, 1]], np.float32)
    ranks = metrics.retrieval_ranks(image, text, np.array([0, 0, 1]))
    assert ranks.image_to_text.tolist() == [1, 1]


def test_summary_of_known_ranks():
    summary = metrics.summarize_ranks(np.array([1, 2, 5, 10, 100]))
    assert summary["R@1"] == 0.2 and summary["R@5"] == 0.6 and summary["R@10"] == 0.8
    assert summary["median_rank"] == 5.0
    assert summary["mean_reciprocal_rank"] == pytest.approx((1 + 0.5 + 0.2 + 0.1 + 0.01) / 5)


@pytest.mark.parametrize("tile", [1, 4, 50])
def test_ranks_of_classes_and_accuracies(tile):
    rng = np.random.default_rng(5)
    image, classes, label = unit(rng, 30, 6), unit(rng, 9, 6), rng.integers(0, 8, 30)
    score = image.astype(np.float64) @ classes.astype(np.float64).T
    expected = 1 + (score > score[np.arange(30), label][:, None]).sum(axis=1)
    ranks, _ = metrics.classified(image, classes, label, tile=tile)
    np.testing.assert_array_equal(ranks, expected)
    per_class = [np.mean(score[label == c].argmax(axis=1) == c) for c in sorted(set(label))]
    assert class_figures(ranks, label)["mean_per_class"] == pytest.approx(np.mean(per_class))
    assert metrics.recall_at(ranks, 1) == np.mean(score.argmax(axis=1) == label)
    assert metrics.recall_at(ranks, 9) == 1.0


def test_mean_per_class_weighs_classes_alike_and_skips_absent_ones():
    ranks, label = np.array([1, 1, 1, 2]), np.array([0, 0, 0, 2])
    assert class_figures(ranks, label)["mean_per_class"] == 0.5
    assert metrics.recall_at(ranks, 1) == 0.75


def test_top_k_returns_the_best_first_with_their_scores():
    candidates = np.eye(4, dtype=np.float32)
    index, score = metrics.top_k(np.array([[0.1, 0.4, 0.3, 0.4]], np.float32), candidates, 3)
    assert index.tolist() == [[1, 3, 2]]
    np.testing.assert_allclose(score, [[0.4, 0.4, 0.3]], atol=1e-7)
    assert metrics.top_k(candidates[:1], candidates, 9)[0].shape == (1, 4)


@pytest.mark.parametrize(
    ("k", "candidates", "right"), [(1, 395, 1), (5, 20, 3), (10, 8, 2), (3, 5, 4)]
)
def test_chance_is_the_hypergeometric_one(k, candidates, right):
    k_drawn = min(k, candidates)
    expected = 1 - math.comb(candidates - right, k_drawn) / math.comb(candidates, k_drawn)
    assert metrics.recall_by_chance(k, candidates, right) == pytest.approx(expected)


def test_bad_input_is_refused_by_name():
    eye = np.eye(3, dtype=np.float32)
    broken = eye.copy()
    broken[1, 1] = np.nan
    with pytest.raises(ClipjaxError, match=r"1 of 3 text embeddings are not finite.*number 1"):
        metrics.retrieval_ranks(eye, broken, np.arange(3))
    with pytest.raises(ClipjaxError, match="1 images have none"):
        metrics.retrieval_ranks(eye, eye, np.array([0, 0, 1]))
    with pytest.raises(ClipjaxError, match="owner has shape"):
        metrics.retrieval_ranks(eye, eye, np.arange(2))
    with pytest.raises(ClipjaxError, match="one width"):
        metrics.retrieval_ranks(eye, eye[:, :2], np.arange(3))
    with pytest.raises(ClipjaxError, match="labels run from 0 to 3, but there are 3 classes"):
        metrics.classified(eye, eye, np.array([0, 1, 3]))


@pytest.fixture(scope="module")
def real():
    """Embeddings of emoji by a random tower; many emoji are drawn alike, so there are ties."""
    golden = np.load(Path(__file__).parent / "golden_probe.npz")
    x = golden["test_x"].astype(np.float32)[:300]
    return x / np.linalg.norm(x, axis=1, keepdims=True), golden["test_y"].astype(np.int64)[:300]


@pytest.mark.parametrize("tile", [7, 128, 2048])
def test_ranks_of_real_embeddings_with_ties_agree_with_sorting(real, tile):
    image, _ = real
    image = np.concatenate([image, image[:20]])  # twenty pictures twice
    rng = np.random.default_rng(7)
    owner = np.concatenate([np.arange(len(image)), rng.integers(0, len(image), 100)])
    text = image[owner]
    text[50:] = np.roll(text[50:], 3, axis=0)  # most captions are their neighbors'
    score = np.round(image.astype(np.float64) @ text.T.astype(np.float64), 7)
    ties = sum(len(row) - len(np.unique(row)) for row in score)
    assert ties > 1000
    ranks = metrics.retrieval_ranks(image, text, owner, tile=tile)
    best = np.array([score[i, owner == i].max() for i in range(len(image))])
    i2t = [1 + (score[i, owner != i] >= best[i] - 1e-6).sum() for i in range(len(image))]
    own = score[owner, np.arange(len(text))]
    t2i = [(score[:, j] >= own[j] - 1e-6).sum() for j in range(len(text))]
    np.testing.assert_array_equal(ranks.image_to_text, i2t)
    np.testing.assert_array_equal(ranks.text_to_image, t2i)


def test_predictions_agree_with_ranks_and_fill_the_confusion_matrix(real):
    image, label = real
    classes = np.stack([image[label == c].mean(axis=0) for c in range(9)])
    classes[3] = classes[2]  # a tie that classes 2 and 3 both lose
    ranks, predicted = metrics.classified(image, classes, label, tile=64)
    np.testing.assert_array_equal(predicted == label, ranks == 1)
    assert (predicted[label == 2] != 2).all() and (predicted[label == 3] != 3).all()
    wrong = predicted != label
    score = image.astype(np.float64) @ classes.T.astype(np.float64)
    np.testing.assert_allclose(score[wrong, predicted[wrong]], score[wrong].max(axis=1), atol=1e-6)
    counts = metrics.confusion_matrix(predicted, label, 9)
    expected = [[np.sum((label == i) & (predicted == j)) for j in range(9)] for i in range(9)]
    np.testing.assert_array_equal(counts, expected)
    assert np.trace(counts) == (ranks == 1).sum()


@pytest.mark.parametrize("tile", [1, 50, 1000])
def test_a_class_of_several_rows_scores_as_its_best(real, tile):
    image, _ = real
    rng = np.random.default_rng(8)
    rows, group = unit(rng, 12, image.shape[1]), np.array([2, 0, 1, 1, 3, 0, 2, 2, 4, 4, 3, 0])
    label = rng.integers(0, 5, len(image))
    score = image.astype(np.float64) @ rows.T.astype(np.float64)
    best = np.stack([score[:, group == g].max(axis=1) for g in range(5)], axis=1)
    expected = (best >= best[np.arange(len(image)), label][:, None]).sum(axis=1)
    ranks, _ = metrics.classified(image, rows, label, group=group, tile=tile)
    np.testing.assert_array_equal(ranks, expected)
    scores = metrics.class_scores(image, rows, group=group, tile=tile)
    np.testing.assert_allclose(scores, best, atol=1e-7)
    with pytest.raises(ClipjaxError, match="leaving none out"):
        metrics.classified(image, rows, label, group=group + 1)


def test_scores_of_pairs(real):
    image, _ = real
    expected = (image[:50].astype(np.float64) * image[50:100]).sum(axis=1)
    np.testing.assert_allclose(
        metrics.pair_scores(image[:50], image[50:100], tile=16), expected, atol=1e-7
    )


def test_ties_in_order_are_those_of_a_stable_sort():
    """Few distinct directions, so that most scores tie, exactly."""
    rng = np.random.default_rng(0)
    image = np.eye(4, dtype=np.float32)[rng.integers(0, 4, 30)]
    text = np.eye(4, dtype=np.float32)[rng.integers(0, 4, 70)]
    owner = np.concatenate([np.arange(30), rng.integers(0, 30, 40)])
    ranks = metrics.retrieval_ranks(image, text, owner, tile=16, ties="first")
    score = image @ text.T
    order = np.argsort(-score, axis=1, kind="stable")
    by_image = [1 + np.argmax(owner[row] == i) for i, row in enumerate(order)]
    others = [
        1 + sum(owner[j] != i for j in row[: rank - 1])
        for i, (row, rank) in enumerate(zip(order, by_image, strict=True))
    ]
    np.testing.assert_array_equal(ranks.image_to_text, others)
    order = np.argsort(-score.T, axis=1, kind="stable")
    by_text = [1 + np.argmax(row == own) for row, own in zip(order, owner, strict=True)]
    np.testing.assert_array_equal(ranks.text_to_image, by_text)
    label = rng.integers(0, 70, 30)
    order = np.argsort(-score, axis=1, kind="stable")
    wanted = [1 + np.argmax(row == own) for row, own in zip(order, label, strict=True)]
    ranked, predicted = metrics.classified(image, text, label, ties="first", tile=7)
    np.testing.assert_array_equal(ranked, wanted)
    np.testing.assert_array_equal(predicted, score.argmax(axis=1))
