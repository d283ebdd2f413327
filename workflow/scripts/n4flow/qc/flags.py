"""The automatic flags: what a reviewer looks at first, by fixed limits.

The table `FLAGS` holds all of them: the pages and the guide show it, and tests hold the config and the manual to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

Metrics = Mapping[str, Any]

#: The longest edge of an image, in mm, without microscopy's: smaller is no scan, larger no scanner.
LEAST_EDGE_MM, MOST_EDGE_MM = 2.0, 3000.0


#: A mask that was given may leave out as much that is bright as it holds: that of a brain leaves out scalp and face.
GIVEN_OUTSIDE = 1.0

#: Tiles have edges along two axes, a layer or a slab along one: so much must planes stand out along both.
SEAM_BOTH = 1.4


class Flag(NamedTuple):
    """A row of the table.

    Parameters
    ----------
    metrics : tuple of str
        Keys of the metrics that it looks at. It says nothing where one of them is absent, None or NaN.
    fires : callable
        Whether it fires: of the limit and these metrics.
    happened : callable
        What is then said: of all metrics.
    meaning : str
        When it fires, for the guide.
    look : str
        What a reviewer then looks at.
    limit : float, optional
        The default of the config; None where there is nothing to choose.
    limit_text : callable
        The limit with its unit.
    unless : str
        Key of a metric that silences it.
    unknown : (str, str)
        What is said where its metrics are not known although the metric of this key is.
    """

    metrics: tuple[str, ...]
    fires: Callable[..., bool]
    happened: Callable[[Metrics], str]
    meaning: str
    look: str
    limit: float | None = None
    limit_text: Callable[[float], str] = "{:g}".format
    unless: str = ""
    unknown: tuple[str, str] = ("", "")


def _above(limit: float, value: float) -> bool:
    return value > limit


def _below(limit: float, value: float) -> bool:
    return value < limit


def _times_above(limit: float, before: float, after: float) -> bool:
    return after > limit * before


def _times_above_in_both(limit: float, before: float, after: float, other_before: float, other_after: float) -> bool:
    return after > limit * before and other_after > other_before


def _more(limit: float, before: float, after: float) -> bool:
    return after > before + limit


def _leaves_out(limit: float, share: float, method: str) -> bool:
    return share > (max(limit, GIVEN_OUTSIDE) if method == "given" else limit)


def _of_tiles(limit: float, ratio: float, both: float) -> bool:
    return ratio > limit and both > SEAM_BOTH


def _off_one(limit: float, ratio: float) -> bool:
    return abs(ratio - 1) > limit


def _is_false(limit: None, value: float) -> bool:
    return not value


def _never(limit: None, *values: float) -> bool:
    return False


def _percent(limit: float) -> str:
    return f"{100 * limit:g} %"


def _longest_edge_mm(shape: Sequence[int], voxel_size_mm: Sequence[float]) -> float:
    return max(n * size for n, size in zip(shape, voxel_size_mm, strict=True))


def _odd_size(limit: None, datatype: str, shape: Sequence[int], voxel_size_mm: Sequence[float]) -> bool:
    least = 0.0 if datatype == "micr" else LEAST_EDGE_MM
    return not least <= _longest_edge_mm(shape, voxel_size_mm) <= MOST_EDGE_MM


#: In the order in which they are told.
FLAGS = {
    "not_measurable": Flag(
        ("mean_ratio", "log_entropy_after_bits"),
        _never,
        lambda m: "",
        meaning="the corrected image has no usable intensities in the mask",
        look="at the mask and the image",
        unknown=("mask_volume_ml", "the corrected image has no usable intensities in the mask"),
    ),
    "size": Flag(
        ("datatype", "shape", "voxel_size_mm"),
        _odd_size,
        lambda m: (
            f"the longest edge of the image is {_longest_edge_mm(m['shape'], m['voxel_size_mm']):.3g} mm "
            f"(limit {LEAST_EDGE_MM:g} to {MOST_EDGE_MM:g} mm)"
        ),
        meaning=f"longest edge of the image below {LEAST_EDGE_MM:g} (not in microscopy) or above {MOST_EDGE_MM:g} mm",
        look="at the units in the header (xyzt_units): lengths, volumes and the closing of the mask go by them",
    ),
    "field_range": Flag(
        ("field_min", "field_max"),
        _times_above,
        lambda m: (
            f"the field runs from ×{m['field_min']:.2f} to ×{m['field_max']:.2f}, "
            f"{m['field_max'] / m['field_min']:.3g}-fold"
        ),
        meaning="largest over smallest field in the mask above the limit",
        look="at the field for a hot corner, and whether the mask leaks into air",
        limit=6.0,
        limit_text="{:g}-fold".format,
    ),
    "field_flat": Flag(
        ("inu_range",),
        _below,
        lambda m: f"next to nothing was corrected, inu_range {m['inu_range']:.4f}",
        meaning="inu_range below the limit",
        look="whether shading is left in the corrected image, and then at the mask; if the original had none, all is "
        "well",
        limit=0.005,
    ),
    "field_steep": Flag(
        ("field_steepness",),
        _above,
        lambda m: f"the field is steep for the size of the mask, steepness {m['field_steepness']:.2f}",
        meaning="field steepness above the limit",
        look="for anatomy or noise in the field: the fit may bend too easily, or a mesh be too fine for ITK's",
        limit=3.0,
    ),
    "repeatability": Flag(
        ("repeatability_log",),
        _above,
        lambda m: f"two halves of the samples give log fields {m['repeatability_log']:.3f} (rms) apart",
        meaning="rms difference between the log fields of two half-samples above the limit",
        look="whether the field looks like that of a coil: where tissues hardly differ, or the mask is small, the "
        "voxels that are taken decide; if another contrast of the session shows it better, name that in field_from",
        limit=0.02,
        unknown=("samples", "how repeatable the field is could not be found, with so few samples"),
    ),
    "field_outside": Flag(
        ("outside_fraction",),
        _above,
        lambda m: (
            f"{100 * m['outside_fraction']:.0f} % of the image lies outside of the one its field was estimated on"
        ),
        meaning="share of the image outside of the one that its field was estimated on above the limit",
        look="whether both are of one space, and for shading where the field is extrapolated",
        limit=0.5,
        limit_text=_percent,
    ),
    # the classes of the CJV may be other tissues once the field is off, so that it counts with the entropy alone
    "cjv_worse": Flag(
        ("cjv_before", "cjv_after", "log_entropy_before_bits", "log_entropy_after_bits"),
        _times_above_in_both,
        lambda m: f"the CJV rose from {m['cjv_before']:.3f} to {m['cjv_after']:.3f}",
        meaning="CJV after over CJV before above the limit, and the entropy of the log histogram rose",
        look="whether tissues still differ as before",
        limit=1.02,
        limit_text="{:g}-fold".format,
    ),
    "entropy_worse": Flag(
        ("log_entropy_before_bits", "log_entropy_after_bits"),
        _more,
        lambda m: (
            "the histogram spread, its entropy rose from "
            f"{m['log_entropy_before_bits']:.2f} to {m['log_entropy_after_bits']:.2f} bits"
        ),
        meaning="entropy of the log histogram rose by more bits than the limit",
        look="whether the corrected image is shaded more than the original",
        limit=0.05,
        limit_text="+{:g} bits".format,
    ),
    "mean_drift": Flag(
        ("mean_ratio",),
        _off_one,
        lambda m: f"the mean intensity in the mask changed by {100 * (m['mean_ratio'] - 1):+.1f} %",
        meaning="mean intensity in the mask changed by a larger share than the limit",
        look="whether the files belong together: this workflow keeps the mean",
        limit=0.01,
        limit_text=lambda limit: f"±{_percent(limit)}",
        unless="field_from",  # the field of another scan is applied as it is
    ),
    "dark_mask": Flag(
        ("mask_dark_fraction",),
        _above,
        lambda m: f"{100 * m['mask_dark_fraction']:.1f} % of the mask is as dark as air",
        meaning="share of the mask as dark as air above the limit",
        look="whether the mask leaks into air: its outline is on the original, its voxels show with m; where a stain "
        "is sparse, try mask.method percentile, or give a mask",
        limit=0.2,
        limit_text=_percent,
    ),
    "bright_outside": Flag(
        ("bright_outside_fraction", "mask_method"),
        _leaves_out,
        lambda m: f"outside of the mask, {100 * m['bright_outside_fraction']:.0f} % as much is as bright as in it",
        meaning="what lies outside of the mask and is as bright as what it holds, as a share of it, above the limit, "
        f"or, of a mask that the sheet gives, above {100 * GIVEN_OUTSIDE:g} %",
        look="whether the mask leaves out what belongs in it: outside of it the image is dimmed",
        limit=0.1,
        limit_text=lambda limit: f"{_percent(limit)}, of a mask that was given {_percent(max(limit, GIVEN_OUTSIDE))}",
    ),
    "speckle": Flag(
        ("mask_speckle_fraction",),
        _above,
        lambda m: f"{100 * m['mask_speckle_fraction']:.0f} % of the mask's voxels stand alone or in pairs",
        meaning="share of the mask's voxels with at most one neighbour in it above the limit",
        look="at the voxels of the mask (m): a threshold may have gone through noise, give a mask or another "
        "mask.method",
        limit=0.1,
        limit_text=_percent,
    ),
    "wrapped": Flag(
        ("wrapped_fraction",),
        _above,
        lambda m: (
            f"beside {100 * m['wrapped_fraction']:.0f} % of the largest integers lie far smaller ones, as if values "
            "had begun again at the smallest"
        ),
        meaning="share of the largest integers beside which far smaller ones lie above the limit",
        look="for dark cores in what is bright: the image was stored in too few bits, convert it again",
        limit=0.55,
        limit_text=_percent,
    ),
    "dropped_voxels": Flag(
        ("dropped_fraction",),
        _above,
        lambda m: f"{100 * m['dropped_fraction']:.1f} % of the mask had no usable intensity",
        meaning="share of the mask without usable intensity above the limit",
        look="for zeros or negative values in the image, and whether the mask fits it",
        limit=0.01,
        limit_text=_percent,
    ),
    "iterations_exhausted": Flag(
        ("converged",),
        _is_false,
        lambda m: "a stage ended above the convergence threshold",
        meaning="a stage ended above the convergence threshold",
        look="at the convergence plot, and raise n4.iterations if it still falls; if it goes up and down, at the mask",
    ),
    "reference_rms": Flag(
        ("reference_rms_log",),
        _above,
        lambda m: f"the log field is {m['reference_rms_log']:.3f} (rms) off the reference",
        meaning="rms difference from the reference, SimpleITK at its defaults, above the limit",
        look="in the corrected image for shading that is left or new: of two estimates the map does not tell which "
        "is wrong",
        limit=0.1,
    ),
    "agreement_rms": Flag(
        ("agreement_rms_log",),
        _above,
        lambda m: f"with SimpleITK's settings our log field is {m['agreement_rms_log']:.1e} off its own",
        meaning="rms difference from SimpleITK, after the same iterations on the same samples, above the limit",
        look="whether other scans have it too: then the arithmetic of the workflow or the machine is at fault, "
        "report it",
        limit=1e-4,
    ),
    "saturation": Flag(
        ("saturated_fraction",),
        _above,
        lambda m: (
            f"{100 * m['saturated_fraction']:.1f} % of the mask is at the original's ceiling, where shading is lost"
        ),
        meaning="share of the mask at the ceiling of the original above the limit",
        look="at the right end of the histogram, and at how the image was made",
        limit=0.01,
        limit_text=_percent,
    ),
    "seams": Flag(
        ("seam_ratio_after", "seam_both_after"),
        _of_tiles,
        lambda m: (
            f"the worst step between planes{f' ({place})' if (place := m.get('seam_place_after')) else ''} is "
            f"{m['seam_ratio_after']:.2f} times the typical one, and no smooth field mends it"
        ),
        meaning=f"tile-seam ratio of the corrected image above the limit, and above {SEAM_BOTH:g} along both axes "
        "(microscopy)",
        look="for the edges of tiles, which are to be corrected before they are fused: flat borders of layers look "
        "like them, and so may the place where the object ends",
        limit=2.0,
        limit_text="{:g}-fold".format,
    ),
    "seam_worse": Flag(
        ("seam_ratio_before", "seam_ratio_after"),
        _times_above,
        lambda m: (
            f"the worst step between planes{f' ({place})' if (place := m.get('seam_place_after')) else ''} rose from "
            f"{m['seam_ratio_before']:.2f} to {m['seam_ratio_after']:.2f} times the typical one"
        ),
        meaning="tile-seam ratio after over before above the limit (microscopy)",
        look="for a seam in the field",
        limit=1.05,
        limit_text="{:g}-fold".format,
    ),
    "self_check": Flag(
        ("self_check_max",),
        _above,
        lambda m: f"corrected × field differs from the original by up to {m['self_check_max']:.1e}",
        meaning="largest relative error of corrected × field against the original above the limit",
        look="whether the files belong together; if they do, report it",
        limit=1e-5,
    ),
}

#: Limits of the automatic flags, each by the name of its flag.
FLAG_LIMITS = {name: flag.limit for name, flag in FLAGS.items() if flag.limit is not None}


def find_flags(metrics: Metrics, limits: Mapping[str, float] = FLAG_LIMITS) -> list[str]:
    """What a reviewer should look at first.

    Parameters
    ----------
    metrics : mapping
        As `measuring.measure_subject` gives them; what is absent, None or NaN raises no flag.
    limits : mapping
        As `FLAG_LIMITS`.

    Returns
    -------
    list of str
        ``name: what happened, with the value and its limit; what to look at``.
    """
    found = []
    for name, flag in FLAGS.items():
        limit = None if flag.limit is None else limits[name]
        happened = ""
        if not all(_known(metrics.get(key)) for key in flag.metrics):
            measured, unknown = flag.unknown
            happened = unknown if metrics.get(measured) else ""
        elif not metrics.get(flag.unless) and flag.fires(limit, *(metrics[key] for key in flag.metrics)):
            happened = flag.happened(metrics) + (f" (limit {flag.limit_text(limit)})" if limit is not None else "")
        if happened:
            found.append(f"{name}: {happened}; look {flag.look}")
    return found


def limit_lines(limits: Mapping[str, float] = FLAG_LIMITS) -> dict[str, list[float]]:
    """Where a plot of a metric has its lines: the limits of the flags that look at this metric alone.

    Parameters
    ----------
    limits : mapping
        As `FLAG_LIMITS`.

    Returns
    -------
    dict of str to list of float
        By the key of the metric.
    """
    lines: dict[str, list[float]] = {}
    for name, flag in FLAGS.items():
        if name in limits and len(flag.metrics) == 1:
            limit = limits[name]
            lines.setdefault(flag.metrics[0], []).extend([1 - limit, 1 + limit] if flag.fires is _off_one else [limit])
    return lines


def _known(value: Any) -> bool:
    return value is not None and not (isinstance(value, float) and not math.isfinite(value))
