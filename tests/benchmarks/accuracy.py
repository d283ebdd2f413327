"""Error of the field where the truth is known, and what is found of a known field that is put on real scans.

    python tests/benchmarks/accuracy.py [--output tests/benchmarks/ACCURACY.md] [--quick] [--only TABLE ...]

Phantoms are those of ``tests/phantoms.py``, real scans those of ``tests/anatomies.py``. The error is the standard
deviation, in the brain, of the difference between estimated and true log field, on every 4th voxel. Each anatomy is
reported for itself: what holds for one need not hold for another.

On a real scan the truth is not known, but a field that is put on top of it is: what the estimate changes by is compared
with what was added, in the mask.

Each method has the settings that it has if nothing is set. SimpleITK, ANTs and n4ax get every 4th voxel, as is usual;
n4flow takes the samples that its settings say. ANTs has a row where antspyx is installed, n4ax where it is:
``pip install jax``, then ``pip install --no-deps n4ax``, below Python 3.12 with ``--ignore-requires-python``.
"""

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import fields, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import nibabel as nib
import numpy as np
import SimpleITK as sitk

REPOSITORY = Path(__file__).parents[2]
sys.path[:0] = [str(REPOSITORY / "workflow" / "scripts"), str(REPOSITORY)]

from n4flow import InputError, __version__, basis_matrix, correct, estimate  # noqa: E402
from n4flow.core import sharpening  # noqa: E402
from n4flow.core.bspline import expand  # noqa: E402
from n4flow.core.noise import surroundings  # noqa: E402
from n4flow.core.samples import Samples, log_where, sample_positions, shrink_per_axis  # noqa: E402
from n4flow.images.sampling import mended  # noqa: E402
from n4flow.parameters import PRESETS, N4Parameters  # noqa: E402
from n4flow.qc.metrics import coefficient_of_joint_variation  # noqa: E402
from n4flow.steps.mask import mask_scan, otsu_threshold  # noqa: E402
from tests.anatomies import REAL_SCANS, anatomy, real_scan  # noqa: E402
from tests.phantoms import (  # noqa: E402
    MASKS,
    NEAR_COIL,
    NOISE,
    STRENGTHS,
    TUNED_ON,
    family,
    light_sheet,
    make_scan,
    with_added_field,
)

#: Every n-th voxel is a sample of SimpleITK, ANTs and n4ax, and a place where errors are measured.
SHRINK = 4


class Found(NamedTuple):
    """What a method makes of an image."""

    log_at: Callable[[Any], np.ndarray]  # log field on the grid of these voxel indices per axis
    iterations: float  # NaN if it does not say


def without_correction(*_, **__):
    """No field at all."""
    return Found(lambda positions: np.zeros([len(p) for p in positions]), 0)


def with_n4flow(parameters, image, mask, voxel_size_mm, positions=None):
    """n4flow, on its own samples or on those at `positions`."""
    if positions is None:
        result = correct(image, mask, voxel_size_mm=voxel_size_mm, parameters=parameters, device="cpu")
        return Found(result.field.log_at, max(Counter(line.half for line in result.history).values(), default=0))
    samples = samples_at(positions, image, mask, voxel_size_mm, parameters)
    found = estimate.estimate_field(samples, parameters)
    return Found(found.field.log_at, len(found.history))


def samples_at(positions, image, mask, voxel_size_mm, parameters):
    """Samples at these voxel indices per axis, as n4flow takes them."""
    used = mask & (image > 0)
    inside, values = (array[np.ix_(*positions)] for array in (used, image))
    affine = np.diag([*voxel_size_mm, 1.0])
    samples = Samples(log_where(values, inside), inside, positions, image.shape, voxel_size_mm, affine, {}, "scan")
    padded = np.pad(np.where(used, image, np.nan), 1, constant_values=np.nan)
    return mended(samples, padded[np.ix_(*(w + 1 for w in surroundings(positions)))], parameters)


def denoised_first(method, image, mask, voxel_size_mm):
    """Another method on samples that are freed of noise as ours are."""
    positions = sample_positions(image.shape, SHRINK)
    samples = samples_at(positions, image, mask, voxel_size_mm, N4Parameters())
    image, grid = image.copy(), np.ix_(*positions)
    image[grid] = np.where(samples.mask, np.exp(samples.log_image), image[grid])
    return method(image, mask, voxel_size_mm)


