import numpy as np
import pytest

from gptjax.evaluate.statistics import Estimate, ratio


def test_of_shares_it_is_the_standard_error_of_a_mean():
    """Two of four: the sample's variance is (4 x 1/4) / 3, and its mean's a quarter of that."""
    assert ratio([1, 0, 0, 1], 1.0) == Estimate(0.5, pytest.approx(np.sqrt(1 / 12)))
    assert ratio([1, 1, 1], 1.0) == (1.0, 0.0)
    assert ratio([3.0], [2.0]) == (1.5, None)


def test_a_ratio_of_sums_by_hand():
    """(1 + 5) / (1 + 3) = 3/2; residuals -1/2 and 1/2, so sqrt(1/2 / 2) over a mean of 2."""
    assert ratio([1, 5], [1, 3]) == Estimate(1.5, pytest.approx(0.25))


def test_the_error_is_how_far_repetitions_are_apart():
    """A thousand samples of 200 windows with texts of various lengths."""
    draw = np.random.default_rng(0)
    below = draw.integers(50, 150, (1000, 200)).astype(float)
    above = below * 3 + draw.normal(0, 20, below.shape)
    found = [ratio(a, b) for a, b in zip(above, below, strict=True)]
    assert np.mean([f.error for f in found]) == pytest.approx(
        np.std([f.value for f in found]), rel=0.07
    )


def test_no_digits_are_lost_on_many_tokens():
    """A million losses; in float32 their sum would be off by more."""
    assert ratio(np.full(1_000_000, 3.1), 1.0).value == pytest.approx(3.1, rel=1e-14)


def test_scaled():
    assert Estimate(2.0, 0.5).scaled(2) == (4.0, 1.0)
    assert Estimate(2.0, None).scaled(2) == (4.0, None)
