import json
import logging
import signal
from dataclasses import replace
from functools import cache

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from numpy.testing import assert_allclose

from n4flow.core.field import BiasField, Mesh
from n4flow.core.samples import Samples, log_where, sample_positions
from n4flow.errors import InputError
from n4flow.estimate import Iteration
from n4flow.images.fields import load_field
from n4flow.parameters import N4Parameters
from n4flow.qc.flags import FLAG_LIMITS
from n4flow.steps.derivatives import CorrectionFiles
from n4flow.steps.mask import mask_scan, otsu_threshold
from n4flow.steps.reference import _recover_lattice, agreement, reference_field, reference_parameters, reference_scan
from tests.conftest import rms
from tests.unit.references import itk_image, itk_positions


def every_nth(head, factor, part=np.s_[:, :, :]):
    """Samples of a phantom, or of a part of it, and its mask."""
    image = head.image[part]
    positions = sample_positions(image.shape, factor)
    values = image[np.ix_(*positions)]
    mask = values > otsu_threshold(head.image.ravel())
    affine = np.diag([2.0, 2, 2, 1])
    return Samples(log_where(values, mask), mask, positions, image.shape, (2.0, 2.0, 2.0), affine, {}, "head")


def parameters_of(samples, mask_voxels=10**9):
    return reference_parameters(samples.image_shape, mask_voxels)


#: Parts of the phantom, and of which voxels of them the samples are.
PARTS = {"3-D": (np.s_[:, :, :], 4), "six planes": (np.s_[:, :, 40:46], 2), "a plane": (np.s_[:, :, 40:41], 2)}


@pytest.fixture(scope="module")
def estimated_of(head):
    """Of one of `PARTS`: samples, what SimpleITK does with them, and its estimate."""

    @cache
    def estimate(name):
        part, factor = PARTS[name]
        samples = every_nth(head, factor, part)
        parameters = parameters_of(samples)
        return samples, parameters, reference_field(samples, parameters)

    return estimate


@pytest.fixture
def estimated(estimated_of):
    return estimated_of("3-D")


@pytest.fixture(scope="module")
def corrected_head(head, tmp_path_factory):
    """Files of the phantom, corrected in its brain."""
    image, mask, files = save_scan(tmp_path_factory.mktemp("head"), head.image, head.brain)
    reference_scan(image, mask, files)
    return files


def less_mean(log_field, inside):
    return log_field[inside] - log_field[inside].mean()


def save_scan(folder, image, mask, voxel_size_mm=(2.0, 2.0, 2.0)):
    for name, array in (("image", image), ("mask", mask.astype(np.uint8))):
        nib.save(nib.Nifti1Image(array, np.diag([*voxel_size_mm, 1])), folder / f"{name}.nii")
    names = ("corrected.nii", "corrected.json", "field.json")
    return folder / "image.nii", folder / "mask.nii", CorrectionFiles(*(folder / name for name in names))


def test_the_settings_are_those_that_simpleitk_has_if_nothing_is_set():
    n4, parameters = sitk.N4BiasFieldCorrectionImageFilter(), reference_parameters((200, 200, 200), 10**6)
    assert n4.GetMaximumNumberOfIterations() == parameters.iterations
    assert n4.GetConvergenceThreshold() == parameters.convergence_threshold
    assert n4.GetBiasFieldFullWidthAtHalfMaximum() == parameters.fwhm
    assert n4.GetWienerFilterNoise() == parameters.wiener_noise
    assert n4.GetNumberOfHistogramBins() == parameters.histogram_bins
    assert n4.GetNumberOfControlPoints() == tuple(spans + 3 for spans in parameters.spans)
    assert n4.GetMaskLabel() == 1
    assert parameters.shrink_factor == 4


@pytest.mark.parametrize(
    ("shape", "mask_voxels", "factor", "levels"),
    [
        ((256, 256, 180), 4_000_000, 4, 4),
        ((256, 256, 180), 4 * 4 * 4 * 5000, 4, 4),
        ((256, 256, 180), 4 * 4 * 4 * 5000 - 1, 3, 4),
        ((256, 256, 180), 30_000, 1, 4),
        ((256, 256, 180), 900, 1, 4),
        ((256, 256, 20), 400_000, 4, 4),
        ((256, 256, 8), 400_000, 4, 4),
        ((256, 256, 7), 400_000, 4, 3),
        ((256, 256, 3), 400_000, 4, 2),
        ((256, 256, 1), 40_000, 2, 4),
    ],
)
def test_small_masks_get_more_voxels_and_thin_stacks_fewer_levels(shape, mask_voxels, factor, levels):
    parameters = reference_parameters(shape, mask_voxels)
    assert (parameters.shrink_factor, parameters.iterations) == (factor, (50,) * levels)


