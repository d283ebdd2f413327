"""What a GPU needs for an estimate and for the division by the field, beside what the hardware allows; see gpu.sh.

--small runs every kernel once on a few voxels, each array in memory of its own: for compute-sanitizer.
"""

import argparse
import os
import platform
import statistics
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

REPOSITORY = Path(__file__).parents[2]
sys.path[:0] = [str(REPOSITORY / "workflow" / "scripts"), str(REPOSITORY)]

from n4flow import N4Parameters  # noqa: E402
from n4flow.core.field import BiasField, Mesh  # noqa: E402
from n4flow.core.phantom import make_phantom  # noqa: E402
from n4flow.device import available_cores, select_device  # noqa: E402
from n4flow.estimate import estimate_field, fit_on, initial_mesh  # noqa: E402
from n4flow.kernels.cuda import CudaKernels, FieldDivision  # noqa: E402
from n4flow.steps.demo import load_tissues  # noqa: E402
from tests.conftest import TISSUES, lee_wolberg_shin, samples_of  # noqa: E402

HEAD = (256, 256, 176)
VOLUME = (256, 1024, 1024)
ITERATIONS = 40
RUNS = 15
WHOLE = (slice(None),) * 3

#: What an iteration must do at a voxel of a row: read it three times, write it once.
BYTES_A_VOXEL = 16

#: Additions, multiplications and comparisons in float32, counted in cuda.cu; an expm1 as 20, a multiply-add as 2.
OPERATIONS_A_VOXEL = 75

#: Multiply-adds in float32 of a multiprocessor at a time, by compute capability.
LANES = {"75": 64, "80": 64}


def head_samples(shape):
    """The demonstration's phantom head on another grid, every voxel above the background a sample."""
    tissues = np.asarray(load_tissues(TISSUES).dataobj)
    index = [np.linspace(0, n - 1, wanted).round().astype(int) for n, wanted in zip(tissues.shape, shape, strict=False)]
    head = make_phantom(tissues[np.ix_(*index)], 1.0, inu_percent=40, noise_percent=3, seed=1)
    return head.image, samples_of(head.image, head.image > 300)


def mesh_of(samples, parameters):
    """The mesh of an estimate."""
    return initial_mesh(samples.image_shape, samples.voxel_size_mm, samples.positions, parameters)


def run_stage(kernels, samples, parameters):
    """What `estimate_field` does, once the samples are on the device."""
    mesh = mesh_of(samples, parameters)
    kernels.start_stage(parameters.stages[0], fit_on(mesh, samples, parameters), np.zeros(mesh.lattice_shape))
    for _ in range(parameters.iterations[0]):
        kernels.subtract(kernels.fit(kernels.sharpen()))
        if kernels.converged():
            break
    return kernels.end_stage()


def estimate_ms(cupy, samples, parameters):
    """Times of an estimate from data on the device, after a run that does not count; the kernels and the lattice."""
    times = []
    for _ in range(RUNS + 1):
        kernels = CudaKernels(samples.log_image, samples.confidence, parameters)
        cupy.cuda.Device().synchronize()
        start = time.perf_counter()
        lattice, _ = run_stage(kernels, samples, parameters)
        times.append(1e3 * (time.perf_counter() - start))
    return times[1:], kernels, lattice


def device_ms(cupy, work, runs=RUNS):
    """Median time on the device, after a run that does not count."""
    times = []
    for _ in range(runs + 1):
        start, end = cupy.cuda.Event(), cupy.cuda.Event()
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(cupy.cuda.get_elapsed_time(start, end))
    return statistics.median(times[1:])


