import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.testing import assert_allclose, assert_array_equal

from n4flow.sharpening import expected_log_values, linear_histogram, look_up, sharpen_residual

VALUES = arrays(np.float64, st.integers(2, 200), elements=st.floats(-5, 5)).filter(lambda v: np.ptp(v) > 1e-3)


@given(VALUES, st.integers(2, 60))
def test_histogram_shares_each_value_between_its_two_nearest_centres(values, bins):
    low, high = values.min(), values.max()
    centres = np.linspace(low, high, bins)
    hats = np.maximum(0, 1 - np.abs(values[:, None] - centres) / (centres[1] - centres[0]))
    assert_allclose(linear_histogram(values, low, high, bins), hats.sum(axis=0), atol=1e-5)


@given(VALUES, st.randoms(use_true_random=False))
def test_histogram_has_the_same_bits_in_any_order_and_in_parts(values, random):
    low, high = values.min(), values.max()
    whole = linear_histogram(values, low, high, 50)
    shuffled = values.copy()
    random.shuffle(shuffled)
    assert_array_equal(linear_histogram(shuffled, low, high, 50), whole)
    cut = len(values) // 2
    parts = [linear_histogram(v, low, high, 50) for v in (values[:cut], values[cut:])]
    assert_array_equal(parts[0] + parts[1], whole)
    assert whole.sum() == len(values)


@given(VALUES)
def test_look_up_is_linear_interpolation(values):
    low, high = values.min(), values.max()
    table = np.sin(np.arange(30.0))
    expected = np.interp(values, np.linspace(low, high, 30), table)
    assert_allclose(look_up(values, table, low, high), expected, atol=1e-9)


def test_two_blurred_peaks_are_pulled_towards_their_centres():
    rng = np.random.default_rng(1)
    values = np.concatenate([rng.normal(4.0, 0.05, 20000), rng.normal(5.0, 0.05, 20000)])
    low, high = values.min(), values.max()
    table = expected_log_values(linear_histogram(values, low, high, 200), low, high, fwhm=0.15, wiener_noise=0.01)
    centres = np.linspace(low, high, 200)
    for peak in (4.0, 5.0):
        near = np.abs(centres - peak) < 0.1
        assert np.abs(table[near] - peak).mean() < 0.6 * np.abs(centres[near] - peak).mean()


def test_residual_of_one_value_is_zero_and_of_bad_values_an_error():
    assert_array_equal(sharpen_residual(np.full((3, 4), 2.0)), np.zeros((3, 4)))
    with pytest.raises(ValueError, match="must be finite"):
        sharpen_residual(np.array([1.0, np.nan, 2.0]))


def test_residual_does_not_depend_on_the_intensity_scale():
    rng = np.random.default_rng(2)
    values = rng.normal(3, 0.3, (10, 11, 12))
    assert_allclose(sharpen_residual(values + np.log(1e6)), sharpen_residual(values), atol=1e-6)
