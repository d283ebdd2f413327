import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.testing import assert_allclose, assert_array_equal

from n4flow.core.sharpening import (
    blurred_entropy,
    expected_log_values,
    linear_histogram,
    look_up,
    sharpen_residual,
    sharpening_gain,
)
from tests.unit.references import direct_expected

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


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(st.floats(3, 6), st.floats(0.01, 0.3)), min_size=1, max_size=4),
    st.floats(0.03, 0.3),
    st.sampled_from([0, 0.5, 0.9, 1]),
    st.integers(10, 300),
)
def test_the_expected_value_is_that_of_the_formulas(classes, fwhm, twicing, bins):
    values = np.concatenate([np.random.default_rng(3).normal(mean, sd, 500) for mean, sd in classes])
    low, high = values.min(), values.max()
    histogram = linear_histogram(values, low, high, bins)
    found = expected_log_values(histogram, low, high, fwhm=fwhm, wiener_noise=0.01, twicing=twicing, as_itk=False)
    expected = direct_expected(histogram, low, high, fwhm, 0.01, twicing)
    with_samples = histogram > 0  # elsewhere rounding may decide whether there is anything
    assert_allclose(found[with_samples], expected[with_samples], atol=1e-5)


@pytest.mark.parametrize("bins", [150, 400])
@pytest.mark.parametrize("sd", [0.05, 0.2])
def test_entropy_of_a_blurred_normal_variable_is_that_of_the_formula(bins, sd):
    fwhm, low, high = 0.07, -2.0, 2.0
    centres = np.linspace(low, high, bins)
    histogram = np.exp(-0.5 * (centres / sd) ** 2)
    variance = sd**2 + max(fwhm, 2 * (high - low) / (bins - 1)) ** 2 / (8 * np.log(2))
    expected = 0.5 * np.log(2 * np.pi * np.e * variance)
    assert blurred_entropy(histogram, low, high, fwhm) == pytest.approx(expected, abs=2e-3)
    assert blurred_entropy(7 * histogram, low, high, fwhm) == pytest.approx(expected, abs=2e-3)


def test_twicing_takes_out_the_pull_between_two_classes():
    """Values that are right already, of two overlapping classes, are moved less on the average of each class."""
    rng = np.random.default_rng(1)
    grey, white = rng.normal(6.5, 0.055, 30000), rng.normal(6.63, 0.055, 20000)
    values = np.concatenate([grey, white])
    low, high = values.min(), values.max()
    histogram = linear_histogram(values, low, high, 200)
    moved = []
    for twicing in (0, 0.9):
        table = expected_log_values(histogram, low, high, fwhm=0.1, wiener_noise=0.01, twicing=twicing, as_itk=False)
        moved.append([abs(np.mean(of - look_up(of, table, low, high))) for of in (grey, white)])
    assert (np.array(moved[1]) < 0.5 * np.array(moved[0])).all()


def test_the_gain_is_the_share_of_a_shift_that_is_seen():
    """Of two sharp peaks nearly all, of one broad hump next to nothing; never less than the floor."""
    rng = np.random.default_rng(1)
    gains = []
    for values in (
        np.concatenate([rng.normal(4.0, 0.02, 20000), rng.normal(5.0, 0.02, 20000)]),
        rng.normal(4.5, 0.4, 40000),
    ):
        low, high = values.min(), values.max()
        histogram = linear_histogram(values, low, high, 200)
        table = expected_log_values(histogram, low, high, fwhm=0.15, wiener_noise=0.01, as_itk=False)
        gains.append(sharpening_gain(histogram, table, low, high))
        shifted = (values + 1e-4) - look_up(np.minimum(values + 1e-4, high), table, low, high)
        seen = np.mean(shifted - (values - look_up(values, table, low, high))) / 1e-4
        assert gains[-1] == pytest.approx(seen, abs=0.02)
    assert gains[0] > 0.8
    assert gains[1] < 0.1
    assert sharpening_gain(histogram, np.linspace(low, high, 200), low, high) == 0.02


def test_a_gaussian_narrower_than_two_bins_is_that_of_two_bins():
    values = np.random.default_rng(1).normal(4, 0.3, 5000)
    low, high = values.min(), values.max()
    histogram = linear_histogram(values, low, high, 50)
    two_bins = 2 * (high - low) / 49
    tables = [
        expected_log_values(histogram, low, high, fwhm=width, wiener_noise=0.01, as_itk=as_itk)
        for width, as_itk in ((two_bins, False), (two_bins / 5, False), (two_bins / 5, True))
    ]
    assert_array_equal(tables[1], tables[0])
    assert np.abs(tables[2] - tables[0]).max() > 1e-3


def test_residual_of_one_value_is_zero_and_of_bad_values_an_error():
    assert_array_equal(sharpen_residual(np.full((3, 4), 2.0)), np.zeros((3, 4)))
    with pytest.raises(ValueError, match="must be finite"):
        sharpen_residual(np.array([1.0, np.nan, 2.0]))


def test_residual_does_not_depend_on_the_intensity_scale():
    rng = np.random.default_rng(2)
    values = rng.normal(3, 0.3, (10, 11, 12))
    assert_allclose(sharpen_residual(values + np.log(1e6)), sharpen_residual(values), atol=1e-6)
