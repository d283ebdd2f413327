"""An OME-Zarr image at full resolution, before and after, where parts meet that were divided by themselves."""

from __future__ import annotations

import logging
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.font_manager import findfont
from PIL import Image as Picture
from PIL import ImageDraw, ImageFont

from n4flow.errors import MachineError
from n4flow.images.arrays import read_part
from n4flow.images.files import atomic_bytes, read_json, shortened
from n4flow.images.ngff import Image, Level, read_image
from n4flow.images.nifti import Volume
from n4flow.qc.mosaics import length_text, round_length
from n4flow.qc.pictures import webp

log = logging.getLogger(__name__)

#: How many there are, and how many voxels wide.
CROPS, EDGE = 3, 512

#: So many places where units meet are looked at.
PLACES = 2000

#: From so large a share of the voxels on it is said that they were cut off at the limit of their type.
CLIPPED = 0.001

#: Around the pictures, in pixels: between two, above and below a row.
GAP, LINE = 8, 24

QUALITY = 70

FONT = findfont("DejaVu Sans")


class Seam(NamedTuple):
    """Where two units meet, on the axes z, y and x of an array."""

    normal: int  # the axis through the crop that shows it
    across: int  # the axis across which they meet
    centre: tuple[int, ...]  # a voxel on it
    parts: tuple[int, int]  # to which parts they belong


def draw_crops(
    store: str | Path,
    corrected: str | Path,
    plan: str | Path,
    mask: str | Path,
    sidecar: str | Path,
    told: str | Path,
    output: str | Path,
    *,
    channel: str,
    pyramid_origin: str,
    t: str = "",
) -> None:
    """Draw crops of the finest level of a channel, original and corrected, side by side in one window.

    In each of them two parts of the division meet, in the mask; where no two do, two units (shards or chunks). Where
    they cannot be drawn, the log and the picture say so: an image is not set aside for want of them.

    Parameters
    ----------
    store, corrected : path-like
        Input and output.
    plan : path-like
        As `pyramid.plan_store` wrote it.
    mask : path-like
        On the grid of the coarse volume.
    sidecar, told : path-like
        Of the coarse volume, and of the corrected store.
    output : path-like
        WebP.
    channel, t : str
        As in the sheet: without a time point, the first one is drawn.
    pyramid_origin : {"auto", "declared"}

    Raises
    ------
    MachineError
        The picture cannot be written.
    """
    try:
        picture = webp(_drawn(store, corrected, plan, mask, sidecar, told, channel, t, pyramid_origin), QUALITY)
    except MachineError:
        raise
    except Exception as error:  # whatever it is, the image is corrected all the same
        problem = f"no crops: {type(error).__name__}: {shortened(str(error))}"
        log.warning("%s: %s", corrected, problem)
        picture = webp(_said(problem), QUALITY)
    with atomic_bytes(output) as file:
        file.write(picture)


def _said(text: str) -> Picture.Image:
    """A line of text, on as many as it takes."""
    lines = textwrap.wrap(text, 70)
    sheet = Picture.new("RGB", (640, LINE * len(lines) + 8), (0, 0, 0))
    ImageDraw.Draw(sheet).text((4, 2), "\n".join(lines), fill=(255, 196, 0), font=ImageFont.truetype(FONT, 15))
    return sheet


def _drawn(
    store: str | Path,
    corrected: str | Path,
    plan: str | Path,
    mask: str | Path,
    sidecar: str | Path,
    told: str | Path,
    channel: str,
    t: str,
    pyramid_origin: str,
) -> Picture.Image:
    before, after = read_image(store, pyramid_origin), read_image(corrected, pyramid_origin)
    index, at = before.channel_index(channel), before.time_index(t) or 0
    level = before.levels[0]
    units_per_part = int(read_json(plan)["Levels"][0]["UnitsPerPart"])
    shown = _choose(before, level, Volume(mask), (index, at), units_per_part)
    rows = []
    for seam in shown:
        region, size_mm = _region(before, level, seam)
        pair = [
            np.nan_to_num(read_part(image, image.levels[0], region[-len(image.space) :], index, at).astype(np.float32))
            for image in (before, after)
        ]
        rows.append((seam, region, size_mm, [np.squeeze(values, axis=_thin(region, values)) for values in pair]))
    offset = float(read_json(sidecar)["Offset"])
    top = max(float(np.percentile(pair[1], 99.5)) for *_, pair in rows)
    facts = read_json(told)
    clipped, missing = float(facts["Clipped"]), sum(len(level.get("MissingUnits", ())) for level in facts["Levels"])
    notes = []
    if clipped > CLIPPED:
        notes.append(f"{100 * clipped:.2g} % of the voxels of the image were cut off; set zarr.dtype: float32")
    if missing:
        notes.append(
            f"{missing} chunks or shards of the image hold nothing inside of its mask; compare it with its source"
        )
    return _sheet(before, rows, offset, top if top > offset else offset + 1, notes)


