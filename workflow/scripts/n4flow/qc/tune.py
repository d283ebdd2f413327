"""Corrections with different settings side by side, for people who choose theirs by eye."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from n4flow.images.files import atomic_text
from n4flow.qc import mosaics
from n4flow.qc.flags import FLAG_LIMITS
from n4flow.qc.measuring import Subject, measure_subject
from n4flow.qc.pictures import data_uri, webp
from n4flow.qc.rendering import number, render
from n4flow.qc.subject_panels import field_panels
from n4flow.steps.derivatives import CorrectionFiles

#: Quality of the image panels.
QUALITY = 75

#: Columns of the comparison: key, heading, digits.
COLUMNS = (
    ("cjv_before", "CJV before", 3),
    ("cjv_after", "CJV after", 3),
    ("foreground_cv_before", "foreground CV before", 3),
    ("foreground_cv_after", "foreground CV after", 3),
    ("log_entropy_after_bits", "log entropy after (bits)", 2),
    ("field_min", "field min (ratio)", 3),
    ("field_max", "field max (ratio)", 3),
    ("inu_range", "inu_range", 3),
    ("field_steepness", "field steepness", 2),
    ("reference_r", "r to reference", 4),
    ("reference_rms_log", "rms Δlog", 4),
    ("iterations_used", "iterations", 0),
    ("wall_time_s", "time (s)", 1),
)


class TunedScan(NamedTuple):
    """A scan, and what each combination made of it."""

    name: str
    image: Path
    mask: Path
    reference_field: Path | None
    corrections: Sequence[CorrectionFiles]  # one for each combination


def make_comparison(
    scans: Sequence[TunedScan],
    combinations: Sequence[Mapping[str, Any]],
    page: str | Path,
    *,
    settings: Mapping[str, Any],
    field_window_log: float,
    flags: Mapping[str, float] = FLAG_LIMITS,
) -> None:
    """Write the page that compares combinations of settings; it ranks nothing.

    Parameters
    ----------
    scans : sequence of TunedScan
        Each with as many corrections as there are combinations. The reference, where there is one, is
        SimpleITK at its defaults: one yardstick for all combinations.
    combinations : sequence of mappings
        The keys of n4 that differ, and their values.
    page : path-like
        One HTML file that needs no other.
    settings : mapping
        The n4 keys that all combinations share.
    field_window_log, flags
        As in `measuring.measure_subject`.

    Raises
    ------
    InputError
        As `measuring.measure_subject`.
    """
    names = [_worded(combination) for combination in combinations]
    sections = []
    for scan in scans:
        rows, cards, window = [], [], 0.0
        shared: list[dict[str, Any]] = []  # what is the same for all combinations
        for name, files in zip(names, scan.corrections, strict=True):
            subject = measure_subject(
                name=scan.name,
                image=scan.image,
                mask=scan.mask,
                corrected=files.corrected,
                field=files.field,
                sidecar=files.sidecar,
                reference_field=scan.reference_field,
                field_window_log=field_window_log,
                flags=flags,
            )
            field, *others = field_panels(subject)
            if not shared:
                window = subject.values["display_max"]
                alt = f"Original; window 0 to {window:.4g}."
                shared = [_image_panel(subject, "before", "original", window, alt), *others[:1]]
            rows.append((name, subject.values))
            cards.append(_card(name, subject, field, window))
        columns = [column for column in COLUMNS if any(values.get(column[0]) is not None for _, values in rows)]
        sections.append(
            {
                "name": scan.name,
                "shared": shared,
                "window": window,
                "headings": [heading for _, heading, _ in columns],
                "rows": [
                    (
                        name,
                        [number(values.get(key), digits) for key, _, digits in columns],
                        [flag.partition(":")[0].replace("_", " ") for flag in values["flags"]],
                    )
                    for name, values in rows
                ],
                "cards": cards,
                "has_reference": scan.reference_field is not None,
            }
        )
    html = render(
        "tune.html",
        sections=sections,
        count=len(combinations),
        shared=_worded(settings),
        field_window=f"×{math.exp(-field_window_log):.2f} to ×{math.exp(field_window_log):.2f}",
    )
    with atomic_text(page) as file:
        file.write(html)


def _worded(settings: Mapping[str, Any]) -> str:
    return " · ".join(f"{key}\u00a0{value}" for key, value in settings.items())  # a line ends between settings


def _image_panel(subject: Subject, which: str, title: str, window: float, alt: str) -> dict[str, Any]:
    """Original or corrected in the slices of the field panels, so that both have one size."""
    view = subject.view
    part = view.field_part
    drawn = mosaics.mosaic(
        [mosaics.Layer("", title, [row[part] for row in subject.pictures[which]], mosaics.intensity_scale(window))],
        [row[part] for row in view.slices],
        width=mosaics.NARROW,
        outlines=[row[part] for row in view.outlines],
        cover="dim",
    )
    layer = {"states": "", "source": data_uri(webp(drawn.pictures[""], QUALITY)), "alt": alt}
    return {"drawing": drawn.drawing, "layers": [layer]}


def _card(name: str, subject: Subject, field: dict[str, Any], window: float) -> dict[str, Any]:
    values = subject.values
    measure, key = ("foreground CV", "foreground_cv") if values["datatype"] == "micr" else ("CJV", "cjv")
    numbers = f"{measure} {number(values[f'{key}_after'])}"
    alt = f"Corrected with {name}: {numbers}; window 0 to {window:.4g}."
    image = _image_panel(subject, "after", "corrected", window, alt)
    field["layers"][0]["alt"] = f"Bias field with {name}: {field['numbers']}."
    if (r := values.get("reference_r")) is not None and math.isfinite(r):
        numbers += f"; r to the reference {number(r, 4)}"
    return {"name": name, "panels": [image, field], "numbers": f"{numbers}; field {field['numbers']}"}
