"""An OME-Zarr image through the workflow: a coarse volume of it, and its levels divided part by part."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from n4flow import __version__
from n4flow.core.samples import inside_mask
from n4flow.errors import InputError
from n4flow.images.arrays import (
    ChannelDivision,
    Place,
    Tally,
    divide_units,
    level_digest,
    places_of,
    read_coarse,
    read_nearest,
    unit_numbers,
)
from n4flow.images.fields import load_field
from n4flow.images.files import read_json, write_json
from n4flow.images.ngff import ROOTS, Files, Image, choose_coarse, file_of, is_store, read_image
from n4flow.images.nifti import Grid, Volume, VolumeWriter
from n4flow.images.remote import is_remote, names_in, remove, remove_all, write
from n4flow.study.bids import source_uri
from n4flow.study.provenance import provenance

log = logging.getLogger(__name__)

#: What may lie in a store that is not complete: the root metadata is written when everything else is there.
ROOT_NAMES = ("zarr.json", ".zattrs", ".zgroup")

FORMAT = "n4flow plan of a store, version 1"

#: File of a store in a bucket that says whose it is.
OWNER = "n4flow.json"

#: A mask whose longest edge is so many times that of the image, or the image's that of the mask, is on another scale.
OTHER_SCALE = 50.0

#: A unit of nothing but the fill value counts as missing if more than this share of its place lies in the mask.
MISSING_SHARE = 0.5

#: So many of them are named.
NAMED = 3

PACKAGES = ("numpy", "zarr", "numcodecs")


def coarse_scan(
    store: str | Path,
    output: str | Path,
    sidecar: str | Path,
    *,
    channel: str,
    t: str = "",
    level: int | str,
    level_voxels: int,
    offset: float | str | Mapping[str, float | str],
    pyramid_origin: str,
) -> None:
    """Write one level of a channel as the volume on which its field is estimated.

    Parameters
    ----------
    store : path-like
    output, sidecar : path-like
        NIfTI, float32, less the pedestal; JSON.
    channel, t : str
        As in the sheet: without a time point, the mean over all time points.
    level, level_voxels
        See `ngff.choose_coarse`.
    offset : float, "auto" or mapping
        The pedestal, or that of each channel by its label or index.
    pyramid_origin : {"auto", "declared"}

    Raises
    ------
    InputError
        The store is unusable.
    """
    output, sidecar = Path(output), Path(sidecar)
    image = read_image(store, pyramid_origin)
    index, at = image.channel_index(channel), image.time_index(t)
    chosen = choose_coarse(image, level, level_voxels)
    source = image.levels[chosen.level]
    if isinstance(offset, Mapping):
        named = {str(key): value for key, value in offset.items()}
        label = image.labels[index] if index < len(image.labels) else ""
        offset = named.get(channel, named.get(label, named.get(str(index), 0.0)))
    volume, pedestal, shares = read_coarse(image, source, chosen.factors, index, at, offset)
    grid = Grid.of(chosen.shape, np.array(chosen.affine))
    with VolumeWriter(output, grid, np.float32) as writer:
        for plane in range(volume.shape[2]):
            writer.write(volume[:, :, plane : plane + 1])
    sizes, axes = _pixel_sizes_um(image)
    write_json(
        sidecar,
        {
            "PixelSize": sizes,
            "PixelSizeUnits": "um",
            "Axes": axes,
            "Channel": channel or str(index),
            **({} if at is None else {"Time": at}),
            "Level": source.path,
            "Resolution": f"level {source.path}"
            + (f", averaged over {' x '.join(map(str, chosen.factors))} voxels" if max(chosen.factors) > 1 else ""),
            "LevelFactors": list(chosen.factors),
            "OriginAssumed": image.origin_assumed,
            "UnitAssumed": image.unit_assumed,
            "Offset": pedestal,
            "FillShare": round(shares["Fill"], 6),
            "SaturatedShare": round(shares["Saturated"], 6),
            "Sources": [source_uri(store, output)],
            "Provenance": provenance(_inputs(store), PACKAGES),
        },
    )


def _pixel_sizes_um(image: Image) -> tuple[list[float], list[str]]:
    """Of the finest level, along the axes of the volume."""
    axes = image.space[::-1]
    return [float(f"{1e3 * image.levels[0].scale[axis]:.9g}") for axis in axes], [image.axes[axis] for axis in axes]


def _inputs(store: str | Path) -> dict[str, str]:
    """The file of a store whose hash is told: the root metadata; of a zip file or in a bucket, none."""
    if is_remote(store):
        return {}
    root = file_of(store)
    return {} if os.path.samefile(root, store) else {"image": root}


def place_mask(image: str | Path, mask: str | Path, output: str | Path, *, pyramid_origin: str, t: str = "") -> None:
    """Bring a mask onto the grid of a coarse volume, by world coordinates: to each voxel its nearest neighbour's value.

    Parameters
    ----------
    image : path-like
        As `coarse_scan` wrote it.
    mask : path-like
        NIfTI, or an OME-Zarr label in the same space, of any resolution; what is not 0 counts.
    output : path-like
    pyramid_origin : {"auto", "declared"}
        Of the label.
    t : str, optional
        As in the sheet: of a label that has several time points, the first without it.

    Raises
    ------
    InputError
        The mask is unusable, on another scale, or lies outside of the image.
    """
    volume = Volume(image)
    if is_store(mask):
        labels = read_image(mask, pyramid_origin)
        # the coarsest of no fewer voxels than the volume: of label images, averages mean nothing
        enough = [level for level in labels.levels if labels.voxels(level) >= math.prod(volume.shape)]
        level = (enough or labels.levels[:1])[-1]
        shape, affine = labels.grid(level)
        _check_scale(mask, _edge_mm(shape, np.array(affine)), volume)
        to_label = np.linalg.solve(np.array(affine), volume.affine_mm)
        at = int(t or 0) if labels.times > 1 else 0
        if at >= labels.times:
            raise InputError(
                mask,
                f"has {labels.times} time points, and the row is of time point {t}",
                "give a label with as many time points as the image, or with one",
            )
        inside = read_nearest(labels, level, to_label, volume.shape, at) != 0
    else:
        given = Volume(mask)
        _check_scale(mask, _edge_mm(given.shape, given.affine_mm), volume)
        inside = _nearest_of_nifti(given, volume)
    if not inside.any():
        raise InputError(mask, f"has no voxel in {Path(image).name}", "give a mask in the same space, in mm")
    with VolumeWriter(output, volume, np.uint8, frames=1) as writer:
        for k in range(volume.shape[2]):
            writer.write(inside[:, :, k : k + 1].astype(np.uint8))


def _edge_mm(shape: Sequence[int], affine_mm: np.ndarray) -> float:
    """The longest edge of a grid."""
    return float(max(np.linalg.norm(affine_mm[:3, :3], axis=0) * shape[:3]))


def _check_scale(mask: str | Path, edge_mm: float, volume: Volume) -> None:
    """Refuse a mask in other units than its image: a corner of it may lie in the image all the same."""
    of_volume_mm = _edge_mm(volume.shape, volume.affine_mm)
    if not 1 / OTHER_SCALE <= edge_mm / of_volume_mm <= OTHER_SCALE:
        raise InputError(
            mask,
            f"is {edge_mm:.3g} mm long, and {volume.path.name} {of_volume_mm:.3g} mm",
            "give a mask in the same space, in mm (µm taken for mm?)",
        )


def _nearest_of_nifti(mask: Volume, volume: Volume) -> np.ndarray:
    """Whether the voxel of a mask counts that lies nearest to each one of a volume."""
    inside = inside_mask(mask.mean())
    to_mask = np.linalg.solve(mask.affine_mm, volume.affine_mm)
    i, j = (np.arange(n, dtype=np.float64) for n in volume.shape[:2])
    found = np.zeros(volume.shape, dtype=bool, order="F")
    for k in range(volume.shape[2]):
        nearest = [
            np.rint(row[0] * i[:, None] + row[1] * j + row[2] * k + row[3]).astype(np.int64) for row in to_mask[:3]
        ]
        there = np.logical_and.reduce([(n >= 0) & (n < size) for n, size in zip(nearest, inside.shape, strict=True)])
        found[:, :, k][there] = inside[tuple(n[there] for n in nearest)]
    return found


def plan_store(
    store: str | Path,
    target: str | Path,
    output: str | Path,
    *,
    job_gb: float,
    dtype: str,
    pyramid_origin: str,
) -> None:
    """Make the arrays of the corrected store like those of the input, and say who writes what.

    Nothing shows them to a reader yet: the root metadata is written last.

    Parameters
    ----------
    store, target : path-like
        Input and output.
    output : path-like
        JSON.
    job_gb : float
        GB of voxels that a part has.
    dtype : {"same", "float32"}
        Of the voxels that are written.
    pyramid_origin : {"auto", "declared"}

    Raises
    ------
    InputError
        The store is unusable, or nothing can be written; or what lies in a bucket is another study's.
    """
    image = read_image(store, pyramid_origin)
    if is_remote(target):
        _claim(str(target), output)
    hide(target)
    wanted = {}
    for level in image.levels:
        metadata = dict(level.metadata) if dtype == "same" else _as_float32(image, dict(level.metadata))
        wanted[f"{level.path}/{image.array_metadata}"] = metadata
    if is_remote(target):
        there = Files(target)
        there.fetch(wanted)
        names = set(names_in(str(target))) - {OWNER, "labels"}
        same = all(there.json(file) == metadata for file, metadata in wanted.items())
        if names and not (same and names == {level.path.partition("/")[0] for level in image.levels}):
            for name in names:
                remove_all(f"{target}/{name}")
    elif os.path.exists(target) and any(read_json(Path(target, file)) != wanted[file] for file in wanted):
        shutil.rmtree(target)
    for file, metadata in wanted.items():
        _write_in(target, file, metadata)
    write_json(
        output,
        {
            "Format": FORMAT,
            "Version": image.version,
            "Levels": [
                {
                    "Path": level.path,
                    "Shape": level.shape,
                    "Unit": level.unit,
                    "UnitsPerPart": level.units_per_part(job_gb),
                    "Parts": level.parts(job_gb),
                }
                for level in image.levels
            ],
        },
    )


def _claim(target: str, plan: str | Path) -> None:
    """Say in a bucket whose store this will be, by where its plan lies: nothing else tells two studies there apart.

    Raises
    ------
    InputError
        It is another's.
    """
    study = hashlib.sha256(os.path.abspath(plan).encode()).hexdigest()[:16]
    owner = (Files(target).json(OWNER) or {}).get("Study")
    if owner != study and (owner is not None or names_in(target)):
        raise InputError(
            target,
            "is there, and not of this results folder (or that was moved)",
            "give zarr.write_to another folder for each study, or remove what lies there",
        )
    _write_in(target, OWNER, {"Study": study})


def _write_in(target: str | Path, name: str, content: Mapping[str, Any]) -> None:
    """Write a JSON file of a store."""
    if is_remote(target):
        write(f"{target}/{name}", f"{json.dumps(content, indent=2, allow_nan=False)}\n".encode())
    else:
        write_json(Path(target, name), content)


def hide(target: str | Path) -> None:
    """Remove the root metadata of a store, so that no reader takes it for complete."""
    for name in ROOT_NAMES:
        if is_remote(target):
            remove(f"{target}/{name}")
        else:
            Path(target, name).unlink(missing_ok=True)


def _as_float32(image: Image, metadata: dict[str, Any]) -> dict[str, Any]:
    """The metadata of an array like this one of float32."""
    if image.version == "0.4":
        if metadata.get("filters"):
            raise InputError(image.path, "has filters of its own data type", "leave zarr.dtype at same")
        fill = metadata.get("fill_value")
        return {**metadata, "dtype": "<f4", "fill_value": None if fill is None else _float(fill)}
    codecs = json.loads(json.dumps(metadata["codecs"]))
    for codec in codecs:
        inner = codec["configuration"]["codecs"] if codec["name"] == "sharding_indexed" else [codec]
        for each in inner:
            if each["name"] == "bytes":
                each.setdefault("configuration", {}).setdefault("endian", "little")
    return {**metadata, "data_type": "float32", "fill_value": _float(metadata["fill_value"]), "codecs": codecs}


def _float(fill: Any) -> Any:
    return fill if isinstance(fill, str) else float(fill)


def divide_part(
    store: str | Path,
    target: str | Path,
    plan: str | Path,
    output: str | Path,
    *,
    channels: Mapping[str, Place],
    fields: Sequence[str | Path],
    coarse: Sequence[str | Path],
    level: int,
    part: int,
    keep_saturated: bool,
    pyramid_origin: str,
    threads: int = 1,
) -> None:
    """Divide a part of a level and write what was seen.

    Parameters
    ----------
    store, target : path-like
        Input and output.
    plan : path-like
        As `plan_store` wrote it.
    output : path-like
        JSON: counts, and the SHA-256 of the voxels of each unit, before and after.
    channels : mapping of str to (int, int or None)
        Of each row, which channel it is, and which time point of it; None for all.
    fields, coarse : sequences of path-like
        Field and sidecar of the coarse volume, of each row.
    level, part : int
    keep_saturated : bool
    pyramid_origin : {"auto", "declared"}
    threads : int

    Raises
    ------
    InputError
        The store is unusable, or something cannot be written.
    """
    start = time.perf_counter()
    hide(target)
    image = read_image(store, pyramid_origin)
    planned, source = read_json(plan)["Levels"][level], image.levels[level]
    if (tuple(planned["Shape"]), tuple(planned["Unit"])) != (source.shape, source.unit):
        raise InputError(store, f"is no longer the one that {plan} was made for", "remove the plan and run again")
    shape, affine = image.grid(source)
    units = list(unit_numbers(source, part, planned["UnitsPerPart"]))
    needed = places_of(image, source, units)
    divisions = {
        (index, at): ChannelDivision(
            load_field(path).on_grid(shape, np.array(affine), store), read_json(told)["Offset"]
        )
        for (index, at), path, told in zip(channels.values(), fields, coarse, strict=True)
        if any(index in of_channel and (at is None or at in of_time) for of_channel, of_time in needed)
    }
    tally = divide_units(
        image,
        source,
        os.path.join(target, source.path),
        divisions,
        units,
        keep_saturated=keep_saturated,
        threads=threads,
    )
    os.sync()  # zarr leaves that to the system: a marker without its voxels would outlive a loss of power
    seconds = round(time.perf_counter() - start, 3)
    told = {"Level": level, "Part": part, **_told(tally), "WallTimeSeconds": seconds}
    write_json(output, {**told, "Units": tally.units, "Empty": tally.empty})


def _told(tally: Tally) -> dict[str, Any]:
    return {
        "Voxels": tally.voxels,
        "Fill": tally.fill,
        "Saturated": tally.saturated,
        "Clipped": tally.clipped,
        "SelfCheck": tally.self_check,
    }


def describe_store(
    store: str | Path,
    parts: Sequence[str | Path],
    output: str | Path,
    *,
    channels: Mapping[str, Place],
    fields: Sequence[str | Path],
    coarse: Sequence[str | Path],
    masks: Sequence[str | Path | None],
    pyramid_origin: str,
    notes: Mapping[str, Any] | None = None,
) -> None:
    """Write the sidecar of a corrected store: what the parts have seen, and the digest of each level.

    Parameters
    ----------
    store : path-like
        The input.
    parts : sequence of path-like
        What `divide_part` wrote, of all parts.
    output : path-like
        JSON, in the folder of the store.
    channels, fields, coarse
        As of `divide_part`.
    masks : sequence of path-like
        Of the coarse volume of each row; None for one that has none.
    pyramid_origin : {"auto", "declared"}
    notes : mapping, optional
        Further keys of the sidecar.
    """
    image, output = read_image(store, pyramid_origin), Path(output)
    seen = [read_json(part) for part in parts]
    if any("Empty" not in part for part in seen):
        raise InputError(output, "has parts of an earlier version", "remove the files of its parts, and run again")
    total = {key: sum(part[key] for part in seen) for key in ("Voxels", "Fill", "Saturated", "Clipped")}
    missing = _missing_units(image, seen, channels, masks)
    for level, names in zip(image.levels, missing, strict=True):
        if names:
            log.warning(
                "%s: %d of the %d %s of its level %s hold nothing although most of their place is in the mask (%s), as "
                "if they had been lost: compare it with its source; once they are back, see docs/microscopy.md on what "
                "is noticed",
                *(store, len(names), math.prod(level.unit_grid), "shards" if level.unit != level.chunks else "chunks"),
                *(level.path, " ".join(names[:NAMED]) + (" …" if len(names) > NAMED else "")),
            )
    levels = []
    for number, level in enumerate(image.levels):
        of_level = [part["Units"] for part in seen if part["Level"] == number]
        units = {place: digests.split() for part in of_level for place, digests in part.items()}
        if len(units) != math.prod(level.unit_grid):
            raise InputError(
                output, f"lacks units of level {level.path}", "remove the files of its parts, and run again"
            )
        before, after = (level_digest({place: digests[which] for place, digests in units.items()}) for which in (0, 1))
        levels.append(
            {
                "Path": level.path,
                "Units": len(units),
                "MissingUnits": missing[number],
                "SHA256Before": before,
                "SHA256": after,
            }
        )
    sizes, axes = _pixel_sizes_um(image)
    rows = {
        name: {
            "Index": index,
            **({} if at is None else {"Time": at}),
            "Field": source_uri(Path(field), Path(output)),
            **{key: read_json(told)[key] for key in ("Channel", "Level", "Offset")},
        }
        for (name, (index, at)), field, told in zip(channels.items(), fields, coarse, strict=True)
    }
    write_json(
        output,
        {
            "PixelSize": sizes,
            "PixelSizeUnits": "um",
            "Axes": axes,
            "OriginAssumed": image.origin_assumed,
            "UnitAssumed": image.unit_assumed,
            "Channels": rows,
            "Clipped": total["Clipped"] / total["Voxels"],
            "Saturated": total["Saturated"] / total["Voxels"],
            "Fill": total["Fill"] / total["Voxels"],
            "SelfCheck": max(part["SelfCheck"] for part in seen),
            "Levels": levels,
            **(notes or {}),
            "Sources": [source_uri(store, output)],
            "Provenance": provenance(_inputs(store), PACKAGES),
        },
    )


def _missing_units(
    image: Image, parts: Sequence[Mapping[str, Any]], channels: Mapping[str, Place], masks: Sequence[str | Path | None]
) -> list[list[str]]:
    """Units of each level that hold nothing although most of their place lies in the mask: lost, it seems.

    Background that nobody wrote is outside of the mask. What is lost of the level that the mask was found on may be
    outside of it, too.
    """
    empty: dict[int, list[str]] = {}
    for part in parts:
        empty.setdefault(part["Level"], []).extend(part["Empty"])
    starts = {
        number: np.array([list(map(int, name.split("."))) for name in names]) * image.levels[number].unit
        for number, names in empty.items()
        if names
    }
    missing: list[set[str]] = [set() for _ in image.levels]
    for own, path in zip(channels.values(), masks, strict=True):
        if not starts or path is None:
            continue
        mask = Volume(path)
        inside = np.pad(mask.mean() > 0, ((1, 0),) * 3).astype(np.uint32)
        for axis in range(3):
            np.cumsum(inside, axis=axis, out=inside)
        for number, first in starts.items():
            level = image.levels[number]
            last = np.minimum(first + level.unit, level.shape)
            is_own = np.ones(len(first), dtype=bool)
            for name, at in zip(("c", "t"), own, strict=True):
                if at is not None and name in image.axes:
                    axis = image.axes.index(name)
                    is_own &= (first[:, axis] <= at) & (at < last[:, axis])
            to_mask = np.linalg.solve(mask.affine_mm, np.array(image.grid(level)[1]))
            along = image.space[::-1]
            shares = _shares(inside, to_mask, first[is_own][:, along], last[is_own][:, along])
            missing[number] |= {empty[number][k] for k in np.flatnonzero(is_own)[shares > MISSING_SHARE]}
    return [sorted(names, key=lambda name: list(map(int, name.split(".")))) for names in missing]


def _shares(sums: np.ndarray, to_other: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """Of the voxels of another grid whose centres lie in a box (one at least), the share that is in a mask there.

    Parameters
    ----------
    sums : (n0 + 1, n1 + 1, n2 + 1) array
        Of the mask, over all that lies before a corner.
    to_other : (4, 4) array
        From indices of the grid of the boxes to those of the mask, along the same axes.
    starts, stops : (boxes, 2 or 3) arrays
    """
    low, high = [], []
    for axis, n in enumerate(np.array(sums.shape) - 1):
        if axis == starts.shape[1]:  # a plane
            first, last = np.zeros(len(starts), dtype=int), np.ones(len(starts), dtype=int)
        else:
            first, last = (
                np.ceil(to_other[axis, axis] * (corner[:, axis] - 0.5) + to_other[axis, 3]).astype(int)
                for corner in (starts, stops)
            )
        low.append(first.clip(0, n - 1))
        high.append(np.maximum(low[-1] + 1, last.clip(0, n)))
    count = np.zeros(len(starts), dtype=np.int64)
    for corner in product((0, 1), repeat=3):
        sign = (-1) ** (3 - sum(corner))
        count += sign * sums[tuple(np.where(end, h, lo) for end, lo, h in zip(corner, low, high, strict=True))].astype(
            int
        )
    return count / np.prod([h - lo for lo, h in zip(low, high, strict=True)], axis=0)


def finish_store(
    store: str | Path, target: str | Path, sidecar: str | Path, output: str | Path, *, pyramid_origin: str
) -> None:
    """Write the root metadata of a corrected store, with which it becomes one.

    Parameters
    ----------
    store, target : path-like
        Input and output.
    sidecar : path-like
        As `describe_store` wrote it.
    output : path-like
        ``zarr.json`` (NGFF 0.5) or ``.zattrs`` (0.4) in the folder of the corrected store; if that does not lie on this
        machine, a copy of it here, which tells that the store is complete.
    pyramid_origin : {"auto", "declared"}
    """
    image, output = read_image(store, pyramid_origin), Path(output)
    for folder, _, names in os.walk(target):  # of writers that were killed
        for name in names:
            if name.endswith(".partial"):
                Path(folder, name).unlink(missing_ok=True)
    told = read_json(sidecar)
    kept = ("Channels", "Clipped", "Saturated", "Levels")
    ours = {"n4flow": {"Version": __version__, **{key: told[key] for key in kept}}}
    multiscales = image.attributes["multiscales"][:1]
    groups = {str(parent) for level in image.levels for parent in Path(level.path).parents} - {"."}
    if image.version == "0.5":
        ome = {"version": "0.5", **image.attributes, "multiscales": multiscales}
        group: dict[str, Any] = {"zarr_format": 3, "node_type": "group", "attributes": {}}
        for name in groups:
            _write_in(target, f"{name}/zarr.json", group)
        root = {**group, "attributes": {"ome": ome, **ours}}
    else:
        for name in ["", *groups]:
            _write_in(target, os.path.join(name, ".zgroup"), {"zarr_format": 2})
        root = {**image.attributes, "multiscales": multiscales, **ours}
    _write_in(target, image.root, root)
    if is_remote(target):
        write_json(output, root)
    if os.path.isdir(Path(store) / "labels") or (
        is_remote(store) and Files(store).json("labels", ROOTS[image.version]) is not None
    ):
        log.warning("%s: its labels are not copied; they fit the corrected store as well", store)
