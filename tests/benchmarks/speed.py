"""How long the same work takes: the tables of RESULTS.md.

    python tests/benchmarks/speed.py [--data FOLDER] [--runs 3] [--large] [--output tests/benchmarks/RESULTS.md]

1. The same work: the same array, mask, mesh, number of iterations and cores, threshold 0. Each method runs in a process
   of its own, all take turns, the first turn warms up (and compiles) and does not count. ANTs takes part where antspyx
   is installed, n4ax where it is: ``pip install jax``, ``pip install --ignore-requires-python --no-deps n4ax``.
2. The cost of a voxel: n4flow alone, over the number of control points and of voxels.
3. A subject: from a compressed file to a corrected file and its field, process start included, beside a plain SimpleITK
   script, and beside a script that merely reads the image with nibabel and writes the same two outputs (which it has
   from uncompressed .npy files: some 20 ms).
4. A large volume (``--large``, alone: needs 30 GB of disk): time per voxel and memory of a job at 0.1, 1 and 8 GB.

What counts are the ratios. Memory is the most that a process took, in all turns, beyond what it held with its data.
"""

import argparse
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import nibabel as nib
import numpy as np

REPOSITORY = Path(__file__).parents[2]
SCRIPTS = REPOSITORY / "workflow" / "scripts"
sys.path.insert(0, str(SCRIPTS))

from n4flow import kernels  # noqa: E402
from n4flow.core.field import Mesh  # noqa: E402
from n4flow.core.samples import Samples, log_where  # noqa: E402
from n4flow.device import available_cores  # noqa: E402
from n4flow.estimate import estimate_field  # noqa: E402
from n4flow.parameters import N4Parameters  # noqa: E402
from n4flow.steps.mask import otsu_threshold  # noqa: E402

ITERATIONS = (20, 20, 20, 20)
FIRST_SPANS = (1, 1, 1)

#: A method that takes longer has one turn.
ONE_TURN_S = 100

SIMPLEITK_SCRIPT = """
import sys
import SimpleITK as sitk
image = sitk.ReadImage(sys.argv[1], sitk.sitkFloat32)
mask = sitk.OtsuThreshold(image, 0, 1, 200)
n4 = sitk.N4BiasFieldCorrectionImageFilter()
n4.SetConvergenceThreshold(1e-3)
n4.SetMaximumNumberOfIterations([50] * 4)
n4.Execute(sitk.Shrink(image, [4] * 3), sitk.Shrink(mask, [4] * 3))
field = sitk.Exp(n4.GetLogBiasFieldAsImage(image))
sitk.WriteImage(field, sys.argv[2])
sitk.WriteImage(image / field, sys.argv[3])
"""

NIBABEL_SCRIPT = """
import sys
import nibabel as nib
import numpy as np
image = nib.load(sys.argv[1])
values = np.asarray(image.dataobj, dtype=np.float32)
for path in sys.argv[2:]:
    nib.save(nib.Nifti1Image(np.load(path), image.affine), path.replace(".npy", ".nii.gz"))
"""

N4FLOW_SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from n4flow import N4Parameters
from n4flow.steps.derivatives import CorrectionFiles
from n4flow.steps.correct import correct_scan
from n4flow.steps.mask import mask_scan
image, folder = Path(sys.argv[1]), Path(sys.argv[2])
mask = folder / "mask.nii.gz"
mask_scan(image, None, mask, folder / "mask.json", method="otsu", percentile=50)
files = CorrectionFiles(*(folder / name for name in ("c.nii.gz", "c.json", "f.json", "f.nii.gz")))
correct_scan(image, mask, files, parameters=N4Parameters(), device="cpu")
"""

LARGE_SCRIPT = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from n4flow import N4Parameters
from n4flow.steps.derivatives import CorrectionFiles
from n4flow.steps.correct import correct_scan
from n4flow.steps.mask import mask_scan
image, folder = Path(sys.argv[1]), Path(sys.argv[2])
def held(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024
Path("/proc/self/clear_refs").write_text("5")
before = held("VmRSS")
start = time.perf_counter(), time.process_time()
mask = folder / "mask.nii"
mask_scan(image, None, mask, folder / "mask.json", method="otsu", percentile=50)
files = CorrectionFiles(*(folder / name for name in ("c.nii", "c.json", "f.json", "f.nii")))
correct_scan(image, mask, files, parameters=N4Parameters(spline_distance_mm=float(sys.argv[4])), device="cpu")
print(time.perf_counter() - start[0], time.process_time() - start[1])
print(held("VmHWM") - before)
"""


