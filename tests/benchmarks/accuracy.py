"""Error of the field where the truth is known: every preset beside SimpleITK, ANTs and n4ax.

    python tests/benchmarks/accuracy.py [--mni152 FOLDER] [--output tests/benchmarks/ACCURACY.md] [--quick]

Cases are those of ``tests/phantoms.py``: fields, strengths, noise, contrasts, masks and lesions, mixed. Defaults were
chosen on every second case; the tables report on the others, and beside them on those that were tuned on. The error is
the standard deviation, in the brain, of the difference between estimated and true log field, on every 4th voxel.
"""

import argparse
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import SimpleITK as sitk

REPOSITORY = Path(__file__).parents[2]
sys.path[:0] = [str(REPOSITORY / "workflow" / "scripts"), str(REPOSITORY)]

from n4flow.estimate import estimate_field  # noqa: E402
from n4flow.metrics import coefficient_of_joint_variation  # noqa: E402
from n4flow.parameters import PRESETS, N4Parameters  # noqa: E402
from n4flow.samples import Samples, log_where, sample_positions  # noqa: E402
from tests.phantoms import family, make_scan  # noqa: E402

SHRINK = 4
STRENGTHS = (0, 20, 40, 100)


def with_n4flow(parameters, samples, *_):
    """Log field on the samples' grid, and the iterations it took."""
    estimate = estimate_field(samples, parameters)
    return estimate.field.log_at(samples.positions), len(estimate.history)


def with_simpleitk(threshold, samples, image, mask):
    """SimpleITK at its defaults: 4 levels of 50 iterations, spans doubling from 1."""
    n4 = sitk.N4BiasFieldCorrectionImageFilter()
    n4.SetConvergenceThreshold(threshold)
    iterations = []
    n4.AddCommand(sitk.sitkIterationEvent, lambda: iterations.append(1))
    volume = sitk.GetImageFromArray(np.ascontiguousarray(image.T))
    n4.Execute(volume, sitk.GetImageFromArray(np.ascontiguousarray(mask.T.astype(np.uint8))))
    field = sitk.GetArrayFromImage(n4.GetLogBiasFieldAsImage(volume)).T.astype(float)
    n4.RemoveAllCommands()
    return field, len(iterations)


def with_ants(samples, image, mask):
    """ANTs at its defaults, on the samples."""
    import ants

    field = ants.n4_bias_field_correction(
        ants.from_numpy(image), mask=ants.from_numpy(mask.astype("float32")), shrink_factor=1, return_bias_field=True
    )
    return np.log(np.maximum(field.numpy(), 1e-6)), None


def methods():
    """What is compared, by name; ANTs where antspyx is installed."""
    found = {
        "SimpleITK, threshold 0": partial(with_simpleitk, 0.0),
        "SimpleITK, threshold 1e-3": partial(with_simpleitk, 1e-3),
        **{
            f"n4flow {name}": partial(with_n4flow, N4Parameters(**keys))
            for name, keys in PRESETS.items()
            if name != "microscopy"
        },
    }
    try:
        import ants  # noqa: F401
    except ImportError:
        return found
    return found | {"ANTs": with_ants}


def measure(case, mni152):
    """Errors of all methods on a case."""
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    scan = make_scan(case, mni152)
    positions = sample_positions(scan.image.shape, SHRINK)
    grid = np.ix_(*positions)
    image, brain, truth = scan.image[grid], scan.brain[grid], scan.log_bias[grid]
    mask = scan.mask[grid] & (image > 0)
    size = (float(case.voxel_size_mm),) * 3
    samples = Samples(log_where(image, mask), mask, positions, scan.image.shape, size, np.eye(4), {}, "phantom")
    rows = {"uncorrected": (np.std(truth[brain]), np.nan, np.nan, 0)}
    for name, method in methods().items():
        field, iterations = method(samples, image, mask)
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


def summary(results, reference):
    """Lines of a table: per method and strength the median ratio to the reference, worst, error, CJV, iterations."""
    lines = []
    for name in results[0][1]:
        cells = []
        for strength in STRENGTHS:
            chosen = [rows for case, rows in results if case.inu_percent == strength]
            ratios = [rows[name][0] / rows[reference][0] for rows in chosen]
            cells.append(f"{statistics.median(ratios):.2f} ({max(ratios):.2f})")
        rms, p99, cjv = (statistics.median(rows[name][i] for _, rows in results) for i in range(3))
        counts = [rows[name][3] for _, rows in results if rows[name][3] is not None]
        cells += [f"{rms:.4f}", f"{p99:.4f}", f"{cjv:.2f}", f"{statistics.median(counts):.0f}" if counts else "n/a"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main():
    """Measure all cases and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mni152", type=Path, default=REPOSITORY.parent / "shared" / "data" / "mni152")
    parser.add_argument("--output", type=Path, help="Markdown file; standard output by default")
    parser.add_argument("--quick", action="store_true", help="every fourth case")
    given = parser.parse_args()
    cases = family((1, 2) if given.mni152.is_dir() else (2,))
    if given.quick:
        cases = [case for case in cases if case.number % 8 in (0, 3)]
    with ProcessPoolExecutor(2) as pool:
        results = list(pool.map(partial(measure, mni152=given.mni152), cases))
    reference = "SimpleITK, threshold 0"
    strengths = " | ".join(f"{s} % INU" for s in STRENGTHS)
    head = f"| | {strengths} | rms | p99 | CJV | iterations |\n|{' --- |' * 9}"
    text = f"""# Accuracy

Error of the log field in the brain against the truth, over {len(cases)} phantoms. Under each strength of the field:
median of the ratio to SimpleITK at its defaults (worst case). Behind it medians over all strengths: rms and 99th
percentile of the error, CJV of grey and white matter, iterations. `python tests/benchmarks/accuracy.py`

## Reported on

{head}
{summary([r for r in results if not r[0].tuned_on], reference)}

## Tuned on

{head}
{summary([r for r in results if r[0].tuned_on], reference)}
"""
    if given.output:
        given.output.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
