"""Linear probe, few-shot and k-NN on features of real pictures.

`golden_probe.npz`: embeddings of emoji (Twemoji, CC-BY 4.0) by a tower with random
weights, the emoji's groups, and what scikit-learn's LogisticRegression (newton-cholesky, tolerance
1e-8) makes of them: the accuracy on the 1,189 test pictures for each C, and the weights at C = 100.
"""

from pathlib import Path

import numpy as np
import pytest

from clipjax.errors import ClipjaxError
from clipjax.evals import KNN, FewShot, LinearProbe
from clipjax.evals.features import Labeled, accuracies
from clipjax.evals.few_shot import draw_shots
from clipjax.evals.knn import nearest
from clipjax.evals.linear_probe import deal_folds
from clipjax.evals.logistic import Classifier, Examples, fit
from clipjax.mesh import MeshShape

CLASSES = 9


@pytest.fixture(scope="module")
def golden():
    return np.load(Path(__file__).parent / "golden_probe.npz")


@pytest.fixture(scope="module")
def data(golden):
    return tuple(
        Labeled(golden[f"{s}_x"].astype(np.float32), golden[f"{s}_y"].astype(np.int64))
        for s in ("train", "test")
    )


def top1(classifier, split):
    return float((classifier(split.x).argmax(axis=1) == split.y).mean())


def test_at_each_c_the_accuracy_is_scikit_learns(golden, data):
    train, test = data
    examples = Examples.place(train.x, train.y)
    for power, accuracy in zip(golden["log10_c"][::2], golden["accuracy"][::2], strict=True):
        classifier = fit(examples, CLASSES, 10.0**power)
        assert top1(classifier, test) == pytest.approx(accuracy, abs=0.002), power


def test_weights_are_scikit_learns(golden, data):
    classifier = fit(Examples.place(data[0].x, data[0].y), CLASSES, 100.0)
    expected = golden["weight_at_2"]
    assert np.abs(expected).max() > 20
    np.testing.assert_allclose(classifier.weight, expected, atol=0.1)
    np.testing.assert_allclose(classifier.bias, golden["bias_at_2"], atol=0.1)


def test_the_probe_is_within_two_tenths_of_scikit_learn_at_its_best_c(golden, data):
    figures = LinearProbe(train=None, source=None).measure(*data, CLASSES, None)
    assert figures["top1"] > golden["accuracy"].max() - 0.002
    assert -2 < figures["log10_C"] < 6


def test_the_gradient_at_the_end_is_zero(data):
    """The optimum by its definition, in float64 and for a weighted part of the examples."""
    train = data[0]
    used = np.arange(len(train.y)) % 3 > 0
    classifier = fit(Examples.place(train.x, train.y), CLASSES, 10.0, used=used)
    x, y = train.x[used].astype(np.float64), train.y[used]
    logits = classifier(x)
    probability = np.exp(logits - logits.max(axis=1, keepdims=True))
    probability /= probability.sum(axis=1, keepdims=True)
    probability[np.arange(len(y)), y] -= 1
    gradient = x.T @ probability + classifier.weight / 10.0
    assert np.abs(gradient).max() < 1e-4 * len(y)
    assert np.abs(probability.sum(axis=0)).max() < 1e-4 * len(y)


@pytest.mark.parametrize("shape", [(2, 2, 2)])
def test_a_mesh_changes_nothing(data, shape):
    train, test = data
    mesh = MeshShape(*shape).build()
    part = Labeled(train.x[:501], train.y[:501])
    one = fit(Examples.place(part.x, part.y), CLASSES, 0.1)
    many = fit(Examples.place(part.x, part.y, mesh), CLASSES, 0.1)
    np.testing.assert_allclose(many.weight, one.weight, atol=2e-4)
    assert np.abs(one.weight).max() > 0.1
    ours = nearest(test.x[:50], part.x, 7, mesh)
    for got, expected in zip(ours, nearest(test.x[:50], part.x, 7), strict=True):
        np.testing.assert_array_equal(got, expected)


def test_neighbors_agree_with_sorting_all_of_them_ties_included(data):
    train, test = data
    bank = np.concatenate([train.x[:300], train.x[:60]])  # sixty of them twice
    index, similarity = nearest(test.x[:100], bank, 9)
    score = test.x[:100].astype(np.float64) @ bank.T.astype(np.float64)
    expected = np.argsort(-score, axis=1, kind="stable")[:, :9]
    np.testing.assert_array_equal(index, expected)
    np.testing.assert_allclose(similarity, np.take_along_axis(score, expected, axis=1), rtol=1e-12)
    assert nearest(test.x[:2], bank[:4], 9)[0].shape == (2, 4)


