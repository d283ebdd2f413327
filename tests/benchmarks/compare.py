"""Time, agreement and error beside SimpleITK: the table of the README.

    python tests/benchmarks/compare.py [--data FOLDER] [--runs 5] [--output tests/benchmarks/RESULTS.md]

Three questions, each answered by runs that take turns on the same data:

1. The same work: the same array, mask, mesh and number of iterations, threshold 0. How much faster, and
   how far apart are the two log fields?
2. A subject: from a compressed file to a corrected file and its field, process start included, beside a
   plain SimpleITK script (Otsu, shrink 4, N4 at its defaults, full-resolution field, both written).
3. The truth: error of the log field in the brain on phantoms, both at their defaults.

SimpleITK uses all cores, n4flow one. Times are medians of the runs; what counts is their ratio.
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

import nibabel as nib
import numpy as np
import SimpleITK as sitk

REPOSITORY = Path(__file__).parents[2]
sys.path.insert(0, str(REPOSITORY / "workflow" / "scripts"))

from n4flow import N4Parameters, correct  # noqa: E402
from n4flow.estimate import estimate_field  # noqa: E402
from n4flow.field import Mesh  # noqa: E402
from n4flow.mask import otsu_threshold  # noqa: E402
from n4flow.phantom import make_phantom  # noqa: E402
from n4flow.samples import Samples, log_where, sample_positions  # noqa: E402

TISSUES = REPOSITORY / "workflow" / "resources" / "mni152" / "tissues_2mm.nii.gz"

SIMPLEITK_SCRIPT = """
import sys
import SimpleITK as sitk
image = sitk.ReadImage(sys.argv[1], sitk.sitkFloat32)
mask = sitk.OtsuThreshold(image, 0, 1, 200)
n4 = sitk.N4BiasFieldCorrectionImageFilter()
n4.Execute(sitk.Shrink(image, [4] * 3), sitk.Shrink(mask, [4] * 3))
field = sitk.Exp(n4.GetLogBiasFieldAsImage(image))
sitk.WriteImage(field, sys.argv[2])
sitk.WriteImage(image / field, sys.argv[3])
"""

N4FLOW_SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from n4flow import N4Parameters
from n4flow.derivatives import CorrectionFiles, correct_scan
from n4flow.mask import mask_scan
image, folder = Path(sys.argv[2]), Path(sys.argv[3])
mask = folder / "mask.nii.gz"
mask_scan(image, None, mask, folder / "mask.json", method="otsu", percentile=50)
files = CorrectionFiles(*(folder / name for name in ("c.nii.gz", "c.json", "f.json", "f.nii.gz")))
correct_scan(image, mask, files, parameters=N4Parameters(), device="cpu")
"""


def simpleitk_log_field(image, mask, iterations, spans, threshold):
    """Log field on the grid of the array."""
    n4 = sitk.N4BiasFieldCorrectionImageFilter()
    n4.SetMaximumNumberOfIterations(list(iterations))
    n4.SetConvergenceThreshold(threshold)
    n4.SetNumberOfControlPoints([s + 3 for s in spans])
    volume = sitk.GetImageFromArray(np.ascontiguousarray(image.T, dtype=np.float32))
    n4.Execute(volume, sitk.GetImageFromArray(np.ascontiguousarray(mask.T, dtype=np.uint8)))
    return sitk.GetArrayFromImage(n4.GetLogBiasFieldAsImage(volume)).T.astype(np.float64)


def n4flow_log_field(image, mask, mesh, iterations, spans):
    """Log field on the grid of the array, which is the whole image here."""
    positions = tuple(np.arange(n) for n in image.shape)
    samples = Samples(log_where(image, mask), mask, positions, image.shape, (1.0,) * 3, np.eye(4), {}, "array")
    parameters = N4Parameters(mesh=mesh, iterations=iterations, convergence_threshold=0, shrink_factor=1)
    return estimate_field(samples, parameters, mesh=Mesh.of_grid(image.shape, spans)).field.log_at(positions)


def take_turns(first, second, runs):
    """Median seconds of each, what each returned, and the spread of the ratio first / second."""
    times, results = ([], []), [first(), second()]  # the first of each warms up
    for _ in range(runs):
        for place, function in enumerate((first, second)):
            start = time.perf_counter()
            results[place] = function()
            times[place].append(time.perf_counter() - start)
    ratios = sorted(a / b for a, b in zip(*times, strict=True))
    return [statistics.median(t) for t in times], results, ratios


def same_work(name, image, mask, mesh, iterations, spans, runs):
    """A row: ratio of the times and distance of the fields for the same work."""
    mask = mask & (image > 0)
    seconds, fields, ratios = take_turns(
        lambda: simpleitk_log_field(image, mask, iterations, spans, 0.0),
        lambda: n4flow_log_field(image, mask, mesh, iterations, spans),
        runs,
    )
    difference = (fields[0] - fields[1])[mask]
    difference -= difference.mean()
    work = f"{mesh} mesh, {' + '.join(map(str, iterations))} iterations, {mask.sum() // 1000}k voxels"
    rms, largest = np.sqrt((difference**2).mean()), np.abs(difference).max()
    return [name, work, *_times(seconds, ratios), f"{rms:.1e}, at most {largest:.1e}"]


