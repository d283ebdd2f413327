"""Error of the field where the truth is known: every preset beside SimpleITK, ANTs and n4ax.

    python tests/benchmarks/accuracy.py [--data FOLDER] [--output tests/benchmarks/ACCURACY.md] [--quick]

Phantoms are those of ``tests/phantoms.py``: fields, strengths, noise, contrasts, masks and lesions, mixed. Defaults
were chosen on every second case; the tables report on the others, and beside them on those that were tuned on. The
error is the standard deviation, in the brain, of the difference between estimated and true log field, on every 4th
voxel.

On a real scan the truth is not known, but a field that is put on top of it is: a T1w head is multiplied by smooth
fields of the same kinds, and what the estimate changes by is compared with what was added, in the head's mask.

All methods get the same samples and the same mask, and each the settings that it has if nothing is set. ANTs has a row
where antspyx is installed, n4ax where it is: ``pip install jax``, then ``pip install --no-deps n4ax``, below Python
3.12 with ``--ignore-requires-python``.
"""

import argparse
import os
import statistics
import sys
import zlib
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import nibabel as nib
import numpy as np
import SimpleITK as sitk

REPOSITORY = Path(__file__).parents[2]
sys.path[:0] = [str(REPOSITORY / "workflow" / "scripts"), str(REPOSITORY)]

from n4flow import __version__  # noqa: E402
from n4flow.estimate import estimate_field  # noqa: E402
from n4flow.mask import otsu_threshold  # noqa: E402
from n4flow.metrics import coefficient_of_joint_variation  # noqa: E402
from n4flow.parameters import PRESETS, N4Parameters  # noqa: E402
from n4flow.samples import Samples, log_where, sample_positions  # noqa: E402
from tests.phantoms import FIELDS, family, log_bias_field, make_scan  # noqa: E402

SHRINK = 4
#: Of the fields, in percent of INU: what the tables take together.
STRENGTHS = ((0,), (20,), (40,), (20, 40), (100,))
#: What is put on the real scan: kind, and INU in percent.
ADDED = [(kind, inu_percent) for inu_percent in (20, 40) for kind in FIELDS]


def without_correction(samples, *_):
    """No field at all."""
    return np.zeros(samples.log_image.shape), 0


def with_n4flow(parameters, samples, *_):
    """Log field on the samples' grid, and the iterations it took."""
    estimate = estimate_field(samples, parameters)
    return estimate.field.log_at(samples.positions), len(estimate.history)


def with_simpleitk(threshold, samples, image, mask):
    """SimpleITK: 4 levels of 50 iterations, spans doubling from 1; the threshold is 1e-3 if nothing is set."""
    n4 = sitk.N4BiasFieldCorrectionImageFilter()
    if threshold is not None:
        n4.SetConvergenceThreshold(threshold)
    iterations = []
    n4.AddCommand(sitk.sitkIterationEvent, lambda: iterations.append(1))
    volume = sitk.GetImageFromArray(np.ascontiguousarray(image.T))
    n4.Execute(volume, sitk.GetImageFromArray(np.ascontiguousarray(mask.T.astype(np.uint8))))
    field = sitk.GetArrayFromImage(n4.GetLogBiasFieldAsImage(volume)).T.astype(float)
    n4.RemoveAllCommands()
    return field, len(iterations)


def with_ants(samples, image, mask):
    """ANTs as antspyx calls it: 4 levels of 50 iterations, spans doubling from 1, threshold 1e-7.

    These are spans of the mesh and no distance (``spline_param=None``), so that the voxel size decides nothing; the
    images carry it all the same. Its shrink factor of 4 is what the samples were taken with. It does not say how many
    iterations it took.
    """
    import ants

    spacing = [size * float(p[1] - p[0]) for size, p in zip(samples.voxel_size_mm, samples.positions, strict=True)]
    field = ants.n4_bias_field_correction(
        ants.from_numpy(image, spacing=spacing),
        mask=ants.from_numpy(mask.astype(np.float32), spacing=spacing),
        shrink_factor=1,
        return_bias_field=True,
    )
    return np.log(field.numpy().astype(float)), None


