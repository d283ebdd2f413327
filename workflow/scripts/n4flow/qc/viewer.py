"""What the viewer in the browser shows: one volume as pictures in a classic script, and the fields as lattices.

A page opened from a folder may load no data, only scripts, so the volume travels as text: its slices side by side in
WebP pictures, in base64. That volume is the corrected image. The original is that times the field, which the browser
evaluates, as `BiasField.log_at` does, from its control points.
"""

from __future__ import annotations

import base64
import io
import json
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import to_hex
from PIL import Image

from n4flow.core.field import BiasField
from n4flow.images.nifti import Volume
from n4flow.qc.panels import upright_planes

#: Characters of base64 per byte.
BASE64 = 4 / 3

#: What is neither volume nor lattice, and the most that a control point takes, as text.
HEAD_BYTES, POINT_BYTES = 6_000, 26

#: Qualities of the pictures: the first that fits, of which a voxel takes about so many bytes.
QUALITIES, VOXEL_BYTES = (90, 75, 60), 0.25

#: Pixels of a picture, and of its sides: what every browser's canvas takes.
SHEET_PIXELS, SHEET_SIDE = 2**24, 4096

#: The stored values reach so many times as far as the window of the page.
HEADROOM = 1.25

#: Spans per axis of the mesh on which a field that is oblique to the image is given to the browser.
OBLIQUE_SPANS = 12

#: Colours of the field's map, evenly spaced; the browser takes what lies between.
COLOURS = [to_hex(colour) for colour in colormaps["RdBu_r"](np.linspace(0, 1, 33))]
STEEP_COLOURS = [to_hex(colour) for colour in colormaps["turbo"](np.linspace(0, 1, 33))]


