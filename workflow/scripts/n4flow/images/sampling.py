"""The samples of an image, and what keeps its mean intensity, taken slab by slab: of files and of arrays."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from n4flow.core.bspline import one_blas_thread
from n4flow.core.noise import denoised, noise_sd, surroundings
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
from n4flow.device import array_module, to_host
from n4flow.errors import InputError
from n4flow.estimate import check_mesh, initial_mesh, positions_in
from n4flow.images.nifti import Volume
from n4flow.parameters import N4Parameters

log = logging.getLogger(__name__)


class Slab(NamedTuple):
    """Planes of an image along the third axis; arrays of NumPy or CuPy, of one shape."""

    planes: slice
    values: Any
    inside: Any  # bool: the mask
    weights: Any = None  # confidence of each voxel, from 0; all 1 if None


class Image(NamedTuple):
    """An image that samples are taken of."""

    source: str  # its name, for messages
    shape: tuple[int, ...]
    voxel_size_mm: tuple[float, ...]
    affine: np.ndarray
    slabs: Callable[[], Iterable[Slab]]  # from the first plane to the last, as often as asked for


def read_samples(
    image: str | Path | Volume,
    mask: str | Path | Volume,
    parameters: N4Parameters,
    weights: str | Path | None = None,
) -> tuple[Samples, MaskIntensity]:
    """Take the samples of an image file (of the mean over its frames) inside a mask.

    Parameters
    ----------
    image, mask : path or Volume
        On the same grid.
    parameters : N4Parameters
    weights : path, optional
        Confidence of each voxel in the fit of the field, on the same grid; only their ratios count. A voxel of 0 or NaN
        takes no part in the estimate. All 1 by default.

    Returns
    -------
    Samples
    MaskIntensity

    Raises
    ------
    InputError
        A file cannot be read, the grids differ, weights in the mask are negative, infinite or all 0, or as
        `take_samples`.
    """
    volume = image if isinstance(image, Volume) else Volume(image)
    own_mask = mask if isinstance(mask, Volume) else Volume(mask)
    volume.check_same_grid(own_mask, "mask")
    check_count(volume.path, math.prod(volume.shape), volume.shape)
    confidence = Volume(weights) if weights else None
    if confidence:
        check_weights(volume, own_mask, confidence)
    box = Box(volume.shape)
    for planes, mask_values in own_mask.mean_slabs():
        box.add(inside_mask(mask_values), planes.start)

    read = [volume, own_mask, *([confidence] if confidence else [])]

    def slabs() -> Iterable[Slab]:
        for (planes, values), (_, mask_values), *rest in zip(*(each.mean_slabs() for each in read), strict=True):
            yield Slab(planes, values, inside_mask(mask_values), *(_without_nan(weighting) for _, weighting in rest))

    described = Image(str(volume.path), volume.shape, volume.voxel_size_mm, volume.affine_mm, slabs)
    return take_samples(described, box, parameters)


def check_weights(image: Volume, mask: Volume, weights: Volume) -> None:
    """Refuse weights that say nothing, or what cannot be; the log tells how many voxels of the mask have none.

    Parameters
    ----------
    image, mask, weights : Volume

    Raises
    ------
    InputError
        They have frames or lie on another grid than the image; in the mask one is negative or infinite, or all are 0.
    """
    if weights.frames > 1:
        raise InputError(weights.path, f"the weights have {weights.frames} frames", "give a 3-D image of weights")
    image.check_same_grid(weights, "weight image")
    counts = dict.fromkeys(("negative", "infinite", "NaN", "0"), 0)
    voxels = 0
    for (_, values), (_, mask_values) in zip(weights.mean_slabs(), mask.mean_slabs(), strict=True):
        inside = values[inside_mask(mask_values)]
        voxels += inside.size
        counts["negative"] += int(np.count_nonzero(inside < 0))
        counts["infinite"] += int(np.count_nonzero(np.isinf(inside)))
        counts["NaN"] += int(np.count_nonzero(np.isnan(inside)))
        counts["0"] += int(np.count_nonzero(inside == 0))
    for what in ("negative", "infinite"):
        if counts[what]:
            raise InputError(
                weights.path,
                f"{counts[what]} of {voxels} weights in the mask are {what}",
                "give weights from 0, the larger the surer",
            )
    lost = counts["NaN"] + counts["0"]
    if voxels and lost == voxels:
        raise InputError(weights.path, "all weights in the mask are 0 or NaN", "give a weight to the voxels that count")
    if lost:
        log.info("%s: %d of %d voxels of the mask have no weight (0 or NaN)", weights.path, lost, voxels)


def _without_nan(weights: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(weights), 0, weights) if weights.dtype.kind == "f" else weights


@one_blas_thread
def take_samples(
    image: Image, box: Box, parameters: N4Parameters, *, box_is_final: bool = False
) -> tuple[Samples, MaskIntensity]:
    """Take the samples of an image inside its mask, slab by slab.

    Parameters
    ----------
    image : Image
    box : Box
        Around the voxels that take part.
    parameters : N4Parameters
        How far the samples are apart, and on which mesh the field will be.
    box_is_final : bool
        All that take part can be used. Otherwise the box may be that of the mask: should it turn out smaller without
        the voxels that cannot be used, the samples are taken again.

    Returns
    -------
    Samples
    MaskIntensity
        What `quadrature.keep_mean_intensity` needs of all voxels of the mask that are finite and above 0, whatever
        their weight.

    Raises
    ------
    InputError
        There are too few samples, the mesh does not fit them, the mask is empty or mostly unusable, or all weights in
        it are 0.
    """
    domain = None
    while domain != box.ranges:
        domain, box = box.ranges, box if box_is_final else Box(image.shape)
        positions = positions_in(domain, image.shape, parameters)
        mesh = initial_mesh(image.shape, image.voxel_size_mm, domain, parameters)
        check_mesh(image.source, positions, mesh, parameters)
        intensity = MaskIntensity(image.shape, mesh.refined(parameters.refinements))
        wanted = surroundings(positions) if parameters.denoise else positions
        values: np.ndarray | None = None
        weights: np.ndarray | None = None
        dropped: dict[str, int] = {}
        voxels = mask_voxels = 0
        for slab in image.slabs():
            start, module = slab.planes.start, array_module(slab.values)
            weighted = slab.weights is not None
            taking_part = slab.inside & inside_mask(slab.weights) if weighted else slab.inside
            usable, lost = usable_voxels(slab.values, taking_part)
            if not box_is_final:
                box.add(usable, start)
            intensity.add(slab.values, usable_voxels(slab.values, slab.inside)[0] if weighted else usable, start)
            mask_voxels += int(module.count_nonzero(slab.inside)) if weighted else 0
            voxels += int(module.count_nonzero(taking_part))
            dropped = {reason: dropped.get(reason, 0) + n for reason, n in lost.items()}
            if values is None:  # whole numbers too, as exact as they are
                exact = np.float32 if np.can_cast(slab.values.dtype, np.float32) else np.float64
                values = np.full([len(w) for w in wanted], np.nan, dtype=exact)
            into, part = _overlap(wanted, slab, module)
            values[into] = np.where(to_host(usable[part]), to_host(slab.values[part]), np.nan)
            if weighted:
                into, part = _overlap(positions, slab, module)
                if weights is None:
                    dtype = np.promote_types(slab.weights.dtype, np.float64)
                    weights = np.zeros([len(p) for p in positions], dtype=dtype)
                weights[into] = np.where(to_host(slab.inside[part]), to_host(slab.weights[part]), 0)
    assert values is not None
    own = values[np.ix_(*(np.searchsorted(w, p) for w, p in zip(wanted, positions, strict=True)))]
    kept = ~np.isnan(own)
    log_image = log_where(own, kept)
    if weights is not None:
        largest = weights.max(initial=0)
        if mask_voxels and largest == 0:
            raise InputError(image.source, "all weights in the mask are 0", "give a weight to the voxels that count")
        # only their ratios count, and those to the largest fit into float32
        weights = (weights / (largest or 1)).astype(np.float32)
        kept &= weights > 0
        log_image = np.where(kept, log_image, 0)
    check_dropped(image.source, dropped, voxels)
    check_range(image.source, log_image[kept])
    samples = Samples(
        log_image,
        kept,
        positions,
        image.shape,
        image.voxel_size_mm,
        image.affine,
        dropped,
        image.source,
        weights,
        domain=domain,
    )
    return mended(samples, values, parameters), intensity


def mended(samples: Samples, values: np.ndarray, parameters: N4Parameters) -> Samples:
    """Samples freed of noise and of grey levels, as far as `parameters` say.

    Parameters
    ----------
    samples : Samples
    values : (m0, m1, m2) float array
        Intensities at the `noise.surroundings` of the samples, if they are to be freed of noise; NaN where they do not
        take part.
    parameters : N4Parameters

    Returns
    -------
    Samples
        The same where there is nothing to mend.
    """
    if parameters.denoise:
        samples = _without_noise(samples, values, parameters.denoise)
    return samples if parameters.as_itk else samples.spread()


def _without_noise(samples: Samples, values: np.ndarray, denoise: float) -> Samples:
    """Each the mean of what is as bright around it.

    The same where no noise is seen, or less than half a step of few grey levels: these have to be spread.
    """
    sd, step = noise_sd(values, samples.positions, samples.mask), samples.grey_step()
    if sd <= step / 2:
        log.info("%s: the noise is about %.3g; the samples are taken as they are", samples.source, sd)
        return samples
    log.info("%s: the noise is about %.3g; what is as bright around a sample is averaged", samples.source, sd)
    log_image = samples.log_image.copy()
    log_image[samples.mask] = np.log(denoised(values, samples.positions, samples.mask, denoise * sd))
    return replace(samples, log_image=log_image)


def _overlap(wanted: Sequence[np.ndarray], slab: Slab, module: Any) -> tuple[Any, Any]:
    """Where voxel indices lie in a slab: their part of an array that holds all of them, and their part of the slab."""
    ends = [(0, slab.values.shape[0]), (0, slab.values.shape[1]), (slab.planes.start, slab.planes.stop)]
    into = tuple(slice(*np.searchsorted(w, end)) for w, end in zip(wanted, ends, strict=True))
    part = [w[along] - first for w, along, (first, _) in zip(wanted, into, ends, strict=True)]
    if all(len(p) and p[-1] - p[0] == len(p) - 1 for p in part):  # much faster than voxel by voxel
        return into, tuple(slice(p[0], p[-1] + 1) for p in part)
    return into, tuple(module.asarray(axis) for axis in np.ix_(*part))


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
