"""The panels of a scan: its pictures and plots, each with its numbers and what is good and bad in it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import nibabel as nib
import numpy as np

from n4flow.qc import panels, plots
from n4flow.qc.measuring import Subject, View
from n4flow.qc.metrics import PLANE_VOXELS, section_profile
from n4flow.qc.pictures import data_uri, webp
from n4flow.qc.plots import Profile
from n4flow.qc.rendering import number

#: The window of the difference map, as a share of the window of the field.
DIFFERENCE_SHARE = 0.25


def image_panels(subject: Subject) -> list[dict[str, Any]]:
    """Original, corrected and field on the same slices, as pictures: they are swapped in place."""
    view, values = subject.view, subject.values
    before, after, field = (subject.pictures[name] for name in ("before", "after", "field"))
    scale = panels.intensity_scale(values["display_max"])
    window = f"window 0 to {values['display_max']:.4g}, the 99.5th percentile of the corrected image in the mask"
    name, key = ("Foreground CV", "foreground_cv") if values["datatype"] == "micr" else ("CJV", "cjv")
    measures = [f"{name} {number(values[f'{key}_{when}'])}" for when in ("before", "after")]
    return [
        {
            "label": "original",
            "alt": f"Original image with the outline of the mask; {window}. {measures[0]}.",
            "picture": panels.mosaic(
                before, view.slices, scale, width=panels.WIDTH, title="original", outlines=view.outlines
            ),
        },
        {
            "label": "corrected",
            "alt": f"Corrected image; {window}. {measures[1]}.",
            "picture": panels.mosaic(after, view.slices, scale, width=panels.WIDTH, title="corrected"),
        },
        {
            "label": "field",
            "alt": f"Bias field on the same slices: {_span(subject.log_field)}.",
            "picture": panels.mosaic(
                field,
                view.slices,
                panels.field_scale(values["field_window_log"]),
                width=panels.WIDTH,
                title="bias field",
                outlines=view.outlines,
                clip=True,
            ),
        },
    ]


def thumbnails(subject: Subject) -> dict[str, np.ndarray]:
    """Original and corrected for the grid of all scans."""
    grey = panels.intensity_scale(subject.values["display_max"])
    shown = {"original": "before", "corrected": "after"}
    return {name: panels.thumbnail(subject.pictures[key], subject.view.slices, grey) for name, key in shown.items()}


def _span(log_values: np.ndarray, digits: int = 2) -> str:
    low, high = (math.exp(float(value)) for value in (log_values.min(), log_values.max()))
    return f"×{low:.{digits}f} to ×{high:.{digits}f} in the mask"


def _beyond(log_values: np.ndarray, window: float) -> str:
    share = float(np.mean(np.abs(log_values) > window))
    window_text = f"window ×{math.exp(-window):.2f} to ×{math.exp(window):.2f}"
    return f"{window_text}; " + (f"{100 * share:.2g} % of the mask exceeds it" if share else "nothing exceeds it")


def field_panels(subject: Subject) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """The field and, if there is one, the reference and the difference, as data URIs; and their thumbnails."""
    view, values = subject.view, subject.values
    log_field, log_reference = subject.log_field, subject.log_reference
    field_pictures, reference_pictures = subject.pictures["field"], subject.pictures.get("reference")
    window = values["field_window_log"]
    part = view.field_part
    small = {}

    def panel(title: str, pictures: Any, log_values: np.ndarray, scale: Any, limit: float, good: str, bad: str) -> Any:
        numbers = f"{_span(log_values, 2 if limit == window else 4)}; {_beyond(log_values, limit)}"
        small[title.lower()] = panels.thumbnail(pictures, view.slices, scale, view.outlines)
        picture = panels.mosaic(
            [row[part] for row in pictures],
            [row[part] for row in view.slices],
            scale,
            width=panels.WIDTH // 2,
            title=title.lower(),
            outlines=[row[part] for row in view.outlines],
            clip=True,
        )
        return {
            "title": title,
            "numbers": numbers,
            "alt": f"{title}: {numbers}.",
            "source": data_uri(webp(picture, 90)),
            "good": good,
            "bad": bad,
        }

    shown = [
        panel(
            "Bias field",
            field_pictures,
            log_field,
            panels.field_scale(window),
            window,
            "smooth and slow, without anatomy in it.",
            "outlines of organs, stripes, or a hot corner.",
        )
    ]
    if log_reference is not None and reference_pictures is not None:
        difference = (log_field - log_field.mean(dtype=np.float64)) - (
            log_reference - log_reference.mean(dtype=np.float64)
        )
        offset = log_field.mean(dtype=np.float64) - log_reference.mean(dtype=np.float64)
        pictures = [
            [a - b - offset for a, b in zip(*rows, strict=True)]
            for rows in zip(field_pictures, reference_pictures, strict=True)
        ]
        narrow = DIFFERENCE_SHARE * window
        shown += [
            panel(
                "Reference field",
                reference_pictures,
                log_reference,
                panels.field_scale(window),
                window,
                "what SimpleITK finds at its defaults: much the same pattern as the bias field.",
                "another sign, or shading in one of the two fields alone.",
            ),
            panel(
                "Difference",
                pictures,
                difference,
                panels.difference_scale(narrow),
                narrow,
                "pale: a few hundredths are normal between two estimates, neither of which is the truth; ours over the "
                f"reference, each less its mean, rms {100 * values['reference_rms_log']:.2f} %.",
                "strong colour from one side to the other. Which of the two is wrong it does not tell: look in the "
                "corrected image for shading.",
            ),
        ]
    return shown, small


def plot_panels(subject: Subject) -> list[dict[str, Any]]:
    """Histogram, profile, convergence and agreement, as data URIs."""
    values, before, after = subject.values, subject.before, subject.after
    log_field, log_reference = subject.log_field, subject.log_reference
    shown = []

    def add(title: str, picture: Any, numbers: str, good: str, bad: str) -> None:
        source = data_uri(webp(picture))
        shown.append(
            {
                "title": title,
                "source": source,
                "numbers": numbers,
                "alt": f"{title}: {numbers}.",
                "good": good,
                "bad": bad,
            }
        )

    microscopy = values["datatype"] == "micr"
    limits = [values[key] for key in ("class_lower", "class_upper") if values.get(key) is not None]
    add(
        "Histogram in the mask",
        plots.histogram_plot(before, after, values["display_max"], limits),
        f"entropy of the log histogram {number(values['log_entropy_before_bits'], 2)} → "
        f"{number(values['log_entropy_after_bits'], 2)} bits"
        + ("" if microscopy else "; dotted: limits of the intensity classes"),
        "peaks are narrower after correction.",
        "peaks merge, or move together.",
    )
    profile, title, averaged = _profile(subject)
    if profile is not None:
        spreads = [100 * float(curve.max() - curve.min()) for curve in (profile.original, profile.corrected)]
        add(
            title,
            plots.profile_plot(profile),
            f"mean of the {averaged} by plane, {profile.ends[0]} to {profile.ends[1]}; "
            f"spread {spreads[0]:.0f} % → {spreads[1]:.0f} %",
            "the corrected line is flatter.",
            "it still follows the field, or turns against it.",
        )
    run = subject.facts.get("N4") or {}
    if run.get("History"):
        threshold = (run.get("Parameters") or {}).get("convergence_threshold")
        used = f"{values['iterations_used']} of at most {number(values['iterations_max'], 0)} iterations"
        add(
            "Convergence",
            plots.convergence_plot(run["History"], threshold),
            f"{used}; last CV {values['convergence_cv']:.2g}, threshold {number(threshold, 4)}",
            "each stage falls to the threshold.",
            "a stage stops above it, or rises.",
        )
    if log_reference is not None:
        add(
            "Ours against the reference",
            plots.agreement_plot(
                log_field,
                log_reference,
                f"r {number(values['reference_r'])}\nslope {number(values['reference_slope'], 2)}",
            ),
            f"r {number(values['reference_r'], 4)}, slope {number(values['reference_slope'])}, "
            f"rms {number(values['reference_rms_log'], 4)}, p99 {number(values['reference_p99_log'], 4)} in log",
            "a band along the diagonal, a few hundredths wide.",
            "a flat band, or a round cloud, although there is shading in the original.",
        )
    return shown


def _profile(subject: Subject) -> tuple[Profile | None, str, str]:
    """What is plotted plane by plane, if anything, its title, and whose mean it is."""
    view, values = subject.view, subject.values
    images = (subject.before, subject.after, np.exp(subject.log_field))
    if values["datatype"] == "micr":
        means = [section_profile(v, view.mask) for v in images]
        return _profile_along(view, 2, means), "Profile along the sections", "foreground"
    if values["class_upper"] is None:
        return None, "", ""
    bright = (subject.after > values["class_upper"]) & (subject.after <= values["class_top"])
    axis = view.steepest_axis(subject.field)
    means = _bright_means(view, axis, images, bright)
    return _profile_along(view, axis, means), "Profile along the steepest axis", "bright class"


def _bright_means(view: View, axis: int, images: Sequence[np.ndarray], bright: np.ndarray) -> list[np.ndarray]:
    """Means of the bright class, plane by plane along an axis; NaN where there are too few voxels."""
    # in the order of the values: the mask's transpose
    counts = np.flatnonzero(view.mask.T.ravel())[bright]
    shape = view.mask.shape
    stride = (1, shape[0], shape[0] * shape[1])[axis]
    index = (counts // stride) % shape[axis]
    voxels = np.bincount(index, minlength=shape[axis])
    known = np.where(voxels >= PLANE_VOXELS, voxels, math.nan)
    return [np.bincount(index, weights=values[bright], minlength=shape[axis]) / known for values in images]


def _profile_along(view: View, axis: int, means: Sequence[np.ndarray]) -> Profile | None:
    """What is plotted of the plane means of original, corrected and field; None for fewer than two planes."""
    kept = np.isfinite(means).all(axis=0)
    if kept.sum() < 2:
        return None
    code = nib.aff2axcodes(view.grid.affine)[axis]
    pair = next(p for p in panels.WORLD if code in p)
    position_mm = np.flatnonzero(kept) * view.grid.voxel_size_mm[axis]
    curves = [along[kept] / along[kept].mean() for along in means]
    ends = (pair[1 - pair.index(code)], code)
    return Profile(position_mm - position_mm[0], curves[0], curves[1], curves[2], ends)
