"""The array code on a real GPU: run with ``pytest -m gpu`` on a machine that has one."""

import json

import nibabel as nib
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from n4flow import N4Parameters, bspline_fit, correct, sharpen_residual
from n4flow.derivatives import CorrectionFiles, correct_scan
from n4flow.device import select_device
from n4flow.estimate import estimate_field
from n4flow.field import Mesh
from n4flow.mask import mask_scan
from tests.conftest import samples_of

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def cupy():
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed: envs/requirements-gpu.txt", exc_type=ImportError)
    try:
        if cupy.cuda.runtime.getDeviceCount() == 0:
            pytest.skip("no GPU")
    except cupy.cuda.runtime.CUDARuntimeError as error:
        pytest.skip(f"no GPU ({error})")
    return cupy


@pytest.fixture(scope="module")
def samples(head):
    return samples_of(head.image, head.image > 300, (2.0, 2.0, 2.0))


PARAMETERS = [N4Parameters(shrink_factor=1), N4Parameters(shrink_factor=1, mesh="refined", iterations=(10, 10))]


@pytest.mark.parametrize("parameters", PARAMETERS)
def test_gpu_and_cpu_agree_and_reruns_give_the_same_bits(cupy, samples, parameters):
    on_cpu = estimate_field(samples, parameters)
    on_gpu = estimate_field(samples, parameters, xp=cupy)
    assert len(on_gpu.history) == len(on_cpu.history)
    tile = (slice(None),) * 3
    difference = on_gpu.field.log_tile(tile, cupy).get() - on_cpu.field.log_tile(tile)
    assert np.abs(difference).max() <= 1e-5
    assert_array_equal(estimate_field(samples, parameters, xp=cupy).field.lattice, on_gpu.field.lattice)


@pytest.mark.parametrize("shape", [(1, 40, 50), (33, 1, 35), (17, 19, 23)])
def test_odd_shapes(cupy, shape):
    rng = np.random.default_rng(1)
    image = np.exp(rng.normal(5, 0.3, shape))
    samples = samples_of(image, np.ones(shape, dtype=bool), (4.0, 4.0, 4.0))
    parameters = N4Parameters(iterations=(5,), shrink_factor=1)
    assert_allclose(
        estimate_field(samples, parameters, xp=cupy).field.lattice,
        estimate_field(samples, parameters).field.lattice,
        atol=1e-5,
    )


def test_arrays_on_the_gpu_stay_there(cupy, head):
    image = cupy.asarray(head.image)
    result = correct(image, image > 300, voxel_size_mm=(2, 2, 2), device="gpu", out=image)
    assert result.corrected is image
    assert isinstance(result.bias, cupy.ndarray)
    assert_allclose((result.corrected * result.bias).get(), head.image, rtol=3e-7)
    on_cpu = correct(head.image, head.image > 300, voxel_size_mm=(2, 2, 2), device="cpu")
    assert_allclose(np.log(result.bias.get()), np.log(on_cpu.bias), atol=1e-5)


def test_the_public_pieces_take_arrays_on_the_gpu(cupy, head):
    values = np.log(head.image[head.brain].astype(np.float64))
    assert_allclose(sharpen_residual(cupy.asarray(values)).get(), sharpen_residual(values), atol=1e-9)
    mesh = Mesh.of_grid((20, 21, 22), (2, 3, 4))
    bases = mesh.bases([np.arange(n) for n in (20, 21, 22)])
    field = np.random.default_rng(2).normal(size=(20, 21, 22))
    weights = np.ones(field.shape)
    fitted = bspline_fit(cupy.asarray(field), cupy.asarray(weights), [cupy.asarray(basis) for basis in bases])
    assert_allclose(fitted.get(), bspline_fit(field, weights, bases), atol=1e-9)


def test_a_file_is_corrected_on_the_gpu_and_its_sidecar_says_so(cupy, head, tmp_path):
    image, mask = tmp_path / "head.nii.gz", tmp_path / "mask.nii.gz"
    nib.save(nib.Nifti1Image(head.image, np.diag([2.0, 2, 2, 1])), image)
    mask_scan(image, None, mask, tmp_path / "mask.json", method="otsu", percentile=50)
    files = CorrectionFiles(*(tmp_path / name for name in ("c.nii.gz", "c.json", "f.json", "f.nii.gz")))
    correct_scan(image, mask, files, parameters=N4Parameters(), device=select_device("gpu").kind)
    facts = json.loads(files.sidecar.read_text())["N4"]
    assert facts["Device"].startswith("GPU")
    assert facts["SelfCheck"] < 3e-7
