"""The estimate against the truth, and against itself."""

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from n4flow import InputError, N4Parameters, correct
from n4flow.correction import read_samples
from n4flow.estimate import estimate_field
from n4flow.field import Mesh
from n4flow.kernels import plain
from n4flow.mask import make_mask, otsu_threshold
from n4flow.phantom import make_phantom
from n4flow.samples import sample_positions
from n4flow.volume import Volume
from tests.conftest import demeaned_error, rms, samples_of
from tests.unit.references import simpleitk_log_field


@pytest.fixture(scope="module")
def small_head(head):
    """Every fourth voxel of the phantom, with its Otsu mask."""
    image = head.image[::3, ::3, ::3]
    return image, image > otsu_threshold(image.ravel())


@pytest.mark.parametrize(("inu_percent", "where"), [(20, "head"), (40, "head"), (20, "brain"), (40, "brain")])
def test_defaults_come_closer_to_the_truth_than_simpleitk_at_its_defaults(tissues, inu_percent, where):
    head = make_phantom(tissues, 2.0, inu_percent=inu_percent, noise_percent=3, seed=100 + inu_percent)
    mask = head.brain if where == "brain" else head.image > otsu_threshold(head.image.ravel())
    ours = correct(head.image, mask, voxel_size_mm=(2, 2, 2), device="cpu")
    grid = np.ix_(*sample_positions(mask.shape, 4))
    # SimpleITK's 4 levels of 50 iterations, spans doubling from 1, every 4th voxel
    reference = np.exp(simpleitk_log_field(head.image[grid], mask[grid], [50] * 4, (1, 1, 1), threshold=1e-3))
    error = rms(demeaned_error(ours.bias[grid], head.bias[grid], head.brain[grid]))
    reference_error = rms(demeaned_error(reference, head.bias[grid], head.brain[grid]))
    assert error <= (0.7 if inu_percent == 20 else 0.8) * reference_error


@pytest.mark.parametrize("parameters", [N4Parameters(), N4Parameters(mesh="refined", iterations=(3, 3))])
def test_two_runs_and_blocks_of_any_size_give_the_same_bits(small_head, parameters, monkeypatch):
    samples = samples_of(*small_head, voxel_size_mm=(6.0, 6.0, 6.0))
    first = estimate_field(samples, parameters).field.lattice
    assert_array_equal(estimate_field(samples, parameters).field.lattice, first)
    # blocks are a constant of the code; another constant may change no more than rounding
    monkeypatch.setattr(plain, "BLOCK_VOXELS", 1000)
    assert_allclose(estimate_field(samples, parameters).field.lattice, first, atol=1e-10)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_mirrored_image_has_the_mirrored_field(small_head, axis):
    image, mask = small_head
    parameters = N4Parameters(shrink_factor=1, iterations=(10,))
    field = estimate_field(samples_of(image, mask, (6, 6, 6)), parameters).field.lattice
    mirrored = estimate_field(
        samples_of(np.flip(image, axis), np.flip(mask, axis), (6, 6, 6)), parameters
    ).field.lattice
    assert_allclose(np.flip(mirrored, axis), field, atol=1e-6)


def test_voxels_outside_the_mask_and_the_intensity_scale_do_not_matter(small_head):
    image, mask = small_head
    parameters = N4Parameters(shrink_factor=1, iterations=(10,))
    field = estimate_field(samples_of(image, mask, (6, 6, 6)), parameters).field.lattice
    other = np.where(mask, image * 1e6, 12345.0)
    assert_allclose(estimate_field(samples_of(other, mask, (6, 6, 6)), parameters).field.lattice, field, atol=1e-6)


def test_history_tells_when_the_threshold_was_reached(small_head):
    parameters = N4Parameters(convergence_threshold=5e-3, strong_field_log=None)
    history = estimate_field(samples_of(*small_head, (6, 6, 6)), parameters).history
    assert [line.iteration for line in history] == list(range(1, len(history) + 1))
    assert all(line.cv > 5e-3 for line in history[:-1])
    assert history[-1].cv <= 5e-3


def test_a_strong_field_is_followed_further(tissues):
    """Its threshold falls in proportion to what the updates add up to."""
    counts = {}
    for inu_percent in (10, 100):
        head = make_phantom(tissues, 2.0, inu_percent=inu_percent, noise_percent=3, seed=7)
        part = (slice(None, None, 3),) * 3
        samples = samples_of(head.image[part], head.brain[part], (6.0, 6.0, 6.0))
        for strong_field_log in (None, 0.1):
            parameters = N4Parameters(strong_field_log=strong_field_log)
            cvs = [line.cv for line in estimate_field(samples, parameters).history]
            limits = [1e-3 * min(1, (strong_field_log or np.inf) / sum(cvs[: i + 1])) for i in range(len(cvs))]
            assert [cv <= limit for cv, limit in zip(cvs, limits, strict=True)] == [False] * (len(cvs) - 1) + [True]
            counts[inu_percent, strong_field_log] = len(cvs)
    assert counts[100, 0.1] > counts[100, None]
    assert counts[10, 0.1] == counts[10, None]


def test_microscopy_is_to_millimetres_what_mri_head_is_to_heads(small_head):
    image, mask = small_head
    lattices = []
    for preset in ("mri-head", "microscopy"):
        parameters = N4Parameters.from_mapping({"preset": preset})
        voxel_size_mm = (parameters.spline_distance_mm / 10,) * 3
        lattices.append(estimate_field(samples_of(image, mask, voxel_size_mm), parameters).field.lattice)
    assert_allclose(*lattices, atol=1e-9)


def test_too_few_samples_one_intensity_and_too_fine_a_mesh_are_refused(small_head):
    image, mask = small_head
    few = np.zeros_like(mask)
    few[10:15, 10:15, 10:15] = True
    with pytest.raises(InputError, match=r"only 125 usable samples .* fewer than 1000; give a larger mask"):
        estimate_field(samples_of(image, few), N4Parameters())
    with pytest.raises(InputError, match="fewer than 1000; leave it out: 9 x 8 x 7 voxels are too few for a field"):
        estimate_field(samples_of(image[:9, :8, :7], np.ones((9, 8, 7), dtype=bool)), N4Parameters())
    with pytest.raises(InputError, match="the same intensity"):
        estimate_field(samples_of(np.full_like(image, 7.0), np.ones_like(mask)), N4Parameters())
    with pytest.raises(InputError, match="spans along axis 0"):
        estimate_field(samples_of(image, mask), N4Parameters(spline_distance_mm=0.5))
    with pytest.raises(InputError, match="spans along axis 0"):
        estimate_field(samples_of(image, mask), N4Parameters(), mesh=Mesh.of_grid(image.shape, (99, 2, 2)))


@pytest.mark.data
def test_every_fourth_voxel_gives_the_field_of_all_voxels(real_scans, tmp_path):
    image = real_scans / "sub-01" / "anat" / "sub-01_T1w.nii.gz"
    make_mask(image, tmp_path / "mask.nii.gz")
    mask = Volume(tmp_path / "mask.nii.gz").mean() > 0
    everywhere = [np.arange(n) for n in mask.shape]
    fields = [
        estimate_field(
            read_samples(image, tmp_path / "mask.nii.gz", N4Parameters(shrink_factor=shrink))[0],
            N4Parameters(shrink_factor=shrink),
        ).field
        for shrink in (4, 1)
    ]
    difference = fields[0].log_at(everywhere)[mask] - fields[1].log_at(everywhere)[mask]
    assert rms(difference - difference.mean()) <= 2e-3
