"""Which planes of a scan are shown, how they are turned, and where the mask ends in them.

Nothing is resampled to another grid: a picture shows index planes of the file, flipped and
transposed so that anatomy stands upright (superior or anterior up, the subject's right on the right).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import nibabel as nib
import numpy as np
from contourpy import FillType, contour_generator
from matplotlib.path import Path as Outline

WORLD = (("L", "R"), ("P", "A"), ("I", "S"))
PLANE_NAMES = ("sagittal", "coronal", "axial")

#: Where the slices of a plane lie, as a share of mask and foreground; field panels show the middle two.
SLICE_QUANTILES = (0.12, 0.37, 0.63, 0.88)
FIELD_SLICES = slice(1, 3)

#: Radius by which the mask is closed to a silhouette, as a share of the picture: 5 mm of 200 mm.
CLOSING_SHARE = 0.025

#: What is shown around mask and foreground, as a share of them.
MARGIN_SHARE = 0.03

#: A plane of the image shows something where more than this share of its voxels is foreground: noise leaves a few.
FOREGROUND_SHARE = 0.03

#: What lies outside of the mask is noise up to its median and so many times the median distance from that.
NOISE_SPREADS = 5.0

#: An outline is found on about so many pixels a side.
OUTLINE_PIXELS = 512


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
        Anatomical directions; empty where nothing says which they are.
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

    @property
    def size_mm(self) -> tuple[float, float]:
        """Width and height of the picture."""
        plane = self.plane
        across, up = (
            (self.box[axis].stop - self.box[axis].start) * size
            for axis, size in zip((plane.across, plane.up), plane.size_mm, strict=True)
        )
        return across, up

    def picture(self, values: np.ndarray) -> np.ndarray:
        """The voxels of `tile` as a picture, rows from bottom to top."""
        return self.plane.upright(np.squeeze(values, axis=self.plane.normal))

    def cut(self, volume: np.ndarray) -> np.ndarray:
        """The slice of a whole volume as a picture, rows from bottom to top."""
        return self.picture(volume[self.tile])


def upright_planes(
    affine: np.ndarray, shape: Sequence[int], voxel_size_mm: Sequence[float], *, anatomical: bool = True
) -> list[Plane]:
    """Axial, coronal and sagittal planes, as near as the file's axes come to them.

    Planes with an axis of fewer than 4 voxels are left out; a 2-D image has one plane.

    Parameters
    ----------
    affine : (4, 4) array
    shape : (n0, n1, n2)
    voxel_size_mm : three floats
    anatomical : bool
        The affine tells where the subject's right, front and top are.
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
                (*WORLD[world[across]], *WORLD[world[up]]) if anatomical else ("", "", "", ""),
                (float(voxel_size_mm[across]), float(voxel_size_mm[up])),
            )
        )
    return planes


def oblique_degrees(affine: np.ndarray) -> float:
    """Largest angle between an axis of the file and the anatomical axis it is named after."""
    axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    ornt = nib.io_orientation(affine)[:, 0].astype(int)
    return float(np.degrees(np.arccos(np.clip(np.abs(axes[ornt, range(3)]), 0, 1)).max()))


def foreground(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """What stands out from the noise outside of a mask, whether the mask holds it or not.

    Parameters
    ----------
    values : (n0, n1, n2) array
        The original; what is not finite counts as 0.
    mask : (n0, n1, n2) bool array

    Returns
    -------
    (n0, n1, n2) bool array
        Noise leaves some voxels of it everywhere.
    """
    steps = [max(1, n // 64) for n in mask.shape]
    part = tuple(slice(None, None, step) for step in steps)
    outside = np.nan_to_num(values[part][~mask[part]], posinf=0, neginf=0)
    if not outside.size:
        return np.zeros(mask.shape, dtype=bool)
    middle = np.median(outside)
    return values > middle + NOISE_SPREADS * np.median(np.abs(outside - middle))


def choose_slices(mask: np.ndarray, planes: Sequence[Plane], seen: np.ndarray | None = None) -> list[list[Slice]]:
    """Slices through the mask and the foreground, one list per plane, cropped to both together and a margin.

    So a mask that leaves out half a head shows as half a head that is left out. The mask and the foreground have an
    equal say in where the slices lie.

    Parameters
    ----------
    mask : (n0, n1, n2) bool array
        Not empty.
    seen : (n0, n1, n2) bool array, optional
        The `foreground`; by default the mask alone.
    """
    others = [tuple(a for a in range(3) if a != axis) for axis in range(3)]
    counts = [mask.sum(axis=other) for other in others]
    wide = counts
    if seen is not None:
        least = [FOREGROUND_SHARE * mask.size / n for n in mask.shape]
        totals = [seen.sum(axis=other) for other in others]
        wide = [np.where(t > few, t, 0) for t, few in zip(totals, least, strict=True)]
    box = []
    for count, more in zip(counts, wide, strict=True):
        hit = np.flatnonzero((count > 0) | (more > 0))
        margin = round(MARGIN_SHARE * (hit[-1] - hit[0] + 1))
        box.append(slice(max(0, int(hit[0]) - margin), min(len(count), int(hit[-1]) + margin + 1)))
    chosen = []
    for plane in planes:
        along = [counts[plane.normal], np.maximum(counts[plane.normal], wide[plane.normal])]
        share = np.mean([np.cumsum(each) / each.sum() for each in along], axis=0)
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