@pytest.mark.parametrize("name", ["3-D", "a plane"])
def test_the_field_is_that_of_a_script_which_sets_nothing(head, estimated_of, name):
    part, factor = PARTS[name]
    image = np.ascontiguousarray(head.image[part])
    samples, _, (reference, *_) = estimated_of(name)
    flat = image.shape[2] == 1
    volume = itk_image(image[:, :, 0] if flat else image)
    factors = [factor] * volume.GetDimension()
    shrunk = sitk.Shrink(volume, factors)
    mask = sitk.Shrink(sitk.Cast(volume > otsu_threshold(head.image.ravel()), sitk.sitkUInt8), factors)
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    n4 = sitk.N4BiasFieldCorrectionImageFilter()
    n4.Execute(shrunk, mask)
    theirs = sitk.GetArrayFromImage(n4.GetLogBiasFieldAsImage(shrunk)).T.astype(np.float64)
    places = [p[0] + factor * itk_positions(len(p), len(p)) if len(p) > 1 else p for p in samples.positions]
    ours = reference.log_at(places)
    assert np.std(theirs) > 0.05
    assert_allclose(ours[:, :, 0] if flat else ours, theirs, atol=1e-6)


def test_full_resolution_has_the_field_at_its_true_place(head):
    """As of an image that begins and ends with the first and the last sample: what SimpleITK evaluates there."""
    samples = every_nth(head, 4)
    field = reference_field(samples, replace(parameters_of(samples), iterations=(2, 2, 2))).field
    lies = [(p[0], p[-1]) for p in samples.positions]
    assert any(first > 0 for first, _ in lies)
    n4 = sitk.N4BiasFieldCorrectionImageFilter()
    n4.SetMaximumNumberOfIterations([2, 2, 2])
    image = itk_image(np.where(samples.mask, np.exp(samples.log_image), 0))
    n4.Execute(image, itk_image(samples.mask, np.uint8))
    voxels = [first + itk_positions(last - first + 1, last - first + 1) for first, last in lies]
    full = sitk.Image([len(axis) for axis in voxels], sitk.sitkFloat32)
    assert_allclose(field.log_at(voxels), sitk.GetArrayFromImage(n4.GetLogBiasFieldAsImage(full)).T, atol=1e-6)


@pytest.mark.parametrize("spans", [(8, 8, 8), (4, 4, 4), (4, 2, 0)])
def test_a_spline_is_recovered_from_its_values_at_even_steps(spans):
    mesh = Mesh(spans, (0.0,) * 3, (1.0,) * 3)
    lattice = np.random.default_rng(2).normal(size=mesh.lattice_shape)
    field = BiasField(lattice, mesh, (9, 9, 9), np.eye(4))
    known = field.log_at([itk_positions(s + 1, 4 * s + 1) if s else np.zeros(1) for s in spans])
    recovered = replace(field, lattice=_recover_lattice(known.astype(np.float32).astype(np.float64), mesh))
    places = [np.linspace(0, s, 50) if s else np.zeros(1) for s in spans]
    assert_allclose(recovered.log_at(places), field.log_at(places), atol=1e-6)


def check_agreement(samples, parameters, reference):
    found = agreement(samples, parameters, reference)
    assert found.r >= 0.9999999
    assert 0 < found.rms <= 3e-5
    assert found.rms <= found.max <= 5e-4


@pytest.mark.parametrize("name", PARTS)
def test_our_arithmetic_is_simpleitks(estimated_of, name):
    check_agreement(*estimated_of(name))


@pytest.mark.parametrize("change", [{"fwhm": 0.1505}, {"wiener_noise": 0.0101}], ids=str)
def test_the_check_finds_arithmetic_that_is_off_by_a_hundredth(estimated, change):
    samples, parameters, reference = estimated
    assert agreement(samples, replace(parameters, **change), reference).rms > FLAG_LIMITS["agreement_rms"]


