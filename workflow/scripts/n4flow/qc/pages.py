"""One self-contained page per subject, with its metrics file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from PIL import Image

from n4flow.images.files import atomic_bytes, atomic_text
from n4flow.qc.measuring import measure_subject
from n4flow.qc.panels import oblique_degrees
from n4flow.qc.pictures import data_uri, webp
from n4flow.qc.rendering import compile_template, render
from n4flow.qc.subject_panels import (
    MAP_QUALITY,
    field_panels,
    image_panel,
    map_thumbnails,
    mask_source,
    plot_panels,
    steep_from,
    steep_tables,
    thumbnails,
)
from n4flow.qc.viewer import viewer_script
from n4flow.study.series import LOW_B

#: A page has no more bytes; the two mosaics of the image take what the rest leaves.
PAGE_BYTES = 494_000

#: Qualities of these mosaics; encoding takes time, so the first one is to fit most scans.
QUALITIES = (70, 45, 25)


def preload() -> None:
    """What makes the first page slow, for a process whose children are to draw many."""
    compile_template("subject.html")
    webp(Image.new("RGB", (1, 1)))


def make_subject(
    *,
    page: str | Path,
    metrics: str | Path,
    pictures: str | Path,
    viewer: str | Path | None = None,
    viewer_mb: float = 0,
    alone: bool = False,
    crops: str | Path | None = None,
    **scan: Any,
) -> None:
    """Write the page and the metrics of one subject.

    Parameters
    ----------
    page, metrics, pictures : path-like
        What to write: one HTML file that needs no other but for the viewer's data, one flat JSON file, and a WebP
        picture of small panels, one below the other, for the grid of all scans.
    viewer : path-like, optional
        Script with the viewer's data; without it the page has no viewer.
    viewer_mb : float
        The most that the viewer's data may take, in MB.
    alone : bool
        The page belongs to no report: it leads nowhere, and nobody rates it.
    crops : path-like, optional
        Picture of crops at full resolution, which is there when the OME-Zarr image is (`crops.draw_crops`).
    **scan
        As `measuring.measure_subject` takes it.

    Raises
    ------
    InputError
        As `measuring.measure_subject`.
    """
    subject = measure_subject(**scan, keep_volume=bool(viewer and viewer_mb))
    folder = Path(metrics).parent
    values = {**subject.values, "page": os.path.relpath(page, folder), "pictures": os.path.relpath(pictures, folder)}
    images, plots = image_panel(subject), plot_panels(subject)
    maps = field_panels(subject, own_window=True)
    mask = mask_source(subject)
    small = thumbnails(subject) | map_thumbnails(subject)
    values["panels"] = list(small)
    fields = [layer for layer in images["layers"] if layer["states"].startswith("is-field")]
    for layer in fields:
        layer["source"] = data_uri(webp(layer.pop("picture"), MAP_QUALITY))
    greys = [layer for layer in images["layers"] if layer not in fields]
    mosaics = [layer.pop("picture") for layer in greys]
    oblique = oblique_degrees(subject.view.grid.affine)

    def rendered() -> str:
        return render(
            "subject.html",
            name=values["name"],
            metrics=values,
            images=images,
            mask=mask,
            steep=steep_tables(values),
            maps=maps,
            plots=plots,
            flags=[flag.split(": ", 1) for flag in values["flags"]],
            provenance=_provenance(subject.facts, subject.reference_facts, values),
            low_b=LOW_B,
            oblique=oblique if oblique > 1 else None,
            has_reference=subject.log_reference is not None,
            index_href=None if alone else f"index.html#{quote(values['name'])}",
            crops_href=quote(os.path.relpath(crops, Path(page).parent)) if crops else None,
            viewer_href=quote(os.path.relpath(viewer, Path(page).parent)) if viewer else None,
        )

    sources = _fit(mosaics, PAGE_BYTES - len(rendered().encode()))
    for layer, source in zip(greys, sources, strict=True):
        layer["source"] = source
    html = rendered()
    with atomic_bytes(pictures) as file:
        file.write(webp(Image.fromarray(np.concatenate(list(small.values()))), 75))
    view = subject.view
    if viewer and subject.volume is not None:
        script = viewer_script(
            view.grid,
            subject.volume,
            view.mask,
            subject.fields,
            display_max=values["display_max"],
            steep_from=steep_from(values),
            field_window_log=values["field_window_log"],
            anatomical=view.anatomical,
            limit_bytes=1e6 * viewer_mb,
        )
        with atomic_text(viewer) as file:
            file.write(script)
    with atomic_text(metrics) as file:
        json.dump(values, file, indent=2, ensure_ascii=False, allow_nan=False)
        file.write("\n")
    with atomic_text(page) as file:
        file.write(html)


def _fit(pictures: Sequence[Any], budget: int) -> list[str]:
    """The pictures as data URIs that fit the budget (characters) together."""

    def encoded(quality: int) -> list[str]:
        return [data_uri(webp(picture, quality)) for picture in pictures]

    def size(sources: list[str]) -> int:
        return sum(map(len, sources))

    for quality in QUALITIES:
        sources = encoded(quality)
        if size(sources) <= budget:
            break
    return sources


def _provenance(
    facts: Mapping[str, Any], reference: Mapping[str, Any], values: Mapping[str, Any]
) -> list[tuple[str, str]]:
    """Everything the sidecar says except long lists, one line per key."""
    lines: list[tuple[str, str]] = [("shape", " × ".join(map(str, values["shape"])))]
    lines.append(("voxel size", " × ".join(f"{s:g}" for s in values["voxel_size_mm"]) + " mm"))
    if values["frames"] > 1:
        part = values["averaged_frames"]
        shown = f"the mean of the {part} up to b = {LOW_B} is shown" if part < values["frames"] else "the mean is shown"
        lines.append(("frames", f"{values['frames']}, {shown}"))

    def add(prefix: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                if key not in ("History", "Lattice"):
                    add(f"{prefix} / {key}" if prefix else str(key), inner)
        else:
            lines.append((prefix, ", ".join(map(str, value)) if isinstance(value, list) else str(value)))

    add("", facts)
    add("Reference", reference.get("N4") or {})
    return lines
