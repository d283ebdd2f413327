"""An array corrected in one call: what a notebook wants."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from n4flow.core.affine import affine_problem
from n4flow.core.bspline import one_blas_thread
from n4flow.core.field import BiasField
from n4flow.core.quadrature import keep_mean_intensity
from n4flow.core.samples import inside_mask, usable_voxels
from n4flow.device import DeviceChoice, array_module, available_cores, select_device, to_host, to_module
from n4flow.estimate import Iteration, estimate_twice
from n4flow.images.division import Tiles, divided_tiles, planes_of
from n4flow.images.sampling import Box, Image, Slab, take_samples
from n4flow.parameters import N4Parameters

#: Voxels that `correct` works on at a time.
TILE_VOXELS = 2**22


class Correction(NamedTuple):
    """What `correct` returns."""

    corrected: Any  # float32, of the image's shape and module
    bias: Any  # multiplicative field, float32, likewise
    field: BiasField
    history: list[Iteration]
    repeatability: float | None  # see `estimate.estimate_twice`


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
        NumPy or CuPy, or what NumPy makes an array of, such as the ``dataobj`` of an image of nibabel; any real dtype.
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
    volume, mask, weights = map(_as_array, (volume, mask, weights))
    optional = {"mask": mask, "weights": weights, "out": out, "bias_out": bias_out}
    arrays = {"volume": volume} | {name: array for name, array in optional.items() if array is not None}
    for name, array in arrays.items():
        none = array_module(array) is np and not isinstance(array, np.ndarray)
        if none or isinstance(array, np.ma.MaskedArray):
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
    planes = max(1, TILE_VOXELS // (image.shape[0] * image.shape[1]))
    tiles = [planes_of(slice(start, min(start + planes, image.shape[2]))) for start in range(0, image.shape[2], planes)]
    resident = home is not np and xp is not np  # from beginning to end on the GPU

    def parts() -> Tiles:
        return ((tile, image[tile] if resident else to_host(image[tile])) for tile in tiles)

    def within(tile: Any, module: Any) -> tuple[Any, Any]:
        """Of a part of the image, the mask and the weights."""
        mask_part = (
            module.ones(image[tile].shape, dtype=bool)
            if inside is None
            else inside_mask(to_module(inside[tile], module))
        )
        return mask_part, None if confidence is None else to_module(confidence[tile], module)

    def slabs() -> Iterator[Slab]:
        for tile, values in parts():
            yield Slab(tile[2], values, *within(tile, array_module(values)))

    box, (mask_whole, weights_whole) = Box(image.shape), within(..., home)
    taking_part = mask_whole if weights_whole is None else mask_whole & inside_mask(weights_whole)
    box.add(usable_voxels(image, taking_part)[0], 0)
    described = Image("volume", image.shape, size_mm, affine, slabs)
    samples, intensity = take_samples(described, box, parameters, box_is_final=True)
    field, history, repeatability = estimate_twice(samples, parameters, xp=xp, threads=available_cores())
    field = keep_mean_intensity(field, intensity, "volume")
    if resident:
        from n4flow.kernels.cuda import FieldDivision

        FieldDivision(field).divide(planes_of(slice(None)), image.astype(np.float32, copy=False), corrected, bias)
    else:
        # a tile is read before it is written: the image may be one of the outputs
        for tile, results in zip(tiles, divided_tiles(field, parts(), xp), strict=True):
            corrected[tile], bias[tile] = (to_module(result, home) for result in results)
    return Correction(out, bias_out, field, history, repeatability)


def _as_array(given: Any) -> Any:
    """What still lies in a file, or is another library's, as a NumPy array; arrays, and what is none, as they are."""
    lazy = hasattr(given, "__array__") and hasattr(given, "dtype") and not isinstance(given, np.ndarray)
    return np.asarray(given) if lazy and array_module(given) is np else given


def _same_view(first: Any, second: Any) -> bool:
    """Whether two arrays are the same elements in the same places."""
    places = [
        array.__array_interface__["data"][0] if isinstance(array, np.ndarray) else array.data.ptr
        for array in (first, second)
    ]
    return places[0] == places[1] and first.strides == second.strides and first.dtype == second.dtype