def hardware(cupy, bandwidth, peak):
    """What was measured, on what and with what."""
    runtime = cupy.cuda.runtime
    name = runtime.getDeviceProperties(cupy.cuda.Device().id)["name"].decode()
    versions = {"cupy": cupy.__version__}
    for package in ("numpy", "n4ax", "jax"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    print("| | |\n| --- | --- |")
    print(f"| GPU | {name}, compute capability {cupy.cuda.Device().compute_capability} |")
    print(f"| CUDA | driver {runtime.driverGetVersion()}, runtime {runtime.runtimeGetVersion()} |")
    print(f"| versions | Python {platform.python_version()}, {', '.join(f'{k} {v}' for k, v in versions.items())} |")
    print(f"| command | `python {' '.join(sys.argv)}`, {time.strftime('%Y-%m-%d')} |")
    print(f"| copying 1 GiB on the device | {bandwidth / 1e9:.0f} GB/s, read and written |")
    print(f"| float32 peak, from clock and lanes | {peak / 1e12:.1f} Tflop/s |\n")


def copy_bandwidth(cupy):
    """Bytes per second, read and written, of copying 1 GiB on the device."""
    source, target = (cupy.ones(2**28, dtype=np.float32) for _ in range(2))
    return 2 * source.nbytes / (1e-3 * device_ms(cupy, lambda: cupy.copyto(target, source)))


def peak_of(device):
    """Operations per second in float32, were every lane busy with multiply-adds."""
    attributes = device.attributes
    lanes = LANES.get(device.compute_capability, 128)
    return 2 * lanes * attributes["MultiProcessorCount"] * attributes["ClockRate"] * 1e3


def measure_estimate(cupy, bandwidth, peak):
    """An estimate, its kernels one by one, and the same on the CPU and with n4ax."""
    image, samples = head_samples(HEAD)
    given = {"iterations": (ITERATIONS,), "convergence_threshold": 0, "fwhm": 0.15}
    parameters = N4Parameters(shrink_factor=1, **given)
    samples = samples.check().cropped()
    times, kernels, lattice = estimate_ms(cupy, samples, parameters)
    ours = statistics.median(times)
    # n4ax begins with a mesh of one span, and so do we beside it
    beside, _, _ = estimate_ms(cupy, samples, lee_wolberg_shin(spans=(1, 1, 1), domain="image", **given))
    voxels = kernels.rows.values.size
    floors = [
        1e3 * ITERATIONS * voxels * cost / rate
        for cost, rate in ((BYTES_A_VOXEL, bandwidth), (OPERATIONS_A_VOXEL, peak))
    ]
    field = BiasField(
        lattice,
        mesh_of(samples, parameters),
        samples.image_shape,
        samples.affine,
    )
    on_cpu = estimate_field(samples, parameters, threads=available_cores()).field
    worst = max(
        float(np.abs(field.log_tile(tile) - on_cpu.log_tile(tile)).max())
        for tile in ((slice(None), slice(None), slice(k, k + 16)) for k in range(0, HEAD[2], 16))
    )
    theirs = n4ax_ms(image, image > 300)

    print(f"Estimate: {HEAD} head, {kernels.count} voxels in the mask, {voxels} in rows, {ITERATIONS} iterations, data")
    print(f"on the device; medians of {RUNS} runs.\n")
    print("| | ms |\n| --- | --- |")
    print(f"| n4flow | {ours:.2f} (bar: 5), from {min(times):.2f} to {max(times):.2f} |")
    print(f"| floor: bytes ({BYTES_A_VOXEL} a voxel and iteration) | {floors[0]:.2f} |")
    print(f"| floor: operations ({OPERATIONS_A_VOXEL} a voxel and iteration) | {floors[1]:.2f} |")
    same = statistics.median(beside)
    print(f"| n4flow, one span per axis | {same:.2f} |")
    ratio = theirs if isinstance(theirs, str) else f"{theirs:.1f}, {theirs / same:.1f} times ours (bar: 10)"
    print(f"| n4ax, one span per axis | {ratio} |")
    print(f"\nLog fields on GPU and CPU differ by at most {worst:.1e} (bar: 1e-5).\n")
    print("| kernel | µs |\n| --- | --- |")
    kernels.start_stage(parameters.stages[0], kernels.spline_fit, np.zeros_like(lattice))
    names = ("histogram", "sharpen", "gather_rows", "gather_planes", "gather_lattice", "solve", "points_of_modes")
    names += ("expand", "subtract")
    launches = [*kernels.to_sharpen, *kernels.to_fit, *kernels.to_subtract]
    for name, launch in zip(names, launches, strict=False):  # not `finish`, which counts iterations
        print(f"| {name} | {1e3 * device_ms(cupy, lambda launch=launch: [launch() for _ in range(20)]) / 20:.1f} |")
    print()


def n4ax_ms(image, mask):
    """The same iterations in JAX, data on the device."""
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    try:
        import jax
        from n4ax import n4
    except ImportError:
        return "not installed"
    if jax.default_backend() != "gpu":
        return "JAX sees no GPU"
    image, mask = jax.device_put(image.astype(np.float32)), jax.device_put(mask)
    times = []
    for _ in range(4):
        start = time.perf_counter()
        jax.block_until_ready(
            n4(image, mask, iters=(ITERATIONS,), over_relax=1.0, conv_threshold=0.0, return_bias=True)
        )
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[1:])