def with_n4ax(samples, image, mask):
    """n4ax, in single precision: 8, 12, 12 and 8 iterations, spans doubling from 1, updates times 1.8, no threshold."""
    import n4ax

    _, field = n4ax.n4(image, mask, return_bias=True)
    return np.asarray(field, dtype=float), 40


def installed(package):
    """Its version, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


SIMPLEITK = f"SimpleITK {version('SimpleITK')}"
#: Whose error is 1 in the tables.
REFERENCE = f"{SIMPLEITK}, defaults"
#: What is compared, by the name of its row.
METHODS = {
    "uncorrected": without_correction,
    REFERENCE: partial(with_simpleitk, None),
    f"{SIMPLEITK}, threshold 0": partial(with_simpleitk, 0.0),
    **({f"ANTs (antspyx {installed('antspyx')})": with_ants} if installed("antspyx") else {}),
    **({f"n4ax {installed('n4ax')}": with_n4ax} if installed("n4ax") else {}),
    **{
        f"n4flow {__version__} {name}": partial(with_n4flow, N4Parameters(**keys))
        for name, keys in PRESETS.items()
        if name != "microscopy"
    },
}


def samples_of(image, mask, voxel_size_mm, positions, shape):
    """What `n4flow.correction.read_samples` makes of files."""
    mask = mask & (image > 0)
    return Samples(log_where(image, mask), mask, positions, shape, voxel_size_mm, np.eye(4), {}, "scan")


def measure(case, mni152):
    """Errors of all methods on a phantom."""
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    scan = make_scan(case, mni152)
    positions = sample_positions(scan.image.shape, SHRINK)
    grid = np.ix_(*positions)
    image, brain, truth = scan.image[grid], scan.brain[grid], scan.log_bias[grid]
    samples = samples_of(image, scan.mask[grid], (float(case.voxel_size_mm),) * 3, positions, scan.image.shape)
    rows = {}
    for name, method in METHODS.items():
        field, iterations = method(samples, image, samples.mask)
        error = (field - truth)[brain]
        error -= error.mean()
        corrected = image / np.exp(field)
        tissues = (corrected[scan.gm[grid]], corrected[scan.wm[grid]])
        rows[name] = (
            np.std(error),
            np.percentile(np.abs(error), 99),
            coefficient_of_joint_variation(*tissues),
            iterations,
        )
    return case, rows


def on_real_scan(added, path):
    """Fields of all methods on it times a known field: that field and, by method, what was estimated.

    Both in the mask, less their means. Without `added` the scan is left as it is.
    """
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    scan = nib.load(path)
    whole = np.asarray(scan.dataobj, dtype=np.float32)
    positions = sample_positions(whole.shape, SHRINK)
    image = whole[np.ix_(*positions)]
    mask = image > otsu_threshold(whole[::2, ::2, ::2].ravel())
    log_added = np.zeros(image.shape)
    if added:
        log_added = log_bias_field(*added, mask, np.random.default_rng(zlib.crc32(repr(added).encode())))
    image = (image * np.exp(log_added)).astype(np.float32)
    voxel_size_mm = tuple(float(size) for size in scan.header.get_zooms()[:3])
    samples = samples_of(image, mask, voxel_size_mm, positions, whole.shape)
    estimates = {}
    for name, method in METHODS.items():
        field, iterations = method(samples, image, mask)
        estimates[name] = (field[mask] - field[mask].mean(), iterations)
    return log_added[mask] - log_added[mask].mean(), estimates


def table(columns, lines):
    """Markdown table of a name and cells per line."""
    rule = f"|{' --- |' * (len(columns) + 1)}"
    return "\n".join([f"| | {' | '.join(columns)} |", rule, *(f"| {name} | {' | '.join(c)} |" for name, c in lines)])


def middle(values, digits):
    """Median of what is known."""
    known = [value for value in values if value is not None]
    return f"{statistics.median(known):.{digits}f}" if known else "n/a"


def phantom_table(results):
    """Per method and strength the median ratio to the reference, worst; then error, CJV, iterations."""
    lines = []
    for name in METHODS:
        cells = []
        for strength in STRENGTHS:
            chosen = [rows for case, rows in results if case.inu_percent in strength]
            ratios = [rows[name][0] / rows[REFERENCE][0] for rows in chosen]
            cells.append(f"{statistics.median(ratios):.2f} ({max(ratios):.2f})")
        digits = (4, 4, 2, 0)
        cells += [middle([rows[name][i] for _, rows in results], d) for i, d in enumerate(digits)]
        lines.append((name, cells))
    counts = [sum(case.inu_percent in strength for case, _ in results) for strength in STRENGTHS]
    strengths = [f"{' and '.join(map(str, s))} % INU, {n} cases" for s, n in zip(STRENGTHS, counts, strict=True)]
    return table([*strengths, "rms", "p99", "CJV", "iterations"], lines)


def real_table(before, results):
    """Per method and strength the error (median, worst) and the share of the added field found; iterations."""
    strengths = sorted({inu_percent for (_, inu_percent), _, _ in results})
    lines = []
    for name, (without, iterations) in before.items():
        cells = []
        for strength in strengths:
            errors, shares = [], []
            for (_, inu_percent), truth, estimates in results:
                if inu_percent == strength:
                    change = estimates[name][0] - without
                    errors.append(np.std(change - truth) / np.std(truth))
                    shares.append(np.mean(change * truth) / np.mean(truth**2))
            cells += [f"{statistics.median(errors):.2f} ({max(errors):.2f})", middle(shares, 2)]
        cells += [middle([iterations], 0), middle([estimates[name][1] for _, _, estimates in results], 0)]
        cells += [f"{np.std(without):.4f}"]
        lines.append((name, cells))
    columns = [column for s in strengths for column in (f"{s} % INU: error", "found")]
    return table([*columns, "iterations without", "with", "field without"], lines)


def main():
    """Measure all cases and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=REPOSITORY.parent / "shared" / "data")
    parser.add_argument("--output", type=Path, help="Markdown file; standard output by default")
    parser.add_argument("--quick", action="store_true", help="every fourth case")
    given = parser.parse_args()
    os.environ["ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"] = "1"  # for ANTs; read when ITK first starts threads
    mni152, t1w = given.data / "mni152", given.data / "bids" / "sub-01" / "anat" / "sub-01_T1w.nii.gz"
    cases, added = family((1, 2) if mni152.is_dir() else (2,)), ADDED if t1w.is_file() else []
    if given.quick:
        cases, added = [case for case in cases if case.number % 8 in (0, 3)], added[::3]
    with ProcessPoolExecutor(2) as pool:
        fields = pool.map(partial(on_real_scan, path=t1w), [None, *added] if added else [])
        results = list(pool.map(partial(measure, mni152=mni152), cases))
        real = list(fields)
    text = f"""# Accuracy

`python tests/benchmarks/accuracy.py` writes this. All methods get the same samples (every 4th voxel) and the same mask,
and each the settings that it has if nothing is set; what these are stands in the script.

## On phantoms

Error of the log field in the brain against the truth, over {len(cases)} phantoms. Under each strength of the field:
median of the ratio to SimpleITK at its defaults (worst case). Behind it medians over all strengths: rms and 99th
percentile of the error, CJV of grey and white matter, iterations. One anatomy; every contrast (T1, T2, PD), kind of
field, strength and noise (0 to 9 %) with every other; mask, voxel size and lesions by lot.

### Reported on

Field, noise and lesions of these are drawn anew with every change of a setting, so that no setting was chosen by them.

{phantom_table([r for r in results if not r[0].tuned_on])}

### Tuned on

{phantom_table([r for r in results if r[0].tuned_on])}
"""
    if real:
        text += f"""
## On a real scan, with a field put on top

A real T1w head of 0.88 mm, with Otsu's mask, times {len(added)} known fields of the same four kinds. What a method
makes of the scan as it is, is subtracted from what it makes of the product, and the rest compared with the added field,
in the mask. Error: sd of the difference as a multiple of the added field's sd, median (worst). Found: the share of the
added field that came out (slope of the regression), median. Last column: sd of the log field that the method finds in
the scan as it is.

What is wrong both times cancels here, such as anatomy that was taken for field: a method that never stops finds any
field that its mesh can follow, whatever else it takes along. So this shows what an early stop leaves in the image, and
the phantoms above show what a late one takes out of it.

{real_table(real[0][1], [(given_field, *found) for given_field, found in zip(added, real[1:], strict=True)])}
"""
    if given.output:
        given.output.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
