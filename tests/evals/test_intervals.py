import numpy as np
import pytest

from clipjax.errors import ClipjaxError
from clipjax.evals import few_shot, geometry, groups, masks
from clipjax.evals.calibration import calibration
from clipjax.evals.caption_metrics import bleu, bleu_counts
from clipjax.evals.captioning import _bleu
from clipjax.evals.figure import Figure, mean_by_class, median
from clipjax.evals.intervals import differences, intervals


def interval(values, resamples, by=None):
    return intervals({"x": Figure(values, by) if by else Figure(values)}, resamples)["x"]


def difference(first, second, resamples):
    return differences({"x": Figure(first)}, {"x": Figure(second)}, resamples)["x"]


def test_the_interval_of_a_share_is_the_binomials():
    values = np.arange(400) < 120
    low, high = interval(values, 4000)
    spread = 1.96 * np.sqrt(0.3 * 0.7 / 400)
    assert low == pytest.approx(0.3 - spread, abs=0.006)
    assert high == pytest.approx(0.3 + spread, abs=0.006)
    assert interval(values, 4000) == (low, high)  # drawn from one seed
    assert interval(np.ones(7), 100) == (1.0, 1.0)


def test_differences_are_taken_in_pairs():
    """Ten of 1,000 pictures are gained and none lost: sure, though each share is known to 3 % only."""
    first = np.arange(1000) < 500
    second = first | (np.arange(1000) >= 990)
    found = difference(first, second, 2000)
    assert found.value == pytest.approx(0.01) and found.low > 0.003 and found.p < 0.01
    # As many lost as gained: no difference.
    swapped = difference(first, np.roll(first, 10), 2000)
    assert swapped.value == 0.0 and swapped.p > 0.8 and swapped.low < 0 < swapped.high
    with pytest.raises(ClipjaxError, match="not the same ones"):
        difference(first, second[:-1], 100)


def test_mcnemars_test_is_the_binomials():
    """Of the pictures that tell the models apart, ten are gained and two lost: (1 + 12 + 66) 2 / 2^12."""
    first, second = np.arange(100) < 2, (np.arange(100) >= 2) & (np.arange(100) < 12)
    assert difference(first, second, 100).mcnemar == pytest.approx(2 * (1 + 12 + 66) / 2**12)
    assert difference(first, first, 100).mcnemar == 1.0
    assert difference(first / 2, second / 2, 100).mcnemar is None  # no shares of right ones


def kinds():
    rng = np.random.default_rng(3)
    n = 40
    hits, label = rng.random(n) < 0.4, rng.integers(0, 5, n)
    classed = np.stack([hits, label], axis=1)
    drawn = rng.random((n, 3)) < 0.5
    found = {
        "mean": Figure(rng.random(n)),
        "median": Figure(rng.integers(1, 9, n), median),
        "mean_by_class": Figure(classed, mean_by_class),
        "macro_f1": Figure(np.stack([rng.integers(0, 5, n), label], axis=1), groups.macro_f1),
        "std": Figure(drawn, few_shot._spread_of_draws),
        "draws": Figure(np.concatenate([drawn, label[:, None]], axis=1), few_shot._mean_by_class),
        "miou": Figure(rng.integers(0, 9, (n, 3, 4)) + np.array([[0], [9], [9]]), masks._miou),
    }
    found |= groups.by_group(np.where(hits, 1, 9), [f"g{i}" for i in label])
    found |= calibration(rng.normal(size=(n, 5)), label)
    words = [rng.choice(list("abcde"), 6).tolist() for _ in range(2 * n)]
    counts = bleu_counts(words[:n], [[own] for own in words[n:]])
    found["BLEU-2"] = Figure(counts, lambda values, weights: _bleu(values, weights, 2))
    x = rng.normal(size=(2, n, 3))
    x /= np.linalg.norm(x, axis=-1, keepdims=True)
    found["gap"] = geometry.geometry(*x)["modality_gap"]
    return {name: each for name, each in found.items() if isinstance(each, Figure)}


@pytest.mark.parametrize(("name", "figure"), kinds().items())
def test_a_resampled_figure_is_that_of_the_examples_drawn(name, figure):
    size = len(figure.values)
    drawn = np.random.default_rng(4).integers(0, size, size)
    again = figure.again(np.bincount(drawn, minlength=size).astype(float))
    assert again == pytest.approx(float(Figure(figure.values[drawn], figure.by)), abs=1e-12)
    assert figure.again(np.ones(size)) == pytest.approx(float(figure), abs=1e-12)


def test_figures_of_a_corpus_are_sums_over_captions():
    candidates, references = [["a", "b", "c"], ["d"]], [[["a", "b"], ["c"]], [["d", "e"]]]
    figure = Figure(bleu_counts(candidates, references), lambda v, w: _bleu(v, w, 2))
    assert figure == bleu(candidates, references)[1]
    assert figure.again(np.array([2.0, 0.0])) == pytest.approx(
        bleu(candidates[:1] * 2, references[:1] * 2)[1]
    )


def test_the_interval_of_a_uniformity_is_that_of_the_pairs_drawn():
    """To first order, against all pairs of different examples among those drawn."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 300, 4)) + np.array([1.5, 0, 0, 0])  # in a cone, as embeddings are
    x /= np.linalg.norm(x, axis=-1, keepdims=True)
    figure = geometry.geometry(*x)["uniformity/cross"]
    kernel = np.exp(4 * (x[0] @ x[1].T) - 4) * (1 - np.eye(300))
    assert figure == pytest.approx(np.log(kernel.sum() / (300 * 299)))
    again = []
    for _ in range(300):
        w = np.bincount(rng.integers(0, 300, 300), minlength=300).astype(float)
        pairs = w.sum() ** 2 - (w**2).sum()
        again.append((figure.again(w), np.log(w @ kernel @ w / pairs)))
    ours, theirs = np.std(again, axis=0)
    assert ours == pytest.approx(theirs, rel=0.1)