def _thin(region: Sequence[slice], values: np.ndarray) -> tuple[int, ...]:
    """The axis through a crop, if the values have it."""
    thin = next(axis for axis, along in enumerate(region) if along.stop - along.start == 1)
    return (thin,) if values.ndim == 3 else ()


def _zyx(image: Image, values: Sequence[Any]) -> tuple[int, ...]:
    """Of something of all axes of an array what it is along its three of space; a plane has one of 1."""
    return (1, *(int(values[axis]) for axis in image.space))[-3:]


def _choose(image: Image, level: Level, mask: Volume, place: tuple[int, int], units_per_part: int) -> list[Seam]:
    """Seams in the mask, far from one another, those of parts first; without any, the middle of the mask."""
    inside = mask.mean() > 0
    to_mask = np.linalg.solve(mask.affine_mm, np.array(image.grid(level)[1]))
    by_region: dict[str, Seam] = {}  # of a small image, many crops would show the same
    for seam in _seams(image, level, place, units_per_part):
        if _value_at(inside, to_mask, seam.centre[::-1]):
            by_region.setdefault(str(_region(image, level, seam)[0]), seam)
    found = list(by_region.values())
    of_parts = [seam for seam in found if seam.parts[0] != seam.parts[1]]
    shown = _spread(of_parts, CROPS)
    shown += _spread([seam for seam in found if seam.parts[0] == seam.parts[1]], CROPS - len(shown))
    if shown:
        return shown
    middle = np.linalg.solve(to_mask, [*np.median(np.argwhere(inside), axis=0), 1])[2::-1]
    centre = np.rint(middle).astype(int).clip(0, np.array(_zyx(image, level.shape)) - 1)
    return [Seam(0, 1, tuple(centre.tolist()), (0, 0))]


def _value_at(values: np.ndarray, to_values: np.ndarray, place: Sequence[int]) -> bool:
    """The value of the nearest voxel; False where there is none."""
    at = np.rint(to_values[:3, :3] @ place + to_values[:3, 3]).astype(int)
    return all(0 <= n < size for n, size in zip(at, values.shape, strict=True)) and bool(values[tuple(at)])


def _spread(seams: Sequence[Seam], count: int) -> list[Seam]:
    """So many of them, evenly from the first to the last."""
    places = np.linspace(0, len(seams) - 1, 2 * min(count, len(seams)) + 1)[1::2]
    return [seams[round(place)] for place in places]


