"""Numbers that describe a correction: pure functions of the voxels inside the mask.

None of them is a verdict alone. A coefficient of variation falls when contrast is flattened, an
entropy falls when the image is, so both stand beside the CJV, which rises in that case.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from n4flow.sharpening import linear_histogram

#: An entropy needs no more voxels than about this.
ENTROPY_VOXELS = 2**20

#: Limits of the automatic flags; see `find_flags`.
FLAG_LIMITS = {
    "field_range": 6.0,  # largest / smallest ratio in the mask
    "field_flat": 0.005,  # inu_range: nothing was corrected
    "cjv_worse": 1.02,  # after / before
    "entropy_worse": 0.05,  # bits, after - before
    "mean_drift": 0.01,  # of the mean intensity in the mask
    "dropped_voxels": 0.01,  # of the mask
    "reference_r": 0.9,
    "self_check": 1e-5,
}


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
    """``sd / mean``, without unit; NaN where the mean is 0. Says nothing about contrast: read it with the CJV."""
    mean = float(np.mean(values, dtype=np.float64)) if values.size else 0.0
    return float(np.std(values, dtype=np.float64)) / mean if mean else math.nan


def coefficient_of_joint_variation(middle: np.ndarray, bright: np.ndarray) -> float:
    """``(sd_GM + sd_WM) / |mean_GM - mean_WM|``, without unit; lower is better.

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
    Ganzetti, Wenderoth & Mantini 2016, doi:10.3389/fninf.2016.00010.
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

    Parameters
    ----------
    ratio : (n,) array
        Multiplicative field.

    Returns
    -------
    range : float
        95th minus 5th percentile.
    med : float
        Median.

    References
    ----------
    Esteban et al. 2017, doi:10.1371/journal.pone.0184661 (MRIQC, inu_range and inu_med).
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
    """Compare two log bias fields in the mask, each less its mean there.

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
    ours = np.asarray(log_field) - np.mean(log_field, dtype=np.float64)
    reference = np.asarray(log_reference) - np.mean(log_reference, dtype=np.float64)
    product, own, other = (float(np.mean(a * b)) for a, b in ((ours, reference), (ours, ours), (reference, reference)))
    difference = np.abs(ours - reference)
    return FieldAgreement(
        product / math.sqrt(own * other) if own * other > 0 else math.nan,
        product / other if other > 0 else math.nan,
        math.sqrt(float(np.mean(difference**2))),
        float(np.percentile(difference, 99)),
    )


def mask_volume_ml(voxels: int, voxel_size_mm: Sequence[float]) -> float:
    """Volume of so many voxels in ml."""
    return voxels * math.prod(float(s) for s in voxel_size_mm) / 1000


def robust_z(values: Sequence[float]) -> np.ndarray:
    """``0.6745 * (x - median) / MAD``: how unusual a value is among all, whatever the outliers.

    Parameters
    ----------
    values : (n,) sequence
        NaN is left out and gets NaN.

    Returns
    -------
    (n,) float64 array
        0 everywhere where the MAD is 0: more than half of the values are the same.

    References
    ----------
    Iglewicz & Hoaglin 1993, How to detect and handle outliers (3.5 is their limit).
    """
    array = np.asarray(values, dtype=np.float64)
    known = array[np.isfinite(array)]
    if known.size == 0:
        return np.full(array.shape, math.nan)
    deviation = array - np.median(known)
    mad = float(np.median(np.abs(known - np.median(known))))
    return 0.6745 * deviation / mad if mad > 0 else np.where(np.isfinite(array), 0.0, math.nan)


def correction_metrics(
    original: np.ndarray,
    corrected: np.ndarray,
    log_field: np.ndarray,
    log_reference: np.ndarray | None = None,
) -> dict[str, float]:
    """All metrics that come from voxels, by the names under which they are reported.

    Parameters
    ----------
    original, corrected : (n,) arrays
        Intensities in the mask; voxels that are not finite or not above 0 in either are left out.
    log_field, log_reference : (n,) arrays
        Log bias fields at the same voxels.

    Returns
    -------
    dict
    """
    usable = np.isfinite(original) & np.isfinite(corrected) & (original > 0) & (corrected > 0)
    before, after = original[usable], corrected[usable]
    classes = intensity_classes(after)
    middle, bright = classes.middle(after), classes.bright(after)
    ratio = np.exp(log_field)
    inu = inhomogeneity(ratio)
    mean_before = float(np.mean(before, dtype=np.float64)) if before.size else math.nan
    step = max(1, before.size // ENTROPY_VOXELS)
    result = {
        "cjv_before": coefficient_of_joint_variation(before[middle], before[bright]),
        "cjv_after": coefficient_of_joint_variation(after[middle], after[bright]),
        "cv_bright_before": coefficient_of_variation(before[bright]),
        "cv_bright_after": coefficient_of_variation(after[bright]),
        "log_entropy_before_bits": log_entropy_bits(before[::step]),
        "log_entropy_after_bits": log_entropy_bits(after[::step]),
        "class_lower": classes.lower,
        "class_upper": classes.upper,
        "class_top": classes.top,
        "mean_ratio": float(np.mean(after, dtype=np.float64)) / mean_before if after.size else math.nan,
        "inu_range": inu.range,
        "inu_med": inu.med,
        "field_min": float(ratio.min()),
        "field_max": float(ratio.max()),
    }
    if log_reference is not None:
        agreement = field_agreement(log_field, log_reference)
        result |= {f"reference_{name}": value for name, value in agreement._asdict().items()}
    return result


def find_flags(metrics: Mapping[str, Any]) -> list[str]:
    """What a reviewer should look at first, by the fixed `FLAG_LIMITS`.

    Parameters
    ----------
    metrics : mapping
        As `correction_metrics` gives them, with what the run reports (dropped_fraction, converged, …);
        what is absent, None or NaN raises no flag.

    Returns
    -------
    list of str
        ``name: reason``.
    """

    def known(*names: str) -> list[float] | None:
        values = [metrics.get(name) for name in names]
        return [float(v) for v in values] if all(v is not None and math.isfinite(v) for v in values) else None  # type: ignore[arg-type]

    limits = FLAG_LIMITS
    flags = []
    if (field := known("field_min", "field_max")) and field[1] > limits["field_range"] * field[0]:
        flags.append(f"field_range: ×{field[0]:.2f} to ×{field[1]:.2f}, more than {limits['field_range']:g}-fold")
    if (inu := known("inu_range")) and inu[0] < limits["field_flat"]:
        flags.append(f"field_flat: inu_range {inu[0]:.4f}, next to nothing was corrected")
    if (cjv := known("cjv_before", "cjv_after")) and cjv[1] > limits["cjv_worse"] * cjv[0]:
        flags.append(f"cjv_worse: rose from {cjv[0]:.3f} to {cjv[1]:.3f}, look whether tissues still differ as before")
    # the classes of the CJV come from the corrected image and favour it; the entropy has no classes
    entropy = known("log_entropy_before_bits", "log_entropy_after_bits")
    if entropy and entropy[1] > entropy[0] + limits["entropy_worse"]:
        flags.append(f"entropy_worse: the histogram spread, from {entropy[0]:.2f} to {entropy[1]:.2f} bits")
    if (mean := known("mean_ratio")) and abs(mean[0] - 1) > limits["mean_drift"]:
        flags.append(f"mean_drift: mean intensity in the mask changed by {100 * (mean[0] - 1):+.1f} %")
    if (dropped := known("dropped_fraction")) and dropped[0] > limits["dropped_voxels"]:
        flags.append(f"dropped_voxels: {100 * dropped[0]:.1f} % of the mask had no usable intensity")
    if metrics.get("converged") is False:
        flags.append("iterations_exhausted: a level ended above the convergence threshold")
    if (r := known("reference_r")) and r[0] < limits["reference_r"]:
        flags.append(f"reference_r: correlation with the reference {r[0]:.3f}, below {limits['reference_r']:g}")
    if (check := known("self_check_max")) and check[0] > limits["self_check"]:
        flags.append(f"self_check: corrected × field differs from the original by up to {check[0]:.1e}")
    return flags
