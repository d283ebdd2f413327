"""The same estimate by SimpleITK, as the independent check."""

from __future__ import annotations

import json
import logging
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from n4flow.bspline import basis_matrix, control_points
from n4flow.correction import read_samples
from n4flow.derivatives import CorrectionFiles, estimate_facts, write_derivatives
from n4flow.errors import InputError
from n4flow.estimate import Estimate, Iteration, check_mesh, initial_mesh, warn_of_long_spans
from n4flow.field import BiasField, Mesh
from n4flow.parameters import N4Parameters
from n4flow.quadrature import keep_mean_intensity
from n4flow.samples import Samples
from n4flow.volume import Volume

log = logging.getLogger(__name__)

#: SimpleITK's result depends on its number of threads (by up to 4e-5); this one is always used.
THREADS = 1


def reference_field(samples: Samples, parameters: N4Parameters) -> Estimate:
    """Estimate the field with SimpleITK on the same samples, with the equivalent parameters.

    SimpleITK stretches its mesh over the image it is given. So the samples are padded, outside the
    mask, until the ends of their grid come as near to the ends of our mesh as whole samples allow.
    Its lattice is then recovered from its field on that grid, which determines it, and so can be
    evaluated at full resolution at the true coordinates of the voxels.

    Parameters
    ----------
    samples : Samples
    parameters : N4Parameters
        A fixed mesh is one level of as many iterations as all levels together.

    Returns
    -------
    Estimate
        The convergence values are those ITK computes, which freeze in single precision on large
        masks: they do not compare with ours.

    Raises
    ------
    InputError
        As `estimate.estimate_field`; or the samples have weights: ITK's filter knows a confidence
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
    mesh = initial_mesh(samples.image_shape, samples.voxel_size_mm, samples.cropped().positions, parameters)
    check_mesh(samples.source, samples.image_shape, mesh, parameters)
    warn_of_long_spans(samples, mesh, parameters)
    levels = [sum(parameters.iterations)] if parameters.mesh == "fixed" else list(parameters.iterations)

    padding, grid_mesh = _grid_like(mesh, samples)
    # a single plane is a 2-D image to ITK
    drawn = [axis for axis in range(3) if mesh.spans[axis]]
    widths = [padding[axis] for axis in drawn]
    flat = tuple(axis for axis in range(3) if axis not in drawn)
    intensity = np.where(samples.mask, np.exp(samples.log_image), 0).astype(np.float32).squeeze(axis=flat)
    image = sitk.GetImageFromArray(np.pad(intensity, widths).T)
    mask = sitk.GetImageFromArray(np.pad(samples.mask.squeeze(axis=flat), widths).astype(np.uint8).T)

    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(THREADS)
    n4 = sitk.N4BiasFieldCorrectionImageFilter()
    n4.SetNumberOfThreads(THREADS)
    n4.SetMaskLabel(1)
    n4.SetMaximumNumberOfIterations(levels)
    n4.SetNumberOfControlPoints([control_points(mesh.spans[axis]) for axis in drawn])
    n4.SetConvergenceThreshold(parameters.convergence_threshold)
    n4.SetNumberOfHistogramBins(parameters.histogram_bins)
    n4.SetBiasFieldFullWidthAtHalfMaximum(parameters.stages[-1].fwhm)
    n4.SetWienerFilterNoise(parameters.wiener_noise)
    history: list[Iteration] = []

    def note_iteration() -> None:
        line = Iteration(n4.GetCurrentLevel() + 1, n4.GetElapsedIterations(), n4.GetCurrentConvergenceMeasurement())
        history.append(line)
        log.info("%s: SimpleITK, level %d, iteration %d, cv %.2e", samples.source, *line)

    n4.AddCommand(sitk.sitkIterationEvent, note_iteration)
    try:
        n4.Execute(image, mask)
    except RuntimeError:
        # Ctrl-C arrives in the function above, and SimpleITK makes it an error of its own
        if isinstance(getattr(sys, "last_value", None), KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise
    log_field = sitk.GetArrayFromImage(n4.GetLogBiasFieldAsImage(image)).T.astype(np.float64)
    n4.RemoveAllCommands()

    grid_mesh = grid_mesh.refined(parameters.doublings)
    lattice = _recover_lattice(log_field.reshape(_padded_shape(samples, padding)), grid_mesh)
    return Estimate(BiasField(lattice, grid_mesh, samples.image_shape, samples.affine), history)


def reference_scan(
    image: Path,
    mask: Path,
    sidecar: Path,
    files: CorrectionFiles,
    *,
    parameters: N4Parameters,
    keep_dtype: bool = False,
) -> None:
    """As `derivatives.correct_scan`, with the field that SimpleITK estimates in as many iterations.

    Its own measure of convergence freezes in single precision, so that it would stop elsewhere, and
    the difference of the fields would be that of two stopping rules.

    Parameters
    ----------
    image, mask : Path
    sidecar : Path
        Of our correction of the scan: says how many iterations each level took.
    files : CorrectionFiles
    parameters : N4Parameters
    keep_dtype : bool
        See `correction.write_corrected`.

    Raises
    ------
    InputError
        The scan or its mask is unusable.
    """
    start = time.perf_counter()
    levels = [line["Level"] for line in json.loads(sidecar.read_text(encoding="utf-8"))["N4"]["History"]]
    counts = tuple(max(1, levels.count(level + 1)) for level in range(len(parameters.iterations)))
    parameters = replace(parameters, iterations=counts, convergence_threshold=0.0)
    volume, inside = Volume(image), Volume(mask)
    samples, intensity = read_samples(volume, inside, parameters)
    estimate = reference_field(samples, parameters)
    facts = {**estimate_facts(estimate, samples, parameters), "Device": "CPU", "Threads": THREADS}
    # its mesh is ours but for a rounding to whole samples: the mean is right to some 1e-5, of thick slices
    field = keep_mean_intensity(estimate.field, intensity, image)
    write_derivatives(volume, {"mask": mask}, files, field, facts, ("SimpleITK",), start, keep_dtype=keep_dtype, xp=np)


def _grid_like(mesh: Mesh, samples: Samples) -> tuple[list[tuple[int, int]], Mesh]:
    """Samples to pad per axis and side, and the mesh that ITK stretches over the padded grid."""
    padding, start, span_voxels = [], [], []
    for axis, positions in enumerate(samples.positions):
        n, spans = len(positions), mesh.spans[axis]
        if spans == 0:
            padding.append((0, 0))
            start.append(mesh.start[axis])
            span_voxels.append(mesh.span_voxels[axis])
            continue
        step = positions[1] - positions[0]
        end = mesh.start[axis] + spans * mesh.span_voxels[axis]
        # no more than the grid's own length: a mesh far larger than the image costs memory
        wanted = [max(0, round((positions[0] - mesh.start[axis]) / step)), max(0, round((end - positions[-1]) / step))]
        before, after = (min(n, width) for width in wanted)
        if max(wanted) > n:
            log.warning(
                "%s: the mesh is far larger than the image; SimpleITK has spans of %.1f voxels along axis %d, not %.1f",
                samples.source,
                (n + before + after - 1) * step / spans,
                axis,
                mesh.span_voxels[axis],
            )
        padding.append((before, after))
        start.append(float(positions[0] - before * step))
        span_voxels.append(float((n + before + after - 1) * step / spans))
    return padding, Mesh(mesh.spans, tuple(start), tuple(span_voxels))


def _padded_shape(samples: Samples, padding: list[tuple[int, int]]) -> tuple[int, ...]:
    return tuple(len(p) + before + after for p, (before, after) in zip(samples.positions, padding, strict=True))


def _recover_lattice(log_field: np.ndarray, mesh: Mesh) -> np.ndarray:
    """The control points of a spline that is known on a grid over its whole domain."""
    lattice = log_field
    for axis, spans in enumerate(mesh.spans):
        n = lattice.shape[axis]
        basis = basis_matrix(np.linspace(0, spans, n), spans)
        columns = np.moveaxis(lattice, axis, 0)
        solved = np.linalg.lstsq(basis, columns.reshape(n, -1), rcond=None)[0]
        lattice = np.moveaxis(solved.reshape(-1, *columns.shape[1:]), 0, axis)
    return lattice
