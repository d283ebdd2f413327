"""One self-contained page per subject, and the dataset's table and index, built from metrics files."""

from __future__ import annotations

import base64
import csv
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

import nibabel as nib
import numpy as np
from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

from n4flow.errors import InputError
from n4flow.field import BiasField
from n4flow.metrics import correction_metrics, find_flags, mask_volume_ml, robust_z
from n4flow.qc import panels
from n4flow.qc.panels import Profile, Slice
from n4flow.volume import Volume, atomic_text

HERE = Path(__file__).parent

#: A page may have so many bytes; the two mosaics of the image take what the rest leaves.
PAGE_BYTES = 480_000

#: The window of the difference map, as a share of the window of the field.
DIFFERENCE_SHARE = 0.25

#: A plane counts in a profile, and a bin in a mean, from so many voxels on.
PROFILE_VOXELS = 20

#: Columns of metrics.tsv and of the dataset table: key, heading, digits, the direction that is worse.
COLUMNS: tuple[tuple[str, str, int, int], ...] = (
    ("cjv_before", "CJV before", 3, 0),
    ("cjv_after", "CJV after", 3, 1),
    ("cv_bright_before", "CV bright before", 3, 0),
    ("cv_bright_after", "CV bright after", 3, 0),
    ("log_entropy_before_bits", "log entropy before (bits)", 2, 0),
    ("log_entropy_after_bits", "log entropy after (bits)", 2, 0),
    ("inu_range", "inu_range", 3, 1),
    ("inu_med", "inu_med", 3, 0),
    ("field_min", "field min (ratio)", 3, -1),
    ("field_max", "field max (ratio)", 3, 1),
    ("reference_r", "r to reference", 4, -1),
    ("reference_slope", "slope to reference", 3, 0),
    ("reference_rms_log", "rms |Δlog|", 4, 1),
    ("reference_p99_log", "p99 |Δlog|", 4, 1),
    ("iterations_used", "iterations", 0, 0),
    ("iterations_max", "iterations max", 0, 0),
    ("mask_volume_ml", "mask (ml)", 0, 0),
    ("dropped_voxels", "dropped voxels", 0, 0),
    ("self_check_max", "self-check", 9, 0),
    ("mean_ratio", "mean after / before", 4, 0),
    ("wall_time_s", "time (s)", 1, 0),
)

#: What the dataset table shows; metrics.tsv has every column.
SHOWN = (
    "cjv_before", "cjv_after", "inu_range", "field_min", "field_max", "reference_r", "reference_rms_log",
    "iterations_used", "mask_volume_ml",
)  # fmt: skip

