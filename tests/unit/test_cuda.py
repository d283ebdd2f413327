"""The CUDA kernels without a GPU: their source compiled for GPUs, and run on the host by a stand-in for CuPy."""

import itertools
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from n4flow import N4Parameters, correct
from n4flow.core.bspline import one_blas_thread
from n4flow.core.field import BiasField, Mesh
from n4flow.core.fit import LeeWolbergShin, PenalisedLeastSquares
from n4flow.core.samples import box_of
from n4flow.core.sharpening import expected_log_values, linear_histogram, sharpening_gain
from n4flow.device import Device, to_host
from n4flow.estimate import estimate_field
from n4flow.images.division import write_corrected
from n4flow.images.nifti import Volume
from n4flow.kernels import PlainKernels, cuda
from n4flow.parameters import Stage
from tests.conftest import REPOSITORY, samples_of
from tests.unit import strict_device
from tests.unit.strict_device import COMPILER, RawModule, StrictModule, running_in_order

DEVICE = StrictModule()


@pytest.fixture
def device(monkeypatch):
    if COMPILER is None:
        pytest.skip("g++ is not there to compile the kernels for the host")
    monkeypatch.setitem(sys.modules, "cupy", DEVICE)
    monkeypatch.setitem(sys.modules, "cupyx", strict_device.Cupyx)
    return DEVICE


@pytest.mark.parametrize("capability", [75, 80, 90, 100])
def test_source_compiles_without_a_warning(capability):
    nvrtc = pytest.importorskip("cupy_backends.cuda.libs.nvrtc", reason="no CuPy here", exc_type=ImportError)
    try:
        version = nvrtc.getVersion()
    except RuntimeError as error:
        pytest.skip(f"NVRTC is not installed: envs/requirements-test.txt ({error})")
    if capability >= 100 and version < (12, 8):
        pytest.skip(f"NVRTC {version} does not know sm_{capability}")
    of_cupy = ("-ftz=true", "--device-as-default-execution-space")
    options = (*cuda.compiler_options(), *of_cupy, f"-arch=sm_{capability}")
    program = nvrtc.createProgram(cuda.SOURCE.read_text(), "cuda.cu", (), ())
    try:
        nvrtc.compileProgram(program, options)
    except nvrtc.NVRTCError:
        pytest.fail(nvrtc.getProgramLog(program))
    assert nvrtc.getProgramLog(program).strip("\0\n ") == ""
    assert b"ELF" in nvrtc.getCUBIN(program)[:4]


def random_case(shape, kept=0.7, seed=1, weighted=False):
    """Two tissues under a field, on a grid, with holes in the mask and planes without any of it."""
    rng = np.random.default_rng(seed)
    field = sum(
        np.linspace(0, 0.3, n).reshape([-1 if a == axis else 1 for a in range(3)]) for axis, n in enumerate(shape)
    )
    log_image = np.where(rng.random(shape) < 0.4, 4.0, 4.6) + rng.normal(0, 0.03, shape) + field
    mask = rng.random(shape) < kept
    for axis in range(3):
        if shape[axis] > 8:
            np.moveaxis(mask, axis, 0)[[0, 3, 4]] = False
    log_image[~mask] = rng.choice([np.nan, np.inf, 1e30], np.count_nonzero(~mask))
    if not weighted:
        return log_image, mask
    return log_image, np.where(mask, rng.uniform(0.1, 2, shape), 0).astype(np.float32)


@one_blas_thread
def fit_on(mesh, shape, weights, kind="penalised"):
    bases = mesh.bases([np.arange(n) for n in shape])
    if kind == "penalised":
        return PenalisedLeastSquares(weights, bases, [n / max(shape) for n in mesh.span_voxels], 2e-6)
    return LeeWolbergShin(weights, bases)


def run_stage(kernels, fit, iterations, lattice=None, fwhm=0.1, twicing=0.0):
    shape = [basis.shape[1] for basis in fit.bases]
    kernels.start_stage(Stage(iterations, fwhm, twicing), fit, np.zeros(shape) if lattice is None else lattice)
    for _ in range(iterations):
        kernels.subtract(kernels.fit(kernels.sharpen()))
        if kernels.converged():
            break
    return kernels.end_stage()


FITS = {
    "penalised": N4Parameters(iterations=(4,), twicing=0.9, fwhm=0.1, convergence_threshold=0),
    "lee-wolberg-shin": N4Parameters(
        fit="lee-wolberg-shin", iterations=(4,), fwhm=0.12, twicing=0, convergence_threshold=0
    ),
}


