"""Input at the edge of sense: it works within a stated error, or it ends in words. Never is the input handed back."""

import nibabel as nib
import numpy as np
import pytest

from n4flow import InputError, N4Parameters, correct
from n4flow.core.phantom import make_phantom
from n4flow.images.sampling import read_samples
from tests.conftest import demeaned_error, lee_wolberg_shin, rms

pytestmark = pytest.mark.usefixtures("kernel_set")


@pytest.fixture(scope="module")
def strong(tissues):
    """A head at 2 mm with 80 % INU: the field is worth correcting in any part of it."""
    return make_phantom(tissues, 2.0, inu_percent=80, noise_percent=2, seed=5)


def error_ratio(image, mask, truth, inside, size=(2.0, 2.0, 2.0), parameters=None):
    """Error of the field as a share of the field itself; the field must not be flat."""
    parameters = parameters or N4Parameters(shrink_factor=2)
    result = correct(image, mask, voxel_size_mm=size, parameters=parameters, device="cpu")
    assert np.ptp(np.log(result.bias[mask])) > 0.01, "the input was handed back"
    return rms(demeaned_error(result.bias, truth, inside)) / rms(demeaned_error(np.ones_like(truth), truth, inside))


def part_of(head, part):
    return head.image[part], head.image[part] > 400, head.bias[part], head.brain[part]


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("slices", [1, 2, 3])
def test_thin_slabs(strong, axis, slices):
    part = [slice(None)] * 3
    part[axis] = slice(46, 46 + slices)
    assert error_ratio(*part_of(strong, tuple(part)), parameters=N4Parameters()) < 0.6


def test_a_plane(strong):
    image, mask, truth, brain = part_of(strong, np.s_[:, :, 46])
    assert error_ratio(image, mask, truth, brain, (2.0, 2.0), N4Parameters()) < 0.6


def test_a_mask_that_touches_every_border(strong):
    part = np.s_[30:70, 25:85, 25:65]
    image, truth = strong.image[part], strong.bias[part]
    everything = np.ones(image.shape, dtype=bool)
    assert error_ratio(image, everything, truth, everything) < 0.6


def test_a_mask_of_two_far_components(strong):
    image, mask, truth, _ = part_of(strong, np.s_[:, :, :])
    mask = mask.copy()
    mask[30:70] = False
    # what they have in common is the intensity of the tissue: the step between them is seen, too
    assert error_ratio(image, mask, truth, mask & strong.brain) < 0.6


def test_few_distinct_values(strong):
    image, _, truth, brain = part_of(strong, np.s_[:, :, :])
    levels = np.clip(np.rint(image / image.max() * 12), 0, 12).astype(np.uint8)
    mask = levels > 2
    assert len(np.unique(levels[mask])) <= 10
    # spread over what was rounded to them, they are as good as grey levels; to ITK they are ten spikes, sharp already
    assert error_ratio(levels, mask, truth, brain & mask) < 0.2
    assert error_ratio(levels, mask, truth, brain & mask, parameters=lee_wolberg_shin(shrink_factor=2)) < 0.98


@pytest.mark.parametrize(
    "extreme",
    [
        {"fwhm": 1e-9},
        {"fwhm": 1000},
        {"wiener_noise": 1e-300},
        {"wiener_noise": 1e9},
        {"spline_distance_mm": 1e8},
        {"convergence_threshold": 1e308},
        {"stiffness": 1e-9},
        {"stiffness": 1e9},
        {"twicing": 1},
        {"histogram_bins": 30000},
    ],
    ids=str,
)
def test_settings_at_the_end_of_their_ranges_give_a_field(strong, extreme):
    image, mask, *_ = part_of(strong, np.s_[::2, ::2, ::2])
    parameters = N4Parameters(
        **{"iterations": (3, 3), "fwhm": (0.15, 0.1), "twicing": 0.9, "shrink_factor": 1} | extreme
    )
    result = correct(image, mask, voxel_size_mm=(4, 4, 4), parameters=parameters, device="cpu")
    assert np.isfinite(result.corrected).all()
    assert (result.bias > 0).all()


@pytest.mark.parametrize(
    "beyond",
    [
        {"fwhm": 1e200},
        {"fwhm": (0.2, 0.1, 0, 0.1)},
        {"spline_distance_mm": 1e-320},
        {"wiener_noise": 1e200},
        {"stiffness": 0},
        {"twicing": 1.1},
    ],
    ids=str,
)
def test_settings_beyond_their_ranges_are_refused(beyond):
    with pytest.raises(InputError, match=rf"n4\.{next(iter(beyond))}: .* give a"):
        N4Parameters(**beyond)


