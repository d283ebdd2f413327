"""The N4 loop: from log intensities on a sample grid to a log bias field."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from n4flow.core.affine import LARGEST_LENGTH
from n4flow.core.bspline import evaluate_at, one_blas_thread, refine
from n4flow.core.field import BiasField, Mesh
from n4flow.core.fit import FEW_SAMPLES, LeeWolbergShin, PenalisedLeastSquares, SplineFit
from n4flow.core.samples import Samples, largest_step, sample_positions
from n4flow.core.sharpening import blurred_entropy, linear_histogram
from n4flow.errors import InputError
from n4flow.kernels import choose_kernels
from n4flow.parameters import N4Parameters, Stage

log = logging.getLogger(__name__)

#: More control points than this make the matrices of the penalised fit, and the time to solve them, large.
MOST_PENALISED_POINTS = 2500

#: Two smooth fields are compared on about so many samples.
COMPARED_SAMPLES = 2**15

#: Of so many samples, the halves give as good a field as all together; the penalty on fewer would be another.
SPLIT_SAMPLES = 20 * FEW_SAMPLES

#: From so many iterations of the first stage on, it is tried what comes of beginning wider.
SLOW_START = 15

#: To begin wider counts where it leaves the histogram sharper by so many nats.
SHARPER = 0.02

#: Of a slab, this share of the root of its area counts as its size; of a head it is less than the volume says.
PROJECTED_SIZE = 0.78


class Iteration(NamedTuple):
    """One line of the history."""

    stage: int  # from 1; 0 is the one before the first, for strong fields
    iteration: int
    cv: float
    half: int = 0  # of the samples, 1 or 2; 0 where all were taken together


class Estimate(NamedTuple):
    """What `estimate_field` and `estimate_twice` return."""

    field: BiasField
    history: list[Iteration]
    repeatability: float | None = None  # rms of the difference of the log fields of two half-samples


@one_blas_thread
def estimate_field(
    samples: Samples, parameters: N4Parameters, *, xp: Any = np, threads: int = 1, mesh: Mesh | None = None
) -> Estimate:
    """Estimate the log bias field that best sharpens the histogram of the samples.

    Parameters
    ----------
    samples : Samples
    parameters : N4Parameters
    xp : module
        numpy or cupy: where to compute.
    threads : int
        On the CPU; the result does not depend on it.
    mesh : Mesh, optional
        Mesh of the first stage; by default the one that the parameters describe.

    Returns
    -------
    Estimate
        The field, whose mean is free (see `quadrature.keep_mean_intensity`), and the history.

    Raises
    ------
    InputError
        Too few samples, all of one intensity, or a mesh that does not fit them (see `check_mesh`).

    References
    ----------
    Tustison et al. 2010, doi:10.1109/TMI.2010.2046908; ITK's N4BiasFieldCorrectionImageFilter.
    """
    return _sharpest([samples], parameters, mesh, xp, threads)[0]


def _sharpest(
    sets: Sequence[Samples], parameters: N4Parameters, mesh: Mesh | None, xp: Any, threads: int
) -> list[Estimate]:
    """Estimates from several sets of samples, each on its own, all of them with the stage for strong fields or without.

    The first stage may take tissues of the dark and the bright end for one another, from which no narrower one finds
    back; a wider one before it may take two tissues that are nearly alike for one. In the first case it is slow, since
    the way there leads past a saddle. So where it is, both ways are gone, and the sharper histograms count.
    """
    prepared = [_prepared(samples, parameters, mesh) for samples in sets]
    stages = list(enumerate(parameters.stages, start=1))
    narrow = [_in_stages(*each, parameters, stages, xp, threads) for each in prepared]
    slowest = max(sum(line.stage == 1 for line in found.history) for found in narrow)
    if parameters.strong_stage is None or slowest < SLOW_START:
        return narrow
    from_wide = [(0, parameters.strong_stage), *stages]
    wide = [_in_stages(*each, parameters, from_wide, xp, threads) for each in prepared]
    entropies = [
        sum(_entropy(samples, found.field, parameters) for (samples, *_), found in zip(prepared, way, strict=True))
        for way in (narrow, wide)
    ]
    gained = (entropies[0] - entropies[1]) / len(sets)
    log.info(
        "%s: stage 1 took %d iterations; to begin with FWHM %g leaves the histogram sharper by %.3f nats, and %s",
        sets[0].source,
        slowest,
        parameters.strong_stage.fwhm,
        gained,
        "counts" if gained > SHARPER else f"does not count: not more than {SHARPER:g}",
    )
    return wide if gained > SHARPER else narrow


def _prepared(samples: Samples, parameters: N4Parameters, mesh: Mesh | None) -> tuple[Samples, Mesh, SplineFit]:
    """Samples of the box of the mask, a mesh that fits them, and the fit on it."""
    grid, samples = samples.check().positions, samples.cropped()
    mesh = mesh or initial_mesh(
        samples.image_shape, samples.voxel_size_mm, samples.domain or samples.positions, parameters
    )
    check_mesh(samples.source, grid, mesh, parameters)
    warn_of_long_spans(samples, mesh, parameters)
    return samples, mesh, fit_on(mesh, samples, parameters)


def _in_stages(
    samples: Samples,
    mesh: Mesh,
    fit: SplineFit,
    parameters: N4Parameters,
    stages: Sequence[tuple[int, Stage]],
    xp: Any,
    threads: int,
) -> Estimate:
    """The estimate itself, through numbered stages."""
    kernels, lattice = choose_kernels(samples, parameters, xp, threads), np.zeros(mesh.lattice_shape)
    history: list[Iteration] = []
    settled = False
    for number, stage in stages:
        before = lattice
        if number > 1 and parameters.mesh == "refined":
            lattice, mesh = refine(lattice), mesh.refined()
            fit = fit_on(mesh, samples, parameters)
        kernels.start_stage(stage, fit, lattice)
        for _ in range(stage.most_iterations):
            if kernels.converged():
                break
            expected = kernels.sharpen()
            update = kernels.fit(expected)
            kernels.subtract(update)
        lattice, cvs = kernels.end_stage()
        log.info(
            "%s: stage %d of %d, FWHM %g, %s spans, %d of at most %d iterations, cv %.2e",
            samples.source,
            number,
            len(parameters.stages),
            stage.fwhm,
            "x".join(map(str, mesh.spans)),
            len(cvs),
            stage.most_iterations,
            cvs[-1] if cvs else 0,
        )
        restless = len(cvs) == stage.most_iterations and cvs[-1] > parameters.convergence_threshold > 0
        if restless and settled and parameters.mesh == "fixed":
            # the width is too narrow for this histogram: from here on, anatomy becomes field
            log.info("%s: the field of stage %d is kept, for the next does not settle", samples.source, number - 1)
            lattice = before
            break
        history += [Iteration(number, iteration, cv) for iteration, cv in enumerate(cvs, start=1)]
        settled = not restless
    return Estimate(BiasField(lattice, mesh, samples.image_shape, samples.affine), history)


def _entropy(samples: Samples, field: BiasField, parameters: N4Parameters) -> float:
    """Of the corrected log intensities, blurred by the width of the last stage; in nats."""
    corrected = (samples.log_image - field.log_at(samples.positions))[samples.confidence > 0]
    low, high = float(corrected.min()), float(corrected.max())
    if low == high:
        return -np.inf
    histogram = linear_histogram(corrected, low, high, parameters.histogram_bins)
    return blurred_entropy(histogram, low, high, parameters.stages[-1].fwhm)


@one_blas_thread
def estimate_twice(samples: Samples, parameters: N4Parameters, *, xp: Any = np, threads: int = 1) -> Estimate:
    """Estimate the field from each half of the samples: the mean is the field, and the difference says how sure it is.

    Together the halves cost what all samples would, and their mean is as close to the truth. All samples are taken
    together where they are few, and where the field is to be ITK's; the halves then only tell how repeatable it is, and
    are blocks of planes.

    Parameters
    ----------
    samples : Samples
    parameters : N4Parameters
    xp, threads
        As `estimate_field`.

    Returns
    -------
    Estimate
        The field, whose mean is free; the history of both halves; the repeatability: root mean square over the samples,
        in natural log, of the difference of both fields, each less its mean. None where no field can be estimated from
        the halves: they are too few, or too few for the mesh.

    Raises
    ------
    InputError
        As `estimate_field`.
    """
    within = samples.cropped()
    mesh = initial_mesh(within.image_shape, within.voxel_size_mm, within.domain or within.positions, parameters)
    repeatability = None
    mean_of_both = np.count_nonzero(samples.confidence) >= SPLIT_SAMPLES and not parameters.as_itk
    try:
        both = samples.halves() if mean_of_both else samples.blocks()
        halves = [replace(half, source=f"{half.source}, half of the samples") for half in both]
        one, other = _sharpest(halves, parameters, mesh, xp, threads)
    except InputError as error:
        log.info("%s; how repeatable the field is remains unknown", error)
    else:
        repeatability = rms_difference(one.field, other.field, samples)
        if mean_of_both:
            lattice = (one.field.lattice + other.field.lattice) / 2
            history = [line._replace(half=n) for n, half in ((1, one), (2, other)) for line in half.history]
            return Estimate(replace(one.field, lattice=lattice), history, repeatability)
    return estimate_field(samples, parameters, xp=xp, threads=threads)._replace(repeatability=repeatability)


def rms_difference(one: BiasField, other: BiasField, samples: Samples) -> float:
    """How far two log fields lie apart on samples, each less its mean.

    Parameters
    ----------
    one, other : BiasField
    samples : Samples
        Where the confidence is above 0; of many, `COMPARED_SAMPLES` are taken.

    Returns
    -------
    float
    """
    indices = np.argwhere(samples.confidence > 0)
    indices = indices[:: max(1, len(indices) // COMPARED_SAMPLES)]
    voxels = [p[index] for p, index in zip(samples.positions, indices.T, strict=True)]
    of_one, of_other = (
        evaluate_at(field.lattice, [field.mesh.coordinate(axis, p) for axis, p in enumerate(voxels)], field.mesh.spans)
        for field in (one, other)
    )
    return float(np.std(of_one - of_other))


def initial_mesh(
    image_shape: Sequence[int],
    voxel_size_mm: Sequence[float],
    domain: Sequence[Any],
    parameters: N4Parameters,
) -> Mesh:
    """The mesh of the first stage: so many spans on the mask or the image, or spans of a length in mm.

    Parameters
    ----------
    image_shape : three ints
        Voxels per axis.
    voxel_size_mm : three floats
    domain : three sequences or arrays of int
        Voxel indices along each axis, from the first of the mask to the last.
    parameters : N4Parameters

    Returns
    -------
    Mesh
    """
    if not parameters.spans:
        assert parameters.spline_distance_mm
        return Mesh.of_distance(image_shape, voxel_size_mm, parameters.spline_distance_mm)
    if parameters.domain == "image":
        return Mesh.of_grid(image_shape, parameters.spans)
    # between two voxels there is nothing that more than a span could follow
    spans = [max(1, min(wanted, len(voxels) - 1)) for wanted, voxels in zip(parameters.spans, domain, strict=True)]
    return Mesh.of_box([(float(voxels[0]), float(voxels[-1])) for voxels in domain], spans)


def positions_in(
    domain: Sequence[range], image_shape: Sequence[int], parameters: N4Parameters
) -> tuple[np.ndarray, ...]:
    """Where the samples are taken: spread over the mask, or as ITK does over the image.

    So a background that is added or cut off changes nothing where `parameters` lay the mesh on the mask.

    Parameters
    ----------
    domain : three ranges
        Voxels along each axis, from the first of the mask to the last.
    image_shape : three ints
    parameters : N4Parameters

    Returns
    -------
    three int arrays
        See `samples.sample_positions`.
    """
    if parameters.domain == "image":
        return sample_positions(image_shape, parameters.shrink_factor)
    return sample_positions([len(r) for r in domain], parameters.shrink_factor, [r.start for r in domain])


def fit_on(mesh: Mesh, samples: Samples, parameters: N4Parameters) -> SplineFit:
    """How a spline on a mesh is fitted to these samples.

    Parameters
    ----------
    mesh : Mesh
    samples : Samples
        See `Samples.cropped`.
    parameters : N4Parameters

    Returns
    -------
    SplineFit
    """
    weights, bases = samples.confidence, mesh.bases(samples.positions)
    if parameters.fit == "lee-wolberg-shin":
        return LeeWolbergShin(weights, bases)
    # lengths are in units of the size of the mask: a mouse is to the fit what a head is
    size = object_size(weights > 0, samples.spacing_mm)
    lengths = [voxels * mm / size for voxels, mm in zip(mesh.span_voxels, samples.voxel_size_mm, strict=True)]
    return PenalisedLeastSquares(weights, bases, lengths, parameters.stiffness)


def object_size(inside: np.ndarray, spacing: Sequence[float]) -> float:
    """The length that bending is measured in: of a compact object the cube root of its volume.

    Of a slab or a shell, whose volume says little of how far the field reaches, the root of its largest projection.

    Parameters
    ----------
    inside : (n0, n1, n2) bool array
    spacing : three floats
        Between samples along each axis.

    Returns
    -------
    float
        In the unit of `spacing`.
    """
    volume = np.count_nonzero(inside) * math.prod(spacing)
    areas = [np.count_nonzero(inside.any(axis=axis)) * math.prod(spacing) / spacing[axis] for axis in range(3)]
    return float(max(volume ** (1 / 3) if min(inside.shape) > 1 else 0.0, PROJECTED_SIZE * max(areas) ** 0.5))


def check_mesh(source: object, positions: Sequence[np.ndarray], mesh: Mesh, parameters: N4Parameters) -> None:
    """Refuse a mesh that would fit single voxels, and one that fits no image.

    Parameters
    ----------
    source : object
        Name of the image, for messages.
    positions : three arrays
        Voxel indices of the samples along each axis.
    mesh : Mesh
        Of the first stage.
    parameters : N4Parameters

    Raises
    ------
    InputError
        The mesh of the last stage has more spans than samples along an axis, its spans are longer than any image, or it
        has too many control points for the penalised fit.
    """
    # what is in force, by a preset or not
    coarser = (
        f"lower n4.spans from {list(parameters.spans)}"
        if parameters.spans
        else f"raise n4.spline_distance_mm from {parameters.spline_distance_mm:g}"
    )
    for axis, (spans, count) in enumerate(zip(mesh.spans, map(len, positions), strict=True)):
        if (last := spans * 2**parameters.refinements) > max(count, 1):
            remedies = [coarser]
            if (step := largest_step(positions)) > 1:
                remedies.append(f"set n4.shrink_factor below {step}")
            if parameters.refinements:
                remedies.append(f"give n4.iterations for fewer than {len(parameters.iterations)} stages")
            raise InputError(
                source,
                f"the mesh has {last} spans along axis {axis}, which has {count} samples",
                ", or ".join(remedies),
            )
    points = math.prod(mesh.lattice_shape)
    if parameters.fit == "penalised" and points > MOST_PENALISED_POINTS:
        raise InputError(
            source,
            f"the mesh has {points} control points, more than the {MOST_PENALISED_POINTS} of a penalised fit",
            f"{coarser}, or set n4.fit to lee-wolberg-shin",
        )
    if (longest := max(mesh.span_voxels)) > LARGEST_LENGTH:
        raise InputError(
            source,
            f"a span of the mesh is {longest:.1e} voxels long",
            "lower n4.spline_distance_mm, or mend the voxel size",
        )


def warn_of_long_spans(samples: Samples, mesh: Mesh, parameters: N4Parameters) -> None:
    """Say so where an image is so small in a span that it gets no field.

    Parameters
    ----------
    samples : Samples
    mesh : Mesh
        Of the first stage; it is the last one that counts.
    parameters : N4Parameters
    """
    size = max(
        n / length for n, length, spans in zip(samples.image_shape, mesh.span_voxels, mesh.spans, strict=True) if spans
    )
    if (share := size * 2**parameters.refinements) < 0.1:
        log.warning(
            "%s: a span of the mesh is %.0f times as long as the image, so that hardly any field can be found; "
            "lower n4.spline_distance_mm, or mend the voxel size",
            samples.source,
            1 / share,
        )
