"""The passes over the voxels one by one, in every set of kernels, and the threads that they run in."""

import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from threadpoolctl import threadpool_info, threadpool_limits

from n4flow import N4Parameters, correct, kernels
from n4flow.core.bspline import bspline_fit, contract, expand
from n4flow.core.field import BiasField, Mesh
from n4flow.core.fit import LeeWolbergShin, PenalisedLeastSquares
from n4flow.core.quadrature import MaskIntensity, keep_mean_intensity
from n4flow.core.sharpening import linear_histogram, look_up
from n4flow.estimate import estimate_field, fit_on
from n4flow.images.division import write_corrected
from n4flow.images.nifti import Volume
from n4flow.images.sampling import read_samples
from n4flow.kernels import PlainKernels, compiled, plain
from n4flow.kernels.compiled import CompiledKernels
from n4flow.kernels.protocol import Expected
from n4flow.parameters import Stage
from tests.conftest import lee_wolberg_shin, samples_of

SHAPE = (7, 6, 5)
PARAMETERS = N4Parameters(histogram_bins=50)
STAGE = Stage(200, 0.12, 0.0)

SETS = {
    "plain": lambda *given: PlainKernels(*given, PARAMETERS),
    "compiled": lambda *given: CompiledKernels(*given, PARAMETERS, threads=1),
    "compiled, 3 threads": lambda *given: CompiledKernels(*given, PARAMETERS, threads=3),
}
#: float32 holds the values, which lie within ±4 of their middle, and the field's steps.
TOLERANCE = {"plain": 1e-12, "compiled": 2e-6, "compiled, 3 threads": 2e-6}


@pytest.fixture
def field():
    mesh = Mesh.of_grid(SHAPE, (2, 1, 1))
    # far from a mean of 0, so that a standard deviation is no coefficient of variation
    lattice = np.random.default_rng(5).normal(0.7, 0.4, mesh.lattice_shape)
    return BiasField(lattice, mesh, SHAPE, np.eye(4))


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """So that these small grids have several, of several planes each."""
    monkeypatch.setattr(compiled, "CHUNK_VOXELS", 200)


@pytest.fixture(autouse=True)
def one_blas_thread():
    """As in an estimate: more of them would wait for each other, on matrices as small as these."""
    with threadpool_limits(1, user_api="blas"):
        yield


def started(made, mesh, positions=None, weights=None, lattice=None):
    """The same kernels, at the start of a stage on a mesh: with ITK's fit, or where there are weights a penalised."""
    positions = positions or [np.arange(n) for n in SHAPE]
    bases = mesh.bases(positions)
    if weights is None:
        fit = LeeWolbergShin(np.ones([len(p) for p in positions]), bases)
    else:
        fit = PenalisedLeastSquares(weights, bases, [n / 10 for n in mesh.span_voxels], 2e-6)
    made.start_stage(STAGE, fit, np.zeros(mesh.lattice_shape) if lattice is None else lattice)
    return made


