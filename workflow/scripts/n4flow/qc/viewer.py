"""What the viewer in the browser shows: volumes of 8 bits in a classic script, and the fields as lattices.

A page opened from a folder may load no data, only scripts, so the volumes travel as text: bytes, deflated (zlib),
in base64. Fields are evaluated in the browser, exactly as `BiasField.log_at` does, from their control points.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import to_hex

from n4flow.core.field import BiasField
from n4flow.images.nifti import Volume
from n4flow.qc.panels import upright_planes

#: Characters of base64 per byte.
BASE64 = 4 / 3

#: What is neither volume nor lattice, and the most that a control point takes, as text.
HEAD_BYTES, POINT_BYTES = 4_000, 26

#: Colours of the field's map, evenly spaced; the browser takes what lies between.
COLOURS = [to_hex(colour) for colour in colormaps["RdBu_r"](np.linspace(0, 1, 33))]


def steps_within(
    shape: Sequence[int], voxel_size_mm: Sequence[float], limit_bytes: float, control_points: int
) -> tuple[int, int, int]:
    """Voxels to average per axis, so that two volumes and a mask fit beside the fields, however badly they deflate.

    The finest axis is coarsened first, which leaves the voxels as near to cubes as they can be.

    Parameters
    ----------
    shape : (n0, n1, n2)
    voxel_size_mm : three floats
    limit_bytes : float
        The most that the script may have.
    control_points : int
        Of all fields in it.
    """
    steps = [1, 1, 1]

    def size() -> float:
        voxels = float(np.prod([-(-n // step) for n, step in zip(shape, steps, strict=True)]))
        return HEAD_BYTES + POINT_BYTES * control_points + BASE64 * (2 + 1 / 8) * voxels

    while size() > limit_bytes and any(step < n for n, step in zip(shape, steps, strict=True)):
        free = [axis for axis in range(3) if steps[axis] < shape[axis]]
        steps[min(free, key=lambda axis: steps[axis] * voxel_size_mm[axis])] += 1
    return steps[0], steps[1], steps[2]


def shrink(values: np.ndarray, steps: Sequence[int]) -> np.ndarray:
    """Means over blocks of voxels, 0 where one is not finite; the last block of an axis may be smaller.

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
    return np.nan_to_num(result, posinf=0, neginf=0)


def _text(values: np.ndarray) -> str:
    return base64.b64encode(zlib.compress(values.tobytes(), 6)).decode("ascii")


def viewer_script(
    grid: Volume,
    steps: Sequence[int],
    original: np.ndarray,
    corrected: np.ndarray,
    mask: np.ndarray,
    fields: Mapping[str, BiasField],
    display_max: float,
    field_window_log: float,
) -> str:
    """The script of a scan: one call of the viewer with everything it shows.

    Parameters
    ----------
    grid : Volume
        Gives geometry.
    steps : three ints
        Voxels of the file per voxel of the volumes, per axis.
    original, corrected, mask : arrays of one shape
        As `shrink` gives them, of the mask the part of a voxel that lies in it.
    fields : mapping of title to BiasField
    display_max : float
        Stored as 255; 0 is stored as 0.
    field_window_log : float
    """
    planes = upright_planes(grid.affine, grid.shape, grid.voxel_size_mm)
    content: dict[str, Any] = {
        "shape": original.shape,
        "fileShape": grid.shape,
        "steps": list(steps),
        "sizeMm": [float(size) * step for size, step in zip(grid.voxel_size_mm, steps, strict=True)],
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
        "windowLog": field_window_log,
        "colours": COLOURS,
        "fields": [{"title": title, **_lattice(field)} for title, field in fields.items()],
        # the first axis runs fastest, as in the file
        "mask": _text(np.packbits(mask.ravel(order="F") >= 0.5)),
        "original": _text(_bytes(original, display_max)),
        "corrected": _text(_bytes(corrected, display_max)),
    }
    return f"showVolumes({json.dumps(content, separators=(',', ':'))});\n"


def _bytes(values: np.ndarray, display_max: float) -> np.ndarray:
    return np.rint(values.ravel(order="F").clip(0, display_max) * (255 / display_max)).astype(np.uint8)


def _lattice(field: BiasField) -> dict[str, Any]:
    return {
        "lattice": field.lattice.ravel().tolist(),
        "spans": field.mesh.spans,
        "start": field.mesh.start,
        "spanVoxels": field.mesh.span_voxels,
    }