CASES = [
    ((23, 18, 37), (2, 3, 1), {}),
    ((23, 18, 37), (1, 1, 1), {"weighted": True}),
    ((37, 18, 23), (9, 7, 5), {"kept": 0.3}),
    ((9, 33, 65), (1, 30, 60), {"weighted": True}),
    ((1, 40, 50), (1, 2, 3), {}),
    ((40, 1, 50), (2, 2, 2), {"weighted": True}),
    ((70, 66, 1), (4, 2, 2), {}),
    ((1, 1, 600), (1, 1, 20), {"kept": 0.9}),
    ((5, 6, 200), (2, 2, 2), {"kept": 0.02}),
]


@pytest.mark.parametrize("kind", FITS)
@pytest.mark.parametrize(("shape", "spans", "options"), CASES)
def test_lattice_and_statistics_agree_with_the_plain_passes(device, shape, spans, options, kind):
    if kind == "penalised" and np.prod([n + 3 for n in spans]) > 2500:
        pytest.skip("no mesh for this fit")
    log_image, weights = random_case(shape, **options)
    parameters = FITS[kind]
    mesh = Mesh.of_grid(shape, spans)
    fit = fit_on(mesh, shape, weights, kind)
    plain = PlainKernels(np.where(weights > 0, log_image, 0), weights, parameters)
    on_device = cuda.CudaKernels(log_image, weights, parameters)
    lattices = [None, None]
    for stage in parameters.stages, N4Parameters().stages[-1:]:  # the same mesh again, with another width, and twiced
        for n, kernels in enumerate((plain, on_device)):
            lattices[n], cvs = run_stage(kernels, fit, 4, lattices[n], stage[0].fwhm, stage[0].twicing)
            if kernels is plain:
                expected = cvs
        assert_allclose(cvs, expected, rtol=1e-5, atol=1e-7)
    fields = [BiasField(lattice, mesh, shape, np.eye(4)).log_tile((slice(None),) * 3) for lattice in lattices]
    assert_allclose(fields[1][weights > 0], fields[0][weights > 0], atol=1e-6)
    assert np.ptp(fields[0][weights > 0]) > 0.01


@pytest.mark.parametrize("bins", [10, 37, 200, 257, 512, 1024, 1025, 9000, 13000])
@pytest.mark.parametrize(("twicing", "as_itk"), [(0, True), (0, False), (0.9, False)])
def test_a_histogram_of_any_number_of_bins_is_sharpened(device, bins, twicing, as_itk):
    shape = (14, 15, 16)
    log_image, mask = random_case(shape)
    if not as_itk:  # which divides by nothing but rounding where the histogram has a gap
        log_image[tuple(index[0] for index in mask.nonzero())] = 7
    fit = "lee-wolberg-shin" if as_itk else "penalised"
    parameters = N4Parameters(fit=fit, histogram_bins=bins, twicing=twicing)
    assert parameters.as_itk == as_itk
    kernels = cuda.CudaKernels(log_image, mask, parameters)
    mesh = Mesh.of_grid(shape, (1, 1, 1))
    fwhm = 0.1
    kernels.start_stage(
        Stage(1, fwhm, twicing), fit_on(mesh, shape, mask, parameters.fit), np.zeros(mesh.lattice_shape)
    )
    values, step = kernels.sharpen().get().T
    low, high = log_image[mask].min(), log_image[mask].max()
    histogram = linear_histogram(log_image[mask], low, high, bins)
    settings = {"fwhm": fwhm, "wiener_noise": parameters.wiener_noise, "twicing": twicing, "as_itk": as_itk}
    table = expected_log_values(histogram, low, high, **settings)
    expected = np.linspace(low, high, bins) - table
    near = 2e-6 if as_itk else 1e-5  # over a larger range: shares are counted in units of 2**-16
    assert_allclose(values, expected[:-1], atol=near)
    assert_allclose(step, np.diff(expected), atol=near)
    assert kernels.gain.get()[0] == pytest.approx(sharpening_gain(histogram, table, low, high), abs=1e-5)
    assert not kernels.counts.get().any(), "the next iteration begins with an empty histogram"