def on_samples(method, image, mask, voxel_size_mm, positions=None):
    """A method that gives its field on the samples: the spline of 8 spans that this is, to be evaluated anywhere."""
    positions = positions or sample_positions(image.shape, SHRINK)
    grid = np.ix_(*positions)
    steps = [float(p[1] - p[0]) for p in positions]
    values, used = image[grid], (mask & (image > 0))[grid]
    field, iterations = method(values, used, [size * step for size, step in zip(voxel_size_mm, steps, strict=True)])

    def bases(places):
        ends = [(p[0], p[-1]) for p in positions]
        return [basis_matrix(8 * np.clip((p - a) / (b - a), 0, 1), 8) for p, (a, b) in zip(places, ends, strict=True)]

    lattice = expand(field, [np.linalg.pinv(basis) for basis in bases(positions)])
    return Found(lambda places: expand(lattice, bases(places)), iterations)


def with_simpleitk(threshold, image, mask, _):
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


def with_ants(image, mask, spacing):
    """ANTs as antspyx calls it: 4 levels of 50 iterations, spans doubling from 1, threshold 1e-7.

    These are spans of the mesh and no distance (``spline_param=None``), so that the voxel size decides nothing; the
    images carry it all the same. Its shrink factor of 4 is what the samples were taken with. It does not say how many
    iterations it took.
    """
    import ants

    field = ants.n4_bias_field_correction(
        ants.from_numpy(image, spacing=spacing),
        mask=ants.from_numpy(mask.astype(np.float32), spacing=spacing),
        shrink_factor=1,
        return_bias_field=True,
    )
    return np.log(field.numpy().astype(float)), np.nan


def with_n4ax(image, mask, _):
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
DEFAULT = f"n4flow {__version__} {next(iter(PRESETS))}"
#: What is compared, by the name of its row.
QUICK = {
    "uncorrected": without_correction,
    REFERENCE: partial(on_samples, partial(with_simpleitk, None)),
    **{f"n4flow {__version__} {name}": partial(with_n4flow, N4Parameters(**keys)) for name, keys in PRESETS.items()},
}
#: What takes 200 iterations of SimpleITK's kind: on a few cases only.
SLOW = {
    f"{SIMPLEITK}, threshold 0": partial(on_samples, partial(with_simpleitk, 0.0)),
    **({f"ANTs (antspyx {installed('antspyx')})": partial(on_samples, with_ants)} if installed("antspyx") else {}),
    **({f"n4ax {installed('n4ax')}": partial(on_samples, with_n4ax)} if installed("n4ax") else {}),
}
#: What is gained by averaging noise out, and what by the estimate.
DENOISED = {f"{SIMPLEITK}, on our denoised samples": partial(denoised_first, QUICK[REFERENCE])}
METHODS = QUICK | DENOISED | SLOW
#: On real scans without ANTs, which on phantoms comes to the same as SimpleITK without a threshold.
REAL = {name: method for name, method in (QUICK | SLOW).items() if "ANTs" not in name}


class Measured(NamedTuple):
    """A method on a phantom."""

    error: float
    left: float  # error as a share of the field that is there; NaN where there is none
    cjv: float
    iterations: float


def attempt(method, scan, mask=None, image=None):
    """What a method makes of a phantom or a real scan, or of another mask or image of it; NaN where it refuses."""
    try:
        return method(scan.image if image is None else image, scan.mask if mask is None else mask, scan.voxel_size_mm)
    except InputError as problem:
        print(problem, file=sys.stderr)
        return Found(lambda positions: np.full([len(p) for p in positions], np.nan), np.nan)


def measure_scan(scan, methods):
    """What methods, by name, make of a phantom."""
    positions = sample_positions(scan.image.shape, SHRINK)
    grid = np.ix_(*positions)
    image, brain, truth = scan.image[grid], scan.brain[grid], scan.log_bias[grid]
    rows = {}
    for name, method in methods.items():
        found = attempt(method, scan)
        field = found.log_at(positions)
        error, size = np.std((field - truth)[brain]), np.std(truth[brain])
        corrected = image / np.exp(field)
        tissues = [corrected[inside[grid]] for inside in (scan.gm, scan.wm)]
        cjv = coefficient_of_joint_variation(*tissues) if min(map(len, tissues)) else np.nan
        rows[name] = Measured(error, error / size if size else np.nan, cjv, found.iterations)
    return rows


