"""Numbers that describe a correction: pure functions of the voxels inside the mask.

None of them is a verdict alone. A coefficient of variation falls when contrast is flattened, an
entropy falls when the image is, so both stand beside the CJV, which rises in that case. Microscopy
has no tissue classes that recur from image to image: there the sections, the tiles and the
saturation are looked at instead.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from n4flow.core.sharpening import linear_histogram
from n4flow.study.outputs import scan_and_role

#: An entropy needs no more voxels than about this.
ENTROPY_VOXELS = 2**20

#: The mean of a plane counts from so many voxels on.
PLANE_VOXELS = 20

#: A step between neighbouring planes counts from so many pairs of voxels on, and from this share of the most pairs
#: between two planes of its axis: where an object ends, few pairs, all on its edge, would pass for a seam.
SEAM_PAIRS, SEAM_SHARE = 100, 0.1

#: A median of fewer steps says nothing about what is typical.
SEAM_STEPS = 5

#: Tiles lie alike in all sections, so a seam ratio needs no more voxels than about this, from evenly spaced sections.
SEAM_VOXELS = 2**26

#: Largest values of cameras of 8 to 16 bits, whose images are often stored as 16 bits.
CAMERA_MAXIMA = tuple(2**bits - 1 for bits in (8, 10, 12, 14, 16))

#: So many voxels may share the largest value by chance.
CHANCE_VOXELS = 10

#: In a wrapped image, a value in the upper tenth of what its integers can hold has a neighbour that is lower by more
#: than this share of it; and on both sides of at least such a share of these steps the values run against them. By
#: chance, as at the border of fat, they do so at a quarter of them, and of a bright skin of one voxel at half.
WRAPPED_TOP, WRAPPED_STEP, WRAPPED_RUNS = 0.9, 0.6, 0.52

#: So many values in the upper tenth are needed to say something of them.
WRAPPED_VOXELS = 50

#: Outside of the mask as bright as this percentile of it is as bright as what the mask holds.
BRIGHT_PERCENTILE = 25

#: Below this share of the 99th percentile of the mask, a voxel is as dark as air.
DARK_SHARE = 0.05


class IntensityClasses(NamedTuple):
    """Limits of the two upper of three intensity classes."""

    lower: float  # the middle class lies above
    upper: float  # the bright class lies above
    top: float  # and below this

    def middle(self, values: np.ndarray) -> np.ndarray:
        """Where the values belong to the middle class."""
        return (values > self.lower) & (values <= self.upper)

    def bright(self, values: np.ndarray) -> np.ndarray:
        """Where the values belong to the bright class."""
        return (values > self.upper) & (values <= self.top)


def intensity_classes(values: np.ndarray, *, bins: int = 128, clip_percent: float = 0.5) -> IntensityClasses:
    """Split intensities into three classes with the largest variance between them.

    These are intensity classes, not a segmentation: in a T1w image without its skull the two upper
    ones are mostly grey and white matter, in a whole head muscle and fat join them.

    Parameters
    ----------
    values : (n,) array
        Corrected intensities inside the mask.
    bins : int
        Bins of the histogram.
    clip_percent : float
        The histogram runs between this percentile and its counterpart from the top, and the bright
        class ends there, so that vessels and fat do not decide.

    Returns
    -------
    IntensityClasses
        All NaN where there are fewer than three distinct intensities.

    References
    ----------
    Otsu 1979, doi:10.1109/TSMC.1979.4310076 (the extension to several thresholds).
    """
    nothing = IntensityClasses(math.nan, math.nan, math.nan)
    if values.size == 0:
        return nothing
    low, high = (float(p) for p in np.percentile(values, [clip_percent, 100 - clip_percent]))
    if not low < high:
        return nothing
    counts, edges = np.histogram(values, bins=bins, range=(low, high))
    if np.count_nonzero(counts) < 3:
        return nothing
    centres = (edges[:-1] + edges[1:]) / 2
    weight = np.concatenate([[0], np.cumsum(counts)]).astype(float)
    moment = np.concatenate([[0], np.cumsum(counts * centres)])

    def score(start: Any, stop: Any) -> Any:
        """``weight * mean**2`` of the bins in between, -inf where they are empty."""
        inside = weight[stop] - weight[start]
        return np.where(inside > 0, (moment[stop] - moment[start]) ** 2 / np.where(inside > 0, inside, 1), -np.inf)

    first, second = np.triu_indices(bins + 1, 1)
    between = score(np.zeros_like(first), first) + score(first, second) + score(second, np.full_like(second, bins))
    best = int(np.argmax(between))
    return IntensityClasses(float(edges[first[best]]), float(edges[second[best]]), high)


def coefficient_of_variation(values: np.ndarray) -> float:
    """``sd / mean`` of an array of intensities, without unit; NaN where it is empty or its mean is 0.

    Falls too when contrast is flattened.
    """
    mean = float(np.mean(values, dtype=np.float64)) if values.size else 0.0
    return float(np.std(values, dtype=np.float64)) / mean if mean else math.nan


def coefficient_of_joint_variation(middle: np.ndarray, bright: np.ndarray) -> float:
    """``(sd_GM + sd_WM) / |mean_GM - mean_WM|``, without unit; lower is better.

    The formula is the one MRIQC documents. Its own numbers differ: it has a segmentation of grey and
    white matter, and puts medians and median absolute deviations for means and standard deviations.

    Parameters
    ----------
    middle, bright : 1-D arrays
        Intensities of two classes, here those of `intensity_classes` instead of GM and WM.

    Returns
    -------
    float
        NaN where a class is empty or the means are equal.

    References
    ----------
    Ganzetti, Wenderoth & Mantini 2016, doi:10.3389/fninf.2016.00010; Esteban et al. 2017,
    doi:10.1371/journal.pone.0184661 (MRIQC, mriqc.qc.anatomical.cjv).
    """
    if middle.size == 0 or bright.size == 0:
        return math.nan
    means = [float(np.mean(c, dtype=np.float64)) for c in (middle, bright)]
    spreads = [float(np.std(c, dtype=np.float64)) for c in (middle, bright)]
    distance = abs(means[0] - means[1])
    return sum(spreads) / distance if distance else math.nan


def log_entropy_bits(values: np.ndarray, bin_width: float = 0.05) -> float:
    """Shannon entropy of the histogram of log intensities, ``-sum p log2 p``, in bits.

    The bins have a fixed width (5 % of intensity), not a fixed number: so the entropies before and
    after, and of different subjects, compare. A value is shared by the two nearest bin centres, or
    the gaps between the integers of an original would pass for a sharp histogram.

    Parameters
    ----------
    values : (n,) array
        Intensities above 0.
    bin_width : float
        In natural log intensity; the bin centres are its multiples.

    Returns
    -------
    float
        NaN where there are no values.

    References
    ----------
    Likar, Viergever & Pernus 2001, doi:10.1109/42.974934 (entropy as a measure of inhomogeneity).
    """
    if values.size == 0:
        return math.nan
    position = np.log(values.astype(np.float64)) / bin_width
    low, high = math.floor(position.min()), math.ceil(position.max())
    counts = linear_histogram(position, low, max(high, low + 1), max(high - low, 1) + 1)
    share = counts[counts > 0] / values.size
    return float(-(share * np.log2(share)).sum()) + 0.0


class Inhomogeneity(NamedTuple):
    """The INU measures of MRIQC."""

    range: float
    med: float


def inhomogeneity(ratio: np.ndarray) -> Inhomogeneity:
    """Spread and location of the multiplicative bias field inside the mask, without unit.

    ``range = |P95(b) - P5(b)|`` and ``med = P50(b)``, as MRIQC has them; its voxels are those of the
    segmented brain, ours those of the mask.

    Parameters
    ----------
    ratio : (n,) array
        Multiplicative field b.

    Returns
    -------
    range : float
        95th minus 5th percentile; 0 for no field.
    med : float
        Median.

    References
    ----------
    Esteban et al. 2017, doi:10.1371/journal.pone.0184661 (MRIQC, inu_range and inu_med of
    mriqc.interfaces.anatomical.StructuralQC).
    """
    low, median, high = np.percentile(ratio, [5, 50, 95])
    return Inhomogeneity(abs(float(high) - float(low)), float(median))


class FieldAgreement(NamedTuple):
    """How a log bias field agrees with a reference field."""

    r: float
    slope: float
    rms_log: float
    p99_log: float


def field_agreement(log_field: np.ndarray, log_reference: np.ndarray) -> FieldAgreement:
    """Compare two log bias fields in the mask, each less its mean there: ``a`` is ours, ``b`` the reference.

    ``r = sum(a b) / sqrt(sum(a a) sum(b b))`` and ``slope = sum(a b) / sum(b b)``.

    Parameters
    ----------
    log_field, log_reference : (n,) arrays
        Natural log.

    Returns
    -------
    r : float
        Pearson's correlation; NaN where a field is constant.
    slope : float
        Of the regression of ours on the reference: below 1, ours is the weaker field.
    rms_log, p99_log : float
        Root mean square and 99th percentile of ``|ours - reference|``, natural log (0.01 is 1 %).
    """
    ours, reference = (
        v - v.dtype.type(np.mean(v, dtype=np.float64)) for v in (np.asarray(log_field), np.asarray(log_reference))
    )
    product, own, other = (
        float(np.mean(a * b, dtype=np.float64)) for a, b in ((ours, reference), (ours, ours), (reference, reference))
    )
    difference = np.abs(ours - reference)
    return FieldAgreement(
        product / math.sqrt(own * other) if own * other > 0 else math.nan,
        product / other if other > 0 else math.nan,
        math.sqrt(float(np.mean(np.square(difference), dtype=np.float64))),
        float(np.percentile(difference, 99)),
    )


def steepness(log_slope_per_mm: np.ndarray, mask_size_mm: float) -> float:
    """``P99(|grad log b|) * size``, without unit: how steep the field is for an object of this size.

    What the log field would change by across the mask, were it everywhere as steep as where it is
    steepest. A coil makes a slow field, whatever the object; a mesh near the size of anatomy follows
    the anatomy, which is steep.

    Parameters
    ----------
    log_slope_per_mm : (n,) array
        Length of the gradient of the log field at voxels of the mask.
    mask_size_mm : float
        Edge of the cube (or the square, of a 2-D image) as large as the mask.
    """
    return float(np.percentile(log_slope_per_mm, 99)) * mask_size_mm if log_slope_per_mm.size else math.nan


def dark_fraction(original: np.ndarray) -> float:
    """Share of the voxels that are as dark as air: ``|{v: v < 0.05 P99(v)}| / n``.

    Noise has no bias field, and its logarithm spreads so far that it outweighs the tissue.

    Parameters
    ----------
    original : (n,) array
        Original intensities in the mask; what is not finite counts as dark.
    """
    known = original[np.isfinite(original)]
    if not known.size:
        return math.nan
    return float(np.mean(~(original >= DARK_SHARE * np.percentile(known, 99))))


def bright_outside_fraction(corrected: np.ndarray, mask: np.ndarray) -> float:
    """What the mask leaves out although it is as bright: ``|{outside: v >= P25(v in the mask)}| / n``.

    About half for the mask of a brain in a whole head, whose scalp and face are bright; next to none for a mask that
    was found by a threshold.

    Parameters
    ----------
    corrected : (n0, n1, n2) array
        Corrected intensities.
    mask : (n0, n1, n2) bool array

    Returns
    -------
    float
        As a share of the voxels of the mask; NaN where nothing in it is above 0.
    """
    inside = corrected.T[mask.T]
    usable = inside[np.isfinite(inside) & (inside > 0)]
    if not usable.size:
        return math.nan
    least = np.percentile(usable, BRIGHT_PERCENTILE)
    bright, held = (int(np.count_nonzero(v >= least)) for v in (corrected, inside))
    return (bright - held) / inside.size


def speckle_fraction(mask: np.ndarray) -> float:
    """Share of a mask's voxels that have at most one neighbour in it, face to face: noise, and no object.

    Parameters
    ----------
    mask : (n0, n1, n2) bool array
        Not empty.
    """
    neighbours = np.zeros(mask.shape, dtype=np.uint8, order="F")
    for lower, upper in _next_to(mask.ndim):
        neighbours[lower] += mask[upper]
        neighbours[upper] += mask[lower]
    return float(np.count_nonzero(mask & (neighbours <= 1)) / np.count_nonzero(mask))


def _next_to(axes: int) -> Iterator[tuple[tuple[slice, ...], tuple[slice, ...]]]:
    """Per axis: all voxels but the last, and their neighbours along it."""
    for axis in range(axes):
        whole = (slice(None),) * axis
        yield (*whole, slice(None, -1)), (*whole, slice(1, None))


def wrapped_fraction(values: np.ndarray, dtype: np.dtype, slope: float = 1.0, inter: float = 0.0) -> float:
    """How much an integer image looks as if its largest values had begun again at the smallest.

    Beside a value near the largest that 8, 10, 12, 14 or 16 bits can hold lies one that is far lower: of a wrapped
    object nearly everywhere, of an image that was scaled to its largest value hardly anywhere, unless it is sharp. Of
    a wrapped object the values rise up to such a step and again behind it; at a border of tissues they do as they like.

    Parameters
    ----------
    values : (n0, n1, n2) array
        Original intensities of one frame, ``slope * stored + inter``.
    dtype : numpy dtype
        Of the stored values.
    slope, inter : float

    Returns
    -------
    float
        Of the voxels in the upper tenth of the range, the share with such a neighbour. NaN where it cannot be told:
        where values do not run up to the steps and on behind them, as at sharp borders, be they wrapped or not, and in
        coarse images; for floats, where values do not reach over a range of so many bits, or too few lie in its upper
        tenth.
    """
    if not np.issubdtype(dtype, np.integer) or not values.size:
        return math.nan
    low, high = (float((v - inter) / slope) for v in (values.min(), values.max()))
    ranges = [2**bits for bits in (8, 10, 12, 14, 16)]
    span = next((r for r in ranges if high - min(low, 0) < r), math.nan)
    least = WRAPPED_TOP * (span / 2 if low < 0 else span)
    if not high >= least:
        return math.nan
    upper = values >= slope * least + inter
    count = int(np.count_nonzero(upper))
    if count < WRAPPED_VOXELS:
        return math.nan
    least_step = WRAPPED_STEP * span * slope
    torn = np.zeros(values.shape, dtype=bool, order="F")
    steps = running = 0
    for axis, (one, other) in enumerate(_next_to(values.ndim)):
        difference = values[one] - values[other]
        fall, rise = difference > least_step, difference < -least_step
        torn[one] |= fall
        torn[other] |= rise
        difference, large = (np.moveaxis(array, axis, 0) for array in (difference, fall | rise))
        places = np.nonzero(large[1:-1])
        before, step, behind = (difference[n : len(difference) - 2 + n][places] for n in range(3))
        steps += step.size
        running += int(np.count_nonzero((before * step < 0) & (behind * step < 0)))
    if running < WRAPPED_RUNS * steps:
        return math.nan
    return float(np.count_nonzero(torn & upper) / count)


def _sections(values: np.ndarray, mask: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Plane by plane along the third axis: its index, its mask (n1, n0) and the values in it."""
    stop = 0
    for section in range(mask.shape[2]):
        inside = mask[:, :, section].T
        start, stop = stop, stop + int(inside.sum())
        yield section, inside, values[start:stop]