@pytest.mark.parametrize("kind", FITS)
@pytest.mark.parametrize("weighted", [False, True])
def test_no_bit_depends_on_the_order_of_threads_or_blocks(device, weighted, kind, monkeypatch):
    shape = (23, 18, 37)
    monkeypatch.setattr(cuda, "HISTOGRAM_VOXELS", 2**9)
    cuda._module.cache_clear()
    cuda._kernel.cache_clear()
    case = random_case(shape, weighted=weighted)
    fit = fit_on(Mesh.of_grid(shape, (3, 2, 2)), shape, case[1], kind)
    results = []
    for order in (0, 0, 1, 2, 3):
        with running_in_order(order):
            kernels = cuda.CudaKernels(*case, FITS[kind])
            results.append((*run_stage(kernels, fit, 3, twicing=0.9), kernels.rows.values.get()))
    cuda._module.cache_clear()
    cuda._kernel.cache_clear()
    for lattice, cvs, values in results[1:]:
        assert_array_equal(lattice, results[0][0])
        assert cvs == results[0][1]
        assert_array_equal(values, results[0][2])


@pytest.mark.parametrize("kind", FITS)
@pytest.mark.parametrize("threshold", [0, 5e-3])
def test_looking_at_the_flag_seldom_changes_nothing(device, kind, threshold, monkeypatch):
    shape = (20, 18, 22)
    case, mesh = random_case(shape), Mesh.of_grid(shape, (2, 2, 2))
    parameters = replace(FITS[kind], iterations=(21,), convergence_threshold=threshold)
    fit = fit_on(mesh, shape, case[1], kind)
    found = []
    for every in (1, 8):
        monkeypatch.setattr(cuda, "LOOK_EVERY", every)
        kernels = cuda.CudaKernels(*case, parameters)
        first = run_stage(kernels, fit, 21)
        found.append((*first, *run_stage(kernels, fit, 21, first[0], 0.08)))
    assert_array_equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]
    assert_array_equal(found[0][2], found[1][2])
    assert found[0][3] == found[1][3]
    history = found[0][1]
    assert (len(history) == 21) if threshold == 0 else (1 < len(history) < 21 and len(history) % 8 != 0)
    plain = PlainKernels(np.where(case[1], case[0], 0), case[1], parameters)
    lattice, cvs = run_stage(plain, fit, 21)
    assert len(cvs) == len(history)
    if threshold:  # at 0 a stage ends when an update is nothing in float32
        assert len(run_stage(plain, fit, 21, lattice, 0.08)[1]) == len(found[0][3])


def test_values_that_are_all_the_same_end_a_stage(device):
    shape = (12, 12, 12)
    mask = np.ones(shape, dtype=bool)
    kernels = cuda.CudaKernels(np.full(shape, 5.0), mask, N4Parameters(convergence_threshold=0))
    lattice, cvs = run_stage(kernels, fit_on(Mesh.of_grid(shape, (1, 1, 1)), shape, mask), 16)
    assert cvs == []
    assert not lattice.any()


LEE = {"fit": "lee-wolberg-shin", "spline_distance_mm": 100, "iterations": (12, 12), "fwhm": 0.12, "twicing": 0}


@pytest.mark.parametrize("settings", [{}, LEE, {**LEE, "mesh": "refined"}], ids=["default", "fixed", "refined"])
def test_an_estimate_is_that_of_the_plain_passes(device, head, settings):
    samples = samples_of(head.image[::4, ::4, ::4], head.image[::4, ::4, ::4] > 300, (8.0, 8.0, 8.0))
    parameters = N4Parameters(**settings, shrink_factor=1)
    plain = estimate_field(samples, parameters)
    on_device = estimate_field(samples, parameters, xp=device)
    assert [line[:2] for line in on_device.history] == [line[:2] for line in plain.history]
    tile = (slice(None),) * 3
    assert_allclose(on_device.field.log_tile(tile), plain.field.log_tile(tile), atol=1e-6)


SHAPE = (21, 34, 17)


@pytest.fixture
def field():
    mesh = Mesh.of_distance(SHAPE, (1, 1, 1), 9.0)
    return BiasField(np.random.default_rng(3).normal(0, 0.4, mesh.lattice_shape), mesh, SHAPE, np.eye(4))


