"""What only a real GPU shows: run with ``pytest -m gpu`` on a machine that has one."""

import json
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from n4flow import N4Parameters, bspline_fit, correct, sharpen_residual
from n4flow.core.field import BiasField, Mesh
from n4flow.device import select_device
from n4flow.estimate import estimate_field
from n4flow.images.division import write_corrected
from n4flow.images.nifti import Volume
from n4flow.steps.correct import correct_scan
from n4flow.steps.derivatives import CorrectionFiles
from n4flow.steps.mask import mask_scan
from tests.conftest import lee_wolberg_shin, samples_of

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


PARAMETERS = [
    N4Parameters(shrink_factor=1),
    N4Parameters(shrink_factor=1, spans=(3, 8, 13)),
    lee_wolberg_shin((10, 10, 10), mesh="refined", spline_distance_mm=65),
    lee_wolberg_shin((5,), spans=(1, 2, 30)),
    N4Parameters(shrink_factor=1, histogram_bins=13000, iterations=(3,), twicing=0.9, fwhm=0.1),
]


@pytest.mark.parametrize("parameters", PARAMETERS)
def test_gpu_and_cpu_agree_and_reruns_give_the_same_bits(cupy, samples, parameters):
    on_cpu = estimate_field(samples, parameters)
    on_gpu = estimate_field(samples, parameters, xp=cupy)
    assert [line[:2] for line in on_gpu.history] == [line[:2] for line in on_cpu.history]
    tile = (slice(None),) * 3
    assert_allclose(on_gpu.field.log_tile(tile), on_cpu.field.log_tile(tile), atol=1e-5)
    for _ in range(3):
        again = estimate_field(samples, parameters, xp=cupy)
        assert_array_equal(again.field.lattice, on_gpu.field.lattice)
        assert again.history == on_gpu.history


@pytest.mark.parametrize("look_every", [1, 3])
def test_looking_at_the_flag_more_often_changes_nothing(cupy, samples, look_every, monkeypatch):
    parameters = N4Parameters(shrink_factor=1)
    expected = estimate_field(samples, parameters, xp=cupy)
    monkeypatch.setattr("n4flow.kernels.cuda.LOOK_EVERY", look_every)
    found = estimate_field(samples, parameters, xp=cupy)
    assert_array_equal(found.field.lattice, expected.field.lattice)
    assert found.history == expected.history


@pytest.mark.parametrize("shape", [(1, 40, 50), (33, 1, 35), (40, 50, 1), (17, 19, 23), (3, 3, 2001), (301, 5, 7)])
@pytest.mark.parametrize("weighted", [False, True])
def test_odd_shapes(cupy, shape, weighted):
    rng = np.random.default_rng(1)
    image = np.exp(rng.normal(5, 0.3, shape))
    samples = samples_of(image, rng.random(shape) < 0.95, (4.0, 4.0, 4.0))
    if weighted:
        samples = replace(samples, weights=rng.uniform(0.1, 2, shape).astype(np.float32))
    parameters = N4Parameters(iterations=(5,), twicing=0.9, fwhm=0.1, shrink_factor=1)
    assert_allclose(
        estimate_field(samples, parameters, xp=cupy).field.log_at(samples.positions),
        estimate_field(samples, parameters).field.log_at(samples.positions),
        atol=1e-5,
    )


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", [np.float32, np.uint16])
def test_arrays_on_the_gpu_stay_there(cupy, head, order, dtype):
    image = cupy.asarray(head.image.astype(dtype), order=order)
    original = image.get().astype(np.float32)
    output = {"out": image} if dtype == np.float32 else {}
    result = correct(image, image > 300, voxel_size_mm=(2, 2, 2), device="gpu", **output)
    assert not output or result.corrected is image
    assert isinstance(result.bias, cupy.ndarray)
    assert_allclose((result.corrected * result.bias).get(), original, rtol=3e-7)
    on_cpu = correct(original, original > 300, voxel_size_mm=(2, 2, 2), device="cpu")
    assert_allclose(np.log(result.bias.get()), np.log(on_cpu.bias), atol=1e-5)


def test_arrays_on_the_host_pass_through_the_gpu(cupy, head, monkeypatch):
    monkeypatch.setattr("n4flow.correction.TILE_VOXELS", 100_000)
    on_cpu, on_gpu = (correct(head.image, head.image > 300, voxel_size_mm=(2, 2, 2), device=d) for d in ("cpu", "gpu"))
    assert isinstance(on_gpu.corrected, np.ndarray)
    assert_allclose(np.log(on_gpu.bias), np.log(on_cpu.bias), atol=1e-5)
    assert_allclose(on_gpu.corrected * on_gpu.bias, head.image, rtol=3e-7)


def test_slabs_of_any_size_give_the_same_file_and_need_little_memory_on_the_device(cupy, tmp_path, monkeypatch):
    shape = (160, 200, 180)
    image = np.random.default_rng(5).uniform(10, 1000, shape).astype(np.float32)
    nib.save(nib.Nifti1Image(image, np.eye(4)), tmp_path / "image.nii")
    mesh = Mesh.of_distance(shape, (1, 1, 1), 40.0)
    field = BiasField(np.random.default_rng(6).normal(0, 0.3, mesh.lattice_shape), mesh, shape, np.eye(4))
    pool = cupy.get_default_memory_pool()
    written = []
    for slab_voxels in (200_000, 500_000):
        pool.free_all_blocks()
        before = pool.total_bytes()
        monkeypatch.setattr("n4flow.images.nifti.SLAB_VOXELS", slab_voxels)
        path = tmp_path / f"{slab_voxels}.nii"
        assert write_corrected(Volume(tmp_path / "image.nii"), field, path, xp=cupy) < 3e-7
        # three arrays and what is evaluated along two axes, of two tiles and their odd last ones
        assert pool.total_bytes() - before < 2 * 2 * 4 * 4 * slab_voxels + 2**22
        written.append(path.read_bytes())
    assert written[0] == written[1]


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