def with_simpleitk(image, mask):
    """SimpleITK on all cores."""
    import SimpleITK as sitk

    n4 = sitk.N4BiasFieldCorrectionImageFilter()
    n4.SetMaximumNumberOfIterations(list(ITERATIONS))
    n4.SetConvergenceThreshold(0)
    n4.SetNumberOfControlPoints([s + 3 for s in FIRST_SPANS])
    volume = sitk.GetImageFromArray(np.ascontiguousarray(image.T))
    n4.Execute(volume, sitk.GetImageFromArray(np.ascontiguousarray(mask.T.astype(np.uint8))))
    return sitk.GetArrayFromImage(n4.GetLogBiasFieldAsImage(volume)).T.astype(np.float64)


def with_ants(image, mask):
    """ANTs, of which the filter is the same; it also copies and rescales."""
    import ants

    field = ants.n4_bias_field_correction(
        ants.from_numpy(image),
        mask=ants.from_numpy(mask.astype(np.float32)),
        shrink_factor=1,
        convergence={"iters": list(ITERATIONS), "tol": 0},
        spline_param=list(FIRST_SPANS),
        return_bias_field=True,
    )
    return np.log(field.numpy().astype(np.float64))


def with_n4ax(image, mask):
    """The JAX port, without its over-relaxation; on the CPU, if JAX has no other device."""
    from n4ax import n4

    _, field = n4(image, mask, iters=ITERATIONS, over_relax=1.0, conv_threshold=0.0, return_bias=True)
    return np.asarray(field, dtype=np.float64)


def with_n4flow(compiled, image, mask, spans=FIRST_SPANS, iterations=ITERATIONS, mesh="refined"):
    """One of our two sets of CPU kernels; the plain one uses one core."""
    kernels.COMPILED_VOXELS = 0 if compiled else 2**62
    positions = tuple(np.arange(n) for n in image.shape)
    samples = Samples(log_where(image, mask), mask, positions, image.shape, (1.0,) * 3, np.eye(4), {}, "array")
    parameters = N4Parameters(
        fit="lee-wolberg-shin", mesh=mesh, iterations=iterations, fwhm=0.15, twicing=0, convergence_threshold=0
    )
    mesh = Mesh.of_grid(image.shape, spans)
    return estimate_field(samples, parameters, mesh=mesh, threads=available_cores()).field.log_at(positions)


def plain(image, mask):
    """The readable kernels."""
    return with_n4flow(False, image, mask)


def compiled(image, mask):
    """The compiled kernels."""
    return with_n4flow(True, image, mask)


METHODS = {
    "SimpleITK": (with_simpleitk, "SimpleITK"),
    "ANTs": (with_ants, "antspyx"),
    "n4ax": (with_n4ax, "n4ax"),
    "n4flow, plain": (plain, "numpy"),
    "n4flow, compiled": (compiled, "numba"),
}


