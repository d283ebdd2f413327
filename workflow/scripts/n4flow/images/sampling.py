"""The samples of an image, and what keeps its mean intensity, taken slab by slab."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from n4flow.core.bspline import one_blas_thread
from n4flow.core.quadrature import MaskIntensity
from n4flow.core.samples import (
    Samples,
    check_count,
    check_dropped,
    check_range,
    inside_mask,
    log_where,
    usable_voxels,
)
from n4flow.device import to_host
from n4flow.estimate import check_mesh, initial_mesh, positions_in
from n4flow.images.nifti import Volume
from n4flow.parameters import N4Parameters


@one_blas_thread
def read_samples(
    image: str | Path | Volume, mask: str | Path | Volume, parameters: N4Parameters
) -> tuple[Samples, MaskIntensity]:
    """Take the samples of an image (of the mean over its frames) inside a mask, slab by slab.

    Parameters
    ----------
    image, mask : path or Volume
        On the same grid.
    parameters : N4Parameters
        How far the samples are apart, and on which mesh the field will be.

    Returns
    -------
    Samples
    MaskIntensity
        What `quadrature.keep_mean_intensity` needs of all voxels of the mask that are finite and above 0.

    Raises
    ------
    InputError
        A file cannot be read, the grids differ, there are too few samples, the mesh does not fit them, or the mask is
        empty or mostly unusable.
    """
    volume = image if isinstance(image, Volume) else Volume(image)
    mask = mask if isinstance(mask, Volume) else Volume(mask)
    volume.check_same_grid(mask, "mask")
    check_count(volume.path, math.prod(volume.shape), volume.shape)
    box = Box(volume.shape)
    for slab, mask_values in mask.mean_slabs():
        box.add(inside_mask(mask_values), slab.start)
    domain = None
    # once, as a rule: unless what cannot be used at the border of the mask makes its box smaller
    while domain != box.ranges:
        domain, box = box.ranges, Box(volume.shape)
        positions = positions_in(domain, volume.shape, parameters)
        mesh = initial_mesh(volume.shape, volume.voxel_size_mm, domain, parameters)
        check_mesh(volume.path, positions, mesh, parameters)
        intensity = MaskIntensity(volume.shape, mesh.refined(parameters.doublings))
        log_image = np.zeros([len(p) for p in positions])
        kept = np.zeros(log_image.shape, dtype=bool)
        dropped: dict[str, int] = {}
        mask_voxels = 0
        for (slab, values), (_, mask_values) in zip(volume.mean_slabs(), mask.mean_slabs(), strict=True):
            inside = inside_mask(mask_values)
            usable, lost = usable_voxels(values, inside)
            box.add(usable, slab.start)
            intensity.add(values, usable, slab.start)
            mask_voxels += int(np.count_nonzero(inside))
            dropped = {reason: dropped.get(reason, 0) + n for reason, n in lost.items()}
            planes = (positions[2] >= slab.start) & (positions[2] < slab.stop)
            grid = np.ix_(positions[0], positions[1], positions[2][planes] - slab.start)
            kept[:, :, planes] = usable[grid]
            log_image[:, :, planes] = log_where(values[grid], usable[grid])
    check_dropped(volume.path, dropped, mask_voxels)
    check_range(volume.path, log_image[kept])
    samples = Samples(
        log_image,
        kept,
        positions,
        volume.shape,
        volume.voxel_size_mm,
        volume.affine_mm,
        dropped,
        str(volume.path),
        domain=domain,
    )
    return samples, intensity


class Box:
    """Voxels along each axis from the first that takes part to the last; all where none does."""

    def __init__(self, shape: Sequence[int]) -> None:
        self.seen = [np.zeros(n, dtype=bool) for n in shape]

    def add(self, inside: Any, first_plane: int) -> None:
        """Look at a slab (bool) of the third axis."""
        lines = inside.any(axis=2)
        planes = to_host(inside.any(axis=(0, 1)))
        self.seen[0] |= to_host(lines.any(axis=1))
        self.seen[1] |= to_host(lines.any(axis=0))
        self.seen[2][first_plane : first_plane + len(planes)] = planes

    @property
    def ranges(self) -> tuple[range, ...]:
        """One per axis."""
        ends = [np.flatnonzero(along) if along.any() else np.arange(len(along)) for along in self.seen]
        return tuple(range(int(hit[0]), int(hit[-1]) + 1) for hit in ends)