def measure_division(cupy, bandwidth):
    """Evaluation and division of a large volume, on the device and from the host."""
    mesh = Mesh.of_distance(VOLUME, (1.0, 1.0, 1.0), 60.0)
    field = BiasField(np.random.default_rng(1).normal(0, 0.2, mesh.lattice_shape), mesh, VOLUME, np.eye(4))
    image = cupy.ones(VOLUME, dtype=np.float32)
    corrected, ratio = cupy.empty_like(image), cupy.empty_like(image)
    division = FieldDivision(field)
    taken = device_ms(cupy, lambda: division.divide(WHOLE, image, corrected, ratio))
    rate = 12 * image.size / (1e-3 * taken)
    tile = (slice(None), slice(None), slice(100, 108))
    worst = float(np.abs(np.log(ratio[tile].get()) - field.log_tile(tile)).max())
    host = np.ones((*VOLUME[:2], 16), dtype=np.float32, order="F")
    tiles = [((slice(None), slice(None), slice(k, k + 16)), host) for k in range(0, VOLUME[2], 16)]
    start = time.perf_counter()
    for _ in division.divide_tiles(tiles):
        pass
    streamed = time.perf_counter() - start
    print(f"Evaluation and division of {VOLUME} float32, {'x'.join(map(str, mesh.lattice_shape))} control points.\n")
    print("| | |\n| --- | --- |")
    print(f"| on the device | {taken:.2f} ms, {rate / 1e9:.0f} GB/s, {rate / bandwidth:.0%} of copying (bar: 70 %) |")
    print(f"| floor: bytes (12 a voxel) | {1e3 * 12 * image.size / bandwidth:.2f} ms |")
    print(f"| from the host and back, in tiles | {1e3 * streamed:.0f} ms, {12e-9 * image.size / streamed:.1f} GB/s |")
    print(f"\nThe field differs from the CPU's by at most {worst:.1e} in log (bar: 1e-5).")


def run_small(cupy):
    """Every kernel once, without CuPy's memory pool, behind which stray accesses would hide."""
    cupy.cuda.set_allocator(None)
    _, samples = head_samples((40, 37, 45))
    for weights in (samples.confidence, np.where(samples.confidence, np.float32(0.5), np.float32(0))):
        for bins in (200, 3000, 13000):
            parameters = N4Parameters(iterations=(2,), fwhm=0.1, convergence_threshold=0, histogram_bins=bins)
            run_stage(CudaKernels(samples.log_image, weights, parameters), samples, parameters)
    mesh = Mesh.of_grid(samples.image_shape, (2, 3, 4))
    field = BiasField(np.ones(mesh.lattice_shape), mesh, samples.image_shape, np.eye(4))
    image = cupy.ones(samples.image_shape, dtype=np.float32)
    FieldDivision(field).divide(WHOLE, image, image, cupy.empty_like(image))
    for corrected, _ in FieldDivision(field).divide_tiles([(WHOLE, np.ones(samples.image_shape))] * 3):
        assert np.isfinite(corrected).all()
    cupy.cuda.Device().synchronize()
    print("every kernel has run")


def main():
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true")
    small = parser.parse_args().small
    cupy = select_device("gpu").xp
    if small:
        run_small(cupy)
        return
    bandwidth, peak = copy_bandwidth(cupy), peak_of(cupy.cuda.Device())
    hardware(cupy, bandwidth, peak)
    measure_estimate(cupy, bandwidth, peak)
    measure_division(cupy, bandwidth)


if __name__ == "__main__":
    main()