def memory_mb(key):
    """What this process holds (VmRSS), or the most it has held (VmHWM) since `forget_peak`; Linux alone tells."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def forget_peak():
    """Let VmHWM begin anew: it is otherwise that of the imports, or even of the process that started this one."""
    Path("/proc/self/clear_refs").write_text("5")


def warm_up(method):
    """Let a method import what it needs, and compile."""
    small = np.random.default_rng(0).uniform(50, 100, (20, 20, 20)).astype(np.float32)
    method(small, small > 0)


def serve(connection, method, image, mask):
    """Run a method whenever asked; send seconds, field and memory."""
    warm_up(method)
    before = memory_mb("VmRSS")
    forget_peak()
    while connection.recv():
        start = time.perf_counter()
        field = method(image, mask)
        connection.send((time.perf_counter() - start, field.astype(np.float32), memory_mb("VmHWM") - before))


class Runner:
    """A method in a process of its own."""

    def __init__(self, method, image, mask):
        self.connection, theirs = multiprocessing.Pipe()
        self.process = multiprocessing.Process(target=serve, args=(theirs, method, image, mask))
        self.process.start()
        self.seconds = []

    def run(self):
        """Run once."""
        self.connection.send(True)
        seconds, self.field, self.memory_mb = self.connection.recv()
        self.seconds.append(seconds)

    def stop(self):
        """End the process; the first run was to warm up, if there was another."""
        self.connection.send(False)
        self.process.join()
        self.seconds = self.seconds[1:] or self.seconds


def same_work(name, image, mask, runs):
    """Rows of the first table."""
    mask = mask & (image > 0)
    voxels = int(mask.sum())
    runners = {name: Runner(METHODS[name][0], image, mask) for name in METHODS if installed(METHODS[name][1])}
    for turn in range(runs + 1):
        for runner in runners.values():
            if turn == 0 or runner.seconds[0] < ONE_TURN_S:
                runner.run()
    rows = []
    for runner in runners.values():
        runner.stop()
    reference = runners["SimpleITK"]
    for method, runner in runners.items():
        difference = (runner.field - reference.field)[mask].astype(np.float64)
        difference -= difference.mean()
        rms, largest = np.sqrt((difference**2).mean()), np.abs(difference).max()
        median = statistics.median(runner.seconds)
        spread = f"{min(runner.seconds):.2f} to {max(runner.seconds):.2f} s"
        rows.append(
            [
                f"{name}, {voxels / 1e6:.2f}M voxels",
                method,
                f"{median:.2f} s ({spread})",
                f"{median / voxels / sum(ITERATIONS) * 1e9:.1f}",
                f"**{statistics.median(reference.seconds) / median:.0f}×**",
                "" if runner is reference else f"{rms:.0e} ({largest:.0e})",
                f"{runner.memory_mb:.0f} MB",
            ]
        )
        print(*rows[-1], sep=", ", file=sys.stderr, flush=True)
    return rows


def cost_of_a_voxel(image, mask, runs):
    """Rows of the second table: nanoseconds per voxel and iteration over spans and shrink factors."""
    rows = []
    for shrink in (4, 2, 1):
        part = (slice(None, None, shrink),) * 3
        some, inside = np.ascontiguousarray(image[part]), mask[part] & (image[part] > 0)
        cells = []
        for spans in (1, 4, 12, 29):
            if spans > min(some.shape):
                cells.append("")
                continue
            seconds = {}
            for iterations in (10, 40):
                taken = []
                for _ in range(runs + 1):
                    start = time.perf_counter()
                    with_n4flow(True, some, inside, (spans,) * 3, (iterations,), "fixed")
                    taken.append(time.perf_counter() - start)
                seconds[iterations] = min(taken[1:])
            # the difference: what an iteration costs, without what comes before and after
            cells.append(f"{(seconds[40] - seconds[10]) / 30 / inside.sum() * 1e9:.1f}")
        rows.append([f"{inside.sum() / 1e6:.2f}M", *cells])
    return rows


def subject(name, image, runs):
    """Rows of the third table."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        commands = {
            "n4flow: mask and n4": ["-c", N4FLOW_SCRIPT, image, out, SCRIPTS],
            "SimpleITK script": ["-c", SIMPLEITK_SCRIPT, image, out / "sf.nii.gz", out / "sc.nii.gz"],
            "nibabel: read, write the same": ["-c", NIBABEL_SCRIPT, image, out / "f.npy", out / "c.npy"],
        }
        # modules compiled once, as they are for those who use them, whatever this shell has set
        environment = os.environ | {"PYTHONPYCACHEPREFIX": str(out), "PYTHONDONTWRITEBYTECODE": ""}
        seconds = {what: [] for what in commands}
        for turn in range(runs + 1):
            for what, command in commands.items():
                os.sync()  # or one would wait for what another has left to be written
                start = time.perf_counter()
                subprocess.run([sys.executable, *command], check=True, env=environment)
                if turn:
                    seconds[what].append(time.perf_counter() - start)
                elif what.startswith("n4flow"):
                    for made in ("f", "c"):
                        np.save(out / f"{made}.npy", np.asarray(nib.load(out / f"{made}.nii.gz").dataobj))
    ours = statistics.median(seconds["n4flow: mask and n4"])
    return [
        [name, what, f"{statistics.median(taken):.2f} s", f"{statistics.median(taken) / ours:.1f}"]
        for what, taken in seconds.items()
    ]


