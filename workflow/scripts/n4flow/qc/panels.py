"""The pictures of a subject: planes of the file laid out upright.

Nothing is resampled to another grid: a picture shows index planes of the file, flipped and
transposed so that anatomy stands upright (superior or anterior up, the subject's right on the right).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
from contourpy import FillType, contour_generator
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.path import Path as Outline
from matplotlib.patheffects import withStroke
from PIL import Image, ImageDraw

from n4flow.qc.pictures import picture_of

WORLD = (("L", "R"), ("P", "A"), ("I", "S"))
PLANE_NAMES = ("sagittal", "coronal", "axial")

#: Where the slices of a plane lie, as a share of the mask's voxels; field panels show the middle two.
SLICE_QUANTILES = (0.12, 0.37, 0.63, 0.88)
FIELD_SLICES = slice(1, 3)

#: Radius by which the mask is closed to a silhouette, as a share of the picture: 5 mm of 200 mm.
CLOSING_SHARE = 0.025

#: What is shown around the mask, as a share of it.
MARGIN_SHARE = 0.03

#: An outline is found on about so many pixels a side.
OUTLINE_PIXELS = 512

OUTSIDE = "#b9bcc0"

#: Width of the two mosaics of the image in pixels; half of it fits a field panel with half the slices, row by row.
WIDTH = 1120

#: Height of all rows of a mosaic together, in pixels, if they would be taller.
TALLEST = 1100

#: Side of a plane in the grid of all scans.
THUMBNAIL_PIXELS = 160


@dataclass(frozen=True)
class Plane:
    """How an index plane of the file is shown.

    Parameters
    ----------
    name : str
        Nearest anatomical plane.
    normal, across, up : int
        Voxel axes: through the plane, to the right and upwards in the picture.
    flip_normal, flip_across, flip_up : bool
        The axis runs from R to L, A to P or S to I.
    labels : (left, right, bottom, top)
        Anatomical directions.
    size_mm : (across, up)
        Of a voxel.
    """

    name: str
    normal: int
    across: int
    up: int
    flip_normal: bool
    flip_across: bool
    flip_up: bool
    labels: tuple[str, str, str, str]
    size_mm: tuple[float, float]

    def upright(self, plane: np.ndarray) -> np.ndarray:
        """An index plane (its two axes in the file's order) as rows from bottom to top."""
        picture = plane.T if self.across < self.up else plane
        return picture[:: -1 if self.flip_up else 1, :: -1 if self.flip_across else 1]


@dataclass(frozen=True)
class Slice:
    """One index plane, and the part of it that is shown."""

    plane: Plane
    index: int
    box: tuple[slice, slice, slice]

    @property
    def tile(self) -> tuple[slice, slice, slice]:
        """The voxels of the slice."""
        box = list(self.box)
        box[self.plane.normal] = slice(self.index, self.index + 1)
        return box[0], box[1], box[2]

    def picture(self, values: np.ndarray) -> np.ndarray:
        """The voxels of `tile` as a picture, rows from bottom to top."""
        return self.plane.upright(np.squeeze(values, axis=self.plane.normal))

    def cut(self, volume: np.ndarray) -> np.ndarray:
        """The slice of a whole volume as a picture, rows from bottom to top."""
        return self.picture(volume[self.tile])


def upright_planes(affine: np.ndarray, shape: Sequence[int], voxel_size_mm: Sequence[float]) -> list[Plane]:
    """Axial, coronal and sagittal planes, as near as the file's axes come to them.

    Planes with an axis of fewer than 4 voxels are left out; a 2-D image has one plane.

    Parameters
    ----------
    affine : (4, 4) array
    shape : (n0, n1, n2)
    voxel_size_mm : three floats
    """
    codes = nib.aff2axcodes(affine)
    world = [next(w for w, pair in enumerate(WORLD) if code in pair) for code in codes]
    thin = [axis for axis in range(3) if shape[axis] < 4]
    planes = []
    for normal in sorted(range(3), key=lambda axis: -world[axis]):
        if thin and normal != min(thin, key=lambda axis: shape[axis]):
            continue
        across, up = sorted((axis for axis in range(3) if axis != normal), key=lambda axis: world[axis])
        flip_normal, flip_across, flip_up = (codes[a] == WORLD[world[a]][0] for a in (normal, across, up))
        planes.append(
            Plane(
                PLANE_NAMES[world[normal]],
                normal,
                across,
                up,
                flip_normal,
                flip_across,
                flip_up,
                (*WORLD[world[across]], *WORLD[world[up]]),
                (float(voxel_size_mm[across]), float(voxel_size_mm[up])),
            )
        )
    return planes


def oblique_degrees(affine: np.ndarray) -> float:
    """Largest angle between an axis of the file and the anatomical axis it is named after."""
    axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    ornt = nib.io_orientation(affine)[:, 0].astype(int)
    return float(np.degrees(np.arccos(np.clip(np.abs(axes[ornt, range(3)]), 0, 1)).max()))


def choose_slices(mask: np.ndarray, planes: Sequence[Plane]) -> list[list[Slice]]:
    """Slices through the mask, one list per plane, cropped to the mask and a margin.

    Parameters
    ----------
    mask : (n0, n1, n2) bool array
        Not empty.
    """
    counts = [mask.sum(axis=tuple(a for a in range(3) if a != axis)) for axis in range(3)]
    box = []
    for count in counts:
        hit = np.flatnonzero(count)
        margin = round(MARGIN_SHARE * (hit[-1] - hit[0] + 1))
        box.append(slice(max(0, int(hit[0]) - margin), min(len(count), int(hit[-1]) + margin + 1)))
    chosen = []
    for plane in planes:
        share = np.cumsum(counts[plane.normal]) / counts[plane.normal].sum()
        indices = sorted({int(np.searchsorted(share, q)) for q in SLICE_QUANTILES})
        ordered = indices[:: -1 if plane.flip_normal else 1]
        chosen.append([Slice(plane, index, (box[0], box[1], box[2])) for index in ordered])
    return chosen


def silhouette(mask: np.ndarray, size_mm: Sequence[float]) -> list[np.ndarray]:
    """Outer outlines of a mask in a plane, closed by `CLOSING_SHARE`, holes and specks left out.

    Parameters
    ----------
    mask : (rows, columns) bool array
    size_mm : (across, up)
        Of a pixel.

    Returns
    -------
    list of (n, 2) arrays
        Closed rings, largest first, x and y as shares of the picture's width and height.
    """
    steps = [max(1, n // OUTLINE_PIXELS) for n in mask.shape]
    mask = mask[:: steps[0], :: steps[1]]
    pixel_mm = [size * step for size, step in zip(size_mm[::-1], steps, strict=True)]
    radius_mm = CLOSING_SHARE * max(n * size for n, size in zip(mask.shape, pixel_mm, strict=True))
    radii = [max(1, round(radius_mm / size)) for size in pixel_mm]
    pad = [r + 2 for r in radii]
    grown = np.pad(mask, [(p, p) for p in pad])
    for axis, radius in enumerate(radii):
        grown = _spread(grown, axis, radius)
    for axis, radius in enumerate(radii):
        grown = ~_spread(~grown, axis, radius)
    smooth: np.ndarray = grown.astype(np.float32)
    for axis in (0, 1):
        smooth = (np.roll(smooth, 1, axis) + 2 * smooth + np.roll(smooth, -1, axis)) / 4
    contours: Any = contour_generator(z=smooth, fill_type=FillType.OuterOffset).filled(0.5, 2)
    rings = [ring[: ends[1]] for ring, ends in zip(*contours, strict=True)]
    shares = [(ring - pad[::-1] + 0.5) / mask.shape[::-1] for ring in rings]
    shares.sort(key=_area, reverse=True)
    kept: list[np.ndarray] = []
    for ring in shares:
        if _area(ring) >= 0.005 and not any(Outline(other).contains_point(ring[0]) for other in kept):
            kept.append(ring)
    return kept


def _spread(mask: np.ndarray, axis: int, radius: int) -> np.ndarray:
    """Dilation by a line; what lies beyond the border counts as the border does."""
    result = mask.copy()
    for step in range(1, radius + 1):
        result |= np.roll(mask, step, axis) | np.roll(mask, -step, axis)
    return result


def _area(ring: np.ndarray) -> float:
    x, y = ring.T
    return 0.5 * abs(float(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))))


class ColourScale(NamedTuple):
    """What the colours of a mosaic mean."""

    cmap: str
    low: float
    high: float
    ticks: list[tuple[float, str]]
    label: str


def intensity_scale(high: float) -> ColourScale:
    """Grey from 0 to `high`."""
    return ColourScale("gray", 0, high, [(0, "0"), (high, f"{high:.4g}")], "intensity")


def ratio_ticks(window_log: float) -> list[tuple[float, str]]:
    """Ticks of a log field at plain ratios, symmetric about ×1, the outermost that fit and one half as far."""
    steps = [r for r in (1.002, 1.005, 1.01, 1.02, 1.05, 1.1, 1.25, 1.5, 2, 3, 5, 10) if math.log(r) <= window_log]
    outer = steps[-1:]
    inner = [r for r in steps if 0.25 <= math.log(r) / window_log <= 0.6][-1:]
    ticks = [(0.0, "×1")]
    for ratio in {*outer, *inner}:
        digits = 2 if ratio >= 1.05 else 3
        ticks += [(math.log(value), f"×{value:.{digits}f}".rstrip("0").rstrip(".")) for value in (ratio, 1 / ratio)]
    return sorted(ticks)


def field_scale(window_log: float) -> ColourScale:
    """Red where the field is above 1 (brighter than it should be), blue below."""
    return ColourScale("RdBu_r", -window_log, window_log, ratio_ticks(window_log), "log scale")


def difference_scale(window_log: float) -> ColourScale:
    """Purple where ours is above the reference, orange below."""
    return ColourScale("PuOr", -window_log, window_log, ratio_ticks(window_log), "ours / reference")


def mosaic(
    pictures: Sequence[Sequence[np.ndarray]],
    slices: Sequence[Sequence[Slice]],
    scale: ColourScale,
    *,
    width: int,
    title: str,
    outlines: Sequence[Sequence[list[np.ndarray]]] | None = None,
    clip: bool = False,
) -> Image.Image:
    """Rows of slices, one row per plane, with anatomical labels and a colour bar.

    Parameters
    ----------
    pictures : per plane, per slice, a (rows, columns) array
        Rows from bottom to top.
    slices : per plane, per slice
    scale : ColourScale
    width : int
        Of the mosaic in pixels.
    title : str
        Printed in the corner, so that a screenshot speaks for itself.
    outlines : per plane, per slice, rings of `silhouette`, optional
    clip : bool
        Show nothing outside the outlines, instead of drawing them on the picture.
    """
    gap, row_gap, bar = 6, 14, 56
    rows, y = [], bar
    most = TALLEST / len(slices)
    for row in reversed(slices):
        aspects = [_aspect(s) for s in row]
        height = min((width - gap * (len(row) + 1)) / sum(aspects), most)
        rows.append((y, height, aspects))
        y += round(height) + row_gap
    total = y + 34
    dark = not clip
    figure = Figure(figsize=(width / 100, total / 100), dpi=100, facecolor="black" if dark else OUTSIDE)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(0, total))
    axes.axis("off")
    ink = "white" if dark else "black"
    halo = [withStroke(linewidth=2.5, foreground="black" if dark else OUTSIDE)]
    style: dict[str, Any] = {"color": ink, "fontsize": 13, "path_effects": halo}
    for number, (bottom, height, aspects) in zip(reversed(range(len(slices))), rows, strict=True):
        x = (width - height * sum(aspects) - gap * (len(aspects) - 1)) / 2
        for column, aspect in enumerate(aspects):
            extent = (x, x + height * aspect, bottom, bottom + height)
            where = slices[number][column]
            shown = axes.imshow(
                pictures[number][column],
                cmap=scale.cmap,
                vmin=scale.low,
                vmax=scale.high,
                extent=extent,
                origin="lower",
                interpolation="bilinear",
                aspect="auto",
            )
            rings = (
                [ring * (height * aspect, height) + (x, bottom) for ring in outlines[number][column]]
                if outlines
                else []
            )
            if clip and rings:
                path = Outline.make_compound_path(*[Outline(ring, closed=True) for ring in rings])
                shown.set_clip_path(path, transform=axes.transData)
            elif clip:
                shown.set_visible(False)
            for ring in rings:
                axes.plot(*ring.T, color="#3c3c3c" if clip else "#ffd23c", linewidth=0.8 if clip else 1.1)
            _label_slice(axes, where, extent, style, full=column == 0)
            x += height * aspect + gap
    axes.text(10, total - 17, title, va="center", weight="bold", **{**style, "fontsize": 14})
    _colour_bar(axes, scale, width, style)
    axes.set(xlim=(0, width), ylim=(0, total))
    return picture_of(figure)