def scattered(shape, weighted, share=0.1, seed=6):
    """Log intensities, weights that are 0 outside of a mask, and the mask; a plane and both corners are outside."""
    rng = np.random.default_rng(seed)
    log_image, mask = rng.normal(4, 1, shape), rng.random(shape) < share
    mask[len(mask) // 2] = False
    log_image[0, 0, 0], log_image[-1, -1, -1], mask[0, 0, 0], mask[-1, -1, -1] = -50, 50, False, False
    return log_image, np.where(mask, rng.uniform(0.1, 1, shape), 0) if weighted else mask, mask


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("block_voxels", [1, 60, 2**18])
@pytest.mark.parametrize("weighted", [False, True])
def test_statistics_are_those_of_the_samples_of_the_mask(field, name, block_voxels, weighted, monkeypatch):
    monkeypatch.setattr(plain, "BLOCK_VOXELS", block_voxels)
    log_image, weights, mask = scattered(SHAPE, weighted)  # so few that N is not N - 1
    made = SETS[name](log_image, weights)
    near = {"rel": TOLERANCE[name]}
    assert (made.low, made.high) == pytest.approx((log_image[mask].min(), log_image[mask].max()), **near)
    started(made, field.mesh)
    made.subtract(field.lattice)
    update = expand(field.lattice, field.mesh.bases([np.arange(n) for n in SHAPE]))[mask]
    change, left = np.exp(-update), log_image[mask] - update
    assert made.cvs == [pytest.approx(np.std(change, ddof=1) / np.mean(change), **near)]
    assert (made.low, made.high) == pytest.approx((left.min(), left.max()), **near)
    made.subtract(field.lattice)
    left -= update
    assert (made.low, made.high) == pytest.approx((left.min(), left.max()), **near)
    lattice, cvs = made.end_stage()
    assert cvs[0] == cvs[1]
    assert_array_equal(lattice, 2 * field.lattice)


SHAPES = st.tuples(*[st.integers(1, 40)] * 3).filter(lambda shape: np.prod(shape) >= 200)


@settings(deadline=None, max_examples=40)
@given(SHAPES, st.tuples(*[st.integers(1, 5)] * 3), st.booleans(), st.floats(0.05, 1), st.integers(0, 2**30))
def test_a_pass_of_any_set_is_that_of_the_definition(shape, spans, weighted, share, seed):
    log_image, weights, mask = scattered(shape, weighted, share, seed)
    if mask.sum() < 20:
        return
    mesh = Mesh.of_grid(shape, spans)
    bases = mesh.bases([np.arange(n) for n in shape])
    values = log_image[mask]
    histogram = linear_histogram(values, values.min(), values.max(), 50)
    table = np.sort(np.random.default_rng(seed).normal(4, 1, 50))
    residual = np.zeros(shape)
    residual[mask] = values - look_up(values, table, values.min(), values.max())
    fits = {
        "one step": (LeeWolbergShin(weights, bases), bspline_fit(residual, weights, bases)),
        "least squares": (PenalisedLeastSquares(weights, bases, (0.3, 0.4, 0.5), 2e-6), None),
    }
    for name, make in SETS.items():
        made = make(log_image, weights)
        for fit, update in fits.values():
            made.start_stage(STAGE, fit, np.zeros(mesh.lattice_shape))
            assert_allclose(made.histogram(), histogram, atol=1e-4 * mask.sum() ** 0.5)
            gathered = contract(np.where(mask, residual * weights, 0), fit.matrices)
            assert_allclose(made.gather(table), gathered, atol=2e-7 * mask.sum() + 1e-12, err_msg=name)
            if update is not None:
                assert_allclose(made.fit(Expected(table, 1.0)), update, atol=20 * TOLERANCE[name], err_msg=name)


@pytest.mark.parametrize("name", SETS)
def test_a_stage_on_values_that_are_all_the_same_is_over_at_once(field, name):
    made = SETS[name](np.full(SHAPE, 4.5), np.ones(SHAPE, dtype=bool))
    started(made, field.mesh)
    assert made.converged()
    lattice, cvs = made.end_stage()
    assert cvs == []
    assert not lattice.any()


def test_a_histogram_of_more_voxels_than_an_entry_holds(monkeypatch):
    """An entry has 23 bits for the count, beside its sign, and 40 for the shares: it is emptied in time."""
    values = np.full((8, 1100, 1000), 5.0)  # 8.8 million in one bin
    values[0, 0, 0], values[0, 0, 1] = 4.0, 6.003
    mesh, positions = Mesh.of_grid(values.shape, (1, 1, 1)), [np.arange(n) for n in values.shape]
    found = []
    for chunk_voxels in (200, 2**30):
        monkeypatch.setattr(compiled, "CHUNK_VOXELS", chunk_voxels)
        made = started(SETS["compiled"](values, np.ones(values.shape, dtype=bool)), mesh, positions)
        found.append(made.histogram())
    assert_allclose(found[0], linear_histogram(values.ravel(), 4.0, 6.003, 50), rtol=1e-4, atol=1e-3)
    assert_array_equal(found[1], found[0])


@pytest.mark.parametrize("range_", [1e-34, 1e-37, 1e-45])
def test_values_that_float32_barely_tells_apart_stay_within_the_histogram(range_):
    values = range_ * np.random.default_rng(0).random((20, 21, 37))
    mesh, positions = Mesh.of_grid(values.shape, (1, 1, 1)), [np.arange(n) for n in values.shape]
    made = started(SETS["compiled"](values, np.ones(values.shape, dtype=bool)), mesh, positions)
    assert made.histogram().sum() == pytest.approx(values.size)
    made.end_stage()


@pytest.mark.parametrize("strength", [1e-3, 0.3, 3, 12])
def test_the_change_of_an_update_of_any_size_is_exact(strength):
    """Its exponential is a series, of an argument halved as often as it takes."""
    shape = (20, 20, 20)
    mesh = Mesh.of_grid(shape, (2, 2, 2))
    log_image, weights, _ = scattered(shape, False, 0.7)
    update = strength * np.random.default_rng(1).uniform(-1, 1, mesh.lattice_shape)
    cvs = []
    for make in SETS.values():
        made = started(make(log_image, weights), mesh, [np.arange(n) for n in shape])
        made.subtract(update)
        cvs += made.cvs
    assert cvs[1] == pytest.approx(cvs[0], rel=2e-5)
    assert cvs[2] == cvs[1]


@pytest.mark.parametrize("mean", [0.05, 0.3, -0.5])
def test_a_change_far_from_0_with_little_spread_is_measured(mean):
    """A difference of large sums would be 0, and an estimate over that is not."""
    shape = (20, 20, 20)
    mesh = Mesh.of_grid(shape, (2, 2, 2))
    log_image, weights, _ = scattered(shape, False, 0.7)
    update = mean + 1e-4 * np.random.default_rng(1).uniform(-1, 1, mesh.lattice_shape)
    cvs = []
    for make in SETS.values():
        made = started(make(log_image, weights), mesh, [np.arange(n) for n in shape])
        made.subtract(update)
        cvs += made.cvs
    assert cvs[1] == pytest.approx(cvs[0], rel=2e-3)


def test_compiled_code_gives_the_same_bits_for_any_number_of_threads(head):
    samples = samples_of(head.image[::2, ::2, ::2], head.image[::2, ::2, ::2] > 300, (4.0, 4.0, 4.0))
    for weights in (None, samples.confidence):
        lattices = []
        for threads in (1, 2, 7, 100):
            made = CompiledKernels(samples.log_image, samples.confidence, PARAMETERS, threads)
            started(made, Mesh.of_grid(samples.image_shape, (2, 2, 2)), samples.positions, weights)
            for _ in range(3):
                made.subtract(made.fit(made.sharpen()))
            lattices.append(made.end_stage()[0])
        assert len(made.rows.chunks) > 30
        for lattice in lattices[1:]:
            assert_array_equal(lattice, lattices[0])


@pytest.mark.parametrize("name", SETS)
def test_stages_on_one_mesh_are_those_of_kernels_that_begin_anew(head, name, monkeypatch):
    """What a mesh needs is made once; a stage has its own width, and goes on from the last lattice and values."""
    samples = samples_of(head.image[::4, ::4, ::4], head.image[::4, ::4, ::4] > 300, (8.0, 8.0, 8.0))
    parameters = N4Parameters(iterations=(3, 4), twicing=0.9, fwhm=(0.2, 0.07), convergence_threshold=0)
    mesh = Mesh.of_grid(samples.image_shape, (2, 2, 2))
    fit = fit_on(mesh, samples, parameters)
    made = SETS[name](samples.log_image, samples.confidence)
    meshes, set_mesh = [], made.set_mesh
    monkeypatch.setattr(made, "set_mesh", lambda *given: meshes.append(given) or set_mesh(*given))
    lattice = np.zeros(mesh.lattice_shape)
    for stage in parameters.stages:
        again = SETS[name](samples.log_image - expand(lattice, fit.bases), samples.confidence)
        results = []
        for kernels_of_stage in (made, again):
            kernels_of_stage.start_stage(stage, fit, lattice)
            for _ in range(stage.most_iterations):
                kernels_of_stage.subtract(kernels_of_stage.fit(kernels_of_stage.sharpen()))
            results.append(kernels_of_stage.end_stage())
        assert_allclose(results[0][0], results[1][0], atol=1e-5)
        assert_allclose(results[0][1], results[1][1], rtol=1e-4)
        lattice = results[0][0]
    assert len(meshes) == 1


def iterated(field, threads, iterations=200):
    """The lattice after so many iterations on a small grid of many chunks, and the kernels."""
    shape = (40, 6, 5)
    log_image, weights, _ = scattered(shape, True, 0.7)
    made = CompiledKernels(log_image, weights, PARAMETERS, threads)
    started(made, Mesh.of_grid(shape, (2, 1, 1)), [np.arange(n) for n in shape])
    for _ in range(iterations):
        made.subtract(made.fit(made.sharpen()))
    return made.lattice, made


def eventually(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


def test_threads_that_have_waited_in_vain_are_called_back(field):
    _, made = iterated(field, 3, iterations=5)
    assert eventually(lambda: all(helper.done() for helper in made.helpers.values()))
    left = dict(made.helpers)
    made.subtract(made.fit(made.sharpen()))
    assert set(made.helpers) == {1, 2}
    assert not set(made.helpers.values()) & set(left.values())
    assert_array_equal(made.lattice, iterated(field, 1, iterations=6)[0])


def test_no_thread_waits_beyond_the_end_of_a_stage(field):
    """It would wait for seconds where others keep its core busy."""
    _, made = iterated(field, 3, iterations=5)
    made.end_stage()
    assert made.work.control[compiled.PASS] % 2**compiled.STEP_BITS == compiled.LEAVE
    assert eventually(lambda: all(helper.done() for helper in made.helpers.values()))


def test_thousands_of_short_passes_lose_no_chunk_and_take_none_twice(field):
    """More threads than cores, several sets of them at once, hardly any work to do."""
    alone, _ = iterated(field, 1)
    with ThreadPoolExecutor(4) as pool:
        for lattice, made in pool.map(lambda threads: iterated(field, threads), (2, 3, 5, 8) * 3):
            assert len(made.rows.chunks) > 4
            assert_array_equal(lattice, alone)


def test_a_process_that_fails_between_two_passes_ends_at_once(pytestconfig):
    code = """
import sys
sys.path.insert(0, sys.argv[1])
import numpy as np
from n4flow import N4Parameters
from n4flow.core.field import Mesh
from n4flow.core.fit import LeeWolbergShin
from n4flow.kernels.compiled import CompiledKernels
image = np.random.default_rng(0).uniform(4, 5, (30, 30, 30))
made = CompiledKernels(image, image > 0, N4Parameters(), 4)
fit = LeeWolbergShin(image > 0, Mesh.of_grid(image.shape, (1, 1, 1)).bases([np.arange(30)] * 3))
made.start_stage(N4Parameters().stages[0], fit, np.zeros((4, 4, 4)))
made.histogram()
raise ValueError("on purpose")
"""
    command = [sys.executable, "-c", code, pytestconfig.rootpath / "workflow" / "scripts"]
    ended = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=60)
    assert ended.stderr.endswith("on purpose\n")


def test_a_thread_that_comes_after_the_end_of_a_stage_does_nothing():
    log_image = np.random.default_rng(0).normal(4, 1, (20, 20, 20))
    made = SETS["compiled, 3 threads"](log_image, np.ones(log_image.shape, dtype=bool))
    started(made, Mesh.of_grid(log_image.shape, (1, 1, 1)), [np.arange(20)] * 3)
    made.histogram()
    made.end_stage()
    for helper in made.helpers.values():
        helper.result(timeout=60)
    compiled._follow(1, made.work)
    assert made.work.control[compiled.DONE] == 0


def test_voxels_outside_are_in_no_bin_even_where_all_values_are_the_same():
    mask = np.zeros((20, 20, 20), dtype=bool)
    mask[:10] = True
    mask[::2, ::2, ::2] = False
    made = SETS["compiled"](np.full(mask.shape, 4.5), mask)
    started(made, Mesh.of_grid(mask.shape, (1, 1, 1)), [np.arange(20)] * 3)
    assert made.histogram().sum() == mask.sum()


def test_large_and_small_scans_get_their_kernels_by_their_voxels_alone(head, monkeypatch):
    samples = samples_of(head.image, head.image > 300)
    count = int(samples.mask.sum())
    for limit, expected in ((count + 1, PlainKernels), (count, CompiledKernels)):
        monkeypatch.setattr(kernels, "COMPILED_VOXELS", limit)
        for threads in (1, 2):
            assert type(kernels.choose_kernels(samples, PARAMETERS, np, threads)) is expected


ESTIMATE = """
import sys
sys.path.insert(0, sys.argv[1])
import numpy as np
from n4flow import N4Parameters, correct, kernels
kernels.COMPILED_VOXELS = int(sys.argv[2])
image = np.random.default_rng(0).uniform(50, 100, (30, 30, 30))
field = correct(image, voxel_size_mm=(1, 1, 1), parameters=N4Parameters(shrink_factor=1), device="cpu").field
print(field.lattice.tobytes().hex(), "numba" in sys.modules)
"""


#: One pass, so that no more than three functions are compiled: the one that it calls is called by another, too.
HISTOGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
import numpy as np
from n4flow import N4Parameters
from n4flow.core.field import Mesh
from n4flow.kernels import compiled
image = np.random.default_rng(0).uniform(4, 5, (30, 30, 30))
made = compiled.CompiledKernels(image, image > 0, N4Parameters(), 1)
bases = Mesh.of_grid(image.shape, (1, 1, 1)).bases([np.arange(30)] * 3)
made.set_mesh(bases, bases)
made._set_limits()
compiled._histogram(compiled.ZERO, compiled.ZERO, made.work)
compiled._sum_counts(made.work)
print(made.work.histogram.tobytes().hex())
"""


def in_a_process(pytestconfig, code, environment, *arguments, scripts=None):
    scripts = scripts or pytestconfig.rootpath / "workflow" / "scripts"
    return subprocess.Popen(
        [sys.executable, "-c", code, scripts, *arguments],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_small_scans_do_not_wait_for_the_compiler(pytestconfig):
    out, error = in_a_process(pytestconfig, ESTIMATE, {}, str(2**18)).communicate()
    assert out.split()[1] == "False", error


@pytest.fixture(scope="module")
def cached(pytestconfig, tmp_path_factory):
    """A cache that three processes have filled at once, and what each of them said."""
    folder = tmp_path_factory.mktemp("cache")
    first = [in_a_process(pytestconfig, HISTOGRAM, {"NUMBA_CACHE_DIR": str(folder)}) for _ in range(3)]
    return folder, [process.communicate() for process in first]


@pytest.fixture
def to_be_spoilt(cached, tmp_path):
    """A copy of the cache, and what a pass with it has to give."""
    folder, ((out, _), *_) = cached
    return shutil.copytree(folder, tmp_path / "cache"), out


def files_of_two_functions(folder, ending):
    """Of one that Python calls, and of one that this one calls: the third need not be compiled again."""
    found = [path for name in ("_histogram", "_bins_per_unit") for path in folder.glob(f"*/compiled.{name}-*{ending}")]
    assert len({path.suffix for path in found}) * 2 == len(found)
    return found


def test_many_processes_may_compile_at_once_and_where_nothing_can_be_cached(pytestconfig, cached):
    folder, outputs = cached
    only_there = {"NUMBA_CACHE_DIR": "/dev/null/nowhere", "NUMBA_CACHE_LOCATOR_CLASSES": "UserProvidedCacheLocator"}
    nowhere = in_a_process(pytestconfig, HISTOGRAM, only_there).communicate()
    assert len(list(folder.rglob("*.nbc"))) == 3
    assert nowhere[1].count("compiled code cannot be kept there") == 1
    assert len({out for out, _ in (*outputs, nowhere)}) == 1, (*outputs, nowhere)
    again, error = in_a_process(pytestconfig, HISTOGRAM, {"NUMBA_CACHE_DIR": str(folder)}).communicate()
    assert again == outputs[0][0] != "", error


def test_an_estimate_compiles_once_and_copies_of_the_package_share_what_it_compiled(pytestconfig, tmp_path):
    """Snakemake makes one for each run, in a folder with a random name."""
    scripts, cache = tmp_path / "copy", {"NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    whole, error = in_a_process(pytestconfig, ESTIMATE, cache, "0").communicate()
    assert whole.endswith("True\n"), error
    shutil.copytree(pytestconfig.rootpath / "workflow/scripts/n4flow", scripts / "n4flow", copy_function=shutil.copy)
    there = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.nb[ic]")}
    assert there
    out, error = in_a_process(pytestconfig, ESTIMATE, cache, "0", scripts=scripts).communicate()
    assert out == whole, error
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.nb[ic]")} == there


@pytest.mark.parametrize("ending", [".nbc", ".nbi"])
def test_a_damaged_cache_is_made_anew(pytestconfig, to_be_spoilt, ending):
    folder, whole = to_be_spoilt
    damaged = files_of_two_functions(folder, ending)
    for path in damaged:
        path.write_bytes(path.read_bytes()[:100] if ending == ".nbi" else b"")
    for time_ in ("first", "second"):
        again, error = in_a_process(pytestconfig, HISTOGRAM, {"NUMBA_CACHE_DIR": str(folder)}).communicate()
        assert again == whole, error
        assert error.count("cannot be read") == (len(damaged) if time_ == "first" else 0), error


def test_a_cache_without_room_is_done_without(pytestconfig, to_be_spoilt):
    folder, whole = to_be_spoilt
    for path in files_of_two_functions(folder, ""):
        path.unlink()
    limited = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n{HISTOGRAM}"
    out, error = in_a_process(pytestconfig, limited, {"NUMBA_CACHE_DIR": str(folder)}).communicate()
    assert out == whole, error
    assert "cannot be kept" in error


def test_one_and_two_blas_threads_give_the_same_bits():
    # wide and thin: the products in which OpenBLAS does share out the sums
    image = np.random.default_rng(7).uniform(50, 100, (16, 500, 500)).astype(np.float32)
    samples = samples_of(image, np.ones(image.shape, dtype=bool))
    for parameters in (
        lee_wolberg_shin((1,), spans=(2, 30, 30), shrink_factor=1),
        N4Parameters(iterations=(1,), twicing=0.9, fwhm=0.1, shrink_factor=1),
    ):
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

    for name, function in (
        ("n4flow.kernels.plain.expand", expand),
        ("n4flow.kernels.plain.contract", plain.contract),
        ("n4flow.core.field.expand", expand),
        ("n4flow.core.quadrature.MaskIntensity.add", MaskIntensity.add),
    ):
        monkeypatch.setattr(name, noting(function))
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
    estimate_field(
        samples_of(image, np.ones(image.shape, dtype=bool)), N4Parameters(iterations=(1,), twicing=0.9, fwhm=0.1)
    )
    assert blas_threads == {1}


def test_a_corrected_array_uses_one_blas_thread(blas_threads):
    image = np.random.default_rng(9).uniform(50, 100, (12, 12, 12))
    parameters = N4Parameters(iterations=(1,), twicing=0.9, fwhm=0.1, shrink_factor=1)
    correct(image, voxel_size_mm=(1, 1, 1), parameters=parameters, device="cpu")
    assert blas_threads == {1}


# `correct` would hide an estimate without a limit of its own, and the estimate a `correct` without: so each alone
def test_the_field_of_an_array_is_evaluated_with_one_blas_thread(blas_threads, field, monkeypatch):
    monkeypatch.setattr("n4flow.correction.estimate_twice", lambda *_, **__: (field, [], None))
    correct(np.full(SHAPE, 7.0), voxel_size_mm=(1, 1, 1), device="cpu")
    assert blas_threads == {1}


def test_a_corrected_file_is_written_with_one_blas_thread(blas_threads, field, tmp_path):
    volume, _ = files_of(tmp_path, field)
    write_corrected(volume, field, tmp_path / "corrected.nii")
    assert blas_threads == {1}


def test_intensities_are_gathered_with_one_blas_thread(blas_threads, field, tmp_path, monkeypatch):
    monkeypatch.setattr("n4flow.core.samples.MINIMUM_SAMPLES", 1)
    read_samples(*files_of(tmp_path, field), N4Parameters())
    assert blas_threads == {1}


def test_the_mean_intensity_is_kept_with_one_blas_thread(blas_threads, field):
    intensity = MaskIntensity(field.image_shape, field.mesh)
    intensity.sums += 1
    keep_mean_intensity(field, intensity, "image")
    assert blas_threads == {1}
