"""A scan read and measured: each of its files is opened once, and then let go."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from n4flow.core.bspline import one_blas_thread
from n4flow.core.field import BiasField
from n4flow.core.samples import inside_mask
from n4flow.errors import InputError
from n4flow.images.fields import load_field
from n4flow.images.nifti import Volume
from n4flow.qc import panels
from n4flow.qc.flags import FLAG_LIMITS, find_flags
from n4flow.qc.metrics import (
    bright_outside_fraction,
    correction_metrics,
    mask_volume_ml,
    microscopy_metrics,
    run_metrics,
    saturated_fraction,
    speckle_fraction,
    steepness,
    wrapped_fraction,
)
from n4flow.qc.rendering import plain, read_json
from n4flow.study.bids import DATATYPE_OF
from n4flow.study.series import open_scan

#: Slices as pictures: per plane, per slice, rows from bottom to top.
Pictures = list[list[np.ndarray]]


class Part(NamedTuple):
    """What is kept of an image."""

    values: np.ndarray  # in the mask, in the order of the file; float32
    pictures: Pictures
    frames: int
    averaged: int  # of these frames
    stored: tuple[np.dtype, float, float]  # dtype, slope and inter in the file


class View:
    """The voxels that a page needs of each image: the slices, and the values in the mask.

    Parameters
    ----------
    mask : Volume
    original : (n0, n1, n2) array
        What is seen of it decides, with the mask, on slices and crop.
    anatomical : bool
        The header tells where the subject's right, front and top are.

    Attributes
    ----------
    grid : Volume
        The mask's: gives geometry.
    anatomical : bool
    mask : (n0, n1, n2) bool array
    voxels : int
        In the mask.
    slices : per plane, per slice
    cuts : per plane, per slice, the mask as a picture
    outlines : per plane, per slice, rings of `panels.silhouette`
    field_part : slice
        Which slices of a plane the panels of a field show.
    """

    def __init__(self, mask: Volume, original: np.ndarray, anatomical: bool) -> None:
        self.grid, self.anatomical = mask, anatomical
        self.mask = np.empty(mask.shape, dtype=bool, order="F")
        for slab, values in mask.mean_slabs():
            self.mask[:, :, slab] = inside_mask(values)
        self.voxels = int(self.mask.sum())
        if self.voxels == 0:
            raise InputError(mask.path, "the mask is empty", "give a mask, or another mask.method")
        planes = panels.upright_planes(mask.affine, mask.shape, mask.voxel_size_mm, anatomical=anatomical)
        self.slices = panels.choose_slices(self.mask, planes, panels.foreground(original, self.mask))
        self.cuts = [[s.cut(self.mask) for s in row] for row in self.slices]
        self.outlines = [
            [panels.silhouette(cut, s.plane.size_mm) for cut, s in zip(*rows, strict=True)]
            for rows in zip(self.cuts, self.slices, strict=True)
        ]
        field_part = panels.FIELD_SLICES
        few = any(len(row) < field_part.stop for row in self.slices)
        self.field_part = slice(None) if few else field_part

    def part(self, volume: Volume, values: np.ndarray) -> Part:
        """Of an image what is kept of it."""
        # the transposes lie in memory as the file does, which makes the selection fast
        inside = values.T[self.mask.T]
        return Part(
            inside,
            [[np.nan_to_num(s.cut(values)) for s in row] for row in self.slices],
            volume.frames,
            len(volume.averaged),
            (volume.dtype, volume.slope, volume.inter),
        )

    def field(self, field: BiasField, path: str | Path) -> tuple[np.ndarray, Pictures]:
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
        # steps between planes are no slope
        log_field = field.smooth.log_at([np.arange(0, n, step) for n, step in zip(self.mask.shape, steps, strict=True)])
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

    def axis_of_field(self, field: BiasField) -> int:
        """The axis of the file along which the log field varies most: by the means of its planes, in the mask."""
        steps = [max(1, n // 48) for n in self.mask.shape]
        inside = self.mask[tuple(slice(None, None, step) for step in steps)]
        log_field = field.log_at([np.arange(0, n, step) for n, step in zip(self.mask.shape, steps, strict=True)])
        spreads = []
        for axis in range(3):
            others = tuple(a for a in range(3) if a != axis)
            counts = inside.sum(axis=others)
            means = (log_field * inside).sum(axis=others) / np.maximum(counts, 1)
            weights = counts / max(1, counts.sum())
            spreads.append(float(np.sum(weights * (means - np.sum(weights * means)) ** 2)))
        return int(np.argmax(spreads))


class Subject(NamedTuple):
    """A scan, read and measured: what its panels are drawn from."""

    view: View
    field: BiasField
    before: np.ndarray  # original in the mask
    after: np.ndarray  # corrected
    log_field: np.ndarray
    log_reference: np.ndarray | None
    pictures: dict[str, Pictures]  # before, after, field and, if there is one, reference
    fields: dict[str, BiasField]  # for the viewer, by name
    volume: np.ndarray | None  # corrected, all of it, if it was asked for
    values: dict[str, Any]  # the metrics
    facts: dict[str, Any]
    reference_facts: dict[str, Any]


@one_blas_thread
def measure_subject(
    *,
    name: str,
    image: str | Path,
    mask: str | Path,
    corrected: str | Path,
    field: str | Path,
    sidecar: str | Path,
    mask_sidecar: str | Path | None = None,
    reference_field: str | Path | None = None,
    reference_sidecar: str | Path | None = None,
    field_window_log: float,
    flags: Mapping[str, float] = FLAG_LIMITS,
    keep_volume: bool = False,
) -> Subject:
    """Read a scan and measure its correction.

    Parameters
    ----------
    name : str
        BIDS name without extension: ``sub-01_T1w``. A suffix of microscopy gets the metrics of that.
    image, mask, corrected : path-like
        NIfTI, on one grid; of 4-D images the mean over the frames that the field was estimated on is looked at.
    field, reference_field : path-like
        Lattice JSON, see `images.fields.load_field`; without a reference its panels are absent.
    sidecar, reference_sidecar : path-like
        JSON of the images corrected with these fields.
    mask_sidecar : path-like, optional
        JSON of the mask: says how it was found.
    field_window_log : float
        Field maps run from ``-field_window_log`` to this, natural log; one for a dataset, so that subjects compare.
    flags : mapping
        Limits of the automatic flags, see `flags.FLAG_LIMITS`.
    keep_volume : bool
        Keep the corrected image, for the viewer.

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
    datatype = DATATYPE_OF.get(name.rpartition("_")[2], "")
    grid, raw, divided = Volume(mask), open_scan(image), Volume(corrected)
    divided.averaged = raw.averaged
    grid.check_same_grid(raw, "image")
    shown = raw.mean()
    # microscopes write affines, but no anatomy
    anatomical = raw.has_spatial_reference and datatype != "micr"
    view = View(grid, shown, anatomical)
    original = view.part(raw, shown)
    wrapped = wrapped_fraction(shown, *original.stored) if original.frames == 1 else None
    grid.check_same_grid(divided, "corrected image")
    shown = divided.mean()
    result = view.part(divided, shown)
    bright_outside = bright_outside_fraction(shown, view.mask)
    ours = fields["bias field"]
    log_field, field_pictures = view.field(ours, field)
    pictures = {"before": original.pictures, "after": result.pictures, "field": field_pictures}
    log_reference = None
    if reference_field:
        log_reference, pictures["reference"] = view.field(fields["reference field"], reference_field)

    values = {
        "name": name,
        "datatype": datatype,
        "report_hash": _report_hash(view.mask, original.values, result.values),
        "shape": list(view.mask.shape),
        "frames": original.frames,
        "averaged_frames": original.averaged,
        "voxel_size_mm": [float(s) for s in view.grid.voxel_size_mm],
        "mask_volume_ml": mask_volume_ml(view.voxels, view.grid.voxel_size_mm),
        **correction_metrics(original.values, result.values, log_field, log_reference, by_class=datatype != "micr"),
        **(microscopy_metrics(original.values, result.values, view.mask) if datatype == "micr" else {}),
        "field_steepness": view.steepness(ours),
        "saturated_fraction": saturated_fraction(original.values, *original.stored),
        "wrapped_fraction": wrapped,
        "bright_outside_fraction": bright_outside,
        "mask_speckle_fraction": speckle_fraction(view.mask),
        "display_max": _display_max(result.values),
        "field_window_log": field_window_log,
        "field_beyond_window_fraction": float(np.mean(np.abs(log_field) > field_window_log)),
        **run_metrics(facts, reference_facts, view.voxels),
        "mask_method": (read_json(mask_sidecar).get("Mask") or {}).get("Method") if mask_sidecar else None,
        "versions": _versions(reference_facts) | _versions(facts),
    }
    values["flags"] = find_flags(values, flags)
    inside = original.values, result.values, log_field, log_reference
    volume_kept = shown if keep_volume else None
    return Subject(view, ours, *inside, pictures, fields, volume_kept, plain(values), facts, reference_facts)


def _display_max(corrected: np.ndarray) -> float:
    """Upper end of the window in which original and corrected are shown."""
    finite = corrected[np.isfinite(corrected)]
    high = float(np.percentile(finite, 99.5)) if finite.size else 0.0
    return high if high > 0 else 1.0


def _report_hash(mask: np.ndarray, before: np.ndarray, after: np.ndarray) -> str:
    """What a rating belongs to: the mask, and original and corrected in it. Shortened SHA-256."""
    digest = hashlib.sha256(np.packbits(mask.T).data)  # in the order of the file, as the values
    for values in (before, after):
        digest.update(np.ascontiguousarray(values).data)
    return digest.hexdigest()[:12]


def _versions(facts: Mapping[str, Any]) -> dict[str, str]:
    """Of what a result was made with, by name."""
    made_by = facts.get("Provenance") or {}
    return {"n4flow": made_by.get("n4flow"), **{name.lower(): v for name, v in (made_by.get("Versions") or {}).items()}}
