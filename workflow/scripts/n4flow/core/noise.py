"""The noise of an image, and samples that are freed of it by the neighbours that look like them.

Noise blurs the histogram as a field does, and no field takes it out: where it is wider than the Gaussian of the last
stage, anatomy is fitted instead. Of a sample and its 26 neighbours those that differ by no more than the noise are of
one tissue, as a rule, and their mean is what the sample would be with a fraction of the noise.

References
----------
Lee 1983, Digital image smoothing and the sigma filter, doi:10.1016/0734-189X(83)90047-6; Immerkaer 1996, Fast noise
variance estimation, doi:10.1006/cviu.1996.0060: a difference of differences that leaves little of anatomy.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np

#: The mean is taken anew of what is as near to the first mean: a sample far from its own tissue finds it.
ROUNDS = 2

#: Noise is told from the differences at no fewer samples.
FEWEST_DIFFERENCES = 1000

#: Less noise than this share of the median intensity is rounding.
ROUNDING = 1e-9

#: The median of absolute values is this share of the standard deviation of a normal variable.
MEDIAN_OF_NORMAL = 0.6744897501960817

#: Samples that are worked on at a time; they and their neighbours stay in the cache of a core.
BLOCK = 2**12

#: Second difference along an axis, and none.
DIFFERENCE, NONE = np.array([1.0, -2.0, 1.0]), np.array([0.0, 1.0, 0.0])


def surroundings(positions: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
    """Voxel indices of samples and their neighbours along each axis, in rising order; some may lie off the image.

    Parameters
    ----------
    positions : three int arrays
        Voxel index of the samples along each axis.

    Returns
    -------
    three int arrays
    """
    return tuple(np.unique(np.concatenate([p - 1, p, p + 1])) for p in positions)


def noise_sd(values: np.ndarray, positions: Sequence[np.ndarray], kept: np.ndarray) -> float:
    """Standard deviation of the noise of an image, from second differences along its axes, one after the other.

    Along all of them, and along each two: of an anatomy with steps, or planes with gains of their own, one is the least
    disturbed. Noise that is alike in neighbours, as of interpolated images, is told too small.

    Parameters
    ----------
    values : (m0, m1, m2) float array
        Intensities at the `surroundings` of the samples; NaN where they do not take part.
    positions : three int arrays
        Voxel index of the samples along each axis.
    kept : (n0, n1, n2) bool array
        Samples that take part.

    Returns
    -------
    float
        In units of the image; 0 where no more than rounding is seen, and where fewer than `FEWEST_DIFFERENCES` samples
        have all their neighbours.
    """
    centres, offsets = _places(values, positions, kept)
    flat, found = values.ravel(), []
    for along in product((DIFFERENCE, NONE), repeat=3):
        if sum(kernel is DIFFERENCE for kernel in along) < 2:
            continue
        kernel = np.einsum("i,j,k->ijk", *along).ravel()
        taken = kernel != 0
        differences = np.empty(len(centres))
        for start in range(0, len(centres), BLOCK):
            block = slice(start, start + BLOCK)
            differences[block] = kernel[taken] @ flat[centres[block] + offsets[taken, None]]
        differences = np.abs(differences[np.isfinite(differences)])
        if len(differences) >= FEWEST_DIFFERENCES:
            found.append(float(np.median(differences)) / MEDIAN_OF_NORMAL / float(np.sqrt(kernel @ kernel)))
    sd = min(found, default=0.0)
    return sd if sd > 0 and sd > ROUNDING * float(np.median(flat[centres])) else 0.0


def denoised(values: np.ndarray, positions: Sequence[np.ndarray], kept: np.ndarray, distance: float) -> np.ndarray:
    """Mean of each sample and its neighbours that are as bright as it.

    Parameters
    ----------
    values, positions, kept
        As `noise_sd`.
    distance : float
        Neighbours that differ by no more are as bright.

    Returns
    -------
    (n,) float array
        At the samples that take part, in the order of `kept`.
    """
    centres, offsets = _places(values, positions, kept)
    flat = values.ravel()
    means = flat[centres].astype(np.float64)
    for start in range(0, len(centres), BLOCK):
        block = slice(start, start + BLOCK)
        around = flat[centres[block] + offsets[:, None]]
        for _ in range(ROUNDS):
            near = np.abs(around - means[block]) <= distance  # not so what is NaN
            total, count = np.where(near, around, 0).sum(axis=0, dtype=np.float64), near.sum(axis=0)
            means[block] = np.where(count > 0, total / np.maximum(count, 1), means[block])
    return means


def _places(values: np.ndarray, positions: Sequence[np.ndarray], kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Flat indices of the samples into `values`, and how far each neighbour is from there, in the order of a cube."""
    within = [
        np.searchsorted(around, p)[index]
        for around, p, index in zip(surroundings(positions), positions, np.nonzero(kept), strict=True)
    ]
    steps = np.array([values.shape[1] * values.shape[2], values.shape[2], 1])
    offsets = np.array(list(product((-1, 0, 1), repeat=3))) @ steps
    return np.ravel_multi_index(within, values.shape), offsets
