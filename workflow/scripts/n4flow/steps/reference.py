"""SimpleITK at its own defaults: another estimate to look at beside ours, and the check of our arithmetic."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from n4flow.core.bspline import basis_matrix
from n4flow.core.field import BiasField, Mesh
from n4flow.core.quadrature import keep_mean_intensity
from n4flow.core.samples import Samples, inside_mask, sample_positions, shrink_per_axis
from n4flow.errors import InputError
from n4flow.estimate import Estimate, Iteration, estimate_field
from n4flow.images.nifti import Volume
from n4flow.images.planes import level_planes
from n4flow.images.sampling import read_samples
from n4flow.parameters import N4Parameters
from n4flow.steps import preload as preload  # what the worker looks for
from n4flow.steps.correct import estimate_facts
from n4flow.steps.derivatives import CorrectionFiles, write_derivatives
from n4flow.study.series import open_scan, series_files

log = logging.getLogger(__name__)

#: SimpleITK's result depends on its number of threads (by up to 4e-5); this one is always used.
THREADS = 1

#: The most iterations of SimpleITK at each level, if nothing is set; their meshes have 1, 2, 4 and 8 spans an axis.
ITERATIONS = (50, 50, 50, 50)

#: Every n-th voxel along each axis, as its manual has it; fewer leave so many samples at least, where there are as many
#: voxels. Of fewer samples, single control points hang on SimpleITK's own rounding.
SHRINK_FACTOR, FEWEST_SAMPLES = 4, 5000

#: Points per span at which its spline is asked for, to recover the control points.
POINTS_PER_SPAN = 4


def reference_parameters(image_shape: Sequence[int], mask_voxels: int) -> N4Parameters:
    """What SimpleITK does with an image if nothing is set, on every 4th voxel along each axis.

    Of a small mask it gets more voxels (see `FEWEST_SAMPLES`), and with fewer than 8 planes it has fewer levels: no
    mesh is to have more spans than samples.

    Parameters
    ----------
    image_shape : three ints
        Voxels per axis.
    mask_voxels : int

    Returns
    -------
    N4Parameters
    """
    factors = range(SHRINK_FACTOR, 0, -1)
    enough = (f for f in factors if mask_voxels >= FEWEST_SAMPLES * math.prod(shrink_per_axis(image_shape, f)))
    factor = next(enough, 1)
    fewest = min((len(p) for p in sample_positions(image_shape, factor) if len(p) > 1), default=1)
    levels = ITERATIONS[: fewest.bit_length()]
    return N4Parameters.from_mapping({"preset": "itk", "iterations": levels, "shrink_factor": factor})


def reference_field(samples: Samples, parameters: N4Parameters) -> Estimate:
    """Estimate the field with SimpleITK on the same samples.

    SimpleITK lays its mesh from the first sample to the last along each axis. Its control points are recovered from its
    spline, so that it can be evaluated at full resolution, at the true coordinates of the voxels. (SimpleITK itself
    would stretch it over the whole image, by up to 0.02 in log.)

    Parameters
    ----------
    samples : Samples
    parameters : N4Parameters
        See `reference_parameters`: of these SimpleITK is told the levels; all else is its default.

    Returns
    -------
    Estimate
        The convergence values are those ITK computes, which freeze in single precision on large
        masks: they do not compare with ours.

    Raises
    ------
    InputError
        Too few samples, or all of one intensity; or they have weights: ITK's filter knows a confidence
        image, SimpleITK has no input for it.

    References
    ----------
    Tustison et al. 2010, doi:10.1109/TMI.2010.2046908; ITK's N4BiasFieldCorrectionImageFilter.
    """
    import SimpleITK as sitk

    if samples.weights is not None:
        raise InputError(
            samples.source,
            "its samples have confidence weights, which SimpleITK does not take",
            "leave the weights out, or compare with ANTs",
        )
    samples.check()
    # a single plane is a 2-D image to ITK
    flat = tuple(axis for axis, n in enumerate(samples.mask.shape) if n == 1)
    intensity = np.where(samples.mask, np.exp(samples.log_image), 0).astype(np.float32).squeeze(axis=flat)
    image = sitk.GetImageFromArray(np.ascontiguousarray(intensity.T))
    mask = sitk.GetImageFromArray(np.ascontiguousarray(samples.mask.squeeze(axis=flat).astype(np.uint8).T))

    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(THREADS)
    n4 = sitk.N4BiasFieldCorrectionImageFilter()
    n4.SetNumberOfThreads(THREADS)
    n4.SetMaximumNumberOfIterations(list(parameters.iterations))
    history: list[Iteration] = []

    def note_iteration() -> None:
        line = Iteration(n4.GetCurrentLevel() + 1, n4.GetElapsedIterations(), n4.GetCurrentConvergenceMeasurement())
        history.append(line)
        log.info("%s: SimpleITK, level %d, iteration %d, cv %.2e", samples.source, *line[:3])

    n4.AddCommand(sitk.sitkIterationEvent, note_iteration)
    try:
        n4.Execute(image, mask)
    except RuntimeError:
        # Ctrl-C arrives in the function above, and SimpleITK makes it an error of its own
        if isinstance(getattr(sys, "last_value", None), KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise
    n4.RemoveAllCommands()

    mesh = mesh_of_samples(samples).refined(len(parameters.iterations) - 1)
    points = tuple(POINTS_PER_SPAN * spans + 1 for spans in mesh.spans)
    drawn = [n for n in points if n > 1]
    log_field = sitk.GetArrayFromImage(n4.GetLogBiasFieldAsImage(sitk.Image(drawn, sitk.sitkFloat32))).T
    lattice = _recover_lattice(log_field.astype(np.float64).reshape(points), mesh)
    return Estimate(BiasField(lattice, mesh, samples.image_shape, samples.affine), history)


class Agreement(NamedTuple):
    """How near our field comes to SimpleITK's in the mask, after the same iterations on the same samples and mesh."""

    r: float | None  # Pearson's correlation of the log fields; None where one is constant
    rms: float  # of their difference, less its mean; natural log
    max: float  # its largest value


