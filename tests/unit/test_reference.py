import json
import logging
import signal
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from numpy.testing import assert_allclose

from n4flow import N4Parameters
from n4flow.derivatives import CorrectionFiles, correct_scan
from n4flow.errors import InputError
from n4flow.estimate import estimate_field
from n4flow.field import BiasField, Mesh
from n4flow.mask import otsu_threshold
from n4flow.phantom import make_phantom
from n4flow.reference import _grid_like, _recover_lattice, reference_field, reference_scan
from n4flow.samples import Samples, log_where, sample_positions
from tests.conftest import rms, samples_of


def shrunken_samples(head, shrink_factor, part=np.s_[:, :, :]):
    image = head.image[part]
    positions = sample_positions(image.shape, shrink_factor)
    values = image[np.ix_(*positions)]
    mask = values > otsu_threshold(head.image.ravel())
    affine = np.diag([2.0, 2, 2, 1])
    return Samples(log_where(values, mask), mask, positions, image.shape, (2.0, 2.0, 2.0), affine, {}, "head")


@pytest.mark.parametrize(
    "parameters",
    [
        N4Parameters(iterations=(20,), convergence_threshold=0),
        N4Parameters(mesh="refined", spline_distance_mm=80, iterations=(10, 10), convergence_threshold=0),
    ],
)
@pytest.mark.parametrize("part", [np.s_[:, :, :], np.s_[:, :, 40:41]], ids=["3-D", "2-D"])
def test_the_same_estimate_as_ours_up_to_the_whole_samples_of_its_mesh(head, parameters, part):
    samples = shrunken_samples(head, 3, part) if part != np.s_[:, :, 40:41] else shrunken_samples(head, 1, part)
    ours, reference = estimate_field(samples, parameters).field, reference_field(samples, parameters)
    assert [n.iteration for n in reference.history] == [n for m in parameters.iterations for n in range(1, m + 1)]
    difference = (ours.log_at(samples.positions) - reference.field.log_at(samples.positions))[samples.mask]
    difference -= difference.mean()
    spread = ours.log_at(samples.positions)[samples.mask].std()
    assert rms(difference) < 0.03 * spread


@pytest.mark.parametrize("setting", [{"fwhm": 0.4}, {"histogram_bins": 12}, {"wiener_noise": 1.0}], ids=str)
def test_settings_of_the_sharpening_reach_simpleitk(head, setting):
    image = head.image[::3, ::3, ::3]
    samples = samples_of(image, image > otsu_threshold(image.ravel()), (6.0, 6.0, 6.0))
    # spans from the first sample to the last, where the two meshes are one
    defaults = N4Parameters(spans=(3, 3, 3), shrink_factor=1, iterations=(10,), convergence_threshold=0)
    parameters = replace(defaults, **setting)

    def in_mask(estimate):
        log_field = estimate.field.log_at(samples.positions)[samples.mask]
        return log_field - log_field.mean()

    ours, at_defaults = (in_mask(estimate_field(samples, p)) for p in (parameters, defaults))
    assert rms(ours - at_defaults) > 5e-3, "the setting matters"
    assert rms(in_mask(reference_field(samples, parameters)) - ours) < 1e-5


def test_its_mesh_is_ours_to_less_than_a_sample(head):
    samples = shrunken_samples(head, 4)
    parameters = N4Parameters()
    mesh = estimate_field(samples, N4Parameters(iterations=(1,))).field.mesh
    _, grid_mesh = _grid_like(mesh, samples)
    for axis, step in enumerate((4, 4, 4)):
        ends = [m.start[axis] + np.array([0, m.spans[axis] * m.span_voxels[axis]]) for m in (mesh, grid_mesh)]
        assert np.abs(ends[0] - ends[1]).max() <= step / 2
    assert parameters.spline_distance_mm / 2.0 == mesh.span_voxels[0]


def test_the_lattice_is_recovered_from_the_field_that_simpleitk_evaluates(head):
    """Evaluated as SimpleITK stretches it, the lattice gives SimpleITK's own full-resolution field."""
    image = head.image[::4, ::4, ::4]
    volume = sitk.GetImageFromArray(np.ascontiguousarray(image.T))
    n4 = sitk.N4BiasFieldCorrectionImageFilter()
    n4.SetMaximumNumberOfIterations([5])
    n4.SetNumberOfControlPoints([7, 6, 7])
    n4.SetConvergenceThreshold(0)
    n4.Execute(volume, volume > 100)
    on_grid = sitk.GetArrayFromImage(n4.GetLogBiasFieldAsImage(volume)).T.astype(np.float64)
    mesh = Mesh.of_grid(image.shape, (4, 3, 4))
    field = BiasField(_recover_lattice(on_grid, mesh), mesh, image.shape, np.eye(4))
    assert_allclose(field.log_at([np.arange(n) for n in image.shape]), on_grid, atol=1e-5)
    full = sitk.GetImageFromArray(np.ascontiguousarray(head.image.T))
    stretched = sitk.GetArrayFromImage(n4.GetLogBiasFieldAsImage(full)).T
    positions = [np.linspace(0, n - 1, m) for n, m in zip(image.shape, head.image.shape, strict=True)]
    assert_allclose(field.log_at(positions), stretched, atol=2e-5)