@pytest.mark.parametrize("axes", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("aliased", ["neither", "corrected", "ratio"])
def test_an_image_with_any_strides_is_divided_by_the_field(device, field, axes, aliased):
    tile = (slice(2, 19), slice(None), slice(5, 17))
    shape = tuple(part.stop - part.start if part.stop else n for part, n in zip(tile, SHAPE, strict=True))
    image = np.random.default_rng(4).uniform(-5, 900, shape).astype(np.float32)
    image[3, 4, 5] = np.nan

    def in_axes(value):
        inverse = np.argsort(axes)
        return device.asarray(np.ascontiguousarray(np.full(shape, value).transpose(axes))).transpose(*inverse)

    given = in_axes(np.float32(0))
    given[...] = device.asarray(image)
    outputs = [given if aliased == name else device.empty(shape, dtype=np.float32) for name in ("corrected", "ratio")]
    for order in (0, 1):
        given[...] = device.asarray(image)
        with running_in_order(order):
            cuda.FieldDivision(field).divide(tile, given, *outputs)
        corrected, ratio = (output.get() for output in outputs)
        assert_allclose(np.log(ratio), field.log_tile(tile), atol=1e-6)
        assert_array_equal(corrected, image / ratio)


@pytest.mark.parametrize("shape", [(40, 50, 1), (1, 40, 50), (3, 2, 70)])
def test_flat_and_thin_images_are_divided(device, shape):
    mesh = Mesh.of_grid(shape, (2, 2, 2))
    field = BiasField(np.random.default_rng(3).normal(0, 0.4, mesh.lattice_shape), mesh, shape, np.eye(4))
    image, corrected, ratio = (device.zeros(shape, dtype=np.float32) for _ in range(3))
    tile = (slice(None),) * 3
    cuda.FieldDivision(field).divide(tile, image, corrected, ratio)
    assert_allclose(np.log(ratio.get()), field.log_tile(tile), atol=1e-6)


@pytest.mark.parametrize("slab_voxels", [1, 2000, 10**6])
def test_files_are_divided_slab_by_slab(device, field, tmp_path, slab_voxels, monkeypatch):
    image = np.random.default_rng(8).uniform(50, 3000, (*SHAPE, 3)).astype(np.int16)
    nib.save(nib.Nifti1Image(image, field.affine), tmp_path / "image.nii")
    volume = Volume(tmp_path / "image.nii")
    written = {}
    for name, xp, voxels in (("host", np, 2000), ("all at once", device, 10**6), ("device", device, slab_voxels)):
        monkeypatch.setattr("n4flow.images.nifti.SLAB_VOXELS", voxels)
        paths = tmp_path / f"{name}.nii", tmp_path / f"{name}_bias.nii"
        assert write_corrected(volume, field, *paths, xp=xp) < 3e-7
        written[name] = [nib.load(path).get_fdata(dtype=np.float32) for path in paths]
    for on_host, at_once, on_device in zip(*written.values(), strict=True):
        assert_array_equal(on_device, at_once)
        assert_allclose(on_device, on_host, rtol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "alias"), [(np.int16, None), (np.float32, None), (np.float32, "out"), (np.float32, "bias_out")]
)
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_are_corrected_where_they_are(device, head, dtype, order, alias, monkeypatch):
    monkeypatch.setattr("n4flow.correction.TILE_VOXELS", 5000)
    image = np.array(head.image[::4, ::4, ::4], dtype=dtype, order=order)
    settings = {
        "voxel_size_mm": (8, 8, 8),
        "parameters": N4Parameters(iterations=(2,), twicing=0.9, fwhm=0.1, shrink_factor=1),
    }
    expected = correct(image, image > 300, device="cpu", **settings)
    monkeypatch.setattr("n4flow.correction.select_device", lambda _: Device("gpu", device, "stand-in", "test"))
    fetched = []
    for module in ("n4flow.correction", "n4flow.images.sampling"):
        monkeypatch.setattr(f"{module}.to_host", lambda array: fetched.append(array.size) or to_host(array))
    for home in (np, device):
        mine = home.asarray(image.copy(order="K"))
        result = correct(mine, mine > 300, **settings, **({alias: mine} if alias else {}))
        assert isinstance(result.corrected, home.ndarray)
        # where the mask begins and ends on each axis, and the samples of image and mask between, with their neighbours
        around = tuple(slice(max(along.start - 1, 0), along.stop + 1) for along in box_of(image > 300))
        assert home is np or sum(fetched) == sum(image.shape) + 2 * image[around].size
        fetched.clear()
        corrected, bias = (a if home is np else a.get() for a in (result.corrected, result.bias))
        assert_allclose(bias, expected.bias, rtol=1e-5)
        assert_allclose(corrected * bias, image.astype(np.float32), rtol=3e-7)
        if alias:
            assert mine is (result.corrected if alias == "out" else result.bias)


def test_no_kernel_is_left_untried(device, field):
    """The tests above run before this one, but it must also hold alone."""
    shape = (14, 15, 16)
    strict_device.launched.clear()
    case = random_case(shape)
    run_stage(cuda.CudaKernels(*case, N4Parameters()), fit_on(Mesh.of_grid(shape, (1, 1, 1)), shape, case[1]), 1)
    image = device.zeros(SHAPE, dtype=np.float32)
    cuda.FieldDivision(field).divide((slice(None),) * 3, image, image, device.zeros(SHAPE, np.float32))
    assert set(strict_device.launched) == set(cuda._module(device).signatures)