def measure(case):
    """All methods on a case, the slow ones at 3 % noise, and where there is no field or one of 40 %."""
    slowly = case.noise_percent == 3 and case.inu_percent in (0, 40)
    return measure_scan(make_scan(case), METHODS if slowly else QUICK | DENOISED)


def measure_quickly(case):
    """All but the slow methods on a case."""
    return measure_scan(make_scan(case), QUICK)


def markdown(columns, lines):
    """Markdown table of a name and cells per line."""
    rule = f"|{' --- |' * (len(columns) + 1)}"
    return "\n".join([f"| | {' | '.join(columns)} |", rule, *(f"| {name} | {' | '.join(c)} |" for name, c in lines)])


def middle(values, digits=2, *, worst=False):
    """Median, with the largest in brackets; a dash for what was not measured, or was refused."""
    known = [value for value in values if np.isfinite(value)]
    if not known:
        return "n/a"
    text = f"{np.median(known):.{digits}f}"
    refused = f", {len(values) - len(known)} refused" if len(known) < len(values) else ""
    return text + (f" ({max(known):.{digits}f}{refused})" if worst else "")


def ratios(results, name):
    """Errors of a method as multiples of the reference's."""
    return [rows[name].error / rows[REFERENCE].error for _, rows in results if name in rows]


def by_anatomy(results, columns, further=()):
    """Tables of ratios, an anatomy each: columns are a name and a choice of cases, then names of what is measured."""
    text = []
    for name in dict.fromkeys(case.anatomy for case, _ in results):
        own = [result for result in results if result[0].anatomy == name]
        chosen = {label: [result for result in own if choice(result[0])] for label, choice in columns.items()}
        chosen = {label: part for label, part in chosen.items() if part}
        lines = []
        for method in dict.fromkeys(method for _, rows in own for method in rows):
            cells = [middle(ratios(part, method), worst=True) for part in chosen.values()]
            rows = [rows[method] for _, rows in own if method in rows]
            lines.append((method, cells + [middle([getattr(row, key) for row in rows], n) for key, n in further]))
        reference = [middle([rows[REFERENCE].error for _, rows in part], 4) for part in chosen.values()]
        lines.insert(0, (f"error of {REFERENCE}", reference + [""] * len(further)))
        titles = [f"{label} ({len(part)})" for label, part in chosen.items()]
        text.append(f"**{name}**\n\n{markdown(titles + [key for key, _ in further], lines)}")
    return "\n\n".join(text)


def strength_tables(results):
    """By strength of the field, then by noise."""
    strengths = {f"{n} % INU": lambda case, n=n: case.inu_percent == n for n in STRENGTHS}
    noise = {f"{n} % noise": lambda case, n=n: case.noise_percent == n for n in NOISE}
    strong = by_anatomy(results, strengths, (("error", 4), ("cjv", 2), ("iterations", 0)))
    return f"{strong}\n\nThe same cases by noise:\n\n{by_anatomy(results, noise)}"


def strong_tables(results):
    """Fields from 150 % INU."""
    return by_anatomy(results, {f"{n} % INU": lambda case, n=n: case.inu_percent == n for n in STRONG}, (("left", 2),))


def mask_tables(results):
    """Masks, and lesions."""
    columns = {mask: lambda case, mask=mask: case.mask == mask and not case.lesions for mask in MASKS}
    return by_anatomy(results, columns | {"brain, lesions": lambda case: case.lesions})


def measure_other_scale(job):
    """A mouse, or a light-sheet object."""
    _, what = job
    scan = light_sheet(**what) if isinstance(what, dict) else make_scan(what)
    return measure_scan(scan, QUICK)


def scale_table(results):
    """Share left where there is a field, rms where there is none."""
    columns = [label for (label, _), _ in results]
    lines = []
    for method in QUICK:
        rows = [rows[method] for _, rows in results]
        cells = [middle([row.left], 3) if np.isfinite(row.left) else middle([row.error], 4) for row in rows]
        lines.append((method, cells))
    return markdown(columns, lines)