def test_votes_of_the_nearest(data):
    train, test = data
    x, y = test.x[:200] / np.linalg.norm(test.x[:200], axis=1, keepdims=True), test.y[:200]
    bank = train.x[:400] / np.linalg.norm(train.x[:400], axis=1, keepdims=True)
    figures = KNN(train=None, source=None, k=5, temperature=0.07).measure(
        Labeled(bank, train.y[:400]), Labeled(x, y), CLASSES, None
    )
    score = x.astype(np.float64) @ bank.T.astype(np.float64)
    right = {"weighted": 0, "plain": 0}
    for i in range(200):
        nearest_five = np.argsort(-score[i], kind="stable")[:5]
        for kind in right:
            votes = np.zeros(CLASSES)
            for j in nearest_five:
                votes[train.y[j]] += np.exp(score[i, j] / 0.07) if kind == "weighted" else 1
            # a tie counts against the model
            right[kind] += (votes >= votes[y[i]] * (1 - 1e-12)).sum() == 1
    assert figures["top1"] == right["weighted"] / 200
    assert figures["plain/top1"] == right["plain"] / 200
    assert right["weighted"] != right["plain"]


def test_few_shot_improves_with_the_shots_and_says_how_sure(data):
    figures = FewShot(train=None, source=None, shots=(1, 16), draws=3).measure(*data, CLASSES, None)
    assert figures["16_shot/top1"] > figures["1_shot/top1"] + 0.05
    assert 0 < figures["16_shot/top1_std"] < 0.1
    assert set(figures) == {
        f"{n}_shot/{key}" for n in (1, 16) for key in ("top1", "top1_std", "mean_per_class")
    }
    # one draw, worked out from the pictures it takes
    train, test = data
    chosen = draw_shots(train.y, 16, 5)
    examples = Examples.place(train.x[chosen], train.y[chosen], rows=16 * CLASSES)
    alone = fit(examples, CLASSES, 100.0)
    one = FewShot(train=None, source=None, shots=(16,), draws=1, seed=5)
    figure = one.measure(*data, CLASSES, None)
    assert figure["16_shot/top1"] == pytest.approx(top1(alone, test), abs=0.002)
    assert figure["16_shot/top1_std"] == 0.0


def test_shots_are_of_each_class_and_nested():
    label = np.repeat([0, 1, 4], [50, 3, 20])
    chosen = draw_shots(label, 5, seed=1)
    assert np.bincount(label[chosen]).tolist() == [5, 3, 0, 0, 5]
    assert set(draw_shots(label, 2, seed=1)) <= set(chosen)
    assert set(chosen) != set(draw_shots(label, 5, seed=2))


def test_folds_have_about_the_same_share_of_every_class():
    label = np.repeat([0, 1, 2], [50, 25, 5])
    fold = deal_folds(label, 5, seed=0)
    for part in range(5):
        assert np.bincount(label[fold == part]).tolist() == [10, 5, 1]
    with pytest.raises(ClipjaxError, match="3 training examples are too few to part in 5"):
        deal_folds(label[:3], 5, 0)


def test_equal_scores_count_against_a_classifier():
    score = np.array([[1.0, 1.0, 0.0], [0.0, 2.0, 1.0]])
    assert accuracies(score, np.array([0, 1]))["top1"] == 0.5
    assert Classifier(np.ones((2, 3)), np.zeros(3))(np.ones((1, 2))).tolist() == [[2.0] * 3]


PIXELS = np.eye(3)[[0, 0, 1, 1, 2, 2]]


def test_from_pictures_to_figures(shades, table):
    captions = ((),) * 6
    train = shades(captions, labels=(0, 0, 1, 1, -1, 2), class_names=("x", "y", "z"))
    # the same classes in another order, and one of its pictures unknown
    test = shades(captions, labels=(2, 2, 1, 1, 0, -1), class_names=("z", "y", "x"))
    predictor = table(PIXELS, {"-": [1, 0, 0]})
    runner = KNN(train=train, source=test, k=2).build()
    found = runner(predictor)
    for key in ("top1", "top5", "mean_per_class"):
        assert found[f"knn/{key}"] == 1.0
    # The one picture of z has a neighbor of another class besides: a tie of votes, and lost.
    assert found["knn/plain/top1"] == pytest.approx(0.8)
    assert found["knn/plain/mean_per_class"] == pytest.approx(2 / 3)
    assert runner.chance() == {"knn/top1": pytest.approx(1 / 3), "knn/top5": 1.0}


def test_bad_input_is_refused_by_name(shades, table):
    captions = ((),) * 3
    labeled = shades(captions, labels=(0, 1, 2), class_names=("x", "y", "z"))
    other = shades(captions, labels=(0, 1, 2), class_names=("x", "y", "q"))
    predictor = table(np.eye(3), {"-": [1, 0, 0]})
    with pytest.raises(ClipjaxError, match="'knn': .* has no labels"):
        KNN(train=shades(captions), source=labeled).run(predictor)
    with pytest.raises(ClipjaxError, match="1 classes that .* lacks, such as 'q'"):
        KNN(train=labeled, source=other).run(predictor)
    for make, match in (
        (lambda: KNN(train=labeled, source=labeled, k=0), "k=0"),
        (lambda: KNN(train=labeled, source=labeled, temperature=0.0), "temperature=0.0"),
        (lambda: LinearProbe(train=labeled, source=labeled, folds=1), "folds=1"),
        (lambda: LinearProbe(train=labeled, source=labeled, limit=0), "limit=0"),
        (lambda: FewShot(train=labeled, source=labeled, shots=()), r"shots=\(\)"),
        (lambda: FewShot(train=labeled, source=labeled, draws=0), "draws=0"),
    ):
        with pytest.raises(ClipjaxError, match=match):
            make()