def test_two_runs_give_the_same_bits(head):
    samples, parameters = shrunken_samples(head, 4), N4Parameters(iterations=(3,))
    first = reference_field(samples, parameters).field.lattice
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(2)
    assert (reference_field(samples, parameters).field.lattice == first).all()


def test_ctrl_c_ends_simpleitk_as_it_ends_everything_else(head):
    class Stopping(logging.Handler):
        def emit(self, record):
            signal.raise_signal(signal.SIGINT)

    logger, handler = logging.getLogger("n4flow.reference"), Stopping()
    before, level = signal.signal(signal.SIGINT, signal.default_int_handler), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        with pytest.raises(KeyboardInterrupt):
            reference_field(shrunken_samples(head, 4), N4Parameters())
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        signal.signal(signal.SIGINT, before)


def test_weights_which_simpleitk_does_not_take_are_refused(head):
    samples = shrunken_samples(head, 4)
    weighted = replace(samples, weights=np.where(samples.mask, 2, 0).astype(np.float32))
    with pytest.raises(InputError, match="head: its samples have confidence weights, which SimpleITK does not take"):
        reference_field(weighted, N4Parameters())


@pytest.mark.parametrize("preset", ["mri-head", "mri-brain"])
@pytest.mark.parametrize("inu_percent", [10, 100])
@pytest.mark.parametrize("where", ["brain", "head"])
def test_the_check_shows_no_stopping_rule(tissues, tmp_path, preset, inu_percent, where):
    """SimpleITK takes as many iterations as we did: what is left is the whole samples of its mesh."""
    head = make_phantom(tissues, 2.0, inu_percent=inu_percent, noise_percent=3, seed=31)
    mask = head.brain if where == "brain" else head.image > 300
    affine = np.diag([2.0, 2, 2, 1])
    for name, array in (("image", head.image), ("mask", mask.astype(np.uint8))):
        nib.save(nib.Nifti1Image(array, affine), tmp_path / f"{name}.nii")
    image, mask_file = tmp_path / "image.nii", tmp_path / "mask.nii"
    files = [
        CorrectionFiles(*(tmp_path / f"{who}-{role}" for role in ("c.nii", "c.json", "f.json")))
        for who in ("ours", "reference")
    ]
    parameters = N4Parameters.from_mapping({"preset": preset})
    correct_scan(image, mask_file, files[0], parameters=parameters, device="cpu")
    reference_scan(image, mask_file, files[0].sidecar, files[1], parameters=parameters)
    histories = [json.loads(one.sidecar.read_text())["N4"]["History"] for one in files]
    assert [line["Level"] for line in histories[0]] == [line["Level"] for line in histories[1]]
    everywhere = [np.arange(n) for n in mask.shape]
    ours, theirs = (BiasField.load(one.lattice).log_at(everywhere)[mask] for one in files)
    difference = ours - theirs
    assert rms(difference - difference.mean()) < 3e-3


@pytest.mark.parametrize("step", [1, 4], ids=["isotropic", "thick"])
@pytest.mark.parametrize("preset", ["mri-head", "mri-brain", "itk"])
def test_both_keep_the_mean_in_the_mask(head, tmp_path, preset, step):
    """SimpleITK's mesh differs from the one that the intensities are gathered for by a rounding to whole samples."""
    original = head.image[:, :, ::step]
    mask = original > 300
    for name, array in (("image", original), ("mask", mask.astype(np.uint8))):
        nib.save(nib.Nifti1Image(array, np.diag([2.0, 2, 2 * step, 1])), tmp_path / f"{name}.nii")
    inputs = tmp_path / "image.nii", tmp_path / "mask.nii"
    ours, reference = (
        CorrectionFiles(*(tmp_path / f"{who}-{role}" for role in ("c.nii", "c.json", "f.json"))) for who in "or"
    )
    parameters = N4Parameters.from_mapping({"preset": preset, "iterations": [10] * (4 if preset == "itk" else 2)})
    correct_scan(*inputs, ours, parameters=parameters, device="cpu")
    reference_scan(*inputs, ours.sidecar, reference, parameters=parameters)
    for files, bound in ((ours, 1e-8), (reference, 1e-5)):
        corrected = np.asarray(nib.load(files.corrected).dataobj, dtype=np.float64)
        assert corrected[mask].sum() == pytest.approx(original[mask].sum(dtype=np.float64), rel=bound)
