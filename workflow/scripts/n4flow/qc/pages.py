"""One self-contained page per subject, with its metrics file."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast
from urllib.parse import quote

import nibabel as nib
import numpy as np
from PIL import Image

from n4flow.core.field import BiasField
from n4flow.core.samples import inside_mask
from n4flow.errors import InputError
from n4flow.images.fields import load_field
from n4flow.images.files import atomic_bytes, atomic_text
from n4flow.images.nifti import Volume
from n4flow.qc import panels
from n4flow.qc.flags import FLAG_LIMITS, find_flags
from n4flow.qc.metrics import (
    PLANE_VOXELS,
    correction_metrics,
    mask_volume_ml,
    microscopy_metrics,
    saturated_fraction,
    section_profile,
    steepness,
)
from n4flow.qc.panels import Profile
from n4flow.qc.rendering import number, plain, read_json, render
from n4flow.qc.viewer import shrink, steps_within, viewer_script
from n4flow.study.bids import DATATYPE_OF

#: A page may have so many bytes; the two mosaics of the image take what the rest leaves.
PAGE_BYTES = 440_000
ROOM_FOR_TEXT = 50_000

#: The window of the difference map, as a share of the window of the field.
DIFFERENCE_SHARE = 0.25


class _View:
    """The voxels that a page needs of each image: the slices, and the values in the mask."""

    def __init__(self, mask: Volume, viewer_bytes: float, control_points: int) -> None:
        self.grid = mask
        fit = viewer_bytes, control_points
        self.steps = steps_within(mask.shape, mask.voxel_size_mm, *fit) if viewer_bytes else None
        self.mask = np.empty(mask.shape, dtype=bool, order="F")
        for slab, values in mask.mean_slabs():
            self.mask[:, :, slab] = inside_mask(values)
        self.voxels = int(self.mask.sum())
        if self.voxels == 0:
            raise InputError(mask.path, "the mask is empty", "give a mask, or another mask.method")
        planes = panels.upright_planes(mask.affine, mask.shape, mask.voxel_size_mm)
        self.slices = panels.choose_slices(self.mask, planes)
        self.outlines = [[panels.silhouette(s.cut(self.mask), s.plane.size_mm) for s in row] for row in self.slices]
        field_part = panels.FIELD_SLICES
        few = any(len(row) < field_part.stop for row in self.slices)
        self.field_part = slice(None) if few else field_part

    def image(self, path: str | Path, role: str) -> tuple[np.ndarray, list[list[np.ndarray]], np.ndarray | None]:
        """Of one image, which is then let go: values in the mask (float32), pictures, and the viewer's volume."""
        volume = Volume(path)
        self.grid.check_same_grid(volume, role)
        values = volume.mean()
        pictures = [[s.cut(values) for s in row] for row in self.slices]
        # the transposes lie in memory as the file does, which makes the selection fast
        inside = values.T[self.mask.T]
        return (
            inside,
            [[np.nan_to_num(p.copy()) for p in row] for row in pictures],
            shrink(values, self.steps) if self.steps else None,
        )

    def field(self, field: BiasField, path: str | Path) -> tuple[np.ndarray, list[list[np.ndarray]]]:
        """Log field in the mask (float32) and on the slices."""
        if field.image_shape != self.mask.shape:
            raise InputError(path, f"the field is of an image of shape {field.image_shape}", "make it again")
        pictures = [[s.picture(field.log_tile(s.tile)) for s in row] for row in self.slices]
        planes = max(1, 2**20 // (self.mask.shape[0] * self.mask.shape[1]))
        parts = []
        for start in range(0, self.mask.shape[2], planes):
            part = slice(start, start + planes)
            inside = self.mask[:, :, part]
            if inside.any():
                tile = field.log_tile((slice(None), slice(None), part))
                parts.append(tile.T[inside.T].astype(np.float32))
        return np.concatenate(parts), pictures

    def log_slopes(self, field: BiasField) -> np.ndarray:
        """Change of the log field per mm along each axis of the file, on a coarse grid in the mask."""
        steps = [max(1, n // 48) for n in self.mask.shape]
        inside = self.mask[tuple(slice(None, None, step) for step in steps)]
        log_field = field.log_at([np.arange(0, n, step) for n, step in zip(self.mask.shape, steps, strict=True)])
        return np.array(
            [
                np.gradient(log_field, step * size, axis=axis)[inside]
                if log_field.shape[axis] > 1
                else np.zeros(np.count_nonzero(inside))
                for axis, (step, size) in enumerate(zip(steps, self.grid.voxel_size_mm, strict=True))
            ]
        )

    def steepness(self, field: BiasField) -> float:
        """See `metrics.steepness`; NaN where the mask has no voxel of the coarse grid."""
        drawn = [size for n, size in zip(self.mask.shape, self.grid.voxel_size_mm, strict=True) if n > 1]
        size_mm = (self.voxels * math.prod(drawn)) ** (1 / len(drawn)) if drawn else 0.0
        return steepness(np.linalg.norm(self.log_slopes(field), axis=0), size_mm)

    def steepest_axis(self, field: BiasField) -> int:
        """The axis of the file along which the log field changes most per mm, in the mask."""
        return int(np.argmax(np.abs(self.log_slopes(field)).sum(axis=1)))

    def bright_profiles(self, axis: int, images: Sequence[np.ndarray], bright: np.ndarray) -> list[np.ndarray]:
        """Means of the bright class, plane by plane along an axis; NaN where there are too few voxels."""
        # in the order of the values: the mask's transpose
        counts = np.flatnonzero(self.mask.T.ravel())[bright]
        shape = self.mask.shape
        stride = (1, shape[0], shape[0] * shape[1])[axis]
        index = (counts // stride) % shape[axis]
        voxels = np.bincount(index, minlength=shape[axis])
        known = np.where(voxels >= PLANE_VOXELS, voxels, math.nan)
        return [np.bincount(index, weights=values[bright], minlength=shape[axis]) / known for values in images]

    def profile(self, axis: int, means: Sequence[np.ndarray]) -> Profile | None:
        """What is plotted of the plane means of original, corrected and field; None for fewer than two planes."""
        kept = np.isfinite(means).all(axis=0)
        if kept.sum() < 2:
            return None
        code = nib.aff2axcodes(self.grid.affine)[axis]
        pair = next(p for p in panels.WORLD if code in p)
        position_mm = np.flatnonzero(kept) * self.grid.voxel_size_mm[axis]
        curves = [along[kept] / along[kept].mean() for along in means]
        ends = (pair[1 - pair.index(code)], code)
        return Profile(position_mm - position_mm[0], curves[0], curves[1], curves[2], ends)


class Subject(NamedTuple):
    """A scan, read and measured: what its panels are drawn from."""

    view: _View
    field: BiasField
    before: np.ndarray
    after: np.ndarray
    log_field: np.ndarray
    log_reference: np.ndarray | None
    pictures: dict[str, list[list[np.ndarray]]]  # before, after, field and, if there is one, reference
    fields: dict[str, BiasField]  # for the viewer, by name
    small: tuple[np.ndarray, np.ndarray] | None  # original and corrected for the viewer, if it was asked for
    values: dict[str, Any]  # the metrics
    facts: dict[str, Any]
    reference_facts: dict[str, Any]

    def image_panels(self) -> list[dict[str, Any]]:
        """Original, corrected and field on the same slices, as pictures."""
        before, after, field = (self.pictures[name] for name in ("before", "after", "field"))
        return _image_panels(self.view, before, after, field, self.log_field, self.values)

    def thumbnails(self) -> dict[str, np.ndarray]:
        """Original and corrected for the grid of all scans."""
        grey = panels.intensity_scale(self.values["display_max"])
        shown = {"original": "before", "corrected": "after"}
        return {name: panels.thumbnail(self.pictures[key], self.view.slices, grey) for name, key in shown.items()}

    def field_panels(self) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
        """The field and, if there is one, the reference and the difference, as data URIs; and their thumbnails."""
        shown = self.pictures["field"], self.pictures.get("reference")
        return _field_panels(self.view, *shown, self.log_field, self.log_reference, self.values)

    def plots(self) -> list[dict[str, Any]]:
        """Histogram, profile, convergence and agreement, as data URIs."""
        inside = self.before, self.after, self.log_field, self.log_reference
        return _plots(self.view, self.field, *inside, self.values, self.facts)


def measure_subject(
    *,
    name: str,
    image: str | Path,
    mask: str | Path,
    corrected: str | Path,
    field: str | Path,
    sidecar: str | Path,
    reference_field: str | Path | None = None,
    reference_sidecar: str | Path | None = None,
    field_window_log: float,
    flags: Mapping[str, float] = FLAG_LIMITS,
    viewer_mb: float = 0,
) -> Subject:
    """Read a scan and measure its correction.

    Parameters
    ----------
    name : str
        BIDS name without extension: ``sub-01_T1w``. A suffix of microscopy gets the metrics of that.
    image, mask, corrected : path-like
        NIfTI, on one grid; of 4-D images the mean over the frames is looked at.
    field, reference_field : path-like
        Lattice JSON, see `images.fields.load_field`; without a reference its panels are absent.
    sidecar, reference_sidecar : path-like
        JSON of the images corrected with these fields.
    field_window_log : float
        Field maps run from ``-field_window_log`` to this, natural log; one for a dataset, so that subjects compare.
    flags : mapping
        Limits of the automatic flags, see `flags.FLAG_LIMITS`.
    viewer_mb : float
        The most that the viewer's data may take, in MB; 0 keeps none.

    Returns
    -------
    Subject

    Raises
    ------
    InputError
        A file cannot be read, the grids differ, or the mask is empty.
    """
    if not (math.isfinite(field_window_log) and field_window_log > 0):
        raise InputError("qc.field_window_log", f"{field_window_log!r} is not valid", "give a number above 0")
    facts = read_json(sidecar)
    reference_facts = read_json(reference_sidecar) if reference_sidecar else {}
    fields = {"bias field": load_field(field)}
    if reference_field:
        fields["reference field"] = load_field(reference_field)
    view = _View(Volume(mask), 1e6 * viewer_mb, sum(each.lattice.size for each in fields.values()))
    before, before_pictures, before_small = view.image(image, "image")
    after, after_pictures, after_small = view.image(corrected, "corrected image")
    ours = fields["bias field"]
    log_field, field_pictures = view.field(ours, field)
    log_reference = reference_pictures = None
    if reference_field:
        log_reference, reference_pictures = view.field(fields["reference field"], reference_field)

    datatype = DATATYPE_OF.get(name.rpartition("_")[2])
    numbers = correction_metrics(before, after, log_field, log_reference, by_class=datatype != "micr")
    if datatype == "micr":
        numbers |= microscopy_metrics(before, after, view.mask)
    # nibabel's header has forgotten the scaling, its array proxy has not
    stored = cast(Any, nib.load(image)).dataobj
    finite = after[np.isfinite(after)]
    display_max = float(np.percentile(finite, 99.5)) if finite.size else 0.0
    display_max = display_max if display_max > 0 else 1.0
    values = {
        "name": name,
        "datatype": datatype,
        "report_hash": _report_hash(view.mask, before, after),
        "shape": list(view.mask.shape),
        "frames": Volume(image).frames,
        "voxel_size_mm": [float(s) for s in view.grid.voxel_size_mm],
        "mask_volume_ml": mask_volume_ml(view.voxels, view.grid.voxel_size_mm),
        **numbers,
        "field_steepness": view.steepness(ours),
        "saturated_fraction": saturated_fraction(before, stored.dtype, stored.slope, stored.inter),
        "display_max": display_max,
        "field_window_log": field_window_log,
        "field_beyond_window_fraction": float(np.mean(np.abs(log_field) > field_window_log)),
        **_run_metrics(facts, reference_facts, view.voxels),
    }
    values["flags"] = find_flags(values, flags)
    pictures = {"before": before_pictures, "after": after_pictures, "field": field_pictures}
    if reference_pictures is not None:
        pictures["reference"] = reference_pictures
    inside = before, after, log_field, log_reference
    small = None if before_small is None or after_small is None else (before_small, after_small)
    return Subject(view, ours, *inside, pictures, fields, small, plain(values), facts, reference_facts)


def make_subject(
    *,
    page: str | Path,
    metrics: str | Path,
    pictures: str | Path,
    viewer: str | Path | None = None,
    viewer_mb: float = 0,
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
    **scan
        As `measure_subject` takes it.

    Raises
    ------
    InputError
        As `measure_subject`.
    """
    subject = measure_subject(**scan, viewer_mb=viewer_mb if viewer else 0)
    folder = Path(metrics).parent
    values = {**subject.values, "page": os.path.relpath(page, folder), "pictures": os.path.relpath(pictures, folder)}
    shown, plots = subject.image_panels(), subject.plots()
    maps, small = subject.field_panels()
    small = subject.thumbnails() | small
    values["panels"] = list(small)
    shown[-1]["source"] = data_uri(panels.webp(shown[-1].pop("picture"), 70))  # the field is smooth and small
    taken = sum(len(p["source"]) for p in [*maps, *plots, shown[-1]])
    sources = _fit([entry.pop("picture") for entry in shown[:-1]], PAGE_BYTES - taken - ROOM_FOR_TEXT)
    for entry, source in zip(shown, sources, strict=False):
        entry["source"] = source

    oblique = panels.oblique_degrees(subject.view.grid.affine)
    html = render(
        "subject.html",
        name=values["name"],
        metrics=values,
        shown=shown,
        maps=maps,
        plots=plots,
        flags=[flag.split(": ", 1) for flag in values["flags"]],
        provenance=_provenance(subject.facts, subject.reference_facts, values),
        oblique=oblique if oblique > 1 else None,
        has_reference=subject.log_reference is not None,
        index_href=f"index.html#{quote(values['name'])}",
        viewer_href=quote(os.path.relpath(viewer, Path(page).parent)) if viewer else None,
    )
    with atomic_bytes(pictures) as file:
        file.write(panels.webp(Image.fromarray(np.concatenate(list(small.values()))), 75))
    view = subject.view
    if viewer and view.steps and subject.small:
        mask_small = shrink(view.mask, view.steps)
        display = (values["display_max"], values["field_window_log"])
        with atomic_text(viewer) as file:
            file.write(viewer_script(view.grid, view.steps, *subject.small, mask_small, subject.fields, *display))
    with atomic_text(metrics) as file:
        json.dump(values, file, indent=2, ensure_ascii=False, allow_nan=False)
        file.write("\n")
    with atomic_text(page) as file:
        file.write(html)


def _report_hash(mask: np.ndarray, before: np.ndarray, after: np.ndarray) -> str:
    """What a rating belongs to: the mask, and original and corrected in it. Shortened SHA-256."""
    digest = hashlib.sha256(np.packbits(mask.T).data)  # in the order of the file, as the values
    for values in (before, after):
        digest.update(np.ascontiguousarray(values).data)
    return digest.hexdigest()[:12]


def _run_metrics(facts: Mapping[str, Any], reference: Mapping[str, Any], mask_voxels: int) -> dict[str, Any]:
    """What the run reports about itself; absent keys give None."""
    run = facts.get("N4") or {}
    reference_run = reference.get("N4") or {}
    agreement = reference_run.get("Agreement") or {}
    parameters = run.get("Parameters") or {}
    history = run.get("History") or []
    most = parameters.get("iterations")
    converged = run.get("Converged")
    dropped = run.get("Dropped")
    lost = sum(dropped.values()) if dropped is not None else None
    return {
        "iterations_used": len(history) if history else None,
        "iterations_max": sum(most) if most else None,
        # with a threshold of 0, a stage is to take all its iterations
        "converged": all(converged) if converged is not None and parameters.get("convergence_threshold") != 0 else None,
        "convergence_cv": history[-1]["CV"] if history else None,
        "dropped_voxels": lost,
        "dropped_fraction": lost / mask_voxels if lost is not None else None,
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
        "outside_fraction": run.get("ShareOutside"),
    }


def _scan_of_field(uri: str) -> str:
    """Name of the scan that a field was estimated on, out of the URI of its lattice."""
    return uri.rpartition("/")[2].removesuffix("_biasfield.json").replace("_desc-N4", "_")


def data_uri(data: bytes) -> str:
    """A WebP picture as the source of an <img>."""
    return "data:image/webp;base64," + base64.b64encode(data).decode("ascii")


def _fit(pictures: Sequence[Any], budget: int) -> list[str]:
    """The pictures as data URIs that fit the budget (characters) together, in better quality where there is room."""

    def encoded(quality: int) -> list[str]:
        return [data_uri(panels.webp(picture, quality)) for picture in pictures]

    def size(sources: list[str]) -> int:
        return sum(map(len, sources))

    # encoding takes most of a page's time: the quality that fits most scans comes first
    sources = encoded(55)
    if size(sources) < 0.65 * budget and size(better := encoded(80)) <= budget:
        return better
    for quality in (36, 20):
        if size(sources) <= budget:
            break
        sources = encoded(quality)
    return sources


def _image_panels(
    view: _View, before: Any, after: Any, field: Any, log_field: np.ndarray, values: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Original, corrected and field on the same slices: they are swapped in place."""
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
            "alt": f"Bias field on the same slices: {_span(log_field)}.",
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


def _span(log_values: np.ndarray, digits: int = 2) -> str:
    low, high = (math.exp(float(value)) for value in (log_values.min(), log_values.max()))
    return f"×{low:.{digits}f} to ×{high:.{digits}f} in the mask"


def _beyond(log_values: np.ndarray, window: float) -> str:
    share = float(np.mean(np.abs(log_values) > window))
    window_text = f"window ×{math.exp(-window):.2f} to ×{math.exp(window):.2f}"
    return f"{window_text}; " + (f"{100 * share:.2g} % of the mask exceeds it" if share else "nothing exceeds it")


def _field_panels(
    view: _View,
    field_pictures: Any,
    reference_pictures: Any,
    log_field: np.ndarray,
    log_reference: np.ndarray | None,
    values: Mapping[str, Any],
) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """The panels of the fields, and their thumbnails by title."""
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
            "source": data_uri(panels.webp(picture, 90)),
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
    if log_reference is not None:
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


def _plots(
    view: _View,
    field: BiasField,
    before: np.ndarray,
    after: np.ndarray,
    log_field: np.ndarray,
    log_reference: np.ndarray | None,
    values: Mapping[str, Any],
    facts: Mapping[str, Any],
) -> list[dict[str, Any]]:
    shown = []

    def add(title: str, picture: Any, numbers: str, good: str, bad: str) -> None:
        source = data_uri(panels.webp(picture))
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
        panels.histogram_plot(before, after, values["display_max"], limits),
        f"entropy of the log histogram {number(values['log_entropy_before_bits'], 2)} → "
        f"{number(values['log_entropy_after_bits'], 2)} bits"
        + ("" if microscopy else "; dotted: limits of the intensity classes"),
        "peaks are narrower after correction.",
        "peaks merge, or move together.",
    )
    images = (before, after, np.exp(log_field))
    profile = None
    if microscopy:
        title, averaged = "Profile along the sections", "foreground"
        profile = view.profile(2, [section_profile(v, view.mask) for v in images])
    elif values["class_upper"] is not None:
        title, averaged = "Profile along the steepest axis", "bright class"
        bright = (after > values["class_upper"]) & (after <= values["class_top"])
        axis = view.steepest_axis(field)
        profile = view.profile(axis, view.bright_profiles(axis, images, bright))
    if profile is not None:
        spreads = [100 * float(curve.max() - curve.min()) for curve in (profile.original, profile.corrected)]
        add(
            title,
            panels.profile_plot(profile),
            f"mean of the {averaged} by plane, {profile.ends[0]} to {profile.ends[1]}; "
            f"spread {spreads[0]:.0f} % → {spreads[1]:.0f} %",
            "the corrected line is flatter.",
            "it still follows the field, or turns against it.",
        )
    run = facts.get("N4") or {}
    if run.get("History"):
        threshold = (run.get("Parameters") or {}).get("convergence_threshold")
        used = f"{values['iterations_used']} of at most {number(values['iterations_max'], 0)} iterations"
        add(
            "Convergence",
            panels.convergence_plot(run["History"], threshold),
            f"{used}; last CV {values['convergence_cv']:.2g}, threshold {number(threshold, 4)}",
            "each stage falls to the threshold.",
            "a stage stops above it, or rises.",
        )
    if log_reference is not None:
        add(
            "Ours against the reference",
            panels.agreement_plot(
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


def _provenance(
    facts: Mapping[str, Any], reference: Mapping[str, Any], values: Mapping[str, Any]
) -> list[tuple[str, str]]:
    """Everything the sidecar says except long lists, one line per key."""
    lines: list[tuple[str, str]] = [("shape", " × ".join(map(str, values["shape"])))]
    lines.append(("voxel size", " × ".join(f"{s:g}" for s in values["voxel_size_mm"]) + " mm"))
    if values["frames"] > 1:
        lines.append(("frames", f"{values['frames']}, the mean is shown"))

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
