"""The fitted line against numpy's."""

import numpy as np
import pytest

from a3_hf.training.plateaus import fitted_fall


@pytest.mark.parametrize("length", [2, 3, 10, 51])
def test_the_fall_is_that_of_the_least_squares_line(length):
    losses = np.random.default_rng(length).normal(size=length).tolist()
    slope, _ = np.polyfit(range(length), losses, 1)
    assert fitted_fall(losses) == pytest.approx(-slope * (length - 1))


def test_a_line_falls_by_what_it_falls():
    assert fitted_fall([5.0, 4.5, 4.0, 3.5]) == 1.5
    assert fitted_fall([2.0, 2.0]) == 0.0
    assert fitted_fall([1.0, 1.25]) == -0.25


def test_the_noise_of_the_fall_is_as_documented():
    """Standard deviation about σ √(12 / n)."""
    noise = np.random.default_rng(0).normal(scale=0.3, size=(2000, 40))
    falls = [fitted_fall(losses) for losses in noise.tolist()]
    assert np.std(falls) == pytest.approx(0.3 * (12 / 40) ** 0.5, rel=0.1)
