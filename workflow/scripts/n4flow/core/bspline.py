"""Uniform cubic B-splines on a regular mesh, where everything factorises per axis.

A mesh of ``spans`` elements has ``spans + 3`` control points along an axis. A point is described by
its parametric coordinate ``p`` in ``[0, spans]``; control points ``floor(p) .. floor(p) + 3`` act on
it. An axis with ``spans == 0`` is flat (one control point, no variation): that is how a 2-D image
goes through the same code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any, TypeVar, cast

import numpy as np
from threadpoolctl import threadpool_limits

from n4flow.device import array_module

Function = TypeVar("Function", bound=Callable[..., Any])


def one_blas_thread(function: Function) -> Function:
    """Run a function that fits or evaluates with one BLAS thread.

    The last bits of a matrix product may depend on the number of threads, which is the machine's
    business and not the result's.
    """
    return cast(Function, threadpool_limits.wrap(limits=1, user_api="blas")(function))


def control_points(spans: int) -> int:
    """Number of control points of a cubic spline with so many spans (mesh elements); 1 on a flat axis."""
    return spans + 3 if spans else 1


def basis_matrix(coordinates: np.ndarray, spans: int) -> np.ndarray:
    """Weights of all control points at each coordinate.

    Parameters
    ----------
    coordinates : (n,) array
        Parametric coordinates, in spans. Outside ``[0, spans]`` the value at the end holds.
    spans : int
        Number of mesh elements; 0 for a flat axis.

    Returns
    -------
    (n, control_points(spans)) float64 array
        Each row sums to 1 and has at most four entries that are not 0.

    References
    ----------
    Lee, Wolberg & Shin 1997, doi:10.1109/2945.620490.
    """
    column, weights = _neighbours(coordinates, spans)
    basis = np.zeros((len(column), control_points(spans)))
    np.put_along_axis(basis, column[:, None] + np.arange(len(weights)), weights.T, axis=1)
    return basis


def _neighbours(coordinates: np.ndarray, spans: int) -> tuple[np.ndarray, np.ndarray]:
    """The first control point that acts on each coordinate, and the weights of it and the three after it.

    On a flat axis it is the only one.
    """
    coordinates = np.asarray(coordinates, dtype=np.float64)
    if spans == 0:
        return np.zeros(coordinates.shape, dtype=np.intp), np.ones((1, *coordinates.shape))
    inside = np.clip(coordinates, 0, spans)
    column = np.minimum(np.floor(inside).astype(np.intp), spans - 1)
    t = inside - column
    return column, np.stack([(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3]) / 6


def gram_matrices(points: int, span_length: float) -> list[np.ndarray]:
    """Mean over an axis of the mesh of the product of two basis functions, and of their first to third derivatives.

    Parameters
    ----------
    points : int
        Control points; 1 on a flat axis, along which nothing varies.
    span_length : float
        Length of a mesh element, which derivatives are in.

    Returns
    -------
    four (points, points) arrays
    """
    if points == 1:
        return [np.ones((1, 1)), *[np.zeros((1, 1))] * 3]
    spans = points - 3
    # the pieces of a cubic spline in a span, as polynomials of the place in it: right with four nodes of Gauss
    pieces = [np.polynomial.Polynomial(c) for c in ([1, -3, 3, -1], [4, 0, -6, 3], [1, 3, 3, -3], [0, 0, 0, 1])]
    nodes, weights = np.polynomial.legendre.leggauss(4)
    grams = []
    for order in range(4):
        values = np.stack([piece.deriv(order)((nodes + 1) / 2) / 6 for piece in pieces]) / span_length**order
        gram = np.zeros((points, points))
        for span in range(spans):
            gram[span : span + 4, span : span + 4] += (values * weights / 2) @ values.T / spans
        grams.append(gram)
    return grams


def evaluate_at(lattice: np.ndarray, coordinates: Sequence[np.ndarray], spans: Sequence[int]) -> np.ndarray:
    """Value of the spline at single points, for grids that are oblique to the mesh.

    Parameters
    ----------
    lattice : (m0, m1, m2) array
    coordinates : three arrays of one shape
        Parametric coordinates of the points, in spans. Outside of the mesh the value at its border holds.
    spans : three ints

    Returns
    -------
    float64 array of the coordinates' shape
    """
    (first, a), (second, b), (third, c) = (_neighbours(p, s) for p, s in zip(coordinates, spans, strict=True))
    values, (_, m1, m2) = lattice.ravel(), lattice.shape
    corner = (first * m1 + second) * m2 + third
    total = np.zeros(corner.shape)
    # summed in a fixed order, so that a point gets the same bits however many are asked for at once
    for i, j in np.ndindex(len(a), len(b)):
        row = corner + (i * m1 + j) * m2
        total += a[i] * b[j] * sum(weight * values[row + k] for k, weight in enumerate(c))
    return total


def contract(values: Any, matrices: Sequence[Any]) -> Any:
    """Sum ``values[i, j, k] * A[i, a] * B[j, b] * C[k, c]`` over the voxels.

    Parameters
    ----------
    values : (n0, n1, n2) array
    matrices : three arrays (n_axis, m_axis)
        On the device of `values`.

    Returns
    -------
    (m0, m1, m2) array
    """
    a, b, c = matrices
    rows = values @ c
    planes = b.T @ rows
    return (a.T @ planes.reshape(len(planes), -1)).reshape(a.shape[1], b.shape[1], c.shape[1])


def expand(lattice: Any, matrices: Sequence[Any]) -> Any:
    """Value of the spline at every voxel of a grid: the transpose of `contract`.

    Parameters
    ----------
    lattice : (m0, m1, m2) array
    matrices : three basis matrices (n_axis, m_axis)
        On the device of `lattice`.

    Returns
    -------
    (n0, n1, n2) array
    """
    a, b, c = matrices
    # summed in a fixed order, not by BLAS, and then plane by plane: a plane gets the same bits
    # however many planes are asked for at once
    planes = sum(a[:, i, None, None] * lattice[i] for i in range(len(lattice)))
    return (b @ planes) @ c.T


def fit_matrices(bases: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """The per-axis factors of the two sums of the scattered data fit.

    With ``t`` the weight of a control point at a voxel, the fit needs ``omega = sum w t^2`` and
    ``delta = sum w r t^3 / sum_d t_d^2``. The inner sum over the 64 neighbours is a product of
    three sums over four, so both factorise.

    Parameters
    ----------
    bases : three basis matrices (n_axis, m_axis)

    Returns
    -------
    omega_matrices, delta_matrices : lists of three (n_axis, m_axis) arrays

    References
    ----------
    Lee, Wolberg & Shin 1997, doi:10.1109/2945.620490;
    ITK's BSplineScatteredDataPointSetToImageFilter.
    """
    squares = [basis**2 for basis in bases]
    cubes = [basis * square / square.sum(axis=1, keepdims=True) for basis, square in zip(bases, squares, strict=True)]
    return squares, cubes


def divisors(omega: Any) -> Any:
    """What to divide ``delta`` by: infinity for control points that no voxel reaches, which so become 0.

    Parameters
    ----------
    omega : (m0, m1, m2) array
        From `fit_matrices`, as ``delta``.

    Returns
    -------
    (m0, m1, m2) array
    """
    xp = array_module(omega)
    return xp.where(omega > np.finfo(np.float64).tiny, omega, np.inf)


def bspline_fit(values: Any, weights: Any, bases: Sequence[Any]) -> Any:
    """One step of the Lee-Wolberg-Shin approximation on a regular grid of samples.

    Parameters
    ----------
    values : (n0, n1, n2) array
        What is to be approximated; ignored where the weight is 0.
    weights : (n0, n1, n2) array
        Confidence of each sample, from 0.
    bases : three arrays (n_axis, m_axis)
        From `basis_matrix`.

    Returns
    -------
    (m0, m1, m2) array
        Control points; 0 where no sample reaches.

    References
    ----------
    As `fit_matrices`.
    """
    xp = array_module(values)
    omega_matrices, delta_matrices = fit_matrices(bases)
    weighted = xp.where(weights > 0, values * weights, 0)
    delta = contract(weighted, delta_matrices)
    omega = contract(weights.astype(np.float64), omega_matrices)
    return delta / divisors(omega)


def bspline_evaluate(lattice: Any, bases: Sequence[Any]) -> Any:
    """Value of the spline with these control points on a grid.

    Parameters
    ----------
    lattice : (m0, m1, m2) array
    bases : three arrays (n_axis, m_axis)
        From `basis_matrix`, on the device of `lattice`.

    Returns
    -------
    (n0, n1, n2) array
    """
    return expand(lattice, bases)


def refine(lattice: np.ndarray) -> np.ndarray:
    """Halve the mesh elements along each axis without changing the function.

    Parameters
    ----------
    lattice : (m0, m1, m2) array
        ``spans + 3`` control points per axis; a flat axis (1) stays flat.

    Returns
    -------
    array with ``2 * spans + 3`` control points per axis

    References
    ----------
    Dyadic subdivision of the uniform cubic B-spline with the masks [1, 1]/2 and [1, 6, 1]/8, as in
    Lee, Wolberg & Shin 1997, doi:10.1109/2945.620490, and ITK.
    """
    return reduce(_refine_axis, range(lattice.ndim), lattice)


def _refine_axis(lattice: np.ndarray, axis: int) -> np.ndarray:
    if lattice.shape[axis] == 1:
        return lattice
    old = np.moveaxis(lattice, axis, 0)
    new = np.empty((2 * len(old) - 3, *old.shape[1:]), dtype=lattice.dtype)
    new[0::2] = (old[:-1] + old[1:]) / 2
    new[1::2] = (old[:-2] + 6 * old[1:-1] + old[2:]) / 8
    return np.moveaxis(new, 0, axis)