def section_profile(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Mean of each plane along the third axis, the slow axis of the file: of each section.

    Parameters
    ----------
    values : (n,) array
        ``image.T[mask.T]``: the voxels of the mask in the order of the file. Those that are not
        finite or not above 0 are left out.
    mask : (n0, n1, n2) bool array

    Returns
    -------
    (n2,) float64 array
        NaN for sections of fewer than `PLANE_VOXELS` voxels.
    """
    profile = np.full(mask.shape[2], math.nan)
    for section, _, voxels in _sections(values, mask):
        part = voxels[np.isfinite(voxels) & (voxels > 0)]
        if part.size >= PLANE_VOXELS:
            profile[section] = np.mean(part, dtype=np.float64)
    return profile


def section_spread(profile: np.ndarray) -> float:
    """``(max - min) / mean`` of the known means of a `section_profile` (n,), without unit.

    NaN where fewer than two are known.
    """
    known = profile[np.isfinite(profile)]
    return float((known.max() - known.min()) / known.mean()) if known.size > 1 else math.nan


def saturated_fraction(values: np.ndarray, dtype: np.dtype, slope: float = 1.0, inter: float = 0.0) -> float:
    """Share of the voxels at the ceiling of what was measured: ``|{v: v = ceiling}| / n``.

    The ceiling is the maximum of the values, if it is one of these, and there is none otherwise:

    - the largest value that an integer `dtype` can store;
    - for integers, the largest value of a camera with fewer bits (`CAMERA_MAXIMA`, 4095 in a
      uint16 file), held by more than `CHANCE_VOXELS` voxels;
    - for floats, any value held by more than `CHANCE_VOXELS` voxels: measured values that are
      not rounded hardly repeat.

    Parameters
    ----------
    values : (n,) array
        Original intensities in the mask, ``slope * stored + inter``; not finite ones are not at
        the ceiling.
    dtype : numpy dtype
        Of the stored values.
    slope, inter : float

    Returns
    -------
    float
        NaN where there are no values.
    """
    if values.size == 0:
        return math.nan
    finite = np.isfinite(values)
    top = float(np.max(values, where=finite, initial=-math.inf))
    half_step, storable = 0.0, False
    if np.issubdtype(dtype, np.integer) and math.isfinite(top):
        stored = round((top - inter) / slope)
        storable = stored >= np.iinfo(dtype).max
        if not storable and stored not in CAMERA_MAXIMA:
            return 0.0
        half_step = abs(slope) / 2
    held = int(np.count_nonzero(finite & (values >= top - half_step)))
    return held / values.size if storable or held > CHANCE_VOXELS else 0.0


class TileSeam(NamedTuple):
    """The largest step between neighbouring planes."""

    ratio: float  # to the typical step
    place: str  # between which planes: "i 29 to 30"
    both: float  # the ratio that is reached along both axes


def tile_seam(values: np.ndarray, mask: np.ndarray) -> TileSeam:
    """How far the worst step between neighbouring planes stands out among all: the edge of a tile.

    Along each of the first two axes, with ``d_i = log v_i+1 - log v_i`` between neighbouring
    voxels of plane i and i+1, ``step_i = mean |d_i - (d_i-1 + d_i+1) / 2|`` over the mask: what a
    step is beyond those on either side, without which the slopes of bright structures outweigh a
    seam of 10 %. The seam ratio is ``max_i step_i / median_i step_i``, of the axis where it is
    larger: about 1 in an image without seams, and blind to a smooth field.

    Parameters
    ----------
    values : (n,) array
        ``image.T[mask.T]``: the voxels of the mask in the order of the file. Those that are not
        finite or not above 0 are left out.
    mask : (n0, n1, n2) bool array

    Returns
    -------
    ratio : float
        NaN where no axis has `SEAM_STEPS` steps over enough voxels (`SEAM_PAIRS`, `SEAM_SHARE`), or
        where most planes are equal, so that the median is 0.
    place : str
        Axis and indices of the two planes; empty where the ratio is NaN.
    both : float
        The smaller of the ratios of the two axes, NaN where one is: tiles have edges along both, a layer or a slab
        along one.
    """
    n0, n1, _ = mask.shape
    sums, pairs = ([np.zeros(max(0, n - 3)) for n in (n0, n1)] for _ in range(2))
    stride = max(1, mask.size // SEAM_VOXELS)
    log_plane = np.empty((n1, n0), dtype=np.float32)
    for section, inside, part in _sections(values, mask):
        if section % stride or part.size == 0:
            continue
        log_plane.fill(math.nan)
        log_plane[inside] = np.log(np.where(np.isfinite(part) & (part > 0), part, math.nan))
        for axis in (0, 1):
            if not sums[axis].size:
                continue
            slope = np.diff(log_plane if axis else log_plane.T, axis=0)
            step = np.abs(slope[1:-1] - (slope[:-2] + slope[2:]) / 2)
            known = np.isfinite(step)
            sums[axis] += np.sum(step, axis=1, where=known, dtype=np.float64)
            pairs[axis] += np.count_nonzero(known, axis=1)
    ratios, places = [math.nan] * 2, [""] * 2
    for axis in (0, 1):
        kept = np.flatnonzero(pairs[axis] >= max(SEAM_PAIRS, SEAM_SHARE * pairs[axis].max(initial=0)))
        steps = sums[axis][kept] / pairs[axis][kept]
        if steps.size < SEAM_STEPS or np.median(steps) == 0:
            continue
        index = 1 + int(kept[np.argmax(steps)])
        ratios[axis], places[axis] = float(steps.max() / np.median(steps)), f"{'ij'[axis]} {index} to {index + 1}"
    worst = int(math.isnan(ratios[0]) or ratios[1] > ratios[0])
    return TileSeam(ratios[worst], places[worst], float(np.min(ratios)))


def mask_volume_ml(voxels: int, voxel_size_mm: Sequence[float]) -> float:
    """Volume of so many voxels in ml."""
    return voxels * math.prod(float(s) for s in voxel_size_mm) / 1000


def robust_z(values: Sequence[float] | np.ndarray, floor: float = 0.0, floor_share: float = 0.0) -> np.ndarray:
    """``0.6745 * (x - median) / MAD``: how unusual a value is among all, whatever the outliers.

    Parameters
    ----------
    values : (n,) sequence
        NaN is left out and gets NaN.
    floor : float
        The least MAD, in the values' unit: where all values are nearly the same, a deviation that matters to nobody
        is none.
    floor_share : float
        The same as a share of the median; the larger of both holds.

    Returns
    -------
    (n,) float64 array
        0 everywhere where the MAD and its floor are 0: more than half of the values are the same.

    References
    ----------
    Iglewicz & Hoaglin 1993, How to detect and handle outliers (3.5 is their limit).
    """
    array = np.asarray(values, dtype=np.float64)
    known = array[np.isfinite(array)]
    if known.size == 0:
        return np.full(array.shape, math.nan)
    median = float(np.median(known))
    deviation = array - median
    mad = max(float(np.median(np.abs(known - median))), floor, floor_share * abs(median))
    return 0.6745 * deviation / mad if mad > 0 else np.where(np.isfinite(array), 0.0, math.nan)


def _usable(original: np.ndarray, corrected: np.ndarray) -> np.ndarray:
    return np.isfinite(original) & np.isfinite(corrected) & (original > 0) & (corrected > 0)


def class_metrics(before: np.ndarray, after: np.ndarray) -> dict[str, float]:
    """Metrics of the two upper intensity classes of the original and of the corrected image, each of its own.

    The classes of one image would favour it: those of the corrected image are narrow in it and wide in the original,
    whatever field it was divided by.

    Parameters
    ----------
    before, after : (n,) arrays
        Usable intensities in the mask.

    Returns
    -------
    dict
        Without unit: CJV and CV of the bright class, before and after. In the image's units: the
        limits of the classes of the corrected image. NaN where there are no three classes.
    """
    result: dict[str, float] = {}
    for when, values in (("before", before), ("after", after)):
        classes = intensity_classes(values)
        middle, bright = values[classes.middle(values)], values[classes.bright(values)]
        result[f"cjv_{when}"] = coefficient_of_joint_variation(middle, bright)
        result[f"cv_bright_{when}"] = coefficient_of_variation(bright)
    return result | {
        "class_lower": classes.lower,
        "class_upper": classes.upper,
        "class_top": classes.top,
    }


def microscopy_metrics(
    original: np.ndarray,
    corrected: np.ndarray,
    mask: np.ndarray,
) -> dict[str, Any]:
    """What stands in place of the `class_metrics` in microscopy.

    Parameters
    ----------
    original, corrected : (n,) arrays
        ``image.T[mask.T]``.
    mask : (n0, n1, n2) bool array

    Returns
    -------
    dict
        Without unit; the places of the seams are None where there is no ratio.
    """
    usable = _usable(original, corrected)
    result: dict[str, Any] = {}
    for when, values in (("before", original), ("after", corrected)):
        seam = tile_seam(values, mask)
        result |= {
            f"foreground_cv_{when}": coefficient_of_variation(values[usable]),
            f"section_spread_{when}": section_spread(section_profile(values, mask)),
            f"seam_ratio_{when}": seam.ratio,
            f"seam_place_{when}": seam.place or None,
            f"seam_both_{when}": seam.both,
        }
    return result


def correction_metrics(
    original: np.ndarray,
    corrected: np.ndarray,
    log_field: np.ndarray,
    log_reference: np.ndarray | None = None,
    *,
    by_class: bool = True,
) -> dict[str, float]:
    """The metrics that come from voxels wherever they lie, by the names under which they are reported.

    Parameters
    ----------
    original, corrected : (n,) arrays
        Intensities in the mask; voxels that are not finite or not above 0 in either are left out.
    log_field, log_reference : (n,) arrays
        Log bias fields at the same voxels.
    by_class : bool
        With the `class_metrics`.

    Returns
    -------
    dict
        Entropies in bits, all else without unit; ``reference_*`` only where there is a reference.
    """
    usable = _usable(original, corrected)
    before, after = original[usable], corrected[usable]
    ratio = np.exp(log_field)
    inu = inhomogeneity(ratio)
    mean_before = float(np.mean(before, dtype=np.float64)) if before.size else math.nan
    step = max(1, before.size // ENTROPY_VOXELS)
    result = class_metrics(before, after) if by_class else {}
    result |= {
        "log_entropy_before_bits": log_entropy_bits(before[::step]),
        "log_entropy_after_bits": log_entropy_bits(after[::step]),
        "mean_ratio": float(np.mean(after, dtype=np.float64)) / mean_before if after.size else math.nan,
        "inu_range": inu.range,
        "inu_med": inu.med,
        "field_min": float(ratio.min()),
        "field_max": float(ratio.max()),
        "mask_dark_fraction": dark_fraction(original),
    }
    if log_reference is not None:
        agreement = field_agreement(log_field, log_reference)
        result |= {f"reference_{name}": value for name, value in agreement._asdict().items()}
    return result


def run_metrics(facts: Mapping[str, Any], reference: Mapping[str, Any], mask_voxels: int | None) -> dict[str, Any]:
    """What a run reports about itself.

    Parameters
    ----------
    facts, reference : mapping
        The sidecars of the corrected image and of SimpleITK's, which may be empty.
    mask_voxels : int, optional

    Returns
    -------
    dict
        What is not known is None.
    """
    run = facts.get("N4") or {}
    reference_run = reference.get("N4") or {}
    agreement = reference_run.get("Agreement") or {}
    parameters = run.get("Parameters") or {}
    history = run.get("History") or []
    # of two halves of the samples, what the slower one took
    halves = [[line["CV"] for line in history if line.get("Half") == n] for n in {line.get("Half") for line in history}]
    most = parameters.get("iterations")
    if most and any(line["Stage"] == 0 for line in history):  # a stage before the first, for a strong field
        most = [most[0], *most]
    converged = run.get("Converged")
    dropped = run.get("Dropped")
    lost = sum(dropped.values()) if dropped is not None else None
    return {
        "iterations_used": max(map(len, halves), default=None),
        "iterations_max": sum(most) if most else None,
        # with a threshold of 0, a stage is to take all its iterations
        "converged": all(converged) if converged is not None and parameters.get("convergence_threshold") != 0 else None,
        "convergence_cv": max((cvs[-1] for cvs in halves), default=None),
        "dropped_voxels": lost,
        "dropped_fraction": lost / mask_voxels if lost is not None and mask_voxels else None,
        "samples": run.get("Samples"),
        "repeatability_log": run.get("Repeatability"),
        "self_check_max": run.get("SelfCheck"),
        "wall_time_s": run.get("WallTimeSeconds"),
        "reference_wall_time_s": reference_run.get("WallTimeSeconds"),
        "agreement_r": agreement.get("r"),
        "agreement_rms_log": agreement.get("rms"),
        "agreement_max_log": agreement.get("max"),
        "device": run.get("Device"),
        "skull_stripped": facts.get("SkullStripped"),
        "field_from": _scan_of_field(run["FieldFrom"]) if run.get("FieldFrom") else None,
        "weights": run["Weights"].rpartition("/")[2] if run.get("Weights") else None,
        "outside_fraction": run.get("ShareOutside"),
        "halves": any("Half" in line for line in history),
        "parameters": parameters or None,
    } | ({"plane_gains": run["PlaneGains"]} if run.get("PlaneGains") else {})


def _scan_of_field(uri: str) -> str:
    """Name of the scan that a field was estimated on; of a file that is called otherwise, its name."""
    found = scan_and_role(uri)
    return found[0] if found else uri.rpartition("/")[2]
