"""What lies beside a series and says what its frames are: b values, gradient directions, the context of ASL."""

from __future__ import annotations

import logging
import math
from pathlib import Path

from n4flow.errors import InputError
from n4flow.images.nifti import Volume
from n4flow.study.bids import beside_image

log = logging.getLogger(__name__)

#: Frames of diffusion up to this b value, in s/mm², show the field: in others what diffuses is dark.
LOW_B = 50


def low_b_frames(image: Path, frames: int) -> tuple[int, ...]:
    """The frames of a series that its field is estimated on: by its .bval, if there is one, else all.

    Parameters
    ----------
    image : Path
    frames : int
        How many it has.

    Returns
    -------
    tuple of int
        Counted from 0; those of b values up to `LOW_B`, or all where there is none.

    Raises
    ------
    InputError
        The .bval cannot be read, or does not fit the series.
    """
    path = beside_image(image, "bval")
    if path is None or frames == 1:
        return tuple(range(frames))
    try:
        values = [float(word) for word in path.read_text(encoding="utf-8").replace(",", " ").split()]
    except (OSError, ValueError) as error:
        raise InputError(path, f"holds no b values ({error})", "give numbers, one for each frame") from None
    if len(values) != frames or not all(map(math.isfinite, values)):
        raise InputError(
            path,
            f"holds {sum(map(math.isfinite, values))} b values, {image.name} has {frames} frames",
            "give one for each frame",
        )
    low = tuple(frame for frame, value in enumerate(values) if value <= LOW_B)
    if not low:
        log.warning(
            "%s: no frame has a b value up to %d, the least is %g: the field is estimated on the mean of all frames; "
            "if the session has another scan that shows it, name that in field_from",
            path,
            LOW_B,
            min(values),
        )
    else:
        log.info("%s: the mean is that of the %d of %d frames of b values up to %d", path, len(low), frames, LOW_B)
    return low or tuple(range(frames))


def series_files(volume: Volume) -> dict[str, Path]:
    """The .bval that the mean of a series goes by, as an input of its field; empty if there is none."""
    path = beside_image(volume.path, "bval") if volume.frames > 1 else None
    return {"bval": path} if path else {}


def open_scan(image: str | Path) -> Volume:
    """Open a raw image; the mean of a diffusion series is that of `low_b_frames`.

    Parameters
    ----------
    image : path-like

    Returns
    -------
    Volume

    Raises
    ------
    InputError
        As `Volume` and `low_b_frames`.
    """
    volume = Volume(image)
    volume.averaged = low_b_frames(volume.path, volume.frames)
    return volume
