"""Which voxels take part in the estimate."""

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from n4flow import InputError, N4Parameters
from n4flow.core.samples import Samples, check_dropped, sample_positions, shrink_per_axis, usable_voxels
from n4flow.estimate import positions_in
from n4flow.parameters import MOST_SAMPLES
from tests.conftest import samples_of


def itk_positions(shape, factors):
    """Voxels that itk::ShrinkImageFilter takes: what it makes of images of the voxels' own indices."""
    ramps = np.indices(shape).astype(np.float32)
    shrunken = [sitk.GetArrayFromImage(sitk.Shrink(sitk.GetImageFromArray(ramp.T), factors)).T for ramp in ramps]
    return [np.unique(ramp) for ramp in shrunken]


@pytest.mark.parametrize("planes", [40, 41, 47])
@pytest.mark.parametrize("split", [Samples.halves, Samples.blocks])
def test_halves_of_samples_share_none_and_hold_all(planes, split):
    image = np.random.default_rng(0).uniform(1, 2, (10, planes, 12))
    samples = samples_of(image, image > 1.1, (1, 1, 1))
    parts = split(samples)
    kept = [part.log_image[part.mask] for part in parts]
    assert not set(kept[0]) & set(kept[1])
    np.testing.assert_array_equal(np.sort(np.concatenate(kept)), np.sort(samples.log_image[samples.mask]))
    assert sorted(np.concatenate([part.positions[1] for part in parts])) == list(range(planes))
    flipped = split(samples_of(image[:, ::-1], image[:, ::-1] > 1.1, (1, 1, 1)))
    found = {tuple(np.sort(part.log_image[part.mask])) for part in flipped}
    assert found == {tuple(np.sort(own)) for own in kept}


@pytest.mark.parametrize("shrink_factor", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("voxels", range(80, 92))
def test_samples_are_centred_as_itk_centres_them(voxels, shrink_factor):
    shape = (voxels, 16, 33)  # axes shrunk as asked for, not at all, and by two at the most
    positions = sample_positions(shape, shrink_factor)
    assert shrink_per_axis(shape, shrink_factor) == (shrink_factor, 1, min(shrink_factor, 2))
    for ours, itk in zip(positions, itk_positions(shape, shrink_per_axis(shape, shrink_factor)), strict=True):
        assert_array_equal(ours, itk)


@pytest.mark.parametrize(
    ("voxels", "shrink_factor", "first", "last"),
    [(80, 2, 1, 79), (81, 2, 1, 79), (82, 3, 2, 80), (83, 4, 3, 79), (80, 4, 2, 78), (84, 5, 4, 79)],
)
def test_as_much_is_left_out_before_the_first_sample_as_after_the_last(voxels, shrink_factor, first, last):
    positions = sample_positions((voxels, 1, 1), shrink_factor)[0]
    assert (positions[0], positions[-1]) == (first, last)
    assert 0 <= first - (voxels - 1 - last) <= 1


@given(st.lists(st.integers(1, 1500), min_size=3, max_size=3))
def test_the_default_takes_as_many_samples_as_it_may_and_about_as_many_along_each_axis(shape):
    factors = shrink_per_axis(shape, None)
    counts = [len(p) for p in sample_positions(shape, None)]
    assert counts == [n // factor for n, factor in zip(shape, factors, strict=True)]
    assert np.prod(counts, dtype=int) <= MOST_SAMPLES
    if set(factors) == {1}:
        return
    # one axis was thinned last: with one less, there would be too many
    less = [max(1, factor - 1) for factor in factors]
    assert any(
        np.prod([shape[axis] // less[axis] if n == axis else count for n, count in enumerate(counts)]) > MOST_SAMPLES
        for axis in range(3)
        if factors[axis] > 1
    )
    # none was thinned but the one that had the most: so it keeps half as many as any other
    assert all(2 * (count + 1) > max(counts) for count, factor in zip(counts, factors, strict=True) if factor > 1)


@given(st.lists(st.integers(1, 1500), min_size=3, max_size=3, unique=True), st.permutations([0, 1, 2]))
def test_axes_may_be_permuted(shape, order):
    positions = sample_positions(shape, None)
    for axis, p in zip(order, sample_positions([shape[axis] for axis in order], None), strict=True):
        assert_array_equal(p, positions[axis])


@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(1, 300), st.integers(0, 30)), min_size=3, max_size=3),
    st.sampled_from([None, 1, 2, 3, 4]),
)
def test_samples_go_with_the_mask_wherever_it_lies_in_the_image(axes, shrink_factor):
    parameters = N4Parameters(shrink_factor=shrink_factor)
    alone = positions_in([range(n) for _, n, _ in axes], [n for _, n, _ in axes], parameters)
    domain = [range(before, before + n) for before, n, _ in axes]
    within = positions_in(domain, [before + n + after for before, n, after in axes], parameters)
    for (before, n, _), p, moved in zip(axes, alone, within, strict=True):
        assert_array_equal(moved, p + before)
        assert moved[-1] < before + n
    # ITK's are those of the image
    itk = N4Parameters.from_mapping({"preset": "itk"})
    assert_array_equal(positions_in(domain, (80, 81, 82), itk)[0], sample_positions((80, 81, 82), 4)[0])


def test_a_voxel_without_a_logarithm_is_dropped_under_its_reason():
    values = np.array([1.0, np.inf, -np.inf, np.nan, 0.0, -0.0, -1.0, 1e-30, np.inf, 0.0, -2.0])
    inside = np.array([True] * 8 + [False] * 3)
    usable, dropped = usable_voxels(values, inside)
    assert_array_equal(np.flatnonzero(usable), [0, 7])
    assert dropped == {"not finite": 3, "zero": 2, "negative": 1}


def test_a_mask_of_which_most_is_dropped_is_refused():
    with pytest.raises(
        InputError, match=r"most of the mask cannot be used, 510 of 1000 voxels .*500 zero, 10 negative"
    ):
        check_dropped("image.nii", {"not finite": 0, "zero": 500, "negative": 10}, 1000)


@pytest.mark.parametrize("lost", [490, 500])
def test_a_mask_of_which_no_more_than_half_is_dropped_is_used_with_a_warning(lost, caplog):
    check_dropped("image.nii", {"not finite": lost - 400, "zero": 400, "negative": 0}, 1000)
    assert f"{lost} of 1000 voxels left out" in caplog.text
    assert f"{lost - 400} not finite, 400 zero" in caplog.text


def test_a_mask_of_which_nothing_is_dropped_is_used_without_a_word(caplog):
    check_dropped("image.nii", {"not finite": 0, "zero": 0, "negative": 0}, 1000)
    assert not caplog.text