def agreement(samples: Samples, parameters: N4Parameters, reference: Estimate) -> Agreement:
    """Check our arithmetic: do what SimpleITK did, iteration by iteration, and compare.

    Parameters
    ----------
    samples : Samples
    parameters : N4Parameters
    reference : Estimate
        From `reference_field`, of these samples and parameters.

    Returns
    -------
    Agreement
        Rounded to three digits, which is more than SimpleITK's single precision tells.
    """
    levels = [level for level, *_ in reference.history]
    # each as many iterations as SimpleITK took; its own measure of convergence would end ours elsewhere
    same = {"iterations": [levels.count(level) for level in sorted(set(levels))], "convergence_threshold": 0.0}
    parameters = N4Parameters.from_mapping({**parameters.to_mapping(), **same})
    ours = estimate_field(samples, parameters, threads=THREADS, mesh=mesh_of_samples(samples))
    log_fields = [estimate.field.log_at(samples.positions)[samples.mask] for estimate in (ours, reference)]
    a, b = (log_field - log_field.mean() for log_field in log_fields)
    norm = math.sqrt(float(a @ a) * float(b @ b))
    difference = np.abs(a - b)
    found = math.sqrt(float(np.mean(difference**2))), float(difference.max())
    rms, largest = (float(f"{value:.2e}") for value in found)
    return Agreement(round(float(a @ b) / norm, 9) if norm > 0 else None, rms, largest)


def mesh_of_samples(samples: Samples) -> Mesh:
    """The mesh that ITK begins with: a span along each axis, from the first sample to the last."""
    return Mesh.of_box([(float(p[0]), float(p[-1])) for p in samples.positions], (1, 1, 1))


def reference_scan(
    image: str | Path,
    mask: str | Path,
    files: CorrectionFiles | Mapping[str, str | Path],
    *,
    keep_dtype: bool = False,
    plane_gains: str | None = None,
) -> None:
    """As `correct.correct_scan`, with the field that SimpleITK estimates at its defaults.

    The sidecar also says how near our own arithmetic comes to it: ``Agreement``.

    Parameters
    ----------
    image, mask : path-like
    files : CorrectionFiles or mapping of str to path-like
        A mapping by the names of `CorrectionFiles`.
    keep_dtype : bool
        See `images.division.write_corrected`.
    plane_gains : {"i", "j", "k"}, optional
        As of `correct.correct_scan`: SimpleITK gets the same planes.

    Raises
    ------
    InputError
        The scan or its mask is unusable.
    """
    start = time.perf_counter()
    image, mask, files = Path(image), Path(mask), CorrectionFiles.of(files)
    volume, inside = open_scan(image), Volume(mask)
    mask_voxels = sum(int(np.count_nonzero(inside_mask(values))) for _, values in inside.mean_slabs())
    parameters = reference_parameters(volume.shape, mask_voxels)
    levelled = level_planes(volume, plane_gains, inside)
    samples, intensity = read_samples(volume, inside, parameters)
    estimate = reference_field(samples, parameters)
    facts: dict[str, Any] = {
        **estimate_facts(estimate, samples, parameters),
        "Agreement": agreement(samples, parameters, estimate)._asdict(),
        "Device": "CPU",
        "Threads": THREADS,
    }
    # its mesh begins and ends with the samples, not the voxels: the mean is right to some 1e-5, of thick slices
    field = keep_mean_intensity(estimate.field, intensity, image)
    if levelled:
        field = replace(field, gains=levelled.gains)
    write_derivatives(
        volume,
        {"mask": mask} | series_files(volume),
        files,
        field,
        facts,
        ("SimpleITK",),
        start,
        keep_dtype=keep_dtype,
        xp=np,
    )


def _recover_lattice(log_field: np.ndarray, mesh: Mesh) -> np.ndarray:
    """The control points of a spline that ITK has evaluated at even steps over its whole domain."""
    lattice = log_field
    for axis, spans in enumerate(mesh.spans):
        n = lattice.shape[axis]
        places = np.linspace(0, spans, n)
        if n > 1:  # ITK moves the last one inside by a thousandth of a step, since its basis ends there
            places[-1] -= 1e-3 * places[1]
        basis = basis_matrix(places, spans)
        columns = np.moveaxis(lattice, axis, 0)
        solved = np.linalg.lstsq(basis, columns.reshape(n, -1), rcond=None)[0]
        lattice = np.moveaxis(solved.reshape(-1, *columns.shape[1:]), 0, axis)
    return lattice