def thumbnail(
    pictures: Sequence[Sequence[np.ndarray]],
    slices: Sequence[Sequence[Slice]],
    scale: ColourScale,
    outlines: Sequence[Sequence[list[np.ndarray]]] | None = None,
) -> np.ndarray:
    """The middle slice of each plane side by side, small, for the grid of all scans.

    Parameters
    ----------
    pictures, slices, scale
        As for `mosaic`.
    outlines : optional
        Show nothing outside them.

    Returns
    -------
    (THUMBNAIL_PIXELS, 3 THUMBNAIL_PIXELS, 3) uint8 array
    """
    side = THUMBNAIL_PIXELS
    sheet = Image.new("RGB", (3 * side, side), "black" if outlines is None else OUTSIDE)
    left = (3 - len(slices)) * side // 2
    for number, row in enumerate(slices):
        middle = len(row) // 2
        shares = (pictures[number][middle] - scale.low) / (scale.high - scale.low)
        image = Image.fromarray(colormaps[scale.cmap](shares[::-1].clip(0, 1), bytes=True)[..., :3])
        aspect = _aspect(row[middle])
        size = (max(1, round(side * min(1, aspect))), max(1, round(side * min(1, 1 / aspect))))
        image = image.resize(size, Image.Resampling.BILINEAR)
        shown = Image.new("L", size, 255 if outlines is None else 0)
        for ring in outlines[number][middle] if outlines else ():
            corners = (ring * (1, -1) + (0, 1)) * size
            ImageDraw.Draw(shown).polygon([(float(x), float(y)) for x, y in corners], fill=255)
        sheet.paste(image, (left + (side - size[0]) // 2, (side - size[1]) // 2), shown)
        left += side
    return np.asarray(sheet)


def _aspect(where: Slice) -> float:
    plane = where.plane
    across, up = (
        (where.box[axis].stop - where.box[axis].start) * size
        for axis, size in zip((plane.across, plane.up), plane.size_mm, strict=True)
    )
    return across / up


def _label_slice(axes: Any, where: Slice, extent: tuple[float, ...], style: dict[str, Any], full: bool) -> None:
    x0, x1, y0, y1 = extent
    left, right, bottom, top = where.plane.labels
    axes.text(
        x1 - 4,
        y0 + 3,
        f"{'ijk'[where.plane.normal]} {where.index}",
        ha="right",
        va="bottom",
        **{**style, "fontsize": 10},
    )
    if full:  # every slice of a row is turned the same way
        middle = ((x0 + x1) / 2, (y0 + y1) / 2)
        axes.text(x0 + 5, middle[1], left, ha="left", va="center", **style)
        axes.text(x1 - 5, middle[1], right, ha="right", va="center", **style)
        axes.text(middle[0], y0 + 3, bottom, ha="center", va="bottom", **style)
        axes.text(middle[0], y1 - 3, top, ha="center", va="top", **style)


def _colour_bar(axes: Any, scale: ColourScale, width: int, style: dict[str, Any]) -> None:
    x0, x1 = 0.1 * width, 0.9 * width
    axes.imshow(
        np.linspace(0, 1, 256)[None], cmap=scale.cmap, extent=(x0, x1, 32, 46), aspect="auto", interpolation="bilinear"
    )
    axes.plot([x0, x1, x1, x0, x0], [32, 32, 46, 46, 32], color=style["color"], linewidth=0.6)
    for value, text in scale.ticks:
        x = x0 + (value - scale.low) / (scale.high - scale.low) * (x1 - x0)
        axes.plot([x, x], [27, 32], color=style["color"], linewidth=1)
        axes.text(x, 25, text, ha="center", va="top", **{**style, "fontsize": 12})
