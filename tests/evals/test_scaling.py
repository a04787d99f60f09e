import numpy as np
import pytest
from PIL import Image

from clipjax.errors import ClipjaxError
from clipjax.evals.flops import forward_flops
from clipjax.evals.scaling import as_error, draw_power_law, fit_power_law
from clipjax.models import DualEncoder
from clipjax.towers import TextTransformer, ViT

X = np.geomspace(1e6, 1e10, 9)


def test_a_known_law_is_found_again():
    law = fit_power_law(X, 40.0 * X**-0.3 + 0.12, resamples=20)
    assert law.b == pytest.approx(0.3, abs=1e-3)
    assert law.c == pytest.approx(0.12, abs=1e-4)
    assert law.a == pytest.approx(40.0, rel=0.02)
    np.testing.assert_allclose(law(X), 40.0 * X**-0.3 + 0.12, rtol=1e-4)
    assert law.residual < 1e-4


def test_a_law_without_an_irreducible_term():
    law = fit_power_law(X, 3.0 * X**-0.2, resamples=0)
    assert law.b == pytest.approx(0.2, abs=2e-3) and law.c < 1e-3 and law.intervals == {}


def test_one_run_gone_wrong_moves_the_fit_little():
    clean = 40.0 * X**-0.3 + 0.12
    bad = clean.copy()
    bad[4] *= 2
    law = fit_power_law(X, bad, resamples=0)
    assert law.b == pytest.approx(0.3, abs=0.02) and law.c == pytest.approx(0.12, abs=0.005)


def test_intervals_hold_the_truth_and_narrow_with_the_noise():
    rng = np.random.default_rng(0)
    x = np.geomspace(1e6, 1e10, 24)
    clean = 40.0 * x**-0.3 + 0.12
    widths = []
    for noise in (0.05, 0.005):
        law = fit_power_law(x, clean * np.exp(rng.normal(size=len(x)) * noise), resamples=200)
        low, high = law.intervals["b"]
        assert low < 0.3 < high
        widths.append(high - low)
    assert widths[1] < widths[0] / 3


def test_too_few_or_impossible_points_are_refused():
    with pytest.raises(ClipjaxError, match="3 different values of x are too few"):
        fit_power_law(np.array([1.0, 2, 3, 3]), np.ones(4))
    with pytest.raises(ClipjaxError, match="positive, finite"):
        fit_power_law(X, np.where(X < 1e8, 0.0, 1.0))


def test_shares_become_errors_and_losses_stay():
    assert as_error("retrieval/image_to_text/R@1", 0.3) == 0.7
    assert as_error("zeroshot/top1", 0.25) == 0.75
    assert as_error("compositional/accuracy", 0.25) == 0.75
    assert (
        as_error("zeroshot/nll", 0.3) == 0.3
        and as_error("retrieval/text_to_image/median_rank", 7.0) == 7.0
    )


def test_the_picture(tmp_path):
    error = 40.0 * X**-0.3 + 0.12
    draw_power_law(tmp_path / "law.png", fit_power_law(X, error, 10), X, error, ("x", "y"))
    assert Image.open(tmp_path / "law.png").size == (900, 600)


def test_flops_of_the_products_of_both_towers():
    width, depth, patches, length = 32, 3, 16, 8
    model = DualEncoder(
        image=ViT(image_size=16, patch_size=4, width=width, depth=depth, heads=2, pool="mean"),
        text=TextTransformer(
            vocab_size=50, context_length=length, width=width, depth=depth, heads=2, eos_id=2
        ),
        embed_dim=8,
    )

    def blocks(tokens):
        # query, key, value, output; the MLP four times as wide; scores and their sums of values
        return depth * (2 * tokens * 12 * width**2 + 2 * 2 * tokens**2 * width)

    expected = (
        blocks(patches) + blocks(length) + 2 * patches * 4 * 4 * 3 * width + 2 * 2 * width * 8
    )
    assert forward_flops(model, 16, length) == pytest.approx(expected, rel=0.02)