def _seams(image: Image, level: Level, channel_time: tuple[int, int], units_per_part: int) -> Iterator[Seam]:
    """Faces of units of a channel at a time point: between parts, `PLACES` at most, then as many others, in order."""
    unit, shape = _zyx(image, level.unit), _zyx(image, level.shape)
    first = {
        name: index // level.unit[image.axes.index(name)]
        for name, index in zip(("c", "t"), channel_time, strict=True)
        if name in image.axes
    }
    grid = np.indices([1 if name in first else n for name, n in zip(image.axes, level.unit_grid, strict=True)])
    place = [first.get(name, along) + np.zeros_like(along) for name, along in zip(image.axes, grid, strict=True)]
    part = np.ravel_multi_index(tuple(place), level.unit_grid).reshape(_zyx(image, level.unit_grid)) // units_per_part
    # per unit and axis, whether it meets the next one there, and whether that is of another part
    meets, differs = np.zeros((2, *part.shape, 3), dtype=bool)
    for across in range(3):
        one, other = (np.moveaxis(part, across, 0)[k : part.shape[across] - 1 + k] for k in (0, 1))
        np.moveaxis(meets[..., across], across, 0)[:-1] = True
        np.moveaxis(differs[..., across], across, 0)[:-1] = one != other
    for faces in (differs, meets & ~differs):
        some = np.flatnonzero(faces)
        for *at, across in zip(*np.unravel_index(some[:: 1 + len(some) // PLACES], faces.shape), strict=True):
            centre = [min(int(n) * size + size // 2, most - 1) for n, size, most in zip(at, unit, shape, strict=True)]
            centre[across] = (int(at[across]) + 1) * unit[across]
            behind = [int(n) + (axis == across) for axis, n in enumerate(at)]
            yield Seam(int(across == 0), int(across), tuple(centre), (int(part[tuple(at)]), int(part[tuple(behind)])))


def _region(image: Image, level: Level, seam: Seam) -> tuple[list[slice], tuple[float, float]]:
    """What is read, along z, y and x, and the size of a voxel along the rows and columns of the picture."""
    shape = _zyx(image, level.shape)
    scale = [level.scale[axis] for axis in image.space]
    sizes = [scale[0], *scale][-3:]
    axes = [axis for axis in range(3) if axis != seam.normal]
    side_mm = EDGE * min(sizes[axis] for axis in axes)
    region = [slice(at, at + 1) for at in seam.centre]
    for axis in axes:
        count = min(shape[axis], max(1, round(side_mm / sizes[axis])))
        start = min(max(0, seam.centre[axis] - count // 2), shape[axis] - count)
        region[axis] = slice(start, start + count)
    return region, (sizes[axes[0]], sizes[axes[1]])


Row = tuple[Seam, list[slice], tuple[float, float], list[np.ndarray]]


def _sheet(image: Image, rows: Sequence[Row], low: float, high: float, notes: Sequence[str]) -> Picture.Image:
    """A row for each crop, under what it is, with ticks where the units meet and a scale bar; notes above, if any."""
    fonts = ImageFont.truetype(FONT, 15)
    names = [image.axes[axis] for axis in image.space]
    names = ["", *names][-3:]
    scales = [_pixels_per_mm(pair[0].shape, size_mm) for *_, size_mm, pair in rows]
    tiles = [
        [_grey(values, low, high, size_mm, per_mm) for values in pair]
        for (*_, size_mm, pair), per_mm in zip(rows, scales, strict=True)
    ]
    width = max(sum(tile.width for tile in pair) for pair in tiles) + GAP
    head = LINE * len(notes)
    height = head + sum(pair[0].height + 2 * LINE for pair in tiles)
    sheet = Picture.new("RGB", (max(width, 640), height), (0, 0, 0))
    pen, top = ImageDraw.Draw(sheet), head
    pen.text((4, 2), "\n".join(notes), fill=(255, 196, 0), font=fonts)
    for (seam, region, size_mm, _), pair, per_mm in zip(rows, tiles, scales, strict=True):
        axes = [axis for axis in range(3) if axis != seam.normal]
        through = [f"{names[seam.normal]} {seam.centre[seam.normal]}"] if names[seam.normal] else []
        said = ", ".join([*through, *(f"{names[a]} {region[a].start} to {region[a].stop - 1}" for a in axes)])
        parts = f"parts {seam.parts[0]} and {seam.parts[1]}" if seam.parts[0] != seam.parts[1] else "units"
        tick = (seam.centre[seam.across] - region[seam.across].start) * size_mm[axes.index(seam.across)] * per_mm
        pen.text((4, top + 2), f"{said}; at the ticks {parts} meet", fill="white", font=fonts)
        top += LINE
        left = 0
        for name, tile in zip(("original", "corrected"), pair, strict=True):
            sheet.paste(tile, (left, top))
            ends = ((0, 10), (-10, 0))
            for start, stop in ends:
                if seam.across == axes[1]:
                    edge = top + (tile.height if start < 0 else 0)
                    pen.line([(left + tick, edge + start), (left + tick, edge + stop)], fill=(255, 196, 0), width=2)
                else:
                    edge = left + (tile.width if start < 0 else 0)
                    pen.line([(edge + start, top + tick), (edge + stop, top + tick)], fill=(255, 196, 0), width=2)
            pen.text((left + 4, top + tile.height + 2), name, fill="white", font=fonts)
            left += tile.width + GAP
        length_mm = round_length(0.25 * pair[0].width / per_mm)
        end, y = left - GAP - 4, top + pair[0].height + 14
        pen.line([(end - length_mm * per_mm, y), (end, y)], fill="white", width=3)
        text = length_text(length_mm)
        pen.text((end - length_mm * per_mm - 6, y), text, fill="white", font=fonts, anchor="rm")
        top += pair[0].height + LINE
    return sheet


def _pixels_per_mm(shape: Sequence[int], size_mm: Sequence[float]) -> float:
    """A pixel is a voxel, or several are where a crop is small; of voxels like rods, none is longer than two edges."""
    across_mm, finest_mm = max(n * mm for n, mm in zip(shape, size_mm, strict=True)), min(size_mm)
    return min(max(1, int(EDGE * finest_mm / across_mm)) / finest_mm, 2 * EDGE / across_mm)


def _grey(values: np.ndarray, low: float, high: float, size_mm: tuple[float, float], scale: float) -> Picture.Image:
    """A crop in grey, so many pixels per mm."""
    shades = np.rint(255 * ((values.clip(low, high) - low) / (high - low))).astype(np.uint8)
    size = [max(1, round(n * mm * scale)) for n, mm in zip(values.shape, size_mm, strict=True)]
    return Picture.fromarray(shades).resize((size[1], size[0]), Picture.Resampling.NEAREST)
