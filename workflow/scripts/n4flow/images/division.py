"""An image divided by a field, slab by slab."""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from threadpoolctl import threadpool_limits

from n4flow.core.bspline import one_blas_thread
from n4flow.core.field import BiasField
from n4flow.core.samples import (
    beyond_float32,
)
from n4flow.images.nifti import Volume, VolumeWriter

log = logging.getLogger(__name__)

#: A relative error that is infinite, as far as floats go: what was written is no number.
BEYOND_FLOAT32 = 1e300


@one_blas_thread
def write_corrected(
    volume: Volume,
    field: BiasField,
    output: str | Path,
    bias_output: str | Path | None = None,
    *,
    keep_dtype: bool = False,
    xp: Any = np,
    look: Callable[[slice, np.ndarray], None] | None = None,
) -> float:
    """Divide an image by the field and write it, slab by slab.

    Parameters
    ----------
    volume : Volume
        All its frames are divided by the one field.
    field : BiasField
        Of this image's grid.
    output : path-like
    bias_output : path-like, optional
        Where to write the multiplicative field, float32 on the image's grid.
    keep_dtype : bool
        Write integers as integers of the same type, with a scl_slope (and scl_inter) that uses its
        range; otherwise float32.
    xp : module
        numpy or cupy: where to compute.
    look : callable, optional
        Is shown each slab of the first frame, planes and values: so that nobody else has to read the image again.

    Returns
    -------
    float
        Largest ``|written * field - original|`` relative to the original, beyond the rounding to integers.

    Raises
    ------
    InputError
        The image cannot be read, or float32 does not hold its intensities.
    """
    dtype = volume.dtype.newbyteorder("=") if keep_dtype else np.dtype(np.float32)
    integers = np.issubdtype(dtype, np.integer)
    slope, intercept = _scaling(volume, field, dtype, xp) if integers else (1.0, 0.0)
    rounding = slope / 2 if integers else 0.0
    worst = 0.0
    with contextlib.ExitStack() as files:
        # entered first, the corrected image appears last: when all is well
        writer = files.enter_context(VolumeWriter(output, volume, dtype, slope=slope, intercept=intercept))
        bias_writer = (
            files.enter_context(VolumeWriter(bias_output, volume, np.float32, frames=1)) if bias_output else None
        )
        for slab, frame, values, corrected, ratio in _corrected_slabs(volume, field, xp):
            written = writer.write(corrected)
            if look and frame == 0:
                look(slab, values)
            if bias_writer and frame == 0:
                bias_writer.write(ratio)
            worst = max(worst, _largest_error(values, written, ratio, rounding))
            if worst > BEYOND_FLOAT32:  # within the context: nothing of it stays
                raise beyond_float32(volume.path)
            log.info(
                "%s: frame %d of %d, plane %d of %d written",
                volume.path.name,
                frame + 1,
                volume.frames,
                slab.stop,
                volume.shape[2],
            )
    return worst


def _largest_error(values: np.ndarray, written: np.ndarray, ratio: np.ndarray, rounding: float) -> float:
    """Largest ``|written * field - original|``, beyond the rounding to integers, relative to the original.

    Voxels below a millionth of the slab's brightest count as that, or noise around 0 would decide. In float32, as it is
    to find what is wrong, not how anything was rounded.
    """
    with np.errstate(over="ignore", invalid="ignore"):  # what float32 does not hold comes out as infinite
        original = values.astype(np.float32)
        error = np.multiply(written, ratio, dtype=np.float32)
        error -= original
        if values.dtype.kind == "f" and not (finite := np.isfinite(values)).all():
            original[~finite] = error[~finite] = 0
        size = np.abs(original, out=original)
        floor = max(np.float32(1e-6) * size.max(), np.finfo(np.float32).tiny)  # below tiny it has fewer digits
        np.abs(error, out=error)
        if rounding:
            error -= rounding * ratio
        error /= np.maximum(size, floor, out=size)
    largest = float(error.max())
    return largest if np.isfinite(largest) else np.inf


Slab = tuple[slice, int, np.ndarray, np.ndarray, np.ndarray]


def _corrected_slabs(volume: Volume, field: BiasField, xp: Any) -> Iterator[Slab]:
    """Slab by slab: where it is, its frame, values, values divided by the field, and the field."""
    on_host = xp is np or field.gains is not None  # the GPU knows splines alone
    return _ahead(_corrected_on_host(volume, field)) if on_host else _corrected_on_gpu(volume, field, xp)


def _corrected_on_gpu(volume: Volume, field: BiasField, xp: Any) -> Iterator[Slab]:
    slabs, twin = itertools.tee(volume.slabs())
    divided = divided_tiles(field, ((planes_of(slab), values) for slab, _, values in twin), xp)
    for (slab, frame, values), (corrected, ratio) in zip(slabs, divided, strict=True):
        yield slab, frame, values, corrected, ratio


def _corrected_on_host(volume: Volume, field: BiasField) -> Iterator[Slab]:
    kept: dict[int, Any] = {}  # of a series: every frame is divided by the one field
    for slab, frame, values in volume.slabs():
        ratio = kept[slab.start] if frame else field.ratio_tile(planes_of(slab))
        if volume.frames > 1:
            kept[slab.start] = ratio
        with np.errstate(over="ignore"):  # what float32 does not hold is refused when it is written
            corrected = np.asarray(values).astype(np.float32, copy=False) / ratio
        yield slab, frame, values, corrected, ratio


Item = TypeVar("Item")


def _ahead(items: Iterable[Item]) -> Iterator[Item]:
    """The same items, the next of which is made in a thread while one is used: NumPy needs no lock for most of it."""
    source: Iterator[Any] = iter(items)
    end: Any = object()
    # as `one_blas_thread`, which all who come here are in: some builds of BLAS know of each thread by itself
    with ThreadPoolExecutor(1, initializer=threadpool_limits, initargs=(1, "blas")) as thread:
        coming = thread.submit(next, source, end)
        while (item := coming.result()) is not end:
            coming = thread.submit(next, source, end)
            yield item


#: Slices of a tile of an image, and the values there.
Tiles = Iterable[tuple[Sequence[slice], Any]]


def planes_of(slab: slice) -> tuple[slice, slice, slice]:
    return slice(None), slice(None), slab


def divided_tiles(field: BiasField, tiles: Tiles, xp: Any) -> Iterator[tuple[Any, Any]]:
    """Tiles divided by the field, and the field there, where the tiles are; to be used before the next."""
    if xp is not np:
        from n4flow.kernels.cuda import FieldDivision

        yield from FieldDivision(field).divide_tiles(tiles)
        return
    for tile, values in tiles:
        ratio = field.ratio_tile(tile)
        yield np.asarray(values, dtype=np.float32) / ratio, ratio


def _scaling(volume: Volume, field: BiasField, dtype: np.dtype, xp: Any) -> tuple[float, float]:
    """The scl_slope and scl_inter with which the corrected image just fits the integer type."""
    low = high = 0.0
    for _, _, _, corrected, _ in _corrected_slabs(volume, field, xp):
        finite = corrected[np.isfinite(corrected)]
        low = min(low, float(finite.min(initial=0)))
        high = max(high, float(finite.max(initial=0)))
    limits = np.iinfo(dtype)
    if limits.min == 0:  # an unsigned type begins at the lowest value
        slope, intercept = (high - low) / limits.max, low
    else:
        slope, intercept = max(high / limits.max, low / limits.min), 0.0
    # as the header will hold them, and the slope no smaller, or the brightest voxel would not fit
    return float(np.nextafter(np.float32(slope or 1.0), np.float32(np.inf))), float(np.float32(intercept))
