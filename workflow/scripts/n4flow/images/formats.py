"""The image formats that are read: their headers, in the terms of NIfTI."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError

from n4flow.errors import InputError

#: A header of NIfTI or Analyze starts with its own size, in either byte order: 348 (NIfTI-1, Analyze) or 540 (NIfTI-2).
HEADER_SIZES = {n: {n.to_bytes(4, order) for order in ("little", "big")} for n in (348, 540)}

#: One of FreeSurfer's starts with its version.
MGH_VERSION = (1).to_bytes(4, "big")

#: How the first file of an image starts.
STARTS = {MGH_VERSION, *HEADER_SIZES[348], *HEADER_SIZES[540]}

#: So many bytes of FreeSurfer's header hold something.
MGH_BYTES = 90

#: At the end of a NIfTI-1 header: of one file, of a pair of files.
NIFTI_MAGIC = {b"n+1\0", b"ni1\0"}


def is_compressed(path: Path) -> bool:
    """Whether the name says that a file is compressed."""
    return path.suffix in (".gz", ".mgz")


def read_header(stream: Any, path: Path) -> tuple[Any, Any]:
    """Read the header of an image.

    Extensions and what stands behind the voxels is passed over: sizes there are claims of the file, and nothing here
    needs them.

    Parameters
    ----------
    stream : binary file
        Of `files.header_file`, at its beginning.
    path : Path
        The image: its name says the format.

    Returns
    -------
    header : nibabel header of NIfTI
        Of the like geometry. An Analyze image names no space, as one of NIfTI without codes.
    own : nibabel header
        By which the voxels can be read.

    Raises
    ------
    InputError
        A voxel size is 0 or not finite.
    nibabel's errors
        It is no header of that format.
    """
    start = stream.read(4)
    stream.seek(0)
    if path.suffix in (".mgz", ".mgh"):
        if start != MGH_VERSION:
            raise ImageFileError("it does not start with an MGH header")
        return _mgh_header(stream.read(MGH_BYTES), path)
    if start not in HEADER_SIZES[348] | HEADER_SIZES[540]:
        raise ImageFileError("it does not start with a NIfTI header")
    kind: Any = nib.Nifti2Header if start in HEADER_SIZES[540] else nib.Nifti1Header
    content = stream.read(kind.sizeof_hdr)
    if path.suffix == ".img" and kind is nib.Nifti1Header and content[344:348] not in NIFTI_MAGIC:
        kind = nib.Spm2AnalyzeHeader
    # as it stands in the file: nibabel makes a voxel size of 0 to 1
    raw = kind(content, check=False)
    _check_voxel_size(raw["pixdim"][1 : 1 + min(3, max(0, int(raw["dim"][0])))], path)
    own = kind(content)
    return (nib.Nifti1Header.from_header(own) if kind is nib.Spm2AnalyzeHeader else own), own


def _mgh_header(content: bytes, path: Path) -> tuple[Any, Any]:
    if len(content) < MGH_BYTES:
        raise ImageFileError("its header is cut off")
    own = nib.freesurfer.mghformat.MGHHeader(content)
    _check_voxel_size(own["delta"], path)
    try:
        dtype = own.get_data_dtype()
    except KeyError:
        raise HeaderDataError(f"its data type {int(own['type'])} is not known") from None
    header = nib.Nifti1Header()
    header.set_data_dtype(dtype)
    header.set_data_shape(own.get_data_shape())
    header.set_zooms((*own["delta"], *own.get_zooms()[3:]))
    code = 1 if own["goodRASFlag"] > 0 else 0
    header.set_qform(own.get_affine(), code)
    header.set_sform(own.get_affine(), code)
    header.set_xyzt_units("mm", "sec")
    return header, own


def _check_voxel_size(sizes: np.ndarray, path: Path) -> None:
    sizes = np.array(sizes, dtype=float)
    if not np.isfinite(sizes).all() or (sizes == 0).any():
        raise InputError(
            path,
            f"has the voxel size {' x '.join(f'{size:g}' for size in sizes)}",
            "set pixdim in its header to the real voxel size",
        )
