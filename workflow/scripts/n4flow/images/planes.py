"""The planes of an image file, levelled: serial sections, each of which has a gain of its own."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from n4flow.core.planes import LEAST_STEP, PlaneGains, find_gains
from n4flow.core.samples import inside_mask, usable_voxels
from n4flow.images.nifti import Volume

log = logging.getLogger(__name__)

#: Axes as BIDS' SliceEncodingDirection names them.
AXES = ("i", "j", "k")

#: Gains are found on at most so many voxels of a plane, and of all planes.
PLANE_VOXELS, ALL_VOXELS = 2**14, 2**23

#: Without a mask, planes are compared that have this share of their foreground in common: noise and object have not.
OVERLAP = 0.5

#: Decimals of a log gain. No further than it is known: other processors round sums otherwise.
DECIMALS = 10


@dataclass(frozen=True)
class Levelled:
    """What came of `level_planes`.

    Parameters
    ----------
    axis : str
        See `AXES`.
    largest_steps : float
        See `planes.find_gains`.
    gains : PlaneGains, optional
        None where the steps are no larger than those of anatomy: nothing was levelled.
    """

    axis: str
    largest_steps: float
    gains: PlaneGains | None

    def facts(self) -> dict[str, Any]:
        """For the sidecar."""
        return {"Axis": self.axis, "LargestSteps": round(self.largest_steps, 4), "Levelled": self.gains is not None}


def level_planes(
    volume: Volume,
    axis: str | None,
    mask: Volume | None = None,
    threshold: Callable[[np.ndarray], float] | None = None,
) -> Levelled | None:
    """Find the gains of the planes of an image, and have `Volume.mean_slabs` divide by them.

    Parameters
    ----------
    volume : Volume
        Its ``gains`` are set; whatever else reads it is not levelled.
    axis : str, optional
        Which axis counts the planes, see `AXES`; without one nothing is done.
    mask : Volume, optional
        On the same grid; the mean intensity in it stays.
    threshold : callable, optional
        In place of a mask: of the intensities above 0 of a plane, the one above which they count.

    Returns
    -------
    Levelled, optional

    Raises
    ------
    InputError
        A file cannot be read.
    """
    if axis is None:
        return None
    number = AXES.index(axis)
    values, sums = _planes_of(volume, number, mask)
    if threshold:
        for plane in values:
            if (positive := plane[plane > 0]).size:
                plane[plane <= threshold(positive)] = 0
    with np.errstate(divide="ignore"):
        logs = np.log(values)
    logs[values <= 0] = np.nan
    found = find_gains(logs, OVERLAP if threshold else 0.0)
    told = f"the largest steps between its planes along {axis} are {found.largest_steps:.3f} in log"
    if not found.is_needed:
        log.info("%s: %s, below %g: its planes are not levelled", volume.path, told, LEAST_STEP)
        return Levelled(axis, found.largest_steps, None)
    shift = math.log(float(np.sum(sums * np.exp(-found.log_gains))) / float(np.sum(sums)))
    gains = PlaneGains(number, np.round(found.log_gains + shift, DECIMALS))
    low, high = np.exp([gains.log_gains.min(), gains.log_gains.max()])
    log.info("%s: %s: they are levelled by gains of %.2f to %.2f", volume.path, told, low, high)
    shape = [1, 1, 1]
    shape[number] = -1
    volume.gains = np.exp(gains.log_gains).reshape(shape)
    return Levelled(axis, found.largest_steps, gains)


def _planes_of(volume: Volume, axis: int, mask: Volume | None) -> tuple[np.ndarray, np.ndarray]:
    """Plane by plane, intensities of a sub-grid (float32, 0 where they do not count) and the sum of all that count."""
    others = [n for n in range(3) if n != axis]
    planes = volume.shape[axis]
    most = max(1, min(PLANE_VOXELS, ALL_VOXELS // planes))
    step = math.ceil(math.sqrt(math.prod(volume.shape[n] for n in others) / most))
    positions = [np.arange(n) if number == axis else _every(n, step) for number, n in enumerate(volume.shape)]
    grid = np.zeros([len(p) for p in positions], dtype=np.float32)
    sums = np.zeros(planes)
    read = [volume, *([mask] if mask else [])]
    for (slab, values), *inside in zip(*(each.mean_slabs() for each in read), strict=True):
        within = inside_mask(inside[0][1]) if inside else np.ones(values.shape, dtype=bool)
        counted = np.where(usable_voxels(values, within)[0], values, 0)
        sums[slab if axis == 2 else slice(None)] += counted.sum(axis=tuple(others), dtype=np.float64)
        hit = (positions[2] >= slab.start) & (positions[2] < slab.stop)
        grid[:, :, hit] = counted[np.ix_(positions[0], positions[1], positions[2][hit] - slab.start)]
    return np.moveaxis(grid, axis, 0).reshape(planes, -1), sums


def _every(count: int, step: int) -> np.ndarray:
    """Every n-th voxel along an axis, centred."""
    return np.arange((count - 1) % step // 2, count, step)
