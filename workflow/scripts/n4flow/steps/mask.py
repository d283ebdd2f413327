"""Where the field is estimated: a mask from the image, or one that the user gives."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from n4flow.core.bspline import one_blas_thread
from n4flow.core.field import BiasField
from n4flow.core.samples import Samples, check_range, inside_mask, largest_step, log_where, sample_positions
from n4flow.errors import InputError
from n4flow.estimate import estimate_field
from n4flow.images.files import write_json
from n4flow.images.nifti import Volume, VolumeWriter
from n4flow.images.planes import level_planes
from n4flow.parameters import N4Parameters
from n4flow.steps import preload as preload  # what the worker looks for
from n4flow.study.bids import check_magnitude, is_called_magnitude, source_uri
from n4flow.study.provenance import provenance
from n4flow.study.series import open_scan

log = logging.getLogger(__name__)

MaskMethod = Literal["otsu", "head", "percentile"]

#: Radius by which ``head`` closes: scalp and brain become one across skull and fluid.
CLOSING_MM = 6.0

#: Foreground is found on at most so many voxels, on a regular sub-grid of the image.
SUB_GRID_VOXELS = 2**20

#: So many voxels of the mask are enough for a field that shows what else is foreground.
FIELD_SAMPLES = 20_000

#: The mask is found again until fewer than this share of its voxels on the sub-grid change, at most so many times.
SAME_MASK, MOST_TURNS = 0.02, 10

#: What lies outside of the mask is taken for noise up to its median and so many times the median distance from that:
#: of the magnitude of Gaussian noise, up to three of its standard deviations.
NOISE_SPREADS = 4.0

#: For so many voxels that are as far below 0 as the foreground lies above it, per voxel of that, an image is refused.
#: Ringing and noise around 0 give none.
MOST_NEGATIVE = 0.05

#: The mask is looked at in cubes of so many voxels of the sub-grid along an edge. One is noise where neighbours differ
#: nearly as often (`DRAWN_BY_LOT`) as voxels drawn by lot, and at least this share is in the mask, or out of it.
CUBE, DRAWN_BY_LOT, BOTH_SIDES = 8, 0.8, 0.1

#: Air is bright where more of the cubes at the border of the image than this share are noise, and by so much more than
#: of those within: what is grainy throughout is no air.
MOST_NOISE, BEYOND_INNER = 0.3, 0.25

#: What wraps around has steps of at least `WHOLE_STEP` of its range between neighbours, of more than half of the range
#: at least `FEWEST_STEPS` of all pairs, and at least `LEAST_QUARTER` of its values in each quarter of the range. Where
#: the values run to is looked up so many voxels away.
WHOLE_STEP, FEWEST_STEPS, LEAST_QUARTER, RUN = 0.85, 5e-4, 0.05, 2

OTSU_BINS = 256


def otsu_threshold(values: np.ndarray) -> float:
    """Threshold that separates two classes with the largest variance between them.

    The histogram runs to the 99.9th percentile, so that a few very bright voxels do not decide; they count in its last
    bin.

    Parameters
    ----------
    values : 1-D array
        Finite intensities.

    Returns
    -------
    float
        Foreground is what lies above.

    References
    ----------
    Otsu 1979, doi:10.1109/TSMC.1979.4310076.
    """
    values = np.sort(values)
    edges = np.linspace(values[0], values[int(0.999 * (len(values) - 1))], OTSU_BINS + 1)
    counts = np.diff(np.searchsorted(values, edges[1:-1]), prepend=0, append=len(values))
    centres = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts)[:-1].astype(float)
    above = counts.sum() - below
    sums = np.cumsum(counts * centres)
    with np.errstate(invalid="ignore", divide="ignore"):
        difference = sums[:-1] / below - (sums[-1] - sums[:-1]) / above
    between = np.nan_to_num(below * above * difference**2)
    return float(edges[1 + np.argmax(between)])


class Foreground(NamedTuple):
    """What counts as foreground: what is brighter than a threshold once the field is off, and no noise.

    Parameters
    ----------
    threshold : float
        Of intensities divided by `field`; in the image's own units, since the field is 1 on average in the mask.
    noise : float
        No voxel of a lower intensity, as it stands in the image, is foreground, however weak the field is there.
    turns : int
        How often the mask was found again on corrected intensities; 0 if it stayed as it was.
    field : BiasField, optional
        None: a field of 1.
    log_range : tuple of float
        Limits of the log field in the mask that it was estimated in, beyond which it is not continued.
    """

    threshold: float
    noise: float = 0.0
    turns: int = 0
    field: BiasField | None = None
    log_range: tuple[float, float] = (0.0, 0.0)

    def limit(self, log_field: np.ndarray) -> np.ndarray:
        """The intensity, as it stands in the image, above which a voxel is foreground.

        Parameters
        ----------
        log_field : array

        Returns
        -------
        float64 array of the same shape
        """
        return np.maximum(self.threshold * np.exp(np.clip(log_field, *self.log_range)), self.noise)

    def inside(self, values: np.ndarray, slab: slice) -> np.ndarray:
        """Where a slab of the image is foreground.

        Parameters
        ----------
        values : (n0, n1, planes) array
        slab : slice
            Along the third axis.

        Returns
        -------
        bool array of the same shape, in Fortran order (first axis fastest)
        """
        shape, values = values.shape, values.ravel(order="F")
        least, most = self.limit(np.array(self.log_range))
        inside = values > most
        if self.field is not None:  # the field is needed where it decides: that is a small part
            undecided = np.flatnonzero((values > least) & ~inside)
            if len(undecided):
                log_field = self.field.log_tile((slice(None), slice(None), slab)).ravel(order="F")
                inside[undecided] = values[undecided] > self.limit(log_field[undecided])
        return inside.reshape(shape, order="F")


def find_foreground(volume: Volume, method: MaskMethod = "otsu", percentile: float = 50.0) -> Foreground:
    """Find the foreground and the field in turns, on a sub-grid of the image.

    Of a scan with a strong field, a threshold takes the bright part alone. The field that is estimated there shows more
    of it once it is continued, and so on until the mask stays.

    Parameters
    ----------
    volume : Volume
    method : {"otsu", "head", "percentile"}
        ``head`` uses Otsu's threshold too.
    percentile : float
        For ``percentile``: of the positive voxels, so that air that was set to 0 does not count.

    Returns
    -------
    Foreground

    Raises
    ------
    InputError
        No voxel is finite and above 0, or all have the same intensity.
    """
    positions, signed = _sub_grid(volume)
    values = np.where(signed > 0, signed, 0)
    if not values.any():
        step = largest_step(positions)
        raise InputError(
            volume.path,
            f"none of the voxels that the mask is sought on (every {step}th along an axis) is above 0",
            "give a mask in the sheet",
        )
    if values.min() == values.max():
        raise InputError(volume.path, "all voxels have the same intensity", "check that this is the right image")
    positive = values[values > 0]
    check_range(volume.path, np.log([positive.min(), np.median(positive), positive.max()]))
    _check_sign(volume, signed, otsu_threshold(values.ravel()))
    _check_wraps(volume, signed, signed != 0)

    def threshold_of(intensities: np.ndarray) -> float:
        if method == "percentile":
            return float(np.percentile(intensities[intensities > 0], percentile))
        return otsu_threshold(intensities.ravel())

    found = at_once = Foreground(threshold_of(values))
    inside = values > at_once.threshold
    at_border, within = _noisy_cubes(inside)
    if at_border > MOST_NOISE and at_border > within + BEYOND_INNER:
        raise InputError(
            volume.path,
            f"has air as bright as what it shows: noise in {100 * at_border:.0f} % of its border",
            "if it is a phase, give its magnitude; if it is MP2RAGE's uniform image (UNIT1), name its second inversion "
            "image (INV2) in the sheet's mask_image; or give a mask",
        )
    changed = 0.0
    for turn in range(1, MOST_TURNS + 1):
        try:
            field = estimate_field(_thinned_samples(volume, positions, values, inside), N4Parameters()).field
        except InputError as error:  # whether that matters, the correction will say
            log.info("%s; the mask is not found again on corrected intensities", error)
            break
        log_field = field.log_at(positions)
        mean = log_field[inside].mean()
        log_field, field = log_field - mean, field.shifted(-mean)
        log_range = float(log_field[inside].min()), float(log_field[inside].max())
        corrected = values / np.exp(np.clip(log_field, *log_range))
        noise = min(_noise(values[~inside]), at_once.threshold)  # without air, it is the dark tissue
        found = Foreground(threshold_of(corrected), noise, turn, field, log_range)
        before, inside = inside, values > found.limit(log_field)
        changed = np.count_nonzero(inside != before) / np.count_nonzero(before)
        log.info(
            "%s: mask found again on corrected intensities, turn %d of at most %d: threshold %.4g, %d voxels of a "
            "sub-grid, %.1f %% changed",
            volume.path,
            turn,
            MOST_TURNS,
            found.threshold,
            np.count_nonzero(inside),
            100 * changed,
        )
        if changed < SAME_MASK:  # an ordinary scan keeps what the threshold gives
            return found if turn > 1 else at_once
    if changed >= SAME_MASK:
        log.warning(
            "%s: the mask has not settled in %d turns, the last of which changed %.1f %% of it; look at it, "
            "or give a mask in the sheet",
            volume.path,
            found.turns,
            100 * changed,
        )
    return found


def _sub_grid(volume: Volume) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
    """Positions along each axis, and intensities there in float64: 0 where they are not finite."""
    positions = _sub_grid_positions(volume.shape)
    values, bright = _values_at(volume, positions)
    if not bright:
        raise InputError(volume.path, "no voxel is above 0", "check that this is the right image")
    return positions, values


def _sub_grid_positions(shape: Sequence[int]) -> tuple[np.ndarray, ...]:
    step = 1
    positions = sample_positions(shape, step)
    while math.prod(map(len, positions)) > SUB_GRID_VOXELS:  # ends, as no axis is thinned below 32
        step += 1
        positions = sample_positions(shape, step)
    return positions


def _values_at(volume: Volume, positions: Sequence[np.ndarray]) -> tuple[np.ndarray, bool]:
    """Intensities on a sub-grid, in float64, 0 where they are not finite; and whether any voxel is above 0."""
    values = np.zeros([len(p) for p in positions])
    bright = False
    for slab, part in volume.mean_slabs():
        bright = bright or bool((part > 0).any())
        hit = (positions[2] >= slab.start) & (positions[2] < slab.stop)
        values[:, :, hit] = part[np.ix_(positions[0], positions[1], positions[2][hit] - slab.start)]
    values[~np.isfinite(values)] = 0
    return values, bright


def _check_sign(volume: Volume, values: np.ndarray, threshold: float) -> None:
    """Refuse an image whose object lies on both sides of 0; not one, such as a CT, whose background is far below."""
    negative, positive = np.count_nonzero(values < -threshold), np.count_nonzero(values > threshold)
    faces = [values.take([0, -1], axis=axis).ravel() for axis in range(3) if values.shape[axis] > 1]
    if negative > MOST_NEGATIVE * positive and np.median(np.concatenate(faces)) > -threshold:
        raise InputError(
            volume.path,
            f"has intensities as far below 0 as its foreground lies above it, {negative} beyond {-threshold:.3g} for "
            f"{positive} beyond {threshold:.3g}",
            "give magnitudes: no phase, real or imaginary part, no z-scores, no unsigned integers that are stored as "
            "signed ones; or give a mask",
        )


def _check_wraps(volume: Volume, values: np.ndarray, inside: np.ndarray) -> None:
    """Refuse what wraps around as a phase does, however it is stored, unless name or sidecar call it a magnitude.

    Where neighbours differ by more than half of the range, they do so by nearly all of it, and on either side of the
    step the values run against it. In noise smaller steps are the more frequent ones; at the border of two tissues,
    values run along with the step, or anywhere.
    """
    seen = values[inside]
    if not (seen.size and np.ptp(seen)):
        return
    low, high = float(seen.min()), float(seen.max())
    above = [np.count_nonzero(seen >= low + quarter * (high - low) / 4) for quarter in range(4)]
    if min(-np.diff([*above, 0])) < LEAST_QUARTER * seen.size:
        return
    pairs = steps = whole = wraps = 0
    for axis in range(3):
        count = values.shape[axis] - 2 * RUN - 1
        if count < 1:
            continue
        # from RUN before a step to RUN behind it
        starts = (0, RUN, RUN + 1, 2 * RUN + 1)
        parts = [tuple(slice(n, n + count) if each == axis else slice(None) for each in range(3)) for n in starts]
        both = np.logical_and.reduce([inside[part] for part in parts])
        first, left, right, last = (values[part][both] for part in parts)
        step = (right - left) / (high - low)
        pairs += step.size
        steps += int(np.count_nonzero(np.abs(step) > 0.5))
        is_whole = np.abs(step) > WHOLE_STEP
        whole += int(np.count_nonzero(is_whole))
        wraps += int(np.count_nonzero(is_whole & ((left - first) * step < 0) & ((last - right) * step < 0)))
    if steps > FEWEST_STEPS * pairs and whole > steps / 2 and wraps > whole / 2:
        if is_called_magnitude(volume.path):
            return
        raise InputError(
            volume.path,
            "wraps around, as a phase does, and unsigned integers that are stored as signed ones: of "
            f"{steps} neighbours that differ by more than half of its range, {low:.4g} to {high:.4g}, {whole} differ "
            "by nearly all of it",
            "give its magnitude; if it is one, say so in its name (part-mag) or its sidecar (ImageType)",
        )


def _noisy_cubes(inside: np.ndarray) -> tuple[float, float]:
    """Share of a mask's cubes that are noise: of those at the border of the image, and of those within."""
    counts = [n // CUBE for n in inside.shape]
    if min(counts) < 3:
        return 0.0, 0.0
    shape = [size for n in counts for size in (n, CUBE)]
    cubes = inside[tuple(slice(n * CUBE) for n in counts)].reshape(shape).transpose(0, 2, 4, 1, 3, 5)
    share = cubes.mean(axis=(3, 4, 5))
    differ = sum(np.diff(cubes, axis=axis).mean(axis=(3, 4, 5)) for axis in (3, 4, 5)) / 3
    by_lot = 2 * share * (1 - share)
    noise = (np.minimum(share, 1 - share) >= BOTH_SIDES) & (differ > DRAWN_BY_LOT * by_lot)
    within = np.zeros(counts, dtype=bool)
    within[1:-1, 1:-1, 1:-1] = True
    return float(noise[~within].mean()), float(noise[within].mean())


def _thinned_samples(
    volume: Volume, positions: Sequence[np.ndarray], values: np.ndarray, inside: np.ndarray
) -> Samples:
    """Of a sub-grid, every 2nd plane of its longest axis, and so on while more than `FIELD_SAMPLES` are inside."""
    every = [1, 1, 1]
    while np.count_nonzero(inside) > FIELD_SAMPLES * math.prod(every):
        every[int(np.argmax(np.array(inside.shape) / every))] *= 2
    part = tuple(slice(None, None, step) for step in every)
    return Samples(
        log_where(values[part], inside[part]),
        inside[part],
        tuple(p[axis] for p, axis in zip(positions, part, strict=True)),
        volume.shape,
        volume.voxel_size_mm,
        volume.affine_mm,
        {},
        str(volume.path),
    ).spread()


def _noise(outside: np.ndarray) -> float:
    """The intensity up to which what lies outside of the mask is taken for noise."""
    if not outside.size:
        return 0.0
    middle = np.median(outside)
    return float(middle + NOISE_SPREADS * np.median(np.abs(outside - middle)))


def head_from_foreground(foreground: np.ndarray, voxel_size_mm: tuple[float, ...]) -> np.ndarray:
    """The head as a whole: the foreground closed over skull and airways, its largest piece filled.

    Parameters
    ----------
    foreground : (n0, n1, n2) bool array
    voxel_size_mm : tuple of float

    Returns
    -------
    (n0, n1, n2) bool array
    """
    import SimpleITK as sitk

    # no more than a tenth of the image, which may be no head
    radius = [
        max(1, min(round(CLOSING_MM / size), n // 10))
        for size, n in zip(voxel_size_mm[::-1], foreground.shape[::-1], strict=True)
    ]
    # padded, so that closing does not take the border of the image for air
    image = sitk.ConstantPad(sitk.GetImageFromArray(foreground.astype(np.uint8)), radius, radius, 0)
    closed = sitk.BinaryMorphologicalClosing(image, radius, sitk.sitkBall)
    largest = sitk.RelabelComponent(sitk.ConnectedComponent(closed)) == 1
    return sitk.GetArrayFromImage(sitk.Crop(sitk.BinaryFillhole(largest), radius, radius)).astype(bool)


@one_blas_thread
def make_mask(
    image: str | Path,
    output: str | Path,
    *,
    method: MaskMethod = "otsu",
    percentile: float = 50.0,
    found_on: str | Path | None = None,
    plane_gains: str | None = None,
) -> dict[str, Any]:
    """Write a foreground mask (uint8, 0 and 1) on the image's grid.

    Parameters
    ----------
    image : path-like
        Of several frames, the mean is taken.
    output : path-like
    found_on : path-like, optional
        Another image on the same grid, whose foreground is taken.
    method : {"otsu", "head", "percentile"}
        ``head`` makes one filled piece of the foreground, see `head_from_foreground`.
    percentile : float
        See `find_foreground`.
    plane_gains : {"i", "j", "k"}, optional
        The axis along which single planes are levelled before.

    Returns
    -------
    dict
        For the sidecar: the method, the threshold, the turns (see `Foreground`) and the number of voxels.

    Raises
    ------
    InputError
        The image cannot be read, or has no foreground.
    """
    like = volume = open_scan(image)
    if found_on:
        volume = open_scan(found_on)
        like.check_same_grid(volume, "mask image")
    level_planes(volume, plane_gains, threshold=otsu_threshold)
    found = find_foreground(volume, method, percentile)
    slabs: Iterable[np.ndarray] = (found.inside(values, slab) for slab, values in volume.mean_slabs())
    if method == "head":
        slabs = [head_from_foreground(np.concatenate(list(slabs), axis=2), volume.voxel_size_mm)]
    count = _write(output, like, slabs)
    return {"Method": method, "Threshold": found.threshold, "Turns": found.turns, "Voxels": count}


def adopt_mask(image: str | Path, mask: str | Path, output: str | Path) -> dict[str, Any]:
    """Write the user's own mask as uint8: any value that is not 0 (nor NaN) counts.

    Parameters
    ----------
    image, mask, output : path-like

    Returns
    -------
    dict
        For the sidecar: the number of voxels.

    Raises
    ------
    InputError
        It cannot be read, lies on another grid than the image, or is empty.
    """
    volume, own = open_scan(image), Volume(mask)
    if own.frames > 1:
        raise InputError(mask, f"the mask has {own.frames} frames", "give a 3-D mask")
    volume.check_same_grid(own, "mask")
    positions = _sub_grid_positions(volume.shape)
    _check_wraps(volume, _values_at(volume, positions)[0], _values_at(own, positions)[0] != 0)
    slabs = (inside_mask(values) for _, values in own.mean_slabs())
    count = _write(output, volume, slabs, source=mask)
    return {"Method": "given", "Voxels": count}


def _write(output: str | Path, like: Volume, slabs: Iterable[np.ndarray], source: str | Path | None = None) -> int:
    count = 0
    with VolumeWriter(output, like, np.uint8, frames=1) as writer:
        for inside in slabs:
            count += int(np.count_nonzero(inside))
            writer.write(inside)
        if count == 0:
            advice = "draw it anew, or leave it out of the sheet" if source else "give a mask, or another mask.method"
            raise InputError(source or like.path, "the mask is empty", advice)
    return count


def mask_scan(
    image: str | Path,
    own_mask: str | Path | None,
    output: str | Path,
    sidecar: str | Path,
    *,
    method: MaskMethod,
    percentile: float,
    found_on: str | Path | None = None,
    plane_gains: str | None = None,
) -> None:
    """Write the mask of a scan and its sidecar; the user's own mask wins over `method`.

    Parameters
    ----------
    image : path-like
    own_mask : path-like, optional
    output, sidecar : path-like
    method, percentile, found_on, plane_gains
        As `make_mask`.

    Raises
    ------
    InputError
        As `make_mask` and `adopt_mask`; or the scan is no magnitude.
    """
    output = Path(output)
    given = {"image": image, "mask": own_mask, "mask_image": found_on}
    sources = {role: Path(path) for role, path in given.items() if path}
    check_magnitude(sources["image"])
    if own_mask:
        facts = adopt_mask(image, own_mask, output)
    else:
        facts = make_mask(
            image, output, method=method, percentile=percentile, found_on=found_on, plane_gains=plane_gains
        )
    write_json(
        sidecar,
        {
            "Type": "ROI",
            "Sources": [source_uri(path, output) for path in sources.values()],
            "Mask": facts,
            "Provenance": provenance(sources, ("numpy", "nibabel")),
        },
    )
    log.info("%s: %s", image, facts)
