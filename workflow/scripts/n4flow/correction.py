"""Image divided by field, tile by tile: files for the workflow, arrays for a notebook."""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from threadpoolctl import threadpool_limits

from n4flow.affine import affine_problem
from n4flow.bspline import one_blas_thread
from n4flow.device import DeviceChoice, array_module, available_cores, select_device, to_host, to_module
from n4flow.errors import InputError
from n4flow.estimate import Iteration, check_mesh, estimate_field, initial_mesh, positions_in
from n4flow.field import BiasField
from n4flow.parameters import N4Parameters
from n4flow.quadrature import MaskIntensity, keep_mean_intensity
from n4flow.samples import (
    Samples,
    beyond_float32,
    check_count,
    check_dropped,
    check_range,
    inside_mask,
    log_where,
    usable_voxels,
)
from n4flow.volume import Volume, VolumeWriter

log = logging.getLogger(__name__)

#: Voxels that `correct` works on at a time.
TILE_VOXELS = 2**22

#: A relative error that is infinite, as far as floats go: what was written is no number.
BEYOND_FLOAT32 = 1e300


@one_blas_thread
def read_samples(
    image: str | Path | Volume, mask: str | Path | Volume, parameters: N4Parameters
) -> tuple[Samples, MaskIntensity]:
    """Take the samples of an image (of the mean over its frames) inside a mask, slab by slab.

    Parameters
    ----------
    image, mask : path or Volume
        On the same grid.
    parameters : N4Parameters
        How far the samples are apart, and on which mesh the field will be.

    Returns
    -------
    Samples
    MaskIntensity
        What `quadrature.keep_mean_intensity` needs of all voxels of the mask that are finite and above 0.

    Raises
    ------
    InputError
        A file cannot be read, the grids differ, there are too few samples, the mesh does not fit them, or the mask is
        empty or mostly unusable.
    """
    volume = image if isinstance(image, Volume) else Volume(image)
    mask = mask if isinstance(mask, Volume) else Volume(mask)
    volume.check_same_grid(mask, "mask")
    check_count(volume.path, math.prod(volume.shape), volume.shape)
    box = _Box(volume.shape)
    for slab, mask_values in mask.mean_slabs():
        box.add(inside_mask(mask_values), slab.start)
    domain = None
    # once, as a rule: unless what cannot be used at the border of the mask makes its box smaller
    while domain != box.ranges:
        domain, box = box.ranges, _Box(volume.shape)
        positions = positions_in(domain, volume.shape, parameters)
        mesh = initial_mesh(volume.shape, volume.voxel_size_mm, domain, parameters)
        check_mesh(volume.path, positions, mesh, parameters)
        intensity = MaskIntensity(volume.shape, mesh.refined(parameters.doublings))
        log_image = np.zeros([len(p) for p in positions])
        kept = np.zeros(log_image.shape, dtype=bool)
        dropped: dict[str, int] = {}
        mask_voxels = 0
        for (slab, values), (_, mask_values) in zip(volume.mean_slabs(), mask.mean_slabs(), strict=True):
            inside = inside_mask(mask_values)
            usable, lost = usable_voxels(values, inside)
            box.add(usable, slab.start)
            intensity.add(values, usable, slab.start)
            mask_voxels += int(np.count_nonzero(inside))
            dropped = {reason: dropped.get(reason, 0) + n for reason, n in lost.items()}
            planes = (positions[2] >= slab.start) & (positions[2] < slab.stop)
            grid = np.ix_(positions[0], positions[1], positions[2][planes] - slab.start)
            kept[:, :, planes] = usable[grid]
            log_image[:, :, planes] = log_where(values[grid], usable[grid])
    check_dropped(volume.path, dropped, mask_voxels)
    check_range(volume.path, log_image[kept])
    samples = Samples(
        log_image,
        kept,
        positions,
        volume.shape,
        volume.voxel_size_mm,
        volume.affine_mm,
        dropped,
        str(volume.path),
        domain=domain,
    )
    return samples, intensity


class _Box:
    """Voxels along each axis from the first that takes part to the last; all where none does."""

    def __init__(self, shape: Sequence[int]) -> None:
        self.seen = [np.zeros(n, dtype=bool) for n in shape]

    def add(self, inside: Any, first_plane: int) -> None:
        """Look at a slab (bool) of the third axis."""
        lines = inside.any(axis=2)
        planes = to_host(inside.any(axis=(0, 1)))
        self.seen[0] |= to_host(lines.any(axis=1))
        self.seen[1] |= to_host(lines.any(axis=0))
        self.seen[2][first_plane : first_plane + len(planes)] = planes

    @property
    def ranges(self) -> tuple[range, ...]:
        ends = [np.flatnonzero(along) if along.any() else np.arange(len(along)) for along in self.seen]
        return tuple(range(int(hit[0]), int(hit[-1]) + 1) for hit in ends)