def fields_on(name, added, methods):
    """Fields of methods on a real scan, times a known field if one is named; and that field: in the mask."""
    scan = real_scan(name)
    positions = sample_positions(scan.image.shape, SHRINK)
    grid = np.ix_(*positions)
    image, log_added = with_added_field(scan, *added, seed=1) if added else (scan.image, np.zeros(scan.image.shape))
    inside = scan.mask[grid]
    estimates = {}
    for method, call in methods.items():
        field = attempt(call, scan, image=image).log_at(positions)[inside]
        estimates[method] = field - field.mean()
    return log_added[grid][inside] - log_added[grid][inside].mean(), estimates


def found_and_error(change, truth):
    """Share of an added field that is found, and the error as a share of that field."""
    return np.mean(change * truth) / np.mean(truth**2), np.std(change - truth) / np.std(truth)


def on_real_scan(job):
    """All methods on a real scan, the slow ones on that as it is and with one added field."""
    name, added = job
    return fields_on(name, added, REAL if added is None or added in ADDED_SLOW else QUICK)


def real_tables(results):
    """Per strength: of each scan the share found (smallest) and the error (largest) over the fields."""
    before = {name: estimates for (name, added), (_, estimates) in results if added is None}
    text = []
    for strength in dict.fromkeys(added[1] for (_, added), _ in results if added):
        lines = []
        for method in REAL:
            cells = []
            for name in before:
                shares, errors = [], []
                for (of, added), (truth, estimates) in results:
                    if of == name and added and added[1] == strength and method in estimates:
                        share, error = found_and_error(estimates[method] - before[name][method], truth)
                        shares.append(share)
                        errors.append(error)
                known = np.isfinite(shares).all() and len(shares) > 0
                cells.append(f"{min(shares):.2f}, {max(errors):.2f}" if known else "n/a")
            lines.append((method, cells))
        text.append(f"**{strength} % INU**\n\n{markdown(list(before), lines)}")
    lines = [(method, [middle([np.std(before[name][method])], 4) for name in before]) for method in REAL]
    text.append(f"**The field that is found in the scan as it is** (sd of its log)\n\n{markdown(list(before), lines)}")
    return "\n\n".join(text)