def run_sanitized(*arguments):
    """Run Python with kernels that are watched by AddressSanitizer."""
    if COMPILER is None:
        pytest.skip("g++ is not there to compile the kernels for the host")
    libraries = [
        subprocess.check_output([COMPILER, f"-print-file-name={name}"], text=True).strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    if not all(Path(library).is_absolute() for library in libraries):
        pytest.skip("g++ has no AddressSanitizer")
    settings = {
        "N4FLOW_SANITIZED": "1",
        "LD_PRELOAD": ":".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "PYTHONPATH": os.pathsep.join(map(str, (REPOSITORY, REPOSITORY / "workflow" / "scripts"))),
    }
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=os.environ | settings, cwd=REPOSITORY, capture_output=True, text=True)


def test_no_kernel_reads_or_writes_beyond_its_arrays():
    ran = run_sanitized(
        *("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__),
        *("-k", "flat_and_thin or untried or any_number_of or (plain_passes and (shape4 or shape6 or shape7))"),
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_the_sanitizer_notices_a_read_beyond_an_array():
    strays = (
        "import numpy as np; from tests.unit.test_cuda import WRITE, RawModule, StrictModule as S\n"
        "kernel = RawModule(WRITE % 'a[0] = b[n];', ('-std=c++17',)).get_function('k')\n"
        "for n in (63, 64):\n"
        "    kernel((1,), (1,), (S().zeros(64, np.float32), np.int32(n), S().zeros(64, np.float32)))\n"
        "    print(n, 'passed', flush=True)"
    )
    ran = run_sanitized("-c", strays)
    assert ran.stdout == "63 passed\n", ran.stdout + ran.stderr
    assert ran.returncode != 0
    assert "use-after-poison" in ran.stderr


# the stand-in itself: what it must notice

WRITE = 'extern "C" __global__ void k(float* a, int n, const float* __restrict__ b)\n{\n%s\n}\n'
SHARED = "extern __shared__ __align__(16) unsigned char dynamic_shared[];\n"


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ("(void)b; a[threadIdx.x + n - 1] = 1;", "wrote behind a"),
        ("(void)b; a[(int)threadIdx.x - n] = 1;", "wrote before a"),
        ("(void)b; (void)a; if ((int)threadIdx.x < n) __syncthreads();", "others have passed by"),
        ("(void)b; (void)a; if ((int)threadIdx.x < n) __syncwarp();", "that do not come"),
        ("(void)b; (void)a; dynamic_shared[64 * n] = 1;", "behind the shared memory"),
    ],
)
def test_the_stand_in_notices_a_kernel_that_strays(device, body, problem):
    kernel = RawModule(SHARED + WRITE % body, ("-std=c++17",)).get_function("k")
    with pytest.raises(AssertionError, match=problem):
        kernel((1,), (64,), (device.zeros(64, np.float32), np.int32(3), device.zeros(64, np.float32)), shared_mem=64)


def test_the_stand_in_shows_a_missing_barrier(device):
    body = (
        "(void)b; float* s = reinterpret_cast<float*>(dynamic_shared); s[threadIdx.x] = (float)n;\n"
        "a[threadIdx.x] = s[(threadIdx.x + 1) % 64];"
    )
    results = []
    for barrier in ("", "__syncthreads();"):
        kernel = RawModule(SHARED + WRITE % body.replace("\n", barrier), ("-std=c++17",)).get_function("k")
        for order in (0, 1):
            given, out = device.zeros(64, np.float32), device.zeros(64, np.float32)
            with running_in_order(order):
                kernel((1,), (64,), (out, np.int32(3), given), shared_mem=256)
            results.append(out.get())
    assert not np.array_equal(results[0], results[1], equal_nan=True)
    assert_array_equal(results[2], results[3])


def test_the_stand_in_refuses_arguments_of_another_type(device):
    kernel = RawModule(WRITE % "a[n] = b[n];", ("-std=c++17",)).get_function("k")
    a, b = device.zeros(4, np.float32), device.zeros(4, np.float32)
    kernel((1,), (1,), (a, np.int32(1), b))
    for wrong in ((a, 1, b), (a, np.int64(1), b), (a.astype(np.float64), np.int32(1), b), (a, np.int32(1), a), (a, b)):
        with pytest.raises(AssertionError):
            kernel((1,), (1,), wrong)