def make_large(path, shape):
    """A ball of blocks of three intensities under a smooth field, float32, .nii: written plane by plane."""
    header = nib.Nifti1Header()
    header.set_data_shape(shape)
    header.set_data_dtype(np.float32)
    header.set_zooms((0.01,) * 3)
    header.set_sform(np.diag([0.01, 0.01, 0.01, 1]), 1)
    header["magic"] = header.single_magic
    header.set_data_offset(352)
    rng = np.random.default_rng(0)
    x, y = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape[:2]), indexing="ij")
    blocks = rng.choice([300.0, 600.0, 900.0], [n // 8 + 1 for n in shape])
    with open(path, "wb") as file:
        header.write_to(file)
        file.write(bytes(352 - file.tell()))
        for k, z in enumerate(np.linspace(-1, 1, shape[2])):
            tissue = blocks[:, :, k // 8].repeat(8, 0).repeat(8, 1)[: shape[0], : shape[1]]
            noise = rng.normal(0, 20, (shape[0], 1)) + rng.normal(0, 20, (1, shape[1]))
            plane = np.where(x**2 + y**2 + z**2 < 0.9, tissue * np.exp(0.2 * x + 0.1 * y * z) + noise, 10)
            file.write(plane.astype(np.float32).tobytes(order="F"))


def large():
    """Rows of the fourth table."""
    warm_up(compiled)  # into the cache on disk, or the first row of a new clone would have it
    rows = []
    for shape in ((256, 256, 400), (256, 1024, 1024), (1024, 1024, 2048)):
        with tempfile.TemporaryDirectory() as folder:
            image = Path(folder) / "large.nii"
            make_large(image, shape)
            command = [sys.executable, "-c", LARGE_SCRIPT, image, folder, SCRIPTS, str(max(shape) * 0.01 / 4)]
            ran = subprocess.run(command, check=True, capture_output=True, text=True)
        wall, cpu, memory = map(float, ran.stdout.split())
        voxels = np.prod(shape, dtype=float)
        rows.append(
            [
                f"{' × '.join(map(str, shape))}, {4 * voxels / 1e9:.1f} GB",
                f"{wall:.0f} s",
                f"{wall / voxels * 1e9:.0f}",
                f"{cpu / voxels * 1e9:.0f}",
                f"{memory:.0f} MB",
            ]
        )
    return rows


def installed(package):
    """Whether a package is there."""
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def table(header, rows):
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def main():
    """Measure and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=REPOSITORY.parent / "shared" / "data", help="holds bids/")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--large", action="store_true", help="the last table, with volumes of up to 8 GB, and no other")
    parser.add_argument("--quick", action="store_true", help="without the full resolution")
    parser.add_argument("--output", type=Path, help="Markdown file; standard output by default")
    given = parser.parse_args()
    if given.large:
        text = f"""## A large volume

{date.today()}, {_machine()}.
`python tests/benchmarks/speed.py --large`: mask and correction of a float32 volume, .nii to .nii, in one process on one
core; memory beyond the interpreter with its imports. What the disk does is in the wall time.

{table(["", "wall", "ns / voxel", "CPU ns / voxel", "memory"], large())}
"""
    else:
        text = _tables(given)
    if given.output:
        given.output.write_text(text)
    else:
        print(text)


def _tables(given):
    """The first three tables, with what they are of."""
    t1w = given.data / "bids" / "sub-01" / "anat" / "sub-01_T1w.nii.gz"
    image = np.asarray(nib.load(t1w).dataobj).astype(np.float32)
    mask = image > otsu_threshold(image.ravel())
    work = []
    for shrink, ordinal in ((4, "4th"), (2, "2nd"), (1, "")):
        if shrink > 1 or not given.quick:
            part = (slice(None, None, shrink),) * 3
            some, inside = image[part].copy(), mask[part].copy()
            work += same_work(f"every {ordinal} voxel".replace("  ", " "), some, inside, given.runs)
    cost = cost_of_a_voxel(image, mask, given.runs)
    subjects = subject("real T1w, 9.1M voxels", t1w, given.runs)
    header = ["real T1w", "", "median (range)", "ns / voxel / iteration", "SimpleITK / this"]
    return f"""# Results

{date.today()}, {_machine()}.
`python tests/benchmarks/speed.py {" ".join(sys.argv[1:])}`, {given.runs} in turns after one to warm up; one
alone where that took more than {ONE_TURN_S} s.

## The same work

Refined mesh from 1 to 8 spans, {" + ".join(map(str, ITERATIONS))} iterations, threshold 0, all cores (the plain
kernels: one); voxels are those of the mask. Last columns: rms (largest) difference of the log field from SimpleITK's;
memory beyond the data.

{table([*header, "differs by", "memory"], work)}

## The cost of a voxel

Compiled kernels, nanoseconds per mask voxel and iteration on {available_cores()} cores; fixed mesh of so many spans per
axis.

{table(["voxels in the mask", "1 span", "4", "12", "29 (32 control points)"], cost)}

## A subject

From .nii.gz to .nii.gz, process start included. SimpleITK takes all cores; n4flow one, beside which it compresses, and
reads and evaluates the next slab. nibabel reads the image, and writes the corrected image and the field that n4flow
found.

{table(["", "", "median", "this / n4flow"], subjects)}
"""


def _machine():
    """Cores and versions."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        processor = platform.machine()
    packages = ["numpy", "numba", "SimpleITK", "antspyx", "jax", "n4ax", "nibabel", "isal"]
    versions = ", ".join(f"{name} {version(name)}" for name in packages if installed(name))
    return f"{available_cores()} cores of {processor}, Python {platform.python_version()}, {versions}"


if __name__ == "__main__":
    os.environ["ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"] = str(available_cores())  # ANTs would take one
    multiprocessing.set_start_method("spawn")
    main()