def repeat(job):
    """How far log fields of other samples of a real scan lie apart (rms)."""
    name, method = job
    scan = real_scan(name)
    places = sample_positions(scan.image.shape, SHRINK)
    inside = scan.mask[np.ix_(*places)]

    def field_of(positions):
        found = attempt(partial(QUICK[method], positions=positions), scan)
        return (field := found.log_at(places)[inside]) - field.mean()

    def every(n, half=0):  # the second half lies between the samples of the first
        steps = shrink_per_axis(scan.image.shape, n)
        return tuple(np.arange(half * (s // 2), size, s) for size, s in zip(scan.image.shape, steps, strict=True))

    apart = [np.std(field_of(every(4)) - field_of(every(4, 1)))]
    if method != REFERENCE:  # which takes every 4th voxel, and minutes for more
        own = field_of(None)
        second, fourth = (np.std(own - field_of(sample_positions(scan.image.shape, n))) for n in (2, 4))
        apart = [second, fourth, np.std(field_of(every(2)) - field_of(every(2, 1))), *apart]
    return [np.nan] * (4 - len(apart)) + apart


def repeat_table(results):
    """Rows: methods and scans."""
    columns = ["own samples, every 2nd", "own, every 4th", "two sets of every 2nd", "two sets of every 4th"]
    lines = [(f"{method}: {name}", [middle([x], 4) for x in values]) for (name, method), values in results]
    return markdown(columns, lines)


def truncated(parameters, stages):
    """Parameters that end after so many iterations at each stage."""
    per_stage = {key: getattr(parameters, key)[: len(stages)] for key in ("fwhm", "twicing")}
    return replace(parameters, iterations=tuple(stages), **per_stage)


def error_by_iteration(case):
    """Error of the default after each of so many iterations."""
    scan = make_scan(case)
    positions = sample_positions(scan.image.shape, SHRINK)
    grid = np.ix_(*positions)
    brain, truth = scan.brain[grid], scan.log_bias[grid]
    arguments = {"voxel_size_mm": scan.voxel_size_mm, "device": "cpu"}
    history = [line for line in correct(scan.image, scan.mask, **arguments).history if line.half < 2]
    errors = []
    for n in (*(n for n in AFTER if n < len(history)), len(history)):
        stages = [sum(i.stage == stage for i in history[:n]) for stage in sorted({i.stage for i in history[:n]})]
        field = correct(scan.image, scan.mask, parameters=truncated(N4Parameters(), stages), **arguments).field
        errors.append(np.std((field.log_at(positions) - truth)[brain]))
    return errors, len(history)


def iteration_table(results):
    """Rows: cases."""
    lines = []
    for case, (errors, last) in results:
        cells = [f"{x:.4f}" for x in errors[:-1]] + [""] * (len(AFTER) - len(errors) + 1)
        lines.append((f"{case.anatomy}, {case.inu_percent} % INU", [*cells, f"{errors[-1]:.4f} ({last})"]))
    return markdown([*map(str, AFTER), "last"], lines)


def changes_of_settings():
    """The default, then with each number of it a fifth larger and a fifth smaller."""
    changes = {"default": N4Parameters()}
    for key in (field.name for field in fields(N4Parameters)):
        value = getattr(N4Parameters(), key)
        for factor in (1.2, 1 / 1.2):
            scaled = _scaled(value, factor)
            if scaled is None or scaled == value:
                continue
            try:
                changes[f"{key} {scaled}"] = replace(N4Parameters(), **{key: scaled})
            except InputError:  # beyond what makes sense
                continue
    return changes


def _scaled(value, factor):
    if isinstance(value, tuple):
        return tuple(_scaled(item, factor) for item in value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return max(1, round(value * factor)) if isinstance(value, int) else float(f"{value * factor:.3g}")


def sensitivity(job):
    """Errors on a phantom, or fields on a real scan, under each change of the settings."""
    methods = {name: partial(with_n4flow, parameters) for name, parameters in changes_of_settings().items()}
    if not isinstance(job, str):
        return {name: row.error for name, row in measure_scan(make_scan(job), methods).items()}
    scan = real_scan(job)
    positions = sample_positions(scan.image.shape, SHRINK)
    inside = scan.mask[np.ix_(*positions)]
    found = {name: method(scan.image, scan.mask, scan.voxel_size_mm) for name, method in methods.items()}
    own = found["default"].log_at(positions)
    return {name: np.std((one.log_at(positions) - own)[inside]) for name, one in found.items()}


def sensitivity_table(results):
    """Rows: changes. Errors as multiples of the default's, and rms change of the field on real scans."""
    columns, lines = [], {name: [] for name in changes_of_settings()}
    for name in TUNED_ON:
        columns.append(f"{name}: error")
        own = [rows for job, rows in results if not isinstance(job, str) and job.anatomy == name]
        for change, cells in lines.items():
            cells.append(middle([rows[change] / rows["default"] for rows in own], worst=True))
    for name, rows in ((job, rows) for job, rows in results if isinstance(job, str)):
        columns.append(name)
        for change, cells in lines.items():
            cells.append(f"{rows[change]:.4f}")
    return markdown(columns, list(lines.items()))


def blind_to_gain(*arguments):
    """The default, if every step were taken to see the whole of a field."""
    with mock.patch.object(sharpening, "SMALLEST_GAIN", 1.0):
        return with_n4flow(N4Parameters(), *arguments)


def undivided(*arguments):
    """The default, if the field were estimated from all samples together."""
    with mock.patch.object(estimate, "SPLIT_SAMPLES", np.inf):
        return with_n4flow(N4Parameters(), *arguments)


FIRST, *_, LAST = N4Parameters().stages
#: The default without one of its pieces each, beside SimpleITK.
PIECES = {
    REFERENCE: METHODS[REFERENCE],
    "default": partial(with_n4flow, N4Parameters()),
    "no twicing": partial(with_n4flow, N4Parameters(twicing=0)),
    "the first width throughout": partial(
        with_n4flow, N4Parameters(fwhm=FIRST.fwhm, twicing=FIRST.twicing, strong_fwhm=None)
    ),
    "the last width throughout": partial(
        with_n4flow, N4Parameters(fwhm=LAST.fwhm, twicing=LAST.twicing, strong_fwhm=None)
    ),
    "a hundredth of the stiffness": partial(with_n4flow, N4Parameters(stiffness=N4Parameters().stiffness / 100)),
    "ITK's fit on the same mesh": partial(with_n4flow, N4Parameters(fit="lee-wolberg-shin")),
    "gain taken for 1": blind_to_gain,
    "all samples together": undivided,
    "samples as they are": partial(with_n4flow, N4Parameters(denoise=0)),
    "no wider stage for strong fields": partial(with_n4flow, N4Parameters(strong_fwhm=None)),
    "every 4th voxel": partial(with_n4flow, N4Parameters(shrink_factor=4)),
}


def without_a_piece(job):
    """Error and iterations on a phantom, or share found and error on a real scan, of each of `PIECES`."""
    if not isinstance(job, str):
        return measure_scan(make_scan(job), PIECES)
    _, before = fields_on(job, None, PIECES)
    truth, after = fields_on(job, ADDED_SLOW[0], PIECES)
    return {name: found_and_error(after[name] - before[name], truth) for name in PIECES}


def ablation_table(results):
    """Rows: pieces. Ratios per anatomy and strength, then found and error on real scans."""
    phantoms = [(job, rows) for job, rows in results if not isinstance(job, str)]
    columns, lines = [], {name: [] for name in PIECES}
    for anatomy_name, inu in dict.fromkeys((case.anatomy, case.inu_percent) for case, _ in phantoms):
        columns.append(f"{anatomy_name}, {inu} %")
        own = [pair for pair in phantoms if (pair[0].anatomy, pair[0].inu_percent) == (anatomy_name, inu)]
        for name, cells in lines.items():
            cells.append(middle(ratios(own, name), worst=True))
    columns.append("iterations")
    for name, cells in lines.items():
        cells.append(middle([rows[name].iterations for _, rows in phantoms], 0))
    for scan, rows in ((job, rows) for job, rows in results if isinstance(job, str)):
        columns.append(f"{scan}: found, error")
        for name, cells in lines.items():
            cells.append("{:.2f}, {:.2f}".format(*rows[name]))
    return markdown(columns, list(lines.items()))


def with_mask_in_turns(case):
    """A strong surface coil: sd and range of the shading left in white matter, and share of the brain in the mask."""
    scan = make_scan(case)
    positions = sample_positions(scan.image.shape, SHRINK)
    grid = np.ix_(*positions)
    image, wm, truth = scan.image[grid], scan.wm[grid], scan.log_bias[grid]
    everywhere = tuple(np.arange(n) for n in scan.image.shape)
    rows = {}
    for name, method in QUICK.items():
        mask, cells = scan.mask, []
        for turn in range(TURNS):
            found = attempt(method, scan, mask)
            left = (found.log_at(positions) - truth)[wm]
            cells.append((np.std(left), np.exp(np.ptp(left)), np.mean(mask[grid][scan.brain[grid]])))
            if turn < TURNS - 1:
                corrected = scan.image * np.exp(-found.log_at(everywhere))
                mask = corrected > otsu_threshold((image * np.exp(-found.log_at(positions))).ravel())
        rows[name] = cells
    rows["n4flow, its rules mask and n4"] = [(np.nan,) * 3] * (TURNS - 1) + [with_rules(scan)]
    return rows


def with_rules(scan):
    """As `with_mask_in_turns`: what is left when a scan goes through mask and n4 as in the workflow, at every voxel."""
    with tempfile.TemporaryDirectory() as folder:
        image, mask = Path(folder) / "image.nii", Path(folder) / "mask.nii"
        nib.save(nib.Nifti1Image(scan.image, np.diag([*scan.voxel_size_mm, 1.0])), image)
        mask_scan(image, None, mask, Path(folder) / "mask.json", method="otsu", percentile=50)
        inside = np.asarray(nib.load(mask).dataobj) > 0
    found = correct(scan.image, inside, voxel_size_mm=scan.voxel_size_mm, device="cpu")
    left = (np.log(found.bias) - scan.log_bias)[scan.wm]
    return np.std(left), np.exp(np.ptp(left)), np.mean(inside[scan.brain])


def coil_table(results):
    """Rows: methods; columns: anatomies and turns."""
    columns = [
        f"{case.anatomy}, {label}"
        for case, _ in results
        for label in ("mask of the scan", *(f"turn {n}" for n in range(2, TURNS + 1)))
    ]
    lines = []
    for method in results[0][1]:
        turns = [rows[method][turn] for _, rows in results for turn in range(TURNS)]
        cells = [f"{sd:.3f} (×{span:.2f}), {share:.2f}" if np.isfinite(sd) else "n/a" for sd, span, share in turns]
        lines.append((method, cells))
    return markdown(columns, lines)


STRONG = (150, 165, 180)
#: Range of ×20, in percent of INU.
COIL = 200 * 19 / 21
#: Of mask and field; the first mask is Otsu's of the scan.
TURNS = 3
AFTER = (1, 2, 4, 6, 8, 10, 12, 15, 20, 30)
#: What is put on real scans: kind, and INU in percent.
ADDED = [("legendre", 20), ("surface", 20), ("linear", 40), ("coil", 40)]
ADDED_SLOW = [("coil", 40)]


class Table(NamedTuple):
    """A section of the report."""

    title: str
    words: str
    jobs: list
    work: Callable  # a job to its result
    text: Callable  # pairs of job and result to Markdown


def tables(quick):
    """All tables by name; fewer cases if it has to be quick."""
    odd, even = ((1, 3), (0, 2)) if quick else (range(1, 10, 2), range(0, 4, 2))
    scans = REAL_SCANS[1:3] if quick else REAL_SCANS
    mouse = family(["individual"], (40, 0), (1,), noise_percent=3, contrast="T2", scale=0.1, mask="brain")
    other_scales = [
        *zip(("mouse, 40 % INU", "mouse, none"), mouse, strict=True),
        *((f"contrast {c}", {"contrast": c, "field_sd": 0.24, "seed": 1}) for c in (1.0, 0.5, 0.25)),
        ("contrast 0.5, 10 grey levels", {"contrast": 0.5, "field_sd": 0.24, "seed": 1, "levels": 10}),
        *((f"contrast {c}, none", {"contrast": c, "field_sd": 0, "seed": 1}) for c in (1.0, 0.5, 0.25)),
    ]
    same = {"noise_percent": 3, "mask": "brain", "lesions": False}
    return {
        "phantoms": Table(
            "Phantoms, reported on",
            "Ratio of the error to that of SimpleITK at its defaults: median (worst); above it the number of cases. "
            "Field, noise and lesions are drawn anew with every change of a setting. Methods of 200 iterations: at 3 % "
            "noise, 0 and 40 % INU alone.",
            family(seeds=odd),
            measure,
            strength_tables,
        ),
        "tuned": Table(
            "Phantoms, tuned on",
            "Settings may have been chosen by these.",
            family(TUNED_ON, seeds=even),
            measure_quickly,
            strength_tables,
        ),
        "real": Table(
            "Real scans, with a field put on top",
            "What a method makes of the scan as it is, is subtracted from what it makes of the product. Found, error: "
            "share of the added field that comes out (slope of the regression; the smallest of two fields), and sd of "
            "the difference from the added field as a multiple of its sd (the largest). What is wrong both times "
            "cancels here, such as anatomy that was taken for field: a method that never stops finds any field that "
            "its mesh can follow. So this shows what stays in the image, and the phantoms what is taken out of it.",
            [(name, added) for name in scans for added in (None, *ADDED)],
            on_real_scan,
            real_tables,
        ),
        "strong": Table(
            "Strong fields",
            "Ratio of the error to SimpleITK's, median (worst), and the share of the field that is left.",
            family(strengths=STRONG, seeds=odd[:3], noise_percent=1, lesions=False, mask="brain"),
            measure_quickly,
            strong_tables,
        ),
        "masks": Table(
            "Masks and lesions",
            "40 % INU, 3 % noise; ratio of the error to SimpleITK's. Half: of the brain; small: a cube of 60 mm in it. "
            "The error is then measured there.",
            [
                *family(strengths=(40,), seeds=(1,), masks=MASKS, noise_percent=3, lesions=False),
                *family(strengths=(40,), seeds=(1,), masks=("brain",), noise_percent=3, lesions=True),
            ],
            measure_quickly,
            mask_tables,
        ),
        "scale": Table(
            "Other scales",
            "A mouse: the individual brain with voxels of 0.1 mm. By contrast: a light-sheet object of 10 mm at "
            "0.04 mm, Otsu's mask, a field of sd 0.24. Share of the field that is left; where there is none, rms of "
            "the field that is found.",
            other_scales,
            measure_other_scale,
            scale_table,
        ),
        "coil": Table(
            "A strong surface coil",
            "A field whose largest value in the head is 20 times its smallest, Otsu's mask. Sd of the log shading "
            "that white matter keeps (its largest ratio), and the share of the brain in the mask: with the mask of the "
            "scan, and with masks found again on the corrected image.",
            family(strengths=(COIL,), seeds=(1,), **(same | {"mask": "head", "field": NEAR_COIL, "contrast": "T1"})),
            with_mask_in_turns,
            coil_table,
        ),
        "repeat": Table(
            "Other samples of the same scan",
            "Rms between log fields of a real scan, less their means, in the mask. Two sets: samples that lie between "
            "one another's.",
            [(name, method) for method in QUICK for name in scans if method != "uncorrected"],
            repeat,
            repeat_table,
        ),
        "iterations": Table(
            "Error against iteration",
            "Of the default: the last is to be the best.",
            family(strengths=(0, 40, 100), seeds=(1,), **same),
            error_by_iteration,
            iteration_table,
        ),
        "sensitivity": Table(
            "What a setting decides",
            "Each number of the default a fifth larger and a fifth smaller, on cases that were tuned on: error as a "
            "multiple of the default's, median (worst); on real scans rms between the fields.",
            [*family(TUNED_ON, (0, 40), even[:2], noise_percent=3), *scans],
            sensitivity,
            sensitivity_table,
        ),
        "ablation": Table(
            "What each piece is for",
            "The default without one of its pieces, on cases that were tuned on: ratio of the error to SimpleITK's, "
            "median (worst), and median iterations; on real scans with a field of 40 % INU on top, the share of it "
            "that is found, and the error as above.",
            [*family(TUNED_ON, (0, 40, 100), even, noise_percent=3), *(scans[:1] + scans[2:3])],
            without_a_piece,
            ablation_table,
        ),
    }


def begin():
    """A worker uses one core for ITK."""
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)


def main():
    """Measure all cases and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="Markdown file; standard output by default")
    parser.add_argument("--quick", action="store_true", help="fewer cases")
    parser.add_argument("--only", nargs="+", choices=list(tables(quick=True)), help="these tables alone")
    given = parser.parse_args()
    os.environ["ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"] = "1"  # for ANTs; read when ITK first starts threads
    start = time.perf_counter()
    chosen = {name: table for name, table in tables(given.quick).items() if name in (given.only or [name])}
    for maps in ("mni_1mm", "mni_2mm", "individual", "t1w"):
        anatomy(maps)  # made once, and shared by the workers
    text = f"""# Accuracy

`python tests/benchmarks/accuracy.py` writes this. Each method has the settings that it has if nothing is set; what
these are stands in the script. All have the same mask. SimpleITK, ANTs and n4ax get every 4th voxel; n4flow takes the
samples that its settings say. Each anatomy is reported for itself: `mni`, the average of 152 heads; `individual`, one
brain; `t1w`, one head. Settings may be tuned on cases of even seeds of {" and ".join(TUNED_ON)}, and on no other.
"""
    with ProcessPoolExecutor(2, multiprocessing.get_context("fork"), initializer=begin) as pool:
        coming = {name: [pool.submit(table.work, job) for job in table.jobs] for name, table in chosen.items()}
        for name, table in chosen.items():
            results = [(job, future.result()) for job, future in zip(table.jobs, coming[name], strict=True)]
            print(f"{name}: {len(results)} jobs, {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
            text += f"\n## {table.title}\n\n{table.words}\n\n{table.text(results)}\n"
            if given.output:  # what there is already, in case the rest fails
                given.output.write_text(text)
    if not given.output:
        print(text)


if __name__ == "__main__":
    main()
