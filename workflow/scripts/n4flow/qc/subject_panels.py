"""The panels of a scan: its pictures and plots, each with its numbers and what is good and bad in it."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
from matplotlib import colormaps
from PIL import Image

from n4flow.qc import mosaics, panels, plots
from n4flow.qc.measuring import Pictures, Subject, View
from n4flow.qc.metrics import PLANE_VOXELS
from n4flow.qc.pictures import data_uri, webp
from n4flow.qc.plots import Profile
from n4flow.qc.rendering import number

#: The window of the difference map, as a share of the window of the field.
DIFFERENCE_SHARE = 0.25

#: Where steep colours begin without intensity classes, and at most, as a share of the window; into how many steps the
#: window is divided; and how bright the greys below are at most.
STEEP_FROM, STEEP_MOST, STEEP_STEPS, STEEP_DARK = 0.3, 0.9, 65, 0.3

#: A profile is broken where so large a share of it has no mean.
PROFILE_GAP = 0.05

#: A map's own window is no narrower than this, natural log: else it shows rounding.
OWN_LEAST = 0.002

#: Quality of the maps, which are smooth.
MAP_QUALITY = 60


#: What the panels of the image show, by the state of the page in which they do.
IMAGES = ("original", "corrected", "field")


def image_panel(subject: Subject, images: Sequence[str] = IMAGES) -> dict[str, Any]:
    """Original, corrected and field on the same slices: they are swapped in place.

    Parameters
    ----------
    subject : Subject
    images : sequence of str
        Which of `IMAGES`.

    Returns
    -------
    dict
        Of a `mosaics.Mosaic` the ``drawing`` and, as ``layers``, the pictures with their ``states`` and ``alt``.
    """
    view, values = subject.view, subject.values
    before, after, field = (subject.pictures[name] for name in ("before", "after", "field"))
    scale = mosaics.intensity_scale(values["display_max"])
    window = f"window 0 to {values['display_max']:.4g}, the 99.5th percentile of the corrected image in the mask"
    name, key = ("Foreground CV", "foreground_cv") if values["datatype"] == "micr" else ("CJV", "cjv")
    measures = [f"{name} {number(values[f'{key}_{when}'])}" for when in ("before", "after")]
    one = len(images) == 1
    layers = {
        "original": (
            [mosaics.Layer("" if one else "is-original", "original", before, scale)],
            [f"Original image with the outline of the mask; {window}. {measures[0]}."],
        ),
        "corrected": (
            [mosaics.Layer("" if one else "is-corrected", "corrected", after, scale)],
            [f"Corrected image; {window}. {measures[1]}."],
        ),
        "field": (
            [
                mosaics.Layer(f"is-field {state}", f"bias field{said}", field, mosaics.field_scale(limit))
                for state, said, limit in windows_of(subject.log_field, values["field_window_log"])
            ],
            2 * [f"Bias field on the same slices: {_span(subject.log_field)}."],
        ),
    }
    drawn = mosaics.mosaic(
        [layer for image in images for layer in layers[image][0]],
        view.slices,
        width=mosaics.WIDE,
        outlines=view.outlines,
        cover="dim bare" if images == ("corrected",) else "dim",
        isolines=field if "field" in images else None,
        iso_states="is-field",
        bar_mm=values["datatype"] == "micr",
    )
    alts = [alt for image in images for alt in layers[image][1]]
    return _panel(drawn, alts)


def windows_of(log_values: np.ndarray, window: float) -> list[tuple[str, str, float]]:
    """The windows of a map: its state, what its title adds, and its limit: that of the dataset, and its own."""
    own = max(OWN_LEAST, float(np.abs(log_values).max()))
    return [("on-dataset", "", window), ("on-own", ", own window", own)]


def _panel(drawn: mosaics.Mosaic, alts: Sequence[str]) -> dict[str, Any]:
    layers = [
        {"states": states, "picture": picture, "alt": alt}
        for (states, picture), alt in zip(drawn.pictures.items(), alts, strict=True)
    ]
    return {"drawing": drawn.drawing, "layers": layers}


def steep_from(values: Mapping[str, Any]) -> float:
    """Where steep colours begin, as a share of the window.

    At the lower limit of the middle class, which leaves the colours to the brighter tissues; in microscopy, and where
    there are no classes, at `STEEP_FROM`.
    """
    lower = values.get("class_lower")
    return min(STEEP_MOST, lower / values["display_max"]) if lower and lower > 0 else STEEP_FROM


def steep_tables(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """For each channel, what grey from 0 to the end of the window becomes where shading is to be seen.

    All colours lie between `steep_from` and the end of the window: a few percent are another colour.

    Parameters
    ----------
    values : mapping
        The metrics of the scan.

    Returns
    -------
    list of (channel, numbers)
        As an SVG filter takes them: ``R``, ``G`` and ``B``.
    """
    low = steep_from(values)
    share = (np.linspace(0, 1, STEEP_STEPS) - low) / (1 - low)
    dark = np.clip(1 + share[:, None] * (1 - low) / low, 0, 1) * STEEP_DARK
    table = np.where(share[:, None] < 0, dark, colormaps["turbo"](share.clip(0, 1))[:, :3])
    return [(c, " ".join(f"{v:.2f}" for v in table[:, n])) for n, c in enumerate("RGB")]


def mask_source(subject: Subject) -> str:
    """The voxels of the mask, to lie over `image_panel`."""
    view = subject.view
    return data_uri(webp(mosaics.mask_picture(view.cuts, view.slices, mosaics.WIDE)))


def thumbnails(subject: Subject) -> dict[str, np.ndarray]:
    """Original and corrected for the grid of all scans."""
    grey = mosaics.intensity_scale(subject.values["display_max"])
    shown, view = {"original": "before", "corrected": "after"}, subject.view
    return {
        name: mosaics.thumbnail(subject.pictures[key], view.slices, grey, view.outlines) for name, key in shown.items()
    }


def _span(log_values: np.ndarray, digits: int = 2) -> str:
    low, high = (math.exp(float(value)) for value in (log_values.min(), log_values.max()))
    return f"×{low:.{digits}f} to ×{high:.{digits}f} in the mask"


def _beyond(log_values: np.ndarray, window: float) -> str:
    share = float(np.mean(np.abs(log_values) > window))
    window_text = f"window ×{math.exp(-window):.2f} to ×{math.exp(window):.2f}"
    if not share:
        return f"{window_text}; nothing exceeds it"
    return f"{window_text}; {f'{100 * share:.2g}' if share >= 1e-4 else 'less than 0.01'} % of the mask exceeds it"


class _Map(NamedTuple):
    """A field or a difference of fields, to be drawn."""

    title: str
    pictures: Pictures
    log_values: np.ndarray
    scale: Callable[[float], mosaics.ColourScale]
    window: float
    digits: int
    good: str
    bad: str


def _maps(subject: Subject) -> list[_Map]:
    """The field and, if there is one, the reference and the difference."""
    values = subject.values
    log_field, log_reference = subject.log_field, subject.log_reference
    fields, references = subject.pictures["field"], subject.pictures.get("reference")
    window = values["field_window_log"]
    found = [
        _Map(
            "Bias field", fields, log_field, mosaics.field_scale, window, 2,
            "smooth and slow, without anatomy in it.",
            "outlines of organs, stripes, or a hot corner.",
        )
    ]  # fmt: skip
    if log_reference is None or references is None:
        return found
    means = [v.mean(dtype=np.float64) for v in (log_field, log_reference)]
    difference = (log_field - means[0]) - (log_reference - means[1])
    pictures = [
        [a - b - (means[0] - means[1]) for a, b in zip(*rows, strict=True)]
        for rows in zip(fields, references, strict=True)
    ]
    return [
        *found,
        _Map(
            "Reference field", references, log_reference, mosaics.field_scale, window, 2,
            "what SimpleITK finds at its defaults: much the same pattern as the bias field.",
            "another sign, or shading in one of the two fields alone.",
        ),
        _Map(
            "Difference", pictures, difference, mosaics.difference_scale, DIFFERENCE_SHARE * window, 4,
            "pale: a few hundredths are normal between two estimates, neither of which is the truth; ours over the "
            f"reference, each less its mean, rms {100 * values['reference_rms_log']:.2f} %.",
            "strong colour from one side to the other. Which of the two is wrong it does not tell: look in the "
            "corrected image for shading.",
        ),
    ]  # fmt: skip


def field_panels(
    subject: Subject, titles: Collection[str] | None = None, *, own_window: bool = False
) -> list[dict[str, Any]]:
    """The panels of the field and, if there is one, of the reference and the difference.

    Parameters
    ----------
    subject : Subject
    titles : collection of str, optional
        Draw these alone.
    own_window : bool
        In the window that just holds the values too, for pages with a key for it.
    """
    view = subject.view
    part = view.field_part
    slices, outlines = [row[part] for row in view.slices], [row[part] for row in view.outlines]
    shown = []
    for each in _maps(subject):
        if titles is not None and each.title not in titles:
            continue
        pictures = [row[part] for row in each.pictures]
        windows = windows_of(each.log_values, each.window)
        layers = [
            mosaics.Layer(state if own_window else "", each.title.lower() + said, pictures, each.scale(limit))
            for state, said, limit in windows[: 1 + own_window]
        ]
        drawn = mosaics.mosaic(
            layers,
            slices,
            width=mosaics.NARROW,
            outlines=outlines,
            cover="hide",
            isolines=pictures,
            bar_mm=subject.values["datatype"] == "micr",
        )
        numbers = f"{_span(each.log_values, each.digits)}; {_beyond(each.log_values, each.window)}"
        panel = _panel(drawn, len(layers) * [f"{each.title}: {numbers}."])
        for layer in panel["layers"]:
            layer["source"] = data_uri(webp(layer.pop("picture"), MAP_QUALITY))
        shown.append(panel | {"title": each.title, "numbers": numbers, "good": each.good, "bad": each.bad})
    return shown


def map_thumbnails(subject: Subject) -> dict[str, np.ndarray]:
    """The maps for the grid of all scans, by name."""
    view = subject.view
    return {
        each.title.lower(): mosaics.thumbnail(each.pictures, view.slices, each.scale(each.window), view.outlines)
        for each in _maps(subject)
    }


def plot_panels(subject: Subject, titles: Collection[str] | None = None) -> list[dict[str, Any]]:
    """Histogram, profile, convergence and agreement, as data URIs; of these `titles` alone, if there are any."""
    values, before, after = subject.values, subject.before, subject.after
    log_field, log_reference = subject.log_field, subject.log_reference
    shown = []

    def add(title: str, draw: Callable[[], Image.Image], numbers: str, good: str, bad: str) -> None:
        if titles is not None and title not in titles:
            return
        shown.append(
            {
                "title": title,
                "source": data_uri(webp(draw())),
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
        lambda: plots.histogram_plot(before, after, values["display_max"], limits),
        f"entropy of the log histogram {number(values['log_entropy_before_bits'], 2)} → "
        f"{number(values['log_entropy_after_bits'], 2)} bits"
        + ("" if microscopy else "; dotted: limits of the intensity classes"),
        "peaks are narrower after correction.",
        "peaks merge, or move together.",
    )
    profile, averaged = _profile(subject)
    if profile is not None:
        spreads = [100 * float(np.nanmax(c) - np.nanmin(c)) for c in (profile.original, profile.corrected)]
        add(
            "Profile along the field",
            lambda: plots.profile_plot(profile),
            f"mean of the {averaged} by plane, {profile.way}, where the field varies most; "
            f"spread {spreads[0]:.0f} % → {spreads[1]:.0f} %",
            "the corrected line is flatter.",
            "it still follows the field, or turns against it.",
        )
    if along := subject.field.gains_along():
        axis, log_gains = along
        low, high = np.exp([log_gains.min(), log_gains.max()])
        add(
            "Gains of planes",
            lambda: plots.gains_plot(np.exp(log_gains), "ijk"[axis]),
            f"×{low:.2f} to ×{high:.2f}, part of the field",
            "one level a section, or its fall with depth.",
            "it follows the anatomy: a plane of another tissue that is given its neighbours' brightness.",
        )
    run = subject.facts.get("N4") or {}
    if history := run.get("History"):
        threshold = (run.get("Parameters") or {}).get("convergence_threshold")
        used = f"{values['iterations_used']} of at most {number(values['iterations_max'], 0)} iterations"
        add(
            "Convergence",
            lambda: plots.convergence_plot(history, threshold),
            f"{used}; last CV {values['convergence_cv']:.2g}, threshold {number(threshold, 4)}",
            "each stage falls to the threshold.",
            "a stage stops above it, or rises.",
        )
    if log_reference is not None:
        note = f"r {number(values['reference_r'])}\nslope {number(values['reference_slope'], 2)}"
        add(
            "Ours against the reference",
            lambda: plots.agreement_plot(log_field, log_reference, note),
            f"r {number(values['reference_r'], 4)}, slope {number(values['reference_slope'])}, "
            f"rms {number(values['reference_rms_log'], 4)}, p99 {number(values['reference_p99_log'], 4)} in log",
            "a band along the diagonal, a few hundredths wide.",
            "a flat band, or a round cloud, although there is shading in the original.",
        )
    return shown


def _profile(subject: Subject) -> tuple[Profile | None, str]:
    """The bright class, in microscopy the foreground, plane by plane along the field; and which of them it is."""
    view, values = subject.view, subject.values
    images = (subject.before, subject.after, np.exp(subject.log_field))
    if values["datatype"] == "micr":
        shown, name = np.isfinite(subject.before) & (subject.before > 0), "foreground"
    elif values["class_upper"] is None:
        return None, ""
    else:
        shown = (subject.after > values["class_upper"]) & (subject.after <= values["class_top"])
        name = "bright class"
    axis = view.axis_of_field(subject.field)
    return _profile_along(view, axis, _plane_means(view, axis, images, shown)), name


def _plane_means(view: View, axis: int, images: Sequence[np.ndarray], shown: np.ndarray) -> list[np.ndarray]:
    """Means of some voxels of the mask, plane by plane along an axis; NaN where there are too few."""
    # in the order of the values: the mask's transpose
    counts = np.flatnonzero(view.mask.T.ravel())[shown]
    shape = view.mask.shape
    stride = (1, shape[0], shape[0] * shape[1])[axis]
    index = (counts // stride) % shape[axis]
    voxels = np.bincount(index, minlength=shape[axis])
    known = np.where(voxels >= PLANE_VOXELS, voxels, math.nan)
    return [np.bincount(index, weights=values[shown], minlength=shape[axis]) / known for values in images]


def _profile_along(view: View, axis: int, means: Sequence[np.ndarray]) -> Profile | None:
    """What is plotted of the plane means of original, corrected and field; None for fewer than two planes."""
    planes = np.flatnonzero(np.isfinite(means).all(axis=0))
    if planes.size < 2:
        return None
    # a line would say something of planes that have too few voxels
    gaps = 1 + np.flatnonzero(np.diff(planes) > max(2, PROFILE_GAP * (planes[-1] - planes[0])))
    position_mm = (planes - planes[0]) * view.grid.voxel_size_mm[axis]
    curves = [np.insert(along[planes] / along[planes].mean(), gaps, math.nan) for along in means]
    code = nib.aff2axcodes(view.grid.affine)[axis]
    pair = next(p for p in panels.WORLD if code in p)
    way = f"from {pair[1 - pair.index(code)]} to {code}" if view.anatomical else f"along {'ijk'[axis]}"
    return Profile(np.insert(position_mm, gaps, math.nan), curves[0], curves[1], curves[2], way)