#: Robust z beyond which a subject is called an outlier among its dataset, and from how many subjects on.
OUTLIER_Z, OUTLIER_SUBJECTS = 3.5, 5


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(HERE / "templates"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["number"] = _number
    # our own style and code, never a value
    environment.globals["asset"] = lambda name: Markup((HERE / "assets" / name).read_text(encoding="utf-8"))
    return environment


def _number(value: Any, digits: int = 3) -> str:
    """A number for people; n/a where there is none."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "n/a"
    if value and abs(value) < 0.5 * 10**-digits:
        return f"{value:.1e}"
    return f"{value:,.{digits}f}"


# ---------------------------------------------------------------- a subject


class _View:
    """The voxels that a page needs of each image: the slices, and the values in the mask."""

    def __init__(self, mask: Volume) -> None:
        self.grid = mask
        self.mask = np.empty(mask.shape, dtype=bool, order="F")
        for slab, values in mask.mean_slabs():
            self.mask[:, :, slab] = np.nan_to_num(values) != 0
        self.voxels = int(self.mask.sum())
        if self.voxels == 0:
            raise InputError(mask.path, "the mask is empty", "give a mask, or another mask.method")
        planes = panels.upright_planes(mask.affine, mask.shape, mask.voxel_size_mm)
        self.slices = panels.choose_slices(self.mask, planes)
        self.outlines = [[panels.silhouette(s.cut(self.mask), s.plane.size_mm) for s in row] for row in self.slices]
        field_part = panels.FIELD_SLICES
        few = any(len(row) < field_part.stop for row in self.slices)
        self.field_part = slice(None) if few else field_part

    @property
    def field_slices(self) -> list[list[Slice]]:
        return [row[self.field_part] for row in self.slices]

    @property
    def field_outlines(self) -> list[list[list[np.ndarray]]]:
        return [row[self.field_part] for row in self.outlines]

    def image(self, path: str | Path, role: str) -> tuple[np.ndarray, list[list[np.ndarray]]]:
        """Values in the mask (float32) and the pictures of one image, which is then let go."""
        volume = Volume(path)
        self.grid.check_same_grid(volume, role)
        values = volume.mean()
        pictures = [[s.cut(values) for s in row] for row in self.slices]
        # the transposes lie in memory as the file does, which makes the selection fast
        inside = values.T[self.mask.T]
        return inside, [[np.nan_to_num(p.copy()) for p in row] for row in pictures]

    def field(self, field: BiasField, path: str | Path) -> tuple[np.ndarray, list[list[np.ndarray]]]:
        """Log field in the mask (float32) and on the slices of the field panels."""
        if field.image_shape != self.mask.shape:
            raise InputError(path, f"the field is of an image of shape {field.image_shape}", "make it again")
        pictures = [[s.picture(field.log_tile(s.tile)) for s in row] for row in self.field_slices]
        planes = max(1, 2**20 // (self.mask.shape[0] * self.mask.shape[1]))
        parts = []
        for start in range(0, self.mask.shape[2], planes):
            part = slice(start, start + planes)
            inside = self.mask[:, :, part]
            if inside.any():
                tile = field.log_tile((slice(None), slice(None), part))
                parts.append(tile.T[inside.T].astype(np.float32))
        return np.concatenate(parts), pictures

    def steepest_axis(self, field: BiasField) -> int:
        """The axis of the file along which the log field changes most per mm, in the mask."""
        steps = [max(1, n // 48) for n in self.mask.shape]
        inside = self.mask[tuple(slice(None, None, step) for step in steps)]
        log_field = field.log_at([np.arange(0, n, step) for n, step in zip(self.mask.shape, steps, strict=True)])
        slopes = [
            np.abs(np.gradient(log_field, step * size, axis=axis)[inside]).mean() if log_field.shape[axis] > 1 else 0.0
            for axis, (step, size) in enumerate(zip(steps, self.grid.voxel_size_mm, strict=True))
        ]
        return int(np.argmax(slopes))

    def profile(
        self, axis: int, original: np.ndarray, corrected: np.ndarray, log_field: np.ndarray, bright: np.ndarray
    ) -> Profile | None:
        """Means of the bright class, plane by plane along an axis; None where there are too few voxels."""
        # in the order of the values: the mask's transpose
        counts = np.flatnonzero(self.mask.T.ravel())[bright]
        shape = self.mask.shape
        stride = (1, shape[0], shape[0] * shape[1])[axis]
        index = (counts // stride) % shape[axis]
        number = np.bincount(index, minlength=shape[axis])
        kept = number >= PROFILE_VOXELS
        if kept.sum() < 2:
            return None

        def mean(values: np.ndarray) -> np.ndarray:
            along = np.bincount(index, weights=values[bright], minlength=shape[axis])[kept] / number[kept]
            return along / along.mean()

        code = nib.aff2axcodes(self.grid.affine)[axis]
        pair = next(p for p in panels.WORLD if code in p)
        position = np.flatnonzero(kept) * self.grid.voxel_size_mm[axis]
        curves = [mean(v) for v in (original, corrected, np.exp(log_field))]
        ends = (pair[1 - pair.index(code)], code)
        return Profile(position - position[0], curves[0], curves[1], curves[2], ends)


def make_subject(
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
    page: str | Path,
    metrics: str | Path,
) -> None:
    """Write the page and the metrics of one subject.

    Parameters
    ----------
    name : str
        As it stands in the sample sheet.
    image, mask, corrected : path-like
        NIfTI, on one grid; of 4-D images the mean over the frames is looked at.
    field, reference_field : path-like
        Lattice JSON, see `BiasField.load`; without a reference its panels are absent.
    sidecar, reference_sidecar : path-like
        JSON of the images corrected with these fields.
    field_window_log : float
        Field maps run from ``-field_window_log`` to this, natural log; one for a dataset, so that subjects compare.
    page, metrics : path-like
        What to write: one HTML file that needs no other, and one flat JSON file.

    Raises
    ------
    InputError
        A file cannot be read, the grids differ, or the mask is empty.
    """
    if not (math.isfinite(field_window_log) and field_window_log > 0):
        raise InputError("qc.field_window_log", f"{field_window_log!r} is not valid", "give a number above 0")
    facts = _read_json(sidecar)
    reference_facts = _read_json(reference_sidecar) if reference_sidecar else {}
    view = _View(Volume(mask))
    before, before_pictures = view.image(image, "image")
    after, after_pictures = view.image(corrected, "corrected image")
    ours = BiasField.load(field)
    log_field, field_pictures = view.field(ours, field)
    log_reference = reference_pictures = None
    if reference_field:
        log_reference, reference_pictures = view.field(BiasField.load(reference_field), reference_field)

    numbers = correction_metrics(before, after, log_field, log_reference)
    finite = after[np.isfinite(after)]
    display_max = float(np.percentile(finite, 99.5)) if finite.size else 0.0
    display_max = display_max if display_max > 0 else 1.0
    values = {
        "name": name,
        "page": os.path.relpath(page, Path(metrics).parent),
        "shape": list(view.mask.shape),
        "frames": Volume(image).frames,
        "voxel_size_mm": [float(s) for s in view.grid.voxel_size_mm],
        "mask_volume_ml": mask_volume_ml(view.voxels, view.grid.voxel_size_mm),
        **numbers,
        "display_max": display_max,
        "field_window_log": field_window_log,
        "field_beyond_window_fraction": float(np.mean(np.abs(log_field) > field_window_log)),
        **_run_metrics(facts, reference_facts, view.voxels),
    }
    values["flags"] = find_flags(values)
    values = _plain(values)

    shown = _image_panels(view, before_pictures, after_pictures, values)
    maps = _field_panels(view, field_pictures, reference_pictures, log_field, log_reference, values)
    plots = _plots(view, ours, before, after, log_field, log_reference, values, facts, reference_facts)
    budget = PAGE_BYTES - sum(len(p["source"]) for p in maps + plots) - 40_000
    sources = _fit([entry.pop("picture") for entry in shown], budget)
    for entry, source in zip(shown, sources, strict=True):
        entry["source"] = source

    oblique = panels.oblique_degrees(view.grid.affine)
    html = (
        _environment()
        .get_template("subject.html")
        .render(
            name=name,
            metrics=values,
            shown=shown,
            maps=maps,
            plots=plots,
            flags=[flag.split(": ", 1) for flag in values["flags"]],
            facts=facts,
            provenance=_provenance(facts, reference_facts, values),
            oblique=oblique if oblique > 1 else None,
            has_reference=log_reference is not None,
        )
    )
    with atomic_text(metrics) as file:
        json.dump(values, file, indent=2, ensure_ascii=False, allow_nan=False)
        file.write("\n")
    with atomic_text(page) as file:
        file.write(html)


def _read_json(path: str | Path) -> dict[str, Any]:
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("not an object")
        return content
    except (OSError, ValueError) as error:
        raise InputError(path, f"cannot be read as JSON ({error})", "make it again") from None


def _plain(value: Any) -> Any:
    """The value as strict JSON has it: None for what is no number, Python's own types."""
    if isinstance(value, Mapping):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _run_metrics(facts: Mapping[str, Any], reference: Mapping[str, Any], mask_voxels: int) -> dict[str, Any]:
    """What the run reports about itself; absent keys give None."""
    run = facts.get("N4") or {}
    reference_run = reference.get("N4") or {}
    parameters = run.get("Parameters") or {}
    history = run.get("History") or []
    most = parameters.get("iterations")
    converged = run.get("Converged")
    dropped = run.get("Dropped")
    lost = sum(dropped.values()) if dropped is not None else None
    return {
        "iterations_used": len(history) if history else None,
        "iterations_max": sum(most) if most else None,
        "converged": all(converged) if converged is not None else None,
        "convergence_cv": history[-1]["CV"] if history else None,
        "dropped_voxels": lost,
        "dropped_fraction": lost / mask_voxels if lost is not None else None,
        "samples": run.get("Samples"),
        "self_check_max": run.get("SelfCheck"),
        "wall_time_s": run.get("WallTimeSeconds"),
        "reference_wall_time_s": reference_run.get("WallTimeSeconds"),
        "device": run.get("Device"),
        "skull_stripped": facts.get("SkullStripped"),
    }


def _uri(data: bytes) -> str:
    return "data:image/webp;base64," + base64.b64encode(data).decode("ascii")


def _fit(pictures: Sequence[Any], budget: int) -> list[str]:
    """The pictures as data URIs of the best quality that fits the budget (characters) together."""
    sources: list[str] = []
    for quality in (82, 68, 52, 36, 20):
        sources = [_uri(panels.webp(picture, quality)) for picture in pictures]
        if sum(map(len, sources)) <= budget:
            break
    return sources


def _image_panels(view: _View, before: Any, after: Any, values: Mapping[str, Any]) -> list[dict[str, Any]]:
    scale = panels.intensity_scale(values["display_max"])
    window = f"window 0 to {values['display_max']:.4g}, the 99.5th percentile of the corrected image in the mask"
    return [
        {
            "label": "original",
            "alt": f"Original image with the outline of the mask; {window}. CJV {_number(values['cjv_before'])}.",
            "picture": panels.mosaic(
                before, view.slices, scale, width=panels.WIDTH, title="original", outlines=view.outlines
            ),
        },
        {
            "label": "corrected",
            "alt": f"Corrected image; {window}. CJV {_number(values['cjv_after'])}.",
            "picture": panels.mosaic(after, view.slices, scale, width=panels.WIDTH, title="corrected"),
        },
    ]


def _span(log_values: np.ndarray) -> str:
    return f"×{math.exp(float(log_values.min())):.2f} to ×{math.exp(float(log_values.max())):.2f} in the mask"


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
) -> list[dict[str, Any]]:
    window = values["field_window_log"]

    def panel(title: str, pictures: Any, log_values: np.ndarray, scale: Any, limit: float, good: str, bad: str) -> Any:
        numbers = f"{_span(log_values)}; {_beyond(log_values, limit)}"
        picture = panels.mosaic(
            pictures,
            view.field_slices,
            scale,
            width=panels.WIDTH // 2,
            title=title.lower(),
            outlines=view.field_outlines,
            clip=True,
        )
        return {
            "title": title,
            "numbers": numbers,
            "alt": f"{title}: {numbers}.",
            "source": _uri(panels.webp(picture, 90)),
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
                "the same pattern as the bias field.",
                "another pattern, or another sign.",
            ),
            panel(
                "Difference",
                pictures,
                difference,
                panels.difference_scale(narrow),
                narrow,
                f"pale; ours over the reference, each less its mean, rms {100 * values['reference_rms_log']:.1f} %.",
                "strong colour across tissue.",
            ),
        ]
    return shown


