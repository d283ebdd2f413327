"""The passes over the voxels one by one, and the one BLAS thread that all of them run in."""

import nibabel as nib
import numpy as np
import pytest
from numpy.testing import assert_array_equal
from threadpoolctl import threadpool_info, threadpool_limits

from n4flow import N4Parameters, correct
from n4flow.bspline import expand
from n4flow.correction import keep_mean_intensity, write_corrected
from n4flow.estimate import estimate_field
from n4flow.field import BiasField, Mesh
from n4flow.kernels import PlainKernels, plain
from n4flow.volume import Volume
from tests.conftest import samples_of

SHAPE = (7, 6, 5)


@pytest.fixture
def field():
    mesh = Mesh.of_grid(SHAPE, (2, 1, 1))
    # far from a mean of 0, so that a standard deviation is no coefficient of variation
    lattice = np.random.default_rng(5).normal(0.7, 0.4, mesh.lattice_shape)
    return BiasField(lattice, mesh, SHAPE, np.eye(4))


@pytest.mark.parametrize("block_voxels", [1, 60, 2**18])
@pytest.mark.parametrize("weighted", [False, True])
def test_statistics_are_those_of_the_samples_of_the_mask(field, block_voxels, weighted, monkeypatch):
    monkeypatch.setitem(plain.BLOCK_VOXELS, "numpy", block_voxels)
    rng = np.random.default_rng(6)
    log_image, mask = rng.normal(4, 1, SHAPE), rng.random(SHAPE) < 0.1  # so few that N is not N - 1
    mask[3] = False
    log_image[0, 0, 0], log_image[6, 5, 4], mask[0, 0, 0], mask[6, 5, 4] = -50, 50, False, False
    kernels = PlainKernels(log_image, np.where(mask, rng.uniform(0.1, 1, SHAPE), 0) if weighted else mask, np)
    bases = field.mesh.bases([np.arange(n) for n in SHAPE])
    kernels.set_mesh(bases)
    found = kernels.subtract(field.lattice)
    update = expand(field.lattice, bases)[mask]
    change, left = np.exp(-update), log_image[mask] - update
    assert found.cv == pytest.approx(np.std(change, ddof=1) / np.mean(change), rel=1e-12)
    assert (found.low, found.high) == pytest.approx((left.min(), left.max()), rel=1e-12)
    again = kernels.subtract(field.lattice)
    left -= update
    assert (again.low, again.high) == pytest.approx((left.min(), left.max()), rel=1e-12)
    assert again.cv == found.cv


def test_one_and_two_blas_threads_give_the_same_bits():
    # wide and thin: the products in which OpenBLAS does share out the sums
    image = np.random.default_rng(7).uniform(50, 100, (16, 500, 500)).astype(np.float32)
    samples = samples_of(image, np.ones(image.shape, dtype=bool))
    parameters = N4Parameters(spans=(2, 30, 30), iterations=(1,), shrink_factor=1)
    lattices = []
    for threads in (1, 2):
        with threadpool_limits(threads, user_api="blas"):
            lattices.append(estimate_field(samples, parameters).field.lattice)
    assert_array_equal(*lattices)


@pytest.fixture
def blas_threads(monkeypatch):
    """Numbers of BLAS threads with which splines are fitted and evaluated; outside it would be two."""
    found = set()

    def noting(function):
        def noted(*arguments):
            found.update(pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas")
            return function(*arguments)

        return noted

    for name in ("n4flow.kernels.plain.expand", "n4flow.kernels.plain.contract", "n4flow.field.expand"):
        monkeypatch.setattr(name, noting(expand if name.endswith("expand") else plain.contract))
    with threadpool_limits(2, user_api="blas"):
        if not any(pool["user_api"] == "blas" and pool["num_threads"] == 2 for pool in threadpool_info()):
            pytest.skip("this BLAS has no second thread")
        yield found


def files_of(folder, field):
    image = np.random.default_rng(8).uniform(50, 100, SHAPE).astype(np.float32)
    for name, values in (("image.nii", image), ("mask.nii", np.ones(SHAPE, np.uint8))):
        nib.save(nib.Nifti1Image(values, field.affine), folder / name)
    return Volume(folder / "image.nii"), Volume(folder / "mask.nii")


def test_an_estimate_uses_one_blas_thread(blas_threads):
    image = np.random.default_rng(9).uniform(50, 100, (12, 12, 12))
    estimate_field(samples_of(image, np.ones(image.shape, dtype=bool)), N4Parameters(iterations=(1,)))
    assert blas_threads == {1}


def test_a_corrected_array_uses_one_blas_thread(blas_threads):
    image = np.random.default_rng(9).uniform(50, 100, (12, 12, 12))
    correct(image, voxel_size_mm=(1, 1, 1), parameters=N4Parameters(iterations=(1,), shrink_factor=1), device="cpu")
    assert blas_threads == {1}


# `correct` would hide an estimate without a limit of its own, and the estimate a `correct` without: so each alone
def test_the_field_of_an_array_is_evaluated_with_one_blas_thread(blas_threads, field, monkeypatch):
    monkeypatch.setattr("n4flow.correction.estimate_field", lambda *_, **__: (field, []))
    correct(np.full(SHAPE, 7.0), voxel_size_mm=(1, 1, 1), device="cpu")
    assert blas_threads == {1}


def test_a_corrected_file_is_written_with_one_blas_thread(blas_threads, field, tmp_path):
    volume, _ = files_of(tmp_path, field)
    write_corrected(volume, field, tmp_path / "corrected.nii")
    assert blas_threads == {1}


def test_the_mean_intensity_is_kept_with_one_blas_thread(blas_threads, field, tmp_path):
    keep_mean_intensity(field, *files_of(tmp_path, field))
    assert blas_threads == {1}
