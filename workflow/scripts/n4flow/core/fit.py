"""How a spline is fitted to what sharpening leaves: an object per mesh, which holds all that depends on the mask alone.

The kernels gather the residual onto the lattice, with `matrices`; what update of the control points comes of that is
said here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from n4flow.core.bspline import contract, divisors, fit_matrices, gram_matrices

#: Samples worked on at a time: memory is bounded, and the order of sums does not depend on the machine.
BLOCK_SAMPLES = 2**18

#: Fewer samples than some times this carry less of a field: the penalty counts 1 + FEW_SAMPLES / samples times.
FEW_SAMPLES = 2e4

#: Log intensity: a wider Gaussian lets more anatomy through, and the penalty grows with (fwhm / FULL_STIFFNESS_FWHM)^4.
FULL_STIFFNESS_FWHM = 0.1

#: A field that bends more than this shows that there is one: the penalty falls with the root of what it bends.
BENT = 10.0

#: Where a step sees less of a field than this, it goes further: the samples damp it by gain / FULLY_DAMPED_GAIN, but by
#: no less than LEAST_DAMPING.
FULLY_DAMPED_GAIN, LEAST_DAMPING = 0.6, 0.1

#: What is neither seen nor costs more than this share of what others are, or do, is left alone: a parabola through the
#: two planes of a slab, say.
UNTOLD = 1e-8


class LeeWolbergShin:
    """The one-step approximation of Lee, Wolberg & Shin, as ITK has it.

    Parameters
    ----------
    weights : (n0, n1, n2) array of bool or float
        Confidence of each sample; 0 outside the mask.
    bases : three (n_axis, m_axis) arrays
        From `bspline.basis_matrix`.

    References
    ----------
    As `bspline.fit_matrices`.
    """

    def __init__(self, weights: np.ndarray, bases: Sequence[np.ndarray]) -> None:
        self.bases = bases
        squares, cubes = fit_matrices(bases)
        self.matrices: Sequence[np.ndarray] = cubes
        self.divisors = divisors(contract_weights(weights, squares))

    def update(self, gathered: np.ndarray, lattice: np.ndarray, gain: float, fwhm: float) -> np.ndarray:
        """What to add to the control points.

        Parameters
        ----------
        gathered : (m0, m1, m2) array
            Sum over the samples of weight times residual times one column of each of `matrices`.
        lattice : (m0, m1, m2) array
            The control points so far.
        gain : float
            See `sharpening.sharpening_gain`.
        fwhm : float
            Of the stage.

        Returns
        -------
        (m0, m1, m2) array
            Here it depends only on what was gathered.
        """
        return gathered / self.divisors


class PenalisedLeastSquares:
    """Least squares, exact for any mask, with a penalty on the squared third derivatives of the whole field.

    With ``G`` the normal matrix, ``K`` the penalty's, ``phi`` the control points, N the sum of the weights and
    ``r`` the residual, the update solves ``(damping G + N penalty K) update = B^T r - N penalty K phi``. Both matrices
    are made diagonal together, once a mesh: then it is two products with a matrix.

    Parameters
    ----------
    weights, bases
        As `LeeWolbergShin`.
    span_lengths : three floats
        Length of a mesh element per axis, in units of the size of the object: nothing depends on millimetres. Of a flat
        axis, anything.
    stiffness : float
        See `parameters.N4Parameters`.

    Attributes
    ----------
    to_points : (points, modes) array
        Control points (in C order) of each mode.
    to_modes : (modes, points) array
        Modes of control points: a left inverse of `to_points`.
    bending : (modes,) array
        Penalty on each mode: K there.
    seen : (modes,) array
        What the samples see of each mode: G / N there.
    total : float
        Sum of the weights.
    """

    def __init__(
        self, weights: np.ndarray, bases: Sequence[np.ndarray], span_lengths: Sequence[float], stiffness: float
    ) -> None:
        self.bases = self.matrices = bases
        self.total = float(weights.sum(dtype=np.float64))
        # weights of which one is far larger than the others say no more than few samples do (Kish 1965)
        squares = float(np.sum(np.square(weights, dtype=np.float64)))
        self.scale = stiffness * (1 + FEW_SAMPLES * squares / self.total**2)
        normal = normal_matrix(weights, bases) / self.total
        penalty = penalty_matrix([basis.shape[1] for basis in bases], span_lengths)
        # first a sum of both that is as much of either, which is sound also where one of them says nothing
        share = np.trace(normal) / np.trace(penalty)
        sizes, turned = np.linalg.eigh(normal + share * penalty)
        told = sizes > UNTOLD * sizes.mean()
        roots, turned = np.sqrt(sizes[told]), turned[:, told]
        half = turned / roots
        bending, turned_again = np.linalg.eigh(half.T @ penalty @ half)
        bending = np.maximum(bending, 0)
        seen = np.maximum(1 - share * bending, 0)
        told = seen + self.scale * bending > UNTOLD
        self.bending, self.seen, turned_again = bending[told], seen[told], turned_again[:, told]
        self.to_points = half @ turned_again
        self.to_modes = turned_again.T @ (turned * roots).T

    def penalty(self, fwhm: float) -> float:
        """What bending costs in a stage, before it is known how much the field bends and how much a step sees."""
        return self.scale * max(1.0, fwhm / FULL_STIFFNESS_FWHM) ** 4

    def update(self, gathered: np.ndarray, lattice: np.ndarray, gain: float, fwhm: float) -> np.ndarray:
        """As `LeeWolbergShin.update`."""
        modes = self.to_modes @ lattice.ravel()
        bent = float((self.bending * modes**2).sum())
        penalty = self.penalty(fwhm) * gain / np.sqrt(1 + bent / BENT) * self.bending
        damping = min(max(gain / FULLY_DAMPED_GAIN, LEAST_DAMPING), 1.0)
        wanted = self.to_points.T @ (gathered.ravel() / self.total) - penalty * modes
        return (self.to_points @ (wanted / (damping * self.seen + penalty))).reshape(lattice.shape)


SplineFit = LeeWolbergShin | PenalisedLeastSquares


def contract_weights(weights: np.ndarray, matrices: Sequence[np.ndarray]) -> Any:
    """`bspline.contract` of the samples' weights, block by block."""
    a, b, c = matrices
    planes = max(1, BLOCK_SAMPLES // max(1, weights[0].size))
    blocks = [slice(i, i + planes) for i in range(0, len(weights), planes)]
    return sum(contract(weights[block].astype(np.float64), (a[block], b, c)) for block in blocks)


def normal_matrix(weights: np.ndarray, bases: Sequence[np.ndarray]) -> np.ndarray:
    """Sum over the samples of weight times the product of two basis functions, for all pairs of them.

    It factorises per axis, as the fit of Lee, Wolberg & Shin does: the weights are contracted with the products of two
    columns of each basis matrix, of which only those of neighbours are not 0.

    Parameters
    ----------
    weights : (n0, n1, n2) array of bool or float
    bases : three (n_axis, m_axis) arrays

    Returns
    -------
    (points, points) array
        Control points in C order.
    """
    products, places = [], []
    for basis in bases:
        m = basis.shape[1]
        first, second = np.triu_indices(m)
        near = second - first < 4
        first, second = first[near], second[near]
        # after the pairs comes one of nothing, for control points that are not neighbours
        products.append(np.pad(basis[:, first] * basis[:, second], ((0, 0), (0, 1))))
        place = np.full((m, m), len(first))
        place[first, second] = place[second, first] = np.arange(len(first))
        places.append(place)
    sums = contract_weights(weights, products)
    (a, b, c), points = places, math.prod(len(place) for place in places)
    whole = sums[a[:, None, None, :, None, None], b[:, None, None, :, None], c[:, None, None, :]]
    return np.asarray(whole.reshape(points, points))


def penalty_matrix(points: Sequence[int], span_lengths: Sequence[float]) -> np.ndarray:
    """The mean, over the mesh, of the squared third derivatives of a spline, as a quadratic form.

    A field of second degree costs nothing.

    Parameters
    ----------
    points : three ints
        Control points per axis; 1 on a flat one, along which nothing varies.
    span_lengths : three floats
        Length of a mesh element per axis.

    Returns
    -------
    (points, points) array
        Control points in C order.
    """
    a, b, c = (gram_matrices(m, length) for m, length in zip(points, span_lengths, strict=True))
    total: Any = 0
    for i in range(4):
        # as often as the third derivatives of this kind occur among all 27
        planes = [math.comb(3, i) * math.comb(3 - i, j) * np.kron(b[j], c[3 - i - j]) for j in range(4 - i)]
        total = total + np.kron(a[i], sum(planes))
    return np.asarray(total)