def steps_within(
    shape: Sequence[int],
    voxel_size_mm: Sequence[float],
    limit_bytes: float,
    control_points: int,
    first: Sequence[int] = (1, 1, 1),
) -> tuple[int, int, int]:
    """Voxels to average per axis, so that the volume and a mask are likely to fit beside the fields.

    The finest axis is coarsened first, which leaves the voxels as near to cubes as they can be.

    Parameters
    ----------
    shape : (n0, n1, n2)
    voxel_size_mm : three floats
    limit_bytes : float
        The most that the script may have.
    control_points : int
        Of all fields in it.
    first : three ints
        As many at least.
    """
    steps = list(first)

    def too_large() -> bool:
        shrunk = [-(-n // step) for n, step in zip(shape, steps, strict=True)]
        size = HEAD_BYTES + POINT_BYTES * control_points + BASE64 * VOXEL_BYTES * math.prod(shrunk)
        return size > limit_bytes or max(shrunk[:2]) > SHEET_SIDE

    while too_large() and any(step < n for n, step in zip(shape, steps, strict=True)):
        _coarsen(steps, shape, voxel_size_mm)
    return steps[0], steps[1], steps[2]


def _coarsen(steps: list[int], shape: Sequence[int], voxel_size_mm: Sequence[float]) -> None:
    free = [axis for axis in range(3) if steps[axis] < shape[axis]]
    steps[min(free, key=lambda axis: steps[axis] * voxel_size_mm[axis])] += 1


def shrink(values: np.ndarray, steps: Sequence[int]) -> np.ndarray:
    """Means over blocks of voxels, not finite where one is; the last block of an axis may be smaller.

    Parameters
    ----------
    values : (n0, n1, n2) array
    steps : three ints

    Returns
    -------
    (ceil(n0 / step0), …) float32 array
    """
    result = values.astype(np.float32, copy=False)
    for axis, step in enumerate(steps):
        if step > 1:
            length = result.shape[axis]
            every = (slice(None),) * axis
            total = result[*every, ::step].copy(order="K")
            for offset in range(1, step):
                part = result[*every, offset::step]
                total[*every, : part.shape[axis]] += part
            counts = np.minimum(step, length - np.arange(0, length, step)).astype(np.float32)
            result = total
            result /= counts.reshape([-1 if a == axis else 1 for a in range(3)])
    return result


def viewer_script(
    grid: Volume,
    corrected: np.ndarray,
    mask: np.ndarray,
    fields: Mapping[str, BiasField],
    *,
    display_max: float,
    steep_from: float,
    field_window_log: float,
    anatomical: bool,
    limit_bytes: float,
) -> str:
    """The script of a scan: one call of the viewer with everything it shows.

    Parameters
    ----------
    grid : Volume
        Gives geometry.
    corrected : (n0, n1, n2) array
    mask : (n0, n1, n2) bool array
    fields : mapping of title to BiasField
        The first is the one that the image was corrected with.
    display_max : float
        Upper end of the window; 0 is the lower.
    steep_from : float
        Where steep colours begin, as a share of the window.
    field_window_log : float
    anatomical : bool
        The affine tells where the subject's right, front and top are.
    limit_bytes : float
        The most that the script may have: the finest voxels and the best quality that fit are chosen.
    """
    planes = upright_planes(grid.affine, grid.shape, grid.voxel_size_mm, anatomical=anatomical)
    content: dict[str, Any] = {
        "fileShape": grid.shape,
        "affine": grid.affine[:3].tolist(),
        "planes": [
            {
                "name": plane.name,
                "normal": plane.normal,
                "across": plane.across,
                "up": plane.up,
                "flipAcross": plane.flip_across,
                "flipUp": plane.flip_up,
                "labels": plane.labels,
            }
            for plane in planes
        ],
        "displayMax": display_max,
        "top": HEADROOM * display_max,
        "steepFrom": steep_from,
        "windowLog": field_window_log,
        "colours": COLOURS,
        "steep": STEEP_COLOURS,
        "fields": [{"title": title, **_lattice(field)} for title, field in fields.items()],
    }
    points = sum(field.lattice.size for field in fields.values())
    steps = list(steps_within(grid.shape, grid.voxel_size_mm, limit_bytes, points))
    while True:
        levels = _levels(shrink(corrected, steps), content["top"])
        content |= {
            "shape": levels.shape,
            "steps": steps,
            "sizeMm": [float(size) * step for size, step in zip(grid.voxel_size_mm, steps, strict=True)],
            # the first axis runs fastest, as in the file
            "mask": _text(zlib.compress(np.packbits((shrink(mask, steps) >= 0.5).ravel(order="F")).tobytes(), 6)),
        }
        for quality in QUALITIES:
            content |= {"columns": _columns(levels.shape), "sheets": [_text(s) for s in _sheets(levels, quality)]}
            script = f"showVolumes({json.dumps(content, separators=(',', ':'))});\n"
            if len(script) <= limit_bytes:
                return script
        if all(step >= n for step, n in zip(steps, grid.shape, strict=True)):
            return script  # one voxel: there is no less
        _coarsen(steps, grid.shape, grid.voxel_size_mm)


def _levels(values: np.ndarray, top: float) -> np.ndarray:
    """Values as uint8, 0 to `top`; slice by slice, which spares memory."""
    levels = np.empty(values.shape, dtype=np.uint8, order="F")
    for n in range(values.shape[2]):
        part = np.nan_to_num(values[:, :, n], posinf=0, neginf=0).clip(0, top)
        levels[:, :, n] = np.rint(part * (255 / top))
    return levels


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _columns(shape: Sequence[int]) -> int:
    """Slices side by side in a picture."""
    return max(1, SHEET_SIDE // shape[0])


def _sheets(levels: np.ndarray, quality: int) -> Iterator[bytes]:
    """Slices along the third axis, their first axis across and their second down, row by row, as WebP pictures."""
    n0, n1, n2 = levels.shape
    columns = _columns(levels.shape)
    rows = max(1, min(SHEET_SIDE, SHEET_PIXELS // (columns * n0)) // n1)
    for start in range(0, n2, rows * columns):
        part = levels[:, :, start : start + rows * columns]
        used = -(-part.shape[2] // columns)
        sheet = np.zeros((used * n1, min(columns, part.shape[2]) * n0), dtype=np.uint8)
        for n in range(part.shape[2]):
            row, column = divmod(n, columns)
            sheet[row * n1 : (row + 1) * n1, column * n0 : (column + 1) * n0] = part[:, :, n].T
        stream = io.BytesIO()
        Image.fromarray(sheet).save(stream, "WEBP", quality=quality, method=2)
        yield stream.getvalue()


def _lattice(field: BiasField) -> dict[str, Any]:
    """The field on a mesh along the axes of the image, its own or one fine enough; gains by plane of the file."""
    gains = field.gains_along()
    field = field.along_image(OBLIQUE_SPANS)
    lattice = field.lattice
    if gains:  # a control point of 1 takes them
        lattice = np.pad(lattice, [(0, int(axis == gains[0])) for axis in range(3)], constant_values=1.0)
    return {
        **({"gains": {"axis": gains[0], "log": gains[1].tolist()}} if gains else {}),
        "lattice": lattice.ravel().tolist(),
        "spans": field.mesh.spans,
        "start": field.mesh.start,
        "spanVoxels": field.mesh.span_voxels,
    }
