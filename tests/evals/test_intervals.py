import numpy as np
import pytest

from clipjax.errors import ClipjaxError
from clipjax.evals.intervals import difference, interval


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
    assert found.mean == pytest.approx(0.01) and found.low > 0.003 and found.p < 0.01
    # As many lost as gained: no difference.
    swapped = difference(first, np.roll(first, 10), 2000)
    assert swapped.mean == 0.0 and swapped.p > 0.8 and swapped.low < 0 < swapped.high
    with pytest.raises(ClipjaxError, match="not the same ones"):
        difference(first, second[:-1], 100)