@pytest.mark.parametrize("count", [1, 20])
def test_hot_voxels(strong, count):
    image, mask, truth, brain = part_of(strong, np.s_[:, :, :])
    image = image.copy()
    rng = np.random.default_rng(3)
    places = np.argwhere(mask)
    for place in places[rng.choice(len(places), count, replace=False)]:
        image[tuple(place)] *= 1e4
    assert error_ratio(image, mask, truth, brain, parameters=N4Parameters(shrink_factor=1)) < 0.7


def test_voxels_that_cannot_be_used_do_not_count_in_the_mean_that_is_kept(strong):
    image, mask, *_ = part_of(strong, np.s_[:, :, :])
    rng = np.random.default_rng(5)
    broken = rng.random(image.shape) < 0.02
    image = np.where(broken, rng.choice([np.nan, np.inf, 0, -1e6], image.shape), image)
    corrected = correct(image, mask, voxel_size_mm=(2, 2, 2), device="cpu").corrected
    used = mask & ~broken
    assert corrected[used].sum(dtype=np.float64) == pytest.approx(image[used].sum(dtype=np.float64), rel=1e-7)


def test_zeros_in_the_mask(strong):
    image, mask, truth, brain = part_of(strong, np.s_[:, :, :])
    zeroed = np.where(np.random.default_rng(4).random(image.shape) < 0.01, 0, image)
    assert error_ratio(zeroed, mask, truth, brain) < 1.1 * error_ratio(image, mask, truth, brain)


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_huge_and_tiny_voxels(strong, scale, caplog):
    """The default knows no millimetres; a distance is refused where it does not fit, or said to find nothing."""
    image, mask, truth, brain = part_of(strong, np.s_[:, :, :])
    size = (2.0 * scale,) * 3
    assert error_ratio(image, mask, truth, brain, size) == pytest.approx(
        error_ratio(image, mask, truth, brain), rel=1e-5
    )
    distance = N4Parameters(spline_distance_mm=65)
    if scale > 1:
        with pytest.raises(InputError, match=r"spans along axis 0, which has .* raise n4\.spline_distance_mm"):
            correct(image, mask, voxel_size_mm=size, parameters=distance, device="cpu")
    else:
        assert "times as long" not in caplog.text
        flat = correct(
            image, mask, voxel_size_mm=size, parameters=lee_wolberg_shin(spline_distance_mm=65), device="cpu"
        )
        assert np.ptp(np.log(flat.bias)) < 1e-3
        assert "a span of the mesh is 2778 times as long as the image" in caplog.text
        assert "lower n4.spline_distance_mm, or mend the voxel size" in caplog.text


@pytest.mark.parametrize("shrink_factor", [16, 200])
def test_a_shrink_factor_larger_than_an_axis_is_limited(strong, shrink_factor):
    image, mask, truth, brain = part_of(strong, np.s_[:, :, :])
    ratio = error_ratio(image, mask, truth, brain, parameters=N4Parameters(shrink_factor=shrink_factor))
    assert ratio < 0.6


def test_a_volume_of_few_voxels_is_refused_in_words():
    with pytest.raises(InputError, match=r"only 27 usable samples .* leave it out: 3 x 3 x 3 voxels are too few"):
        correct(np.arange(1.0, 28.0).reshape(3, 3, 3), voxel_size_mm=(1, 1, 1), device="cpu")


@pytest.mark.parametrize(("shape", "size", "preset"), [((9, 8, 7), 5, "itk"), ((5, 5, 5), 100, "default")])
def test_a_file_of_few_voxels_is_refused_for_them_and_not_for_its_mesh(tmp_path, shape, size, preset):
    affine = np.diag([size, size, size, 1])
    nib.save(nib.Nifti1Image(np.arange(1.0, 1 + np.prod(shape)).reshape(shape), affine), tmp_path / "a.nii")
    nib.save(nib.Nifti1Image(np.ones(shape, dtype=np.uint8), affine), tmp_path / "m.nii")
    with pytest.raises(InputError, match=r"a\.nii: only .* voxels are too few for a field"):
        read_samples(tmp_path / "a.nii", tmp_path / "m.nii", N4Parameters.from_mapping({"preset": preset}))


@pytest.mark.parametrize(("size", "distance"), [(2e-9, 65), (0.5, 1e9)])
def test_a_mesh_for_no_image_is_refused_before_there_is_a_field_that_no_one_can_load(strong, size, distance):
    image, mask, *_ = part_of(strong, np.s_[:, :, :])
    with pytest.raises(
        InputError, match=r"volume: a span of the mesh is .* voxels long; lower n4\.spline_distance_mm, or"
    ):
        correct(
            image,
            mask,
            voxel_size_mm=(size, size, size / 2),
            parameters=N4Parameters(spline_distance_mm=distance),
            device="cpu",
        )
