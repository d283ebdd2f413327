"""What must not matter to the estimate, on random small heads."""

from dataclasses import replace
from functools import cache

import nibabel as nib
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from n4flow import N4Parameters, correct
from n4flow.core.field import Mesh
from n4flow.core.phantom import make_phantom
from n4flow.estimate import estimate_field
from n4flow.steps.mask import otsu_threshold
from tests.conftest import lee_wolberg_shin, samples_of

# every example estimates; a few dozen are enough to find an axis that was mixed up
SEARCH = settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])

SIZE = (6.0, 6.0, 6.0)
PARAMETERS = {
    "default": N4Parameters(
        shrink_factor=1, iterations=(4, 4), twicing=0.9, fwhm=(0.15, 0.08), convergence_threshold=0
    ),
    "fixed": lee_wolberg_shin((8,), spline_distance_mm=80, convergence_threshold=0),
    "refined": lee_wolberg_shin((4, 4), mesh="refined", spline_distance_mm=80, convergence_threshold=0),
}
KINDS = st.sampled_from(list(PARAMETERS))


@pytest.fixture(scope="module")
def small(head):
    """Every third voxel of the phantom and its foreground."""
    return head.image[::3, ::3, ::3], head.image[::3, ::3, ::3] > 300


def log_field(image, mask, kind, size=SIZE, mesh=None):
    samples = samples_of(image, mask, size)
    return estimate_field(samples, PARAMETERS[kind], mesh=mesh).field.log_at(samples.positions)


@pytest.fixture
def expected(small, kernel_set):
    """The field of the small head as it is, by the kind of parameters."""
    return cache(lambda kind: log_field(*small, kind))


@SEARCH
@given(st.permutations([0, 1, 2]), st.sets(st.integers(0, 2)), KINDS)
def test_axes_may_be_permuted_and_flipped(small, expected, order, flipped, kind):
    image, mask = small
    turned = [np.flip(array.transpose(order), tuple(flipped)) for array in (image, mask)]
    found = log_field(*turned, kind)
    assert_allclose(found, np.flip(expected(kind).transpose(order), tuple(flipped)), atol=1e-6)


@SEARCH
@given(st.floats(-6, 6), KINDS)
def test_intensities_may_be_scaled(small, expected, exponent, kind):
    image, mask = small
    scaled = image.astype(np.float64) * 10**exponent
    assert_allclose(log_field(scaled, mask, kind), expected(kind), atol=1e-6)


@pytest.mark.usefixtures("kernel_set")
@SEARCH
@given(st.sampled_from([np.nan, np.inf, -np.inf, 0.0, -5.0, 1e30]))
def test_voxels_outside_the_mask_may_hold_anything(small, value):
    image, mask = small
    settings = {"voxel_size_mm": SIZE, "parameters": PARAMETERS["default"], "device": "cpu"}
    with np.errstate(invalid="ignore"):
        other = correct(np.where(mask, image, value), mask, **settings)
    expected = correct(image, mask, **settings)
    np.testing.assert_array_equal(other.field.lattice, expected.field.lattice)


@pytest.mark.usefixtures("kernel_set")
@SEARCH
@given(st.tuples(*[st.tuples(st.integers(0, 4), st.integers(0, 4))] * 3), KINDS)
def test_background_may_be_added_around_on_the_same_domain(small, widths, kind):
    image, mask = small
    mesh = Mesh.of_distance(image.shape, SIZE, 80.0)
    moved = Mesh(
        mesh.spans, tuple(s + before for s, (before, _) in zip(mesh.start, widths, strict=True)), mesh.span_voxels
    )
    inner = tuple(slice(before, before + n) for (before, _), n in zip(widths, image.shape, strict=True))
    padded = log_field(np.pad(image, widths), np.pad(mask, widths), kind, mesh=moved)[inner]
    assert_allclose(padded, log_field(image, mask, kind, mesh=mesh), atol=1e-9)


@SEARCH
@given(st.floats(0.05, 20.0), KINDS)
def test_voxel_and_mesh_may_be_measured_in_another_unit(small, expected, unit, kind):
    image, mask = small
    parameters = PARAMETERS[kind]
    if parameters.spline_distance_mm:
        parameters = replace(parameters, spline_distance_mm=80 * unit)
    samples = samples_of(image, mask, tuple(size * unit for size in SIZE))
    found = estimate_field(samples, parameters).field.log_at(samples.positions)
    assert_allclose(found, expected(kind), atol=1e-6)


def changes_of_two_corrections(image, mask, size, parameters):
    """Standard deviation of the log field of a correction, and of the correction of what it made."""
    first = correct(image, mask, voxel_size_mm=size, parameters=parameters, device="cpu")
    second = correct(first.corrected, mask, voxel_size_mm=size, parameters=parameters, device="cpu")
    return [float(np.std(np.log(result.bias[mask]))) for result in (first, second)]


@pytest.mark.parametrize("inu_percent", [10, 40, 100])
def test_a_corrected_image_is_hardly_changed_again(tissues, inu_percent):
    head = make_phantom(tissues, 2.0, inu_percent=inu_percent, noise_percent=3, seed=12)
    parameters = N4Parameters()
    for mask in (head.brain, head.image > 300):
        first, second = changes_of_two_corrections(head.image, mask, (2, 2, 2), parameters)
        # of a weak field what changes again is a larger share
        assert second < max(0.1 * first, 0.006)


@pytest.mark.data
@pytest.mark.parametrize("subject", ["01", "02"])
def test_a_corrected_scan_is_hardly_changed_again(real_scans, subject):
    scan = nib.load(real_scans / f"sub-{subject}" / "anat" / f"sub-{subject}_T1w.nii.gz")
    image = np.asarray(scan.dataobj, dtype=np.float32)
    mask = image > otsu_threshold(image[::2, ::2, ::2].ravel())
    size = tuple(float(length) for length in scan.header.get_zooms()[:3])
    first, second = changes_of_two_corrections(image, mask, size, N4Parameters())
    # where there is hardly a field, as in the first scan, what changes again is a larger share of it, and still little
    assert second < max(0.1 * first, 0.013)