def whole_subject(name, image, runs):
    """A row: ratio of the times from file to file."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        simpleitk = [sys.executable, "-c", SIMPLEITK_SCRIPT, image, out / "f.nii.gz", out / "c.nii.gz"]
        n4flow = [sys.executable, "-c", N4FLOW_SCRIPT, REPOSITORY / "workflow" / "scripts", image, out]
        seconds, _, ratios = take_turns(
            lambda: subprocess.run(simpleitk, check=True), lambda: subprocess.run(n4flow, check=True), runs
        )
    return [name, "file to files, each at its defaults", *_times(seconds, ratios), "different meshes and stopping"]


def _times(seconds, ratios):
    return [
        f"{seconds[0]:.2f} s",
        f"{seconds[1]:.2f} s",
        f"**{statistics.median(ratios):.0f}×** ({ratios[0]:.0f} to {ratios[-1]:.0f})",
    ]


def truth(tissues, inu_percent, where):
    """A row: field error in the brain, both at their defaults (SimpleITK: 4 x 50, threshold 1e-3)."""
    ours, theirs, none = [], [], []
    for seed in (21, 22, 23):
        head = make_phantom(tissues, 2.0, inu_percent=inu_percent, noise_percent=3, seed=seed)
        mask = head.brain if where == "brain" else head.image > otsu_threshold(head.image.ravel())
        grid = np.ix_(*sample_positions(mask.shape, 4))
        corrected = correct(head.image, mask, voxel_size_mm=(2, 2, 2), device="cpu")
        reference = simpleitk_log_field(head.image[grid], mask[grid], [50] * 4, (1, 1, 1), 1e-3)
        inside = head.brain[grid]
        expected = np.log(head.bias[grid][inside])
        for errors, found in (
            (ours, np.log(corrected.bias[grid][inside])),
            (theirs, reference[inside]),
            (none, 0 * expected),
        ):
            errors.append(np.std(found - expected))
    values = [np.mean(errors) for errors in (none, theirs, ours)]
    return [f"{inu_percent} %", where, *(f"{v:.4f}" for v in values), f"**{values[2] / values[1]:.2f}**"]


def table(header, rows):
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def main():
    """Measure and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=REPOSITORY.parent / "shared" / "data", help="holds bids/")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--output", type=Path, help="Markdown file; standard output by default")
    given = parser.parse_args()

    tissues = np.asarray(nib.load(TISSUES).dataobj)
    head = make_phantom(tissues, 2.0, inu_percent=40, noise_percent=3, seed=20)
    head_mask = head.image > otsu_threshold(head.image.ravel())
    work = [
        same_work(
            "phantom, 2 mm, every 2nd voxel", head.image[::2, ::2, ::2], head_mask[::2, ::2, ::2], *job, given.runs
        )
        for job in (("refined", (20,) * 4, (1, 1, 1)), ("fixed", (50,), (5, 6, 5)))
    ]
    t1w = given.data / "bids" / "sub-01" / "anat" / "sub-01_T1w.nii.gz"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "phantom.nii.gz"
        nib.save(nib.Nifti1Image(head.image, np.diag([2.0, 2, 2, 1])), file)
        subjects = [whole_subject("phantom, 2 mm, 1.1M voxels", file, given.runs)]
    if t1w.exists():
        image = np.asarray(nib.load(t1w).dataobj).astype(np.float32)
        mask = image > otsu_threshold(image.ravel())
        for shrink, runs in ((4, given.runs), (2, max(1, given.runs // 3))):
            part = np.s_[::shrink, ::shrink, ::shrink]
            name = f"real T1w, 0.88 mm, every {shrink}{'nd' if shrink == 2 else 'th'} voxel"
            work.append(same_work(name, image[part], mask[part], "refined", (20,) * 4, (1, 1, 1), runs))
        subjects.append(whole_subject("real T1w, 0.88 mm, 9.1M voxels", t1w, given.runs))
    errors = [truth(tissues, inu, where) for inu in (0, 20, 40, 100) for where in ("brain", "head")]

    timed = ["scan", "work", "SimpleITK", "n4flow", "ratio (range)", "log fields differ by (rms)"]
    text = f"""# Results

{date.today()}, {os.cpu_count()} cores of {_processor()}, Python {platform.python_version()},
SimpleITK {version("SimpleITK")}, NumPy {version("numpy")}. `python tests/benchmarks/compare.py`,
medians of {given.runs} runs in turns. SimpleITK uses all cores, n4flow one.

## The same work, and a whole subject

{table(timed, work + subjects)}

## The truth

Error of the log field in the brain of phantoms (rms, mean of 3), each at its defaults (SimpleITK: 4 levels of 50
iterations, threshold 1e-3). 3 % Rician noise, 2 mm.

{table(["INU", "mask", "uncorrected", "SimpleITK", "n4flow", "n4flow / SimpleITK"], errors)}
"""
    if given.output:
        given.output.write_text(text)
    else:
        print(text)


def _processor():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


if __name__ == "__main__":
    main()
