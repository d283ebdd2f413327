"""Gains of single planes: what no smooth field can follow, found from the steps between neighbouring planes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

#: A plane with fewer samples takes no part, nor does a step between two planes that have fewer in common.
FEWEST_COMMON = 50

#: Of the gains, a polynomial of this degree along the axis is left to the field, and to anatomy.
TREND_DEGREE = 2

#: Planes are levelled where the largest tenth of the steps, each less the trend, are this large (rms, natural log).
#: Between planes of heads and brains of which nobody has changed the gain, they are 0.01 to 0.1.
LEAST_STEP = 0.1

#: The steps of voxels are weighed down to 0 at so many standard deviations from the most frequent one.
CUTOFF = 1.5

#: Location and spread settle to 1e-3 of the spread in so many rounds.
ROUNDS = 10


@dataclass(frozen=True, eq=False)
class PlaneGains:
    """Log gains of the planes of the image that a field was estimated on.

    Parameters
    ----------
    axis : int
        The axis of that image that counts the planes.
    log_gains : (n,) float64 array
        Natural log, a number for each plane; beyond the first and the last, theirs hold.
    """

    axis: int
    log_gains: np.ndarray

    def at(self, index: np.ndarray, thickness: float) -> np.ndarray:
        """Log gain of planes of any thickness, anywhere: that of the mean gain of what they cover.

        Parameters
        ----------
        index : array
            Where their middles lie, in planes of the image: any real numbers.
        thickness : float
            Above 0, in planes of the image.

        Returns
        -------
        float64 array of the shape of `index`
        """
        gains, count, half = np.exp(self.log_gains), len(self.log_gains), thickness / 2
        # the integral of the gain, at the faces of the planes; what lies beyond the ends has the gain there
        faces = np.concatenate([[-thickness], np.arange(count + 1), [count + thickness]]) - 0.5
        integral = np.concatenate([[-thickness * gains[0], 0], np.cumsum(gains)])
        integral = np.append(integral, integral[-1] + thickness * gains[-1])
        middle = np.clip(np.asarray(index, dtype=np.float64), -0.5 - half, count - 0.5 + half)
        lower, upper = (np.interp(middle + side, faces, integral) for side in (-half, half))
        return np.log((upper - lower) / thickness)


class Levelling(NamedTuple):
    """What `find_gains` returns."""

    log_gains: np.ndarray  # (n,), weighted mean 0
    largest_steps: float  # rms of the largest tenth of the steps between planes, less the trend; natural log

    @property
    def is_needed(self) -> bool:
        """Whether the steps are larger than those of anatomy."""
        return self.largest_steps >= LEAST_STEP


def find_gains(log_planes: np.ndarray, overlap: float = 0.0) -> Levelling:
    """Find the gain of each plane.

    From one plane to the next, most places keep their tissue: the most frequent change of the log intensity is that of
    the gain. The changes are added up, and a smooth trend is taken off.

    Parameters
    ----------
    log_planes : (n, m) array
        Log intensities of the same m places in each plane; NaN where there is no sample.
    overlap : float
        Two planes are compared if they have this share of the samples of the larger one in common.

    Returns
    -------
    Levelling
    """
    used = ~np.isnan(log_planes)
    counts = used.sum(axis=1)
    known = np.flatnonzero(counts >= FEWEST_COMMON)
    if len(known) < TREND_DEGREE + 2:
        return Levelling(np.zeros(len(log_planes)), 0.0)
    steps = np.zeros(len(known) - 1)
    for n, (one, next_one) in enumerate(pairwise(known)):
        both = used[one] & used[next_one]
        if np.count_nonzero(both) >= max(FEWEST_COMMON, overlap * max(counts[one], counts[next_one])):
            steps[n] = most_frequent((log_planes[next_one] - log_planes[one])[both])
    # a plane at the end of an object says as much as its samples; more than an ordinary plane none
    weights = np.minimum(counts[known], np.median(counts[known])).astype(np.float64)
    gains = _without_trend(known, np.concatenate([[0], np.cumsum(steps)]), weights, TREND_DEGREE)
    of_steps = np.minimum(weights[1:], weights[:-1])
    sizes = np.abs(_without_trend(known[1:], steps, of_steps, TREND_DEGREE - 1))
    order = np.argsort(-sizes)
    share = np.cumsum(of_steps[order]) / of_steps.sum()
    largest = order[: 1 + int(np.searchsorted(share, 0.1))]
    rms = math.sqrt(float(np.average(sizes[largest] ** 2, weights=of_steps[largest])))
    return Levelling(np.interp(np.arange(len(log_planes)), known, gains), rms)


def most_frequent(values: np.ndarray) -> float:
    """Where values are most frequent: Tukey's biweight, from the median on.

    Parameters
    ----------
    values : (n,) array

    Returns
    -------
    float

    References
    ----------
    Beaton & Tukey 1974, doi:10.1080/00401706.1974.10489171.
    """
    middle = float(np.median(values))
    spread = 1.4826 * float(np.median(np.abs(values - middle)))
    if spread == 0:
        return middle
    for _ in range(ROUNDS):
        weights = (1 - ((values - middle) / (CUTOFF * spread)) ** 2).clip(0) ** 2
        middle = float(np.average(values, weights=weights))
    return middle


def _without_trend(planes: np.ndarray, values: np.ndarray, weights: np.ndarray, degree: int) -> np.ndarray:
    """Values less the polynomial along the axis that fits them best."""
    place = 2 * (planes - planes[0]) / max(1, planes[-1] - planes[0]) - 1
    powers = np.polynomial.legendre.legvander(place, degree)
    root = np.sqrt(weights)
    fitted = np.linalg.lstsq(powers * root[:, None], values * root, rcond=None)[0]
    return np.asarray(values - powers @ fitted)
