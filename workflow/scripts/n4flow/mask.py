"""Where the field is estimated: a mask from the image, or one that the user gives."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from n4flow.bids import raw_uri
from n4flow.errors import InputError
from n4flow.files import write_json
from n4flow.provenance import provenance
from n4flow.samples import check_range, inside_mask
from n4flow.volume import Volume, VolumeWriter

log = logging.getLogger(__name__)

MaskMethod = Literal["otsu", "head", "percentile"]

#: Radius by which ``head`` closes: scalp and brain become one across skull and fluid.
CLOSING_MM = 6.0

#: A threshold is found on about so many voxels, on a regular sub-grid of the image.
THRESHOLD_VOXELS = 2**21

OTSU_BINS = 256


def otsu_threshold(values: np.ndarray) -> float:
    """Threshold that separates two classes with the largest variance between them.

    The histogram runs to the 99.9th percentile, so that a few very bright voxels do not decide; they count in its last
    bin.

    Parameters
    ----------
    values : 1-D array
        Finite intensities.

    Returns
    -------
    float
        Foreground is what lies above.

    References
    ----------
    Otsu 1979, doi:10.1109/TSMC.1979.4310076.
    """
    return _otsu_of_sorted(np.sort(values))


def _otsu_of_sorted(values: np.ndarray) -> float:
    edges = np.linspace(values[0], values[int(0.999 * (len(values) - 1))], OTSU_BINS + 1)
    counts = np.diff(np.searchsorted(values, edges[1:-1]), prepend=0, append=len(values))
    centres = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts)[:-1].astype(float)
    above = counts.sum() - below
    sums = np.cumsum(counts * centres)
    with np.errstate(invalid="ignore", divide="ignore"):
        difference = sums[:-1] / below - (sums[-1] - sums[:-1]) / above
    between = np.nan_to_num(below * above * difference**2)
    return float(edges[1 + np.argmax(between)])


def foreground_threshold(volume: Volume, method: MaskMethod = "otsu", percentile: float = 50.0) -> float:
    """Intensity above which a voxel is foreground.

    Parameters
    ----------
    volume : Volume
    method : {"otsu", "head", "percentile"}
        ``head`` uses Otsu's threshold too.
    percentile : float
        For ``percentile``: of the positive voxels, so that air that was set to 0 does not count.

    Returns
    -------
    float
        In the image's own units.

    Raises
    ------
    InputError
        No voxel is finite and above 0, or all have the same intensity.
    """
    stride = max(1, int(np.ceil((np.prod(volume.shape) / THRESHOLD_VOXELS) ** (1 / 3))))
    parts, empty = [], True
    for slab, values in volume.mean_slabs():
        empty = empty and not (values > 0).any()
        part = values[::stride, ::stride, -slab.start % stride :: stride]
        if part.size:  # an empty one would be no copy, and hold its slab
            parts.append(part.ravel(order="K"))
    if empty:
        raise InputError(volume.path, "no voxel is above 0", "check that this is the right image")
    values = np.concatenate(parts)
    # NaN last; of short integers the stable sort is a radix sort, several times as fast
    values.sort(kind="stable" if values.itemsize <= 2 else None)
    values = values.astype(np.float64)
    values = values[np.searchsorted(values, -np.inf, "right") : np.searchsorted(values, np.inf)]
    np.maximum(values, 0, out=values)
    if len(values) == 0 or values[0] == values[-1]:
        raise InputError(volume.path, "all voxels have the same intensity", "check that this is the right image")
    positive = values[np.searchsorted(values, 0, "right") :]
    check_range(volume.path, np.log(positive[[0, len(positive) // 2, -1]]))
    return float(np.percentile(positive, percentile)) if method == "percentile" else _otsu_of_sorted(values)


def head_from_foreground(foreground: np.ndarray, voxel_size_mm: tuple[float, ...]) -> np.ndarray:
    """The head as a whole: the foreground closed over skull and airways, its largest piece filled.

    Parameters
    ----------
    foreground : (n0, n1, n2) bool array
    voxel_size_mm : tuple of float

    Returns
    -------
    (n0, n1, n2) bool array
    """
    import SimpleITK as sitk

    # no more than a tenth of the image, which may be no head
    radius = [
        max(1, min(round(CLOSING_MM / size), n // 10))
        for size, n in zip(voxel_size_mm[::-1], foreground.shape[::-1], strict=True)
    ]
    # padded, so that closing does not take the border of the image for air
    image = sitk.ConstantPad(sitk.GetImageFromArray(foreground.astype(np.uint8)), radius, radius, 0)
    closed = sitk.BinaryMorphologicalClosing(image, radius, sitk.sitkBall)
    largest = sitk.RelabelComponent(sitk.ConnectedComponent(closed)) == 1
    return sitk.GetArrayFromImage(sitk.Crop(sitk.BinaryFillhole(largest), radius, radius)).astype(bool)


def make_mask(
    image: str | Path,
    output: str | Path,
    *,
    method: MaskMethod = "otsu",
    percentile: float = 50.0,
) -> dict[str, Any]:
    """Write a foreground mask (uint8, 0 and 1) on the image's grid.

    Parameters
    ----------
    image : path-like
        Of several frames, the mean is taken.
    output : path-like
    method : {"otsu", "head", "percentile"}
        ``head`` makes one filled piece of the foreground, see `head_from_foreground`.
    percentile : float
        See `foreground_threshold`.

    Returns
    -------
    dict
        For the sidecar: the method, the threshold and the number of voxels.

    Raises
    ------
    InputError
        The image cannot be read, or has no foreground.
    """
    volume = Volume(image)
    threshold = foreground_threshold(volume, method, percentile)
    if method == "head":
        foreground = np.empty(volume.shape, dtype=bool)
        for slab, values in volume.mean_slabs():
            foreground[:, :, slab] = values > threshold
        slabs = iter([head_from_foreground(foreground, volume.voxel_size_mm)])
    else:
        slabs = (values > threshold for _, values in volume.mean_slabs())
    count = _write(output, volume, slabs)
    return {"Method": method, "Threshold": threshold, "Voxels": count}


def adopt_mask(image: str | Path, mask: str | Path, output: str | Path) -> dict[str, Any]:
    """Write the user's own mask as uint8: any value that is not 0 (nor NaN) counts.

    Parameters
    ----------
    image, mask, output : path-like

    Returns
    -------
    dict
        For the sidecar: the number of voxels.

    Raises
    ------
    InputError
        It cannot be read, lies on another grid than the image, or is empty.
    """
    volume, own = Volume(image), Volume(mask)
    if own.frames > 1:
        raise InputError(mask, f"the mask has {own.frames} frames", "give a 3-D mask")
    volume.check_same_grid(own, "mask")
    slabs = (inside_mask(values) for _, values in own.mean_slabs())
    count = _write(output, volume, slabs, source=mask)
    return {"Method": "given", "Voxels": count}


def _write(output: str | Path, like: Volume, slabs: Iterator[np.ndarray], source: str | Path | None = None) -> int:
    count = 0
    with VolumeWriter(output, like, np.uint8, frames=1) as writer:
        for inside in slabs:
            count += int(np.count_nonzero(inside))
            writer.write(inside)
        if count == 0:
            advice = "draw it anew, or leave it out of the sheet" if source else "give a mask, or another mask.method"
            raise InputError(source or like.path, "the mask is empty", advice)
    return count


def mask_scan(
    image: Path, own_mask: Path | None, output: Path, sidecar: Path, *, method: MaskMethod, percentile: float
) -> None:
    """Write the mask of a scan and its sidecar; the user's own mask wins over `method`.

    Parameters
    ----------
    image : Path
    own_mask : Path, optional
    output, sidecar : Path
    method, percentile
        As `make_mask`.

    Raises
    ------
    InputError
        As `make_mask` and `adopt_mask`.
    """
    if own_mask:
        made = adopt_mask(image, own_mask, output)
    else:
        made = make_mask(image, output, method=method, percentile=percentile)
    sources = {"image": image} | ({"mask": own_mask} if own_mask else {})
    write_json(
        sidecar,
        {
            "Type": "ROI",
            "Sources": [raw_uri(path, output) for path in sources.values()],
            "Mask": made,
            "Provenance": provenance(sources, ("numpy", "nibabel")),
        },
    )
    log.info("%s: %s", image, made)