def _plots(
    view: _View,
    field: BiasField,
    before: np.ndarray,
    after: np.ndarray,
    log_field: np.ndarray,
    log_reference: np.ndarray | None,
    values: Mapping[str, Any],
    facts: Mapping[str, Any],
    reference: Mapping[str, Any],
) -> list[dict[str, Any]]:
    shown = []

    def add(title: str, picture: Any, numbers: str, good: str, bad: str) -> None:
        source = _uri(panels.webp(picture))
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

    classes = [values[key] if values[key] is not None else math.nan for key in ("class_lower", "class_upper")]
    add(
        "Histogram in the mask",
        panels.histogram_plot(before, after, values["display_max"], classes),
        f"entropy of the log histogram {_number(values['log_entropy_before_bits'], 2)} → "
        f"{_number(values['log_entropy_after_bits'], 2)} bits; dotted: limits of the intensity classes",
        "peaks are narrower after correction.",
        "peaks merge, or move together.",
    )
    if values["class_upper"] is not None:
        bright = (after > values["class_upper"]) & (after <= values["class_top"])
        profile = view.profile(view.steepest_axis(field), before, after, log_field, bright)
        if profile is not None:
            spreads = [100 * float(curve.max() - curve.min()) for curve in (profile.original, profile.corrected)]
            add(
                "Profile along the steepest axis",
                panels.profile_plot(profile),
                f"mean of the bright class by plane, {profile.ends[0]} to {profile.ends[1]}; "
                f"spread {spreads[0]:.0f} % → {spreads[1]:.0f} %",
                "the corrected line is flatter.",
                "it still follows the field, or turns against it.",
            )
    run = facts.get("N4") or {}
    if run.get("History"):
        threshold = (run.get("Parameters") or {}).get("convergence_threshold")
        used = f"{values['iterations_used']} of at most {_number(values['iterations_max'], 0)} iterations"
        add(
            "Convergence",
            panels.convergence_plot(run["History"], threshold, (reference.get("N4") or {}).get("History") or ()),
            f"{used}; last CV {values['convergence_cv']:.1e}, threshold {_number(threshold, 4)}",
            "each level falls to the threshold.",
            "a level stops above it, or rises.",
        )
    if log_reference is not None:
        add(
            "Ours against the reference",
            panels.agreement_plot(
                log_field, log_reference, values["reference_r"] or math.nan, values["reference_slope"] or math.nan
            ),
            f"r {_number(values['reference_r'], 4)}, slope {_number(values['reference_slope'])}, "
            f"rms {_number(values['reference_rms_log'], 4)}, p99 {_number(values['reference_p99_log'], 4)} in log",
            "a thin band along the diagonal.",
            "a flat or a broad cloud.",
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


# ---------------------------------------------------------------- the dataset


def make_index(
    metrics_files: Iterable[str | Path],
    output_page: str | Path,
    output_table: str | Path,
    failed: Sequence[tuple[str, str]] = (),
) -> None:
    """Write the dataset's index page and metrics.tsv, from the metrics files alone.

    Parameters
    ----------
    metrics_files : paths
        As `make_subject` wrote them.
    output_page, output_table : path-like
    failed : sequence of (name, error line)
    """
    subjects = []
    folder = Path(output_page).resolve().parent
    for path in metrics_files:
        values = _read_json(path)
        linked = Path(path).resolve().parent / str(values.get("page", ""))
        values["href"] = quote(os.path.relpath(linked, folder))
        subjects.append(values)
    worst = _worst_z(subjects)
    for values, (z, reason) in zip(subjects, worst, strict=True):
        values["worst_z"] = z
        values["flags"] = list(values.get("flags") or []) + ([reason] if reason else [])
    # without enough subjects every z is None, and the flags decide
    subjects.sort(key=lambda v: (-(v["worst_z"] or 0.0), -len(v["flags"]), str(v.get("name"))))
    _write_table(subjects, output_table)

    shown = [column for column in COLUMNS if column[0] in SHOWN and any(v.get(column[0]) is not None for v in subjects)]
    rows = [
        [
            v.get("name"),
            v["href"],
            v["flags"],
            v["worst_z"],
            *(_round(v.get(key), digits) for key, _, digits, _ in shown),
        ]
        for v in subjects
    ]
    table = {
        "columns": [[heading, digits] for _, heading, digits, _ in shown],
        "rows": rows,
        "ranked": len(subjects) >= OUTLIER_SUBJECTS,
    }
    # inside <script> only "<" can end the element
    data = Markup(json.dumps(_plain(table), ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c"))
    html = (
        _environment()
        .get_template("index.html")
        .render(
            data=data,
            count=len(subjects),
            flagged=sum(bool(v["flags"]) for v in subjects),
            failed=list(failed),
            ranked=len(subjects) >= OUTLIER_SUBJECTS,
            table_href=quote(os.path.relpath(Path(output_table).resolve(), folder)),
        )
    )
    with atomic_text(output_page) as file:
        file.write(html)


def _round(value: Any, digits: int) -> Any:
    return round(value, digits) if isinstance(value, float) else value


def _worst_z(subjects: Sequence[Mapping[str, Any]]) -> list[tuple[float | None, str]]:
    """Per subject the largest robust z in the bad direction, and the flag it raises beyond the limit."""
    if len(subjects) < OUTLIER_SUBJECTS:
        return [(None, "")] * len(subjects)
    best: list[tuple[float, str]] = [(0.0, "")] * len(subjects)
    for key, heading, _, worse in COLUMNS:
        if not worse:
            continue
        column = [math.nan if v.get(key) is None else float(v[key]) for v in subjects]
        for n, z in enumerate(worse * robust_z(column)):
            if math.isfinite(z) and z > best[n][0]:
                best[n] = (float(z), heading)
    return [
        (round(z, 2), f"outlier: {heading} is unusual in this dataset (robust z {z:.1f})" if z > OUTLIER_Z else "")
        for z, heading in best
    ]


def _write_table(subjects: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    with atomic_text(path) as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n", quoting=csv.QUOTE_NONE, quotechar=None)
        writer.writerow(["name", *(key for key, *_ in COLUMNS), "worst_z", "flags"])
        for values in subjects:
            cells = [values.get("name"), *(values.get(key) for key, *_ in COLUMNS), values["worst_z"]]
            cells.append("; ".join(values["flags"]) or None)
            # neither tab nor line end inside a cell
            writer.writerow(["n/a" if c is None else " ".join(str(c).split()) for c in cells])
