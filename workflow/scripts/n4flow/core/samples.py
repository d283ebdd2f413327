"""The voxels that take part in the estimate: a centred sub-grid of an image, inside its mask."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self

import numpy as np

from n4flow.device import array_module
from n4flow.errors import InputError
from n4flow.parameters import MOST_SAMPLES

log = logging.getLogger(__name__)

#: Fewer samples than this inside the mask cannot carry a histogram of 200 bins.
MINIMUM_SAMPLES = 1000

#: With so many grey levels the steps between them may be wider than the peaks of tissues; fewer are no scale of greys.
FEWEST_LEVELS, FEW_LEVELS = 6, 100

#: A level of no more than this share of the samples does not count: it may be off the scale.
RARE = 1e-4

#: A scale of greys has at least this share of the levels that fit between its ends.
MOSTLY_USED = 0.8

#: One over the powers of the root of x^4 = x + 1: their multiples fill the unit interval evenly, along any line.
SPREAD_SHARES = tuple(1.2207440846057596**-power for power in (1, 2, 3))

#: Planes that one half of the samples takes before it is the other's turn, see `Samples.blocks`.
BLOCK_PLANES = 4

#: No axis is shrunk to fewer samples than this, so that thin stacks keep their slices.
MINIMUM_GRID = 16


class _GreyScale(NamedTuple):
    """Few grey levels that are the steps of a scale."""

    step: float  # as a share of the largest level
    common: int  # how many levels are not rare
    levels: np.ndarray  # natural log of each, in rising order
    level: np.ndarray  # index of that of each sample


@dataclass(frozen=True, eq=False)
class Samples:
    """Log intensities on a regular sub-grid of an image.

    Parameters
    ----------
    log_image : (n0, n1, n2) float64 array
        Log intensities; 0 where the mask is 0.
    mask : (n0, n1, n2) bool array
        Samples that are inside the mask, finite and above 0.
    positions : three int arrays
        Voxel index of the samples along each axis.
    image_shape : tuple of int
        Voxels per axis of the whole image.
    voxel_size_mm : tuple of float
    affine : (4, 4) array
        Voxel-to-world matrix of the image, in mm.
    dropped : dict
        Voxels of the mask that could not be used, by reason.
    source : str
        Name of the image, for messages.
    weights : (n0, n1, n2) float32 array, optional
        Confidence of each sample in the fit, from 0; a sample of weight 0 takes no part. All 1 by default.
    domain : three ranges, optional
        Voxels along each axis from the first of the mask to the last; by default from its first sample to its last.
    """

    log_image: np.ndarray
    mask: np.ndarray
    positions: tuple[np.ndarray, ...]
    image_shape: tuple[int, ...]
    voxel_size_mm: tuple[float, ...]
    affine: np.ndarray
    dropped: dict[str, int]
    source: str
    weights: np.ndarray | None = None
    domain: tuple[range, ...] | None = None

    @property
    def spacing_mm(self) -> tuple[float, ...]:
        """Distance between samples along each axis; that between voxels where there is one."""
        return tuple(
            float(p[-1] - p[0]) / (len(p) - 1) * size if len(p) > 1 else size
            for p, size in zip(self.positions, self.voxel_size_mm, strict=True)
        )

    @property
    def confidence(self) -> np.ndarray:
        """Weight of each sample, 0 outside the mask: what the kernels take."""
        return self.mask if self.weights is None else np.where(self.mask, self.weights, 0)

    def check(self) -> Self:
        """Refuse samples that no field can be estimated from; return them otherwise.

        Raises
        ------
        InputError
            Too few of them, or all of one intensity.
        """
        used = self.confidence > 0
        check_count(
            self.source, int(np.count_nonzero(used)), self.image_shape, self.dropped, largest_step(self.positions)
        )
        one = self.log_image[np.unravel_index(used.argmax(), used.shape)]
        # plane by plane: as a rule the first one has another intensity
        if not any(np.any(plane[inside] != one) for plane, inside in zip(self.log_image, used, strict=True)):
            raise InputError(
                self.source,
                "all voxels inside the mask have the same intensity",
                "check that this is the right image and mask",
            )
        return self

    def cropped(self) -> Self:
        """Without the outer planes that hold no sample of the mask: nothing depends on them."""
        return self._part(box_of(self.mask))

    def _part(self, part: tuple[slice | np.ndarray, ...]) -> Self:
        return replace(
            self,
            log_image=self.log_image[part],
            mask=np.ascontiguousarray(self.mask[part]),
            weights=None if self.weights is None else np.ascontiguousarray(self.weights[part]),
            positions=tuple(p[along] for p, along in zip(self.positions, part, strict=True)),
        )

    def halves(self) -> list[Self]:
        """Two sets of samples that share none: alternate planes along the axis that has the most."""
        return self._split(np.arange)

    def blocks(self) -> list[Self]:
        """As `halves`, but in turns of `BLOCK_PLANES` planes: samples of either hardly have neighbours in the other.

        They are counted from the middle, so that a flipped image has the same.
        """
        return self._split(lambda count: np.abs(2 * np.arange(count) - (count - 1)) // (2 * BLOCK_PLANES))

    def _split(self, numbers: Callable[[int], np.ndarray]) -> list[Self]:
        """Planes of even and of odd numbers, along the axis that has the most."""
        axis = int(np.argmax(self.mask.shape))
        odd = numbers(self.mask.shape[axis]) % 2 > 0
        return [
            self._part(tuple(np.flatnonzero(half) if n == axis else slice(None) for n in range(3)))
            for half in (~odd, odd)
        ]

    def grey_step(self) -> float:
        """Between neighbours of a scale of few grey levels, in intensity; 0 where there is none: see `spread`."""
        found = self._scale_of_greys()
        return found.step * math.exp(found.levels[-1]) if found else 0.0

    def _scale_of_greys(self) -> _GreyScale | None:
        """The scale of the samples.

        None where there are more than `FEW_LEVELS`, or where they are not the steps of a scale: a drawing of five
        tissues is none.
        """
        values = self.log_image[self.confidence > 0]
        if len(np.unique(values[:: max(1, len(values) // 1024)])) > FEW_LEVELS:
            return None  # as a rule
        levels, level, counts = np.unique(values, return_inverse=True, return_counts=True)
        intensities = np.exp(levels - levels[-1])
        # of single voxels that are hot, or off the scale, there may be some
        common = intensities[counts > RARE * len(values)]
        if len(levels) > 2 * FEW_LEVELS or not FEWEST_LEVELS <= len(common) <= FEW_LEVELS:
            return None
        step = float(np.diff(common).min())
        if len(common) < MOSTLY_USED * (1 + (common[-1] - common[0]) / step):
            return None
        return _GreyScale(step, len(common), levels, level)

    def spread(self) -> Self:
        """With few grey levels, each of them spread over the interval of intensities that was rounded to it.

        A histogram of a few spikes is as sharp as can be, whatever the field. Spread evenly, by a sequence that has
        nothing to do with the image, the levels say again where the field moves them.

        Returns
        -------
        Samples
            The same where there are more levels.

        References
        ----------
        Roberts 2018, Quasirandom sequences: the additive recurrence of three axes.
        """
        if not (found := self._scale_of_greys()):
            return self
        step, common, levels, level = found
        log.info("%s: has %d grey levels, which are spread by half a step up and down", self.source, common)
        used, intensities = self.confidence > 0, np.exp(levels - levels[-1])
        first = [0, 0, 0] if self.domain is None else [voxels.start for voxels in self.domain]
        shares = sum(
            share * (p[index] - start)
            for share, p, index, start in zip(SPREAD_SHARES, self.positions, np.nonzero(used), first, strict=True)
        )
        log_image = self.log_image.copy()
        spread = intensities[level] + step * (shares % 1 - 0.5)
        log_image[used] = np.log(np.where(spread > 0, spread, intensities[level])) + levels[-1]
        return replace(self, log_image=log_image)


def shrink_per_axis(shape: Sequence[int], shrink_factor: int | None) -> tuple[int, ...]:
    """Shrink factor of each axis.

    Parameters
    ----------
    shape : sequence of int
        Voxels per axis of the domain.
    shrink_factor : int, optional
        From 1; by default the axis with the most samples is thinned out until all together are `MOST_SAMPLES` or fewer.

    Returns
    -------
    tuple of int
        The one asked for, less where it would leave too few samples: at least `MINIMUM_GRID` per axis are left, where
        there are as many voxels.
    """
    if shrink_factor is not None:
        return tuple(max(1, min(shrink_factor, n // MINIMUM_GRID)) for n in shape)
    factors = [1] * len(shape)
    while math.prod(counts := [max(1, n // step) for n, step in zip(shape, factors, strict=True)]) > MOST_SAMPLES:
        # of axes that have as many, the longer one: in whatever order they come
        factors[max(range(len(shape)), key=lambda axis: (counts[axis], shape[axis]))] += 1
    return tuple(factors)


def sample_positions(
    shape: Sequence[int], shrink_factor: int | None, start: Sequence[int] = (0, 0, 0)
) -> tuple[np.ndarray, ...]:
    """Voxel indices of the samples along each axis, centred in their domain.

    Parameters
    ----------
    shape : sequence of int
        Voxels per axis of the domain.
    shrink_factor : int, optional
        See `shrink_per_axis`.
    start : sequence of int
        First voxel of the domain.

    Returns
    -------
    tuple of int arrays

    References
    ----------
    ITK's ShrinkImageFilter, which takes the same voxels of an image.
    """
    positions = []
    for n, step, begin in zip(shape, shrink_per_axis(shape, shrink_factor), start, strict=False):
        count = max(1, n // step)
        first = int(np.floor(((n - 1) - step * (count - 1)) / 2 + 0.5))
        positions.append(begin + first + step * np.arange(count))
    return tuple(positions)


def box_of(mask: np.ndarray) -> tuple[slice, ...]:
    """The part of a mask of three axes, along each of them, outside of which it is 0; all of an empty one."""
    lines, columns = np.any(mask, axis=2), np.any(mask, axis=0)
    hits = [np.flatnonzero(np.any(part, axis=axis)) for part, axis in ((lines, 1), (lines, 0), (columns, 0))]
    return tuple(slice(hit[0], hit[-1] + 1) if len(hit) else slice(None) for hit in hits)


def inside_mask(mask: Any) -> Any:
    """Where a mask, an array (NumPy or CuPy) of any shape and dtype, is neither 0 nor NaN (bool, same shape)."""
    inside = mask != 0
    return inside & ~array_module(mask).isnan(mask) if mask.dtype.kind == "f" else inside


def usable_voxels(values: Any, inside: Any) -> tuple[Any, dict[str, int]]:
    """Voxels of a mask that have a logarithm, and how many have none, by reason.

    Parameters
    ----------
    values : array
        Intensities.
    inside : bool array of the same shape

    Returns
    -------
    usable : bool array of the same shape
    dropped : dict
        Voxels per reason: ``not finite``, ``zero``, ``negative``.
    """
    count = array_module(values).count_nonzero
    usable = inside & (values > 0)
    if values.dtype.kind == "f":
        usable &= np.isfinite(values)
    dropped = dict.fromkeys(("not finite", "zero", "negative"), 0)
    if lost := int(count(inside)) - int(count(usable)):  # as a rule there are none
        dropped["zero"] = int(count(inside & (values == 0)))
        dropped["negative"] = int(count(inside & (values < 0) & np.isfinite(values)))
        dropped["not finite"] = lost - dropped["zero"] - dropped["negative"]
    return usable, dropped


def largest_step(positions: Sequence[np.ndarray]) -> int:
    """The most voxels between two samples, along the axis where it is most: 1 where nothing was shrunk.

    Parameters
    ----------
    positions : three int arrays
        See `sample_positions`.
    """
    return max(int(along[1] - along[0]) if len(along) > 1 else 1 for along in positions)


def check_count(
    source: object,
    count: int,
    image_shape: Sequence[int],
    dropped: Mapping[str, int] | None = None,
    step: int = 1,
) -> None:
    """Refuse an image of too few samples.

    Parameters
    ----------
    source : object
        Name of the image, for messages.
    count : int
        Samples inside the mask.
    image_shape : three ints
        Voxels per axis.
    dropped : mapping, optional
        Voxels of the mask that could not be used, by reason.
    step : int
        See `largest_step`.

    Raises
    ------
    InputError
        They cannot carry a histogram.
    """
    if count < MINIMUM_SAMPLES:
        remedy = "give a larger mask" + (f" or an n4.shrink_factor below {step}" if step > 1 else "")
        if math.prod(image_shape) < MINIMUM_SAMPLES:
            remedy = f"leave it out: {' x '.join(map(str, image_shape))} voxels are too few for a field"
        raise InputError(
            source,
            f"only {count} usable samples inside the mask{' after shrinking' if step > 1 else ''}, "
            f"fewer than {MINIMUM_SAMPLES}" + describe_dropped(dropped or {}),
            remedy,
        )


def check_dropped(source: object, dropped: Mapping[str, int], mask_voxels: int) -> None:
    """Refuse an empty mask, and one of which most voxels have no logarithm; warn of fewer.

    Parameters
    ----------
    source : object
        Name of the image, for messages.
    dropped : dict
        From `usable_voxels`.
    mask_voxels : int

    Raises
    ------
    InputError
        The mask is empty, or more than half of it cannot be used.
    """
    if mask_voxels == 0:
        raise InputError(source, "the mask is empty", "give another mask")
    lost = sum(dropped.values())
    if lost > mask_voxels / 2:
        raise InputError(
            source,
            f"most of the mask cannot be used, {lost} of {mask_voxels} voxels" + describe_dropped(dropped),
            "check the image, or give a mask without them",
        )
    if lost:
        log.warning("%s: %d of %d voxels left out%s", source, lost, mask_voxels, describe_dropped(dropped))


def check_range(source: object, log_values: np.ndarray) -> None:
    """Refuse intensities that float32, which everything is written in, does not hold.

    Parameters
    ----------
    source : object
        Name of the image, for messages.
    log_values : (n,) array
        Natural log of the intensities.

    Raises
    ------
    InputError
        The largest is within a factor of 10 of float32's largest number, or the median within one
        of 1000 of its smallest.
    """
    limits = np.finfo(np.float32)
    # a tenfold margin for the field, and a thousand steps of precision for dark tissue
    darkest, brightest = np.log(float(limits.tiny) * 1e3), np.log(float(limits.max) / 10)
    dark = log_values.min(initial=np.inf) <= darkest and np.median(log_values) <= darkest  # seldom asked: it is slow
    if dark or log_values.max(initial=-np.inf) >= brightest:
        middle, most = np.exp(np.median(log_values)), np.exp(log_values.max())
        raise beyond_float32(source, f"intensities, around {middle:.1e} and up to {most:.1e},")


def beyond_float32(source: object, intensities: str = "intensities") -> InputError:
    """The error for an image of intensities that float32, which everything is written in, does not hold."""
    return InputError(
        source,
        f"holds {intensities} beyond what float32 holds",
        "multiply the image by a constant, or set single voxels that are wrong to 0",
    )


def describe_dropped(dropped: Mapping[str, int]) -> str:
    """The counts in brackets, as they stand in messages; empty if nothing was dropped."""
    reasons = ", ".join(f"{n} {reason}" for reason, n in dropped.items() if n)
    return f" (dropped from the mask: {reasons})" if reasons else ""


def log_where(values: np.ndarray, usable: np.ndarray) -> np.ndarray:
    """Natural logarithm in float64 where usable (bool, of the shape of `values`), else 0."""
    logs = np.where(usable, values, 1).astype(np.float64)
    return np.log(logs, out=logs)
