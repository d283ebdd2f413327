"""What division by a field makes of the mean of an image, known without its voxels."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from n4flow.core.bspline import one_blas_thread
from n4flow.core.field import BiasField, Mesh
from n4flow.core.samples import beyond_float32
from n4flow.device import array_module, to_host
from n4flow.errors import InputError

#: Nodes in a span of the mesh, per axis: they give the mean to 2e-8, even of a single voxel, where a field changes by
#: a factor of 7 in a span.
NODES_PER_SPAN = 12

#: About the most nodes along an axis, on meshes of up to 40 spans: the finer the mesh, the less does the field that is
#: found change in a span. Fewer nodes give its mean to 1e-6.
NODES_PER_AXIS = 160

FEWEST_NODES_PER_SPAN = 4

#: In spans: no voxel is beyond the mesh by so little.
ROUNDING = 1e-9

#: Nodes at which a field is evaluated at a time, for the sake of memory.
BLOCK_NODES = 2**20


class _Panel(NamedTuple):
    """The voxels of one span along an axis, and the nodes that stand for them."""

    voxels: slice
    nodes: slice
    interpolation: np.ndarray  # (voxels, nodes): what a voxel gets of each node


class MaskIntensity:
    """Intensities in a mask, gathered on the nodes of a quadrature before the field is known that divides them.

    In a span of its mesh a field ``B`` is smooth, and ``exp(-B)`` at a voxel nearly the polynomial through its values
    at some nodes. So the sum of the intensities times ``exp(-B)`` is one over the nodes, each of which counts the
    intensities times what interpolation gives it at their voxels. No pass over the image is needed for it but the one
    that takes the samples.

    The nodes are those of Gauss, for sums over the voxels of a span: where intensities are even, ``n`` of them are
    right for polynomials up to degree ``2 n - 1``, not only ``n - 1``.

    Parameters
    ----------
    shape : three ints
        Voxels per axis of the image.
    mesh : Mesh
        Of the field that is to be found: nodes do not interpolate across the borders of its spans.

    Attributes
    ----------
    nodes : three float64 arrays
        Place of the nodes along each axis, in voxels.
    sums : array of their lengths, in Fortran order
        Intensity that each node stands for, in the units of the image.

    References
    ----------
    Golub & Welsch 1969, doi:10.1090/S0025-5718-69-99647-1: Gauss nodes from a recurrence; that of the discrete
    Chebyshev polynomials stands in Gautschi, Orthogonal Polynomials: Computation and Approximation, 2004.
    """

    def __init__(self, shape: tuple[int, ...], mesh: Mesh) -> None:
        axes = [_panels(mesh, axis, n) for axis, n in enumerate(shape)]
        self.nodes = [nodes for nodes, _ in axes]
        self._panels = [panels for _, panels in axes]
        self._panel_of_plane = [panel for panel in self._panels[2] for _ in range(*panel.voxels.indices(shape[2]))]
        self.sums = np.zeros([len(nodes) for nodes in self.nodes], order="F")

    def add(self, values: Any, usable: Any, first_plane: int) -> None:
        """Gather a slab; all of them are to be added, from the first to the last.

        Parameters
        ----------
        values : (n0, n1, planes) array
            NumPy or CuPy; real numbers.
        usable : bool array of the same shape
            Voxels that count.
        first_plane : int
            Index of its first plane.
        """
        xp = array_module(values)
        # in one order, and multiplied plane by plane: the same bits whatever the array's order, and the slab's size
        counted = xp.zeros(values.shape[::-1])
        xp.copyto(counted, values.T, where=usable.T)
        lines = xp.concatenate(
            [counted[:, :, panel.voxels] @ xp.asarray(panel.interpolation) for panel in self._panels[0]], axis=2
        )
        planes = xp.concatenate(
            [xp.asarray(panel.interpolation).T @ lines[:, panel.voxels] for panel in self._panels[1]], axis=1
        )
        for k, plane in enumerate(to_host(planes), start=first_plane):
            panel = self._panel_of_plane[k]
            row = panel.interpolation[k - panel.voxels.start]
            self.sums.T[panel.nodes] += row[:, None, None] * plane


@one_blas_thread
def keep_mean_intensity(field: BiasField, intensity: MaskIntensity, source: object) -> BiasField:
    """Fix the constant of a field so that the mean of the gathered intensities does not change.

    A constant factor may move freely between image and field: N4 leaves it to drift.

    Parameters
    ----------
    field : BiasField
        On the grid of the image.
    intensity : MaskIntensity
        Of the whole image.
    source : object
        Name of the image, for messages.

    Returns
    -------
    BiasField

    Raises
    ------
    InputError
        Intensities beyond what floats hold, or a field that leaves no mean above 0.
    """
    x, y, z = intensity.nodes
    divided, planes = 0.0, max(1, BLOCK_NODES // (len(x) * len(y)))
    with np.errstate(over="ignore", invalid="ignore"):
        total = float(intensity.sums.sum())
        if not np.isfinite(total):
            raise beyond_float32(source)
        for start in range(0, len(z), planes):
            weight = np.exp(-field.log_at([x, y, z[start : start + planes]]))
            weight *= intensity.sums[:, :, start : start + planes]
            divided += float(weight.sum())
    change = divided / total
    if not (np.isfinite(change) and change > 0):
        raise InputError(
            source,
            "the field that was found changes by many orders of magnitude within one span of the mesh",
            "check the image and its mask, or take longer spans (n4.spans, n4.spline_distance_mm)",
        )
    # no further than it is known: other processors round the sums otherwise, and would get other bits of a field
    return field.shifted(round(float(np.log(change)), 10))


def _panels(mesh: Mesh, axis: int, voxels: int) -> tuple[np.ndarray, list[_Panel]]:
    """Places of the nodes along an axis, and the panels."""
    spans = max(1, mesh.spans[axis])
    most = max(FEWEST_NODES_PER_SPAN, min(NODES_PER_SPAN, NODES_PER_AXIS // spans))
    coordinate = mesh.coordinate(axis, np.arange(voxels))
    span = np.clip(np.floor(coordinate), 0, spans - 1)
    if mesh.spans[axis]:  # beyond the mesh the value at its end holds
        span[coordinate < -ROUNDING] = -1
        span[coordinate > spans + ROUNDING] = spans
    borders = [0, *(np.flatnonzero(np.diff(span)) + 1).tolist(), voxels]
    nodes: list[float] = []
    panels = []
    for start, stop in pairwise(borders):
        count = min(most, stop - start) if 0 <= span[start] < spans else 1
        if count == stop - start:  # each voxel is a node
            places, interpolation = np.arange(start, stop, dtype=np.float64), np.eye(count)
        else:
            middle, degrees = (start + stop - 1) / 2, np.arange(1, count)
            recurrence = degrees / 2 * np.sqrt(((stop - start) ** 2 - degrees**2) / (4 * degrees**2 - 1))
            places = middle + np.linalg.eigvalsh(np.diag(recurrence, -1))  # takes the lower triangle
            others = np.stack([np.delete(places, node) for node in range(count)])
            # Lagrange's polynomials: (voxels, nodes, other nodes), then multiplied
            factors = (np.arange(start, stop)[:, None, None] - others) / (places[:, None] - others)
            interpolation = np.prod(factors, axis=2)
        panels.append(_Panel(slice(start, stop), slice(len(nodes), len(nodes) + count), interpolation))
        nodes += places.tolist()
    return np.array(nodes), panels