@one_blas_thread
def write_corrected(
    volume: Volume,
    field: BiasField,
    output: str | Path,
    bias_output: str | Path | None = None,
    *,
    keep_dtype: bool = False,
    xp: Any = np,
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
    return _ahead(_corrected_on_host(volume, field)) if xp is np else _corrected_on_gpu(volume, field, xp)


def _corrected_on_gpu(volume: Volume, field: BiasField, xp: Any) -> Iterator[Slab]:
    slabs, twin = itertools.tee(volume.slabs())
    divided = _divided(field, ((_planes(slab), values) for slab, _, values in twin), xp)
    for (slab, frame, values), (corrected, ratio) in zip(slabs, divided, strict=True):
        yield slab, frame, values, corrected, ratio


def _corrected_on_host(volume: Volume, field: BiasField) -> Iterator[Slab]:
    kept: dict[int, Any] = {}  # of a series: every frame is divided by the one field
    for slab, frame, values in volume.slabs():
        ratio = kept[slab.start] if frame else field.ratio_tile(_planes(slab))
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


def _planes(slab: slice) -> tuple[slice, slice, slice]:
    return slice(None), slice(None), slab


def _divided(field: BiasField, tiles: Tiles, xp: Any) -> Iterator[tuple[Any, Any]]:
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


class Correction(NamedTuple):
    """What `correct` returns."""

    corrected: Any  # float32, of the image's shape and module
    bias: Any  # multiplicative field, float32, likewise
    field: BiasField
    history: list[Iteration]


@one_blas_thread
def correct(
    volume: Any,
    mask: Any = None,
    *,
    voxel_size_mm: tuple[float, ...],
    affine: np.ndarray | None = None,
    weights: Any = None,
    parameters: N4Parameters | None = None,
    device: DeviceChoice = "auto",
    out: Any = None,
    bias_out: Any = None,
) -> Correction:
    """Bias-correct an array.

    Parameters
    ----------
    volume : (n0, n1[, n2]) array
        NumPy or CuPy; any real dtype.
    mask : array of the same shape, optional
        Where it is not 0 the field is estimated; everywhere by default.
    voxel_size_mm : tuple of float
        Per axis, in the order of the array's axes.
    affine : (4, 4) array, optional
        Voxel-to-world matrix in mm, also of a plane: what `BiasField.on_grid` needs to bring the field to another
        image. By default the voxel sizes (1 for the missing axis of a plane) along the axes from 0. The estimate does
        not depend on it.
    weights : array of the same shape, optional
        Confidence of each voxel in the fit of the field, from 0; a voxel of weight 0 takes no part in the estimate.
        Only their ratios count. All 1 by default.
    parameters : N4Parameters, optional
    device : {"auto", "gpu", "cpu"}
    out, bias_out : float32 arrays of the volume's shape, optional
        Where to put the results; either may be `volume` itself.

    Returns
    -------
    Correction

    Raises
    ------
    InputError
        The array holds nothing a field can be estimated from.
    ValueError
        A shape, dtype or voxel size does not fit, the affine cannot be inverted, or a weight is negative or not finite.
    TypeError
        An array is none, or a masked one, or the parameters are no `N4Parameters`.
    """
    parameters = parameters or N4Parameters()
    if not isinstance(parameters, N4Parameters):
        raise TypeError("parameters must be N4Parameters, which N4Parameters.from_mapping makes of a dict")
    given = {"mask": mask, "weights": weights, "out": out, "bias_out": bias_out}
    arrays = {"volume": volume} | {name: array for name, array in given.items() if array is not None}
    for name, array in arrays.items():
        if not hasattr(array, "dtype") or isinstance(array, np.ma.MaskedArray):
            raise TypeError(f"{name}: need a NumPy or CuPy array, and what a masked one leaves out as 0 in `mask`")
        if array.dtype.kind not in "biuf":
            raise ValueError(f"{name}: need real numbers, got {array.dtype}")
    voxel_size_mm = tuple(np.atleast_1d(voxel_size_mm).tolist())  # plain numbers, also in messages
    shape = tuple(volume.shape)
    if 0 in shape:
        raise ValueError(f"an array of shape {shape} holds no voxel")
    if volume.ndim not in (2, 3) or len(voxel_size_mm) != volume.ndim:
        raise ValueError(f"need a 2-D or 3-D array and a voxel size per axis, got {shape} and {voxel_size_mm}")
    if not all(np.isfinite(size) and size > 0 for size in voxel_size_mm):
        raise ValueError(f"voxel_size_mm must be above 0, got {voxel_size_mm}")
    size_mm = (*voxel_size_mm, 1.0)[:3]
    affine = np.diag([*size_mm, 1.0]) if affine is None else np.array(affine, dtype=np.float64)
    if problem := affine_problem(affine):
        raise ValueError(f"the affine {problem}")
    if mask is not None and tuple(mask.shape) != shape:
        raise ValueError(f"the mask has shape {tuple(mask.shape)}, the volume {shape}")
    if weights is not None:
        if tuple(weights.shape) != shape:
            raise ValueError(f"the weights have shape {tuple(weights.shape)}, the volume {shape}")
        if not (array_module(weights).isfinite(weights) & (weights >= 0)).all():
            raise ValueError("the weights must be finite and not below 0")
    for name, buffer in (("out", out), ("bias_out", bias_out)):
        if buffer is not None and (tuple(buffer.shape) != shape or buffer.dtype != np.float32):
            raise ValueError(f"{name} must be float32 of shape {shape}, is {buffer.dtype} of {tuple(buffer.shape)}")
        if isinstance(buffer, np.ndarray) and not buffer.flags.writeable:
            raise ValueError(f"{name} is read-only")
    home = array_module(volume)
    if out is not None and bias_out is not None and home.shares_memory(out, bias_out):
        raise ValueError("out and bias_out must be two arrays")
    for name, buffer in (("out", out), ("bias_out", bias_out)):
        if buffer is not None and home.may_share_memory(buffer, volume) and not _same_view(buffer, volume):
            raise ValueError(f"{name} overlaps the volume without being it")
    # kept to the end, since it holds the claim to a GPU; arrays on a GPU are worked on where they are
    claim = select_device(device) if home is np or device == "cpu" else None
    xp = claim.xp if claim else home
    out = home.empty(shape, dtype=np.float32) if out is None else out
    bias_out = home.empty(shape, dtype=np.float32) if bias_out is None else bias_out

    # from here on a plane is a volume of one plane; the views share memory with what the user gave
    flat = volume.ndim == 2
    image, inside, confidence, corrected, bias = (
        array[..., None] if flat and array is not None else array for array in (volume, mask, weights, out, bias_out)
    )
    samples = _take_samples(image, inside, confidence, size_mm, affine, parameters)
    field, history = estimate_field(samples, parameters, xp=xp, threads=available_cores())
    planes = max(1, TILE_VOXELS // (image.shape[0] * image.shape[1]))
    tiles = [_planes(slice(start, start + planes)) for start in range(0, image.shape[2], planes)]

    resident = home is not np and xp is not np  # from beginning to end on the GPU

    def parts() -> Tiles:
        return ((tile, image[tile] if resident else to_host(image[tile])) for tile in tiles)

    intensity = MaskIntensity(image.shape, field.mesh)
    for tile, values in parts():
        module = array_module(values)
        within = (
            module.ones(values.shape, dtype=bool) if inside is None else inside_mask(to_module(inside[tile], module))
        )
        intensity.add(values, usable_voxels(values, within)[0], tile[2].start)
    field = keep_mean_intensity(field, intensity, "volume")
    if resident:
        from n4flow.kernels.cuda import FieldDivision

        FieldDivision(field).divide(_planes(slice(None)), image.astype(np.float32, copy=False), corrected, bias)
    else:
        # a tile is read before it is written: the image may be one of the outputs
        for tile, results in zip(tiles, _divided(field, parts(), xp), strict=True):
            corrected[tile], bias[tile] = (to_module(result, home) for result in results)
    return Correction(out, bias_out, field, history)


def _same_view(first: Any, second: Any) -> bool:
    """Whether two arrays are the same elements in the same places."""
    places = [
        array.__array_interface__["data"][0] if isinstance(array, np.ndarray) else array.data.ptr
        for array in (first, second)
    ]
    return places[0] == places[1] and first.strides == second.strides and first.dtype == second.dtype


def _take_samples(
    image: Any, mask: Any, weights: Any, voxel_size_mm: tuple[float, ...], affine: np.ndarray, parameters: N4Parameters
) -> Samples:
    """What `read_samples` does for files."""
    box, module = _Box(image.shape), array_module(image)
    taking_part = module.ones(image.shape, dtype=bool)
    for given in (mask, weights):
        if given is not None:
            taking_part &= to_module(inside_mask(given), module)
    box.add(usable_voxels(image, taking_part)[0], 0)
    domain = box.ranges
    positions = positions_in(domain, image.shape, parameters)
    grid = np.ix_(*positions)

    def sampled(array: Any) -> np.ndarray:
        return to_host(array[tuple(array_module(array).asarray(axis) for axis in grid)])

    values = sampled(image)
    inside = np.ones(values.shape, dtype=bool) if mask is None else inside_mask(sampled(mask))
    confidence = None
    if weights is not None:
        given = sampled(weights)
        given = np.where(inside, given, 0).astype(np.promote_types(given.dtype, np.float64))
        largest = given.max(initial=0)
        if inside.any() and largest == 0:
            raise InputError("volume", "all weights in the mask are 0", "give a weight to the voxels that count")
        # only their ratios count, and those to the largest fit into float32
        confidence = (given / (largest or 1)).astype(np.float32)
        inside = confidence > 0
    usable, dropped = usable_voxels(values, inside)
    check_dropped("volume", dropped, int(inside.sum()))
    log_image = log_where(values, usable)
    check_range("volume", log_image[usable])
    return Samples(
        log_image,
        usable,
        positions,
        image.shape,
        voxel_size_mm,
        affine,
        dropped,
        "volume",
        confidence,
        domain,
    )
