"""The N4 loop: from log intensities on a sample grid to a log bias field."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from n4flow.affine import LARGEST_LENGTH
from n4flow.bspline import one_blas_thread, refine
from n4flow.errors import InputError
from n4flow.field import BiasField, Mesh
from n4flow.kernels import choose_kernels
from n4flow.parameters import N4Parameters
from n4flow.samples import Samples, sample_positions

log = logging.getLogger(__name__)


class Iteration(NamedTuple):
    """One line of the history."""

    level: int
    iteration: int
    cv: float


class Estimate(NamedTuple):
    """What `estimate_field` returns."""

    field: BiasField
    history: list[Iteration]


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
        Mesh of the first level; by default the one that the parameters describe.

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
    samples = samples.check().cropped()
    mesh = mesh or initial_mesh(samples.image_shape, samples.voxel_size_mm, parameters)
    check_mesh(samples.source, samples.image_shape, mesh, parameters)
    warn_of_long_spans(samples, mesh, parameters)

    kernels = choose_kernels(samples, parameters, xp, threads)
    lattice = np.zeros(mesh.lattice_shape)
    history: list[Iteration] = []
    for level, most_iterations in enumerate(parameters.iterations):
        if level > 0 and parameters.mesh == "refined":
            lattice, mesh = refine(lattice), mesh.refined()
        kernels.start_level(lattice, mesh.bases(samples.positions))
        for _ in range(most_iterations):
            if kernels.converged():
                break
            expected = kernels.sharpen()
            update = kernels.fit(expected)
            kernels.subtract(update)
        lattice, cvs = kernels.end_level()
        history += [Iteration(level + 1, iteration, cv) for iteration, cv in enumerate(cvs, start=1)]
        log.info(
            "%s: level %d of %d, %s spans, %d of at most %d iterations, cv %.2e",
            samples.source,
            level + 1,
            len(parameters.iterations),
            "x".join(map(str, mesh.spans)),
            len(cvs),
            most_iterations,
            cvs[-1] if cvs else 0,
        )
    return Estimate(BiasField(lattice, mesh, samples.image_shape, samples.affine), history)


def initial_mesh(image_shape: Sequence[int], voxel_size_mm: Sequence[float], parameters: N4Parameters) -> Mesh:
    """The mesh of the first level: so many spans on the image, or spans of a length in mm.

    Parameters
    ----------
    image_shape : three ints
        Voxels per axis.
    voxel_size_mm : three floats
    parameters : N4Parameters

    Returns
    -------
    Mesh
        `Mesh.of_grid` where `parameters` name spans, else `Mesh.of_distance`.
    """
    if parameters.spans:
        return Mesh.of_grid(image_shape, parameters.spans)
    return Mesh.of_distance(image_shape, voxel_size_mm, parameters.spline_distance_mm)


def check_mesh(source: object, image_shape: Sequence[int], mesh: Mesh, parameters: N4Parameters) -> None:
    """Refuse a mesh that would fit single voxels, and one that fits no image.

    Parameters
    ----------
    source : object
        Name of the image, for messages.
    image_shape : three ints
        Voxels per axis.
    mesh : Mesh
        Of the first level.
    parameters : N4Parameters

    Raises
    ------
    InputError
        The mesh of the last level has more spans than samples along an axis, or its spans are longer than any image.
    """
    grid = [len(p) for p in sample_positions(image_shape, parameters.shrink_factor)]
    for axis, (spans, count) in enumerate(zip(mesh.spans, grid, strict=True)):
        if (last := spans * 2**parameters.doublings) > max(count, 1):
            raise InputError(
                source,
                f"the mesh has {last} spans along axis {axis}, which has {count} samples",
                "raise n4.spline_distance_mm, or lower n4.spans, n4.shrink_factor or the number of levels",
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
        Of the first level; it is the last one that counts.
    parameters : N4Parameters
    """
    size = max(
        n / length for n, length, spans in zip(samples.image_shape, mesh.span_voxels, mesh.spans, strict=True) if spans
    )
    if (share := size * 2**parameters.doublings) < 0.1:
        log.warning(
            "%s: a span of the mesh is %.0f times as long as the image, so that hardly any field can be found; "
            "lower n4.spline_distance_mm, or mend the voxel size",
            samples.source,
            1 / share,
        )