def test_the_check_takes_as_many_iterations_as_simpleitk_at_each_level(estimated):
    samples, parameters, reference = estimated
    levels = [level for level, *_ in reference.history]
    assert sorted(set(levels)) == [1, 2, 3, 4]
    assert len(levels) < 200, "it stopped by its threshold"
    one_less = reference._replace(history=reference.history[:-1])
    one_more = reference._replace(history=[*reference.history, Iteration(4, levels.count(4) + 1, 0.0)])
    for other in (one_less, one_more):
        assert agreement(samples, parameters, other).rms > 10 * agreement(samples, parameters, reference).rms


@pytest.mark.data
@pytest.mark.parametrize(
    "place",
    [
        "bids/sub-01/anat/sub-01_T1w.nii.gz",
        "bids/sub-02/perf/sub-02_asl.nii.gz",
        "mni152/t1.nii.gz",
        "individual/bet.nii.gz",
    ],
)
def test_our_arithmetic_is_simpleitks_on_real_scans(real_scans, tmp_path, place):
    image = real_scans.parent / place
    if not image.is_file():
        pytest.skip(f"no {place}")
    mask_scan(image, None, tmp_path / "mask.nii", tmp_path / "mask.json", method="otsu", percentile=50)
    files = CorrectionFiles(*(tmp_path / name for name in ("corrected.nii", "corrected.json", "field.json")))
    reference_scan(image, tmp_path / "mask.nii", files)
    found = json.loads(files.sidecar.read_text())["N4"]["Agreement"]
    assert found["r"] >= 0.9999999
    assert found["rms"] <= 5e-5


def test_two_runs_give_the_same_bits(head):
    samples = every_nth(head, 4)
    parameters = replace(parameters_of(samples), iterations=(3, 3))
    first = reference_field(samples, parameters).field.lattice
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(2)
    assert (reference_field(samples, parameters).field.lattice == first).all()


def test_ctrl_c_ends_simpleitk_as_it_ends_everything_else(head):
    class Stopping(logging.Handler):
        def emit(self, record):
            signal.raise_signal(signal.SIGINT)

    samples = every_nth(head, 4)
    logger, handler = logging.getLogger("n4flow.steps.reference"), Stopping()
    before, level = signal.signal(signal.SIGINT, signal.default_int_handler), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        with pytest.raises(KeyboardInterrupt):
            reference_field(samples, parameters_of(samples))
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        signal.signal(signal.SIGINT, before)


def test_weights_which_simpleitk_does_not_take_are_refused(head):
    samples = every_nth(head, 4)
    weighted = replace(samples, weights=np.where(samples.mask, 2, 0).astype(np.float32))
    with pytest.raises(InputError, match="head: its samples have confidence weights, which SimpleITK does not take"):
        reference_field(weighted, N4Parameters())


def test_sidecar_says_what_simpleitk_did_and_how_near_ours_came(head, corrected_head):
    facts = json.loads(corrected_head.sidecar.read_text())["N4"]
    assert facts["Parameters"] == reference_parameters(head.image.shape, int(head.brain.sum())).to_mapping()
    assert facts["Spans"] == [8, 8, 8]
    assert facts["Agreement"].keys() == {"r", "rms", "max"}
    assert facts["Agreement"]["rms"] < 5e-5
    assert 4 < len(facts["History"]) <= 200
    truth = np.log(head.bias)
    found = load_field(corrected_head.field).log_at([np.arange(n) for n in head.image.shape])
    left = less_mean(found - truth, head.brain)
    assert rms(left) < 0.8 * rms(less_mean(truth, head.brain))


def check_mean_in_the_mask(files, original, mask):
    corrected = np.asarray(nib.load(files.corrected).dataobj, dtype=np.float64)
    assert corrected[mask].sum() == pytest.approx(original[mask].sum(dtype=np.float64), rel=1e-5)


def test_the_mean_in_the_mask_is_kept(head, corrected_head):
    check_mean_in_the_mask(corrected_head, head.image, head.brain)


@pytest.mark.parametrize(
    "part", [np.s_[:, :, ::4], np.s_[:, :, 40:45], np.s_[:, :, 40:41]], ids=["thick", "five planes", "a plane"]
)
def test_the_mean_in_the_mask_of_few_planes_is_kept(head, tmp_path, part):
    """Intensities are gathered for a mesh on the image, and SimpleITK's begins and ends with the samples."""
    original = head.image[part]
    mask = original > 300
    image, mask_file, files = save_scan(tmp_path, original, mask, (2.0, 2.0, 2.0 * (part[2].step or 1)))
    reference_scan(image, mask_file, files)
    check_mean_in_the_mask(files, original, mask)
