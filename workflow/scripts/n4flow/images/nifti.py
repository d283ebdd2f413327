"""Lazy NIfTI images: slabs in, slabs out, geometry kept, nothing half-written."""

from __future__ import annotations

import contextlib
import io
import math
import os
import sys
import zlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import nibabel as nib
import numpy as np
from isal import igzip
from nibabel.arrayproxy import ArrayProxy
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError

from n4flow.core.affine import affine_problem
from n4flow.errors import InputError
from n4flow.images.files import atomic_bytes, missing_file

#: Voxels in a slab: what reading, evaluating and writing hold in memory at a time, per array. So few lie in a core's
#: cache, which takes a fifth off the time of a correction (2**20 to 2**18).
SLAB_VOXELS = 2**18

#: An image whose data are no larger is decompressed once, and its bytes are kept for the next pass over them.
KEPT_BYTES = 2**26

#: Level 1 of 3 (ISA-L): a third smaller than level 0 at a tenth of zlib's time. Level 2 saves 1 % more of a field, and
#: takes a quarter longer.
GZIP_LEVEL = 1

WRITE_BYTES = 2**20

#: Pieces of so many bytes that may wait for being written.
WAITING_PIECES = 8

#: The most that a byte of a compressed file can stand for.
DEFLATE_RATIO = 1032

#: The most voxels of what is held as a whole: a plane, or the mean of a series.
HELD_VOXELS = 2**28

GZIP_MAGIC = b"\x1f\x8b"

#: How files begin that stand for another one, which is to be fetched: the name of the tool, and its command.
POINTERS = {b"version https://git-lfs": ("Git LFS", "git lfs pull"), b"/annex/objects/": ("git-annex", "git annex get")}

#: A NIfTI header starts with its own size, in either byte order: 348 (NIfTI-1) or 540 (NIfTI-2).
HEADER_SIZES = {n: {n.to_bytes(4, order) for order in ("little", "big")} for n in (348, 540)}

#: An unknown unit is taken for mm, as every reader does.
MM_PER_UNIT = {"meter": 1e3, "mm": 1.0, "micron": 1e-3}
SECONDS_PER_UNIT = {"sec": 1.0, "msec": 1e-3, "usec": 1e-6}


class Volume:
    """A NIfTI image (.nii or .nii.gz, 2-D to 4-D) that is read slab by slab.

    Axes keep the order of the file: slabs run along the third, frames are the fourth.

    Parameters
    ----------
    path : path-like

    Attributes
    ----------
    shape : (n0, n1, n2)
        Voxels per axis; a 2-D image has ``n2 == 1``.
    frames : int
        1 for 2-D and 3-D images.
    affine : (4, 4) float64 array
    affine_mm : (4, 4) float64 array
        The affine with world coordinates in mm, whatever the header's units.
    has_spatial_reference : bool
        Whether the header names a space (qform_code or sform_code is not 0); where it does not, the affine is made up,
        with its origin in the middle of the image.
    voxel_size_mm : tuple of three floats
        From the header's zooms and units.
    frame_time_s : float
        Time between frames; 0 for one frame.
    header : nibabel header
    dtype : numpy dtype
        As stored, before scl_slope and scl_inter are applied.
    slope, inter : float
        Values are ``slope * stored + inter``.

    Raises
    ------
    InputError
        The file is missing, is no NIfTI image, is cut off, or has values or voxel sizes that are
        no real numbers.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if missing := missing_file(path):
            raise InputError(path, *missing)
        self._kept = b""
        with self._opened() as (header, data):
            self.header = header
            self.affine = header.get_best_affine()
            self.dtype = header.get_data_dtype()
            self._check(data)
            self.slope, self.inter = float(data.slope), float(data.inter)
            shape = data.shape
        n0, n1, n2, self.frames = (*shape, 1, 1)[:4]
        self.shape = (n0, n1, n2)
        scale = MM_PER_UNIT.get(self._unit(), 1.0)
        zooms = [float(z) * scale for z in self.header.get_zooms()[:3]]
        self.affine_mm = self.affine * [[scale], [scale], [scale], [1.0]]
        if problem := affine_problem(self.affine_mm):
            raise InputError(self.path, f"its affine {problem}", "mend qform or sform in its header")
        self.has_spatial_reference = bool(self.header["qform_code"] > 0 or self.header["sform_code"] > 0)
        self.voxel_size_mm = tuple((*zooms, 1.0)[:3])
        scale = SECONDS_PER_UNIT.get(self._unit(1), 1.0)
        self.frame_time_s = float(self.header.get_zooms()[3]) * scale if self.frames > 1 else 0.0

    @contextlib.contextmanager
    def _opened(self) -> Iterator[tuple[nib.Nifti1Header, ArrayProxy]]:
        """Header and data, which can be read as long as the context lasts.

        Header extensions are passed over: their sizes are claims of the file, and nothing here needs them.
        """
        opener: Any = igzip.open if self.path.suffix == ".gz" else open
        with self._errors(), open(self.path, "rb") as file:
            start = file.read(32)
        if not start:
            raise InputError(self.path, "is empty", "copy it again")
        for pointer, (tool, command) in POINTERS.items():
            if start.startswith(pointer):
                raise InputError(self.path, f"is a pointer of {tool}, not the image", f"fetch it: {command}")
        start = start[:4]
        if opener is igzip.open and start in HEADER_SIZES[348] | HEADER_SIZES[540]:
            raise InputError(self.path, "is not compressed, though its name says so", "rename it to .nii")
        if opener is open and start[:2] == GZIP_MAGIC:
            raise InputError(self.path, "is compressed, which its name does not say", "rename it to .nii.gz")
        with self._errors(), io.BytesIO(self._kept) if self._kept else opener(self.path, "rb") as stream:
            start = stream.read(4)
            stream.seek(0)
            if start not in HEADER_SIZES[348] | HEADER_SIZES[540]:
                raise ImageFileError("it does not start with a NIfTI header")
            kind: Any = nib.Nifti2Header if start in HEADER_SIZES[540] else nib.Nifti1Header
            content = stream.read(kind.sizeof_hdr)
            # as it stands in the file: nibabel makes a voxel size of 0 to 1
            self._check_voxel_size(kind(content, check=False))
            header = kind(content)
            yield header, ArrayProxy(stream, header)

    def _unit(self, which: int = 0) -> str:
        try:
            return self.header.get_xyzt_units()[which]
        except KeyError:  # a code that the standard does not know
            return "unknown"

    def _check_voxel_size(self, header: nib.Nifti1Header) -> None:
        sizes = np.array(header["pixdim"][1 : 1 + min(3, max(0, int(header["dim"][0])))], dtype=float)
        if not np.isfinite(sizes).all() or (sizes == 0).any():
            raise InputError(
                self.path,
                f"has the voxel size {' x '.join(f'{size:g}' for size in sizes)}",
                "set pixdim in its header to the real voxel size",
            )

    def _check(self, data: ArrayProxy) -> None:
        shape = data.shape
        if len(shape) not in (2, 3, 4) or min(shape) < 1:
            raise InputError(self.path, f"has {len(shape)} dimensions {shape}", "give a 2-D, 3-D or 4-D image")
        if self.dtype.fields is not None or np.issubdtype(self.dtype, np.complexfloating):
            kind = "complex" if self.dtype.fields is None else "colour"
            raise InputError(self.path, f"holds {kind} values", "give an image of real numbers, such as the magnitude")
        self._bytes = int(data.offset) + math.prod(map(int, shape)) * self.dtype.itemsize
        there = self.path.stat().st_size
        if self.path.suffix != ".gz" and there < self._bytes:
            raise InputError(self.path, f"is cut off: {there} of {self._bytes} bytes", "copy it again")
        if there * DEFLATE_RATIO < self._bytes:
            raise InputError(
                self.path,
                f"is cut off: {there} compressed bytes cannot hold the {self._bytes} that its header claims",
                "copy it again",
            )
        held = math.prod(map(int, shape[:3] if len(shape) == 4 and shape[3] > 1 else shape[:2]))
        if held > HELD_VOXELS:
            raise InputError(
                self.path,
                f"has {held} voxels in a plane (or in a frame of a series), more than {HELD_VOXELS}",
                "give it at a lower resolution, or in parts",
            )

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """Turn what reading libraries raise into one line for the user."""
        try:
            yield
        except InputError:
            raise
        except EOFError:
            raise InputError(self.path, "the compressed data end too early", "copy it again") from None
        except (igzip.BadGzipFile, zlib.error, igzip.isal_zlib.error) as error:  # type: ignore[attr-defined]
            raise InputError(self.path, f"cannot be decompressed ({error})", "copy it again") from None
        except (ImageFileError, HeaderDataError, WrapStructError) as error:
            raise InputError(self.path, f"is no NIfTI image ({error})", "give a .nii or .nii.gz file") from None
        except OSError as error:
            raise InputError(self.path, f"cannot be read ({error})", "copy it again or check its permissions") from None
        except ValueError as error:
            raise InputError(self.path, f"cannot be read ({error})", "copy it again or mend its header") from None

    def slabs(self, planes: int | None = None) -> Iterator[tuple[slice, int, np.ndarray]]:
        """Read the image from its first voxel to its last.

        Parameters
        ----------
        planes : int, optional
            Planes per slab; by default about `SLAB_VOXELS` voxels.

        Yields
        ------
        slab : slice
            Along the third axis.
        frame : int
        values : (n0, n1, planes) array
            Real values (scl_slope and scl_inter applied).

        Raises
        ------
        InputError
            The file turns out to be damaged.
        """
        self._keep()
        with self._opened() as (_, data):
            for frame in range(self.frames):
                for slab in self._slab_slices(planes):
                    index = {2: (), 3: (slice(None), slice(None), slab)}.get(
                        len(data.shape), (slice(None), slice(None), slab, frame)
                    )
                    values = np.asarray(data[index] if index else data)
                    yield slab, frame, values.reshape(*self.shape[:2], -1, order="F")

    def _keep(self) -> None:
        """Decompress a small file once for all passes over it."""
        if self.path.suffix == ".gz" and not self._kept and self._bytes <= KEPT_BYTES:
            with self._errors():
                found = self.path.stat()
                self._kept = _decompressed(self.path, self._bytes, found.st_size, found.st_mtime_ns)

    def _slab_slices(self, planes: int | None) -> Iterator[slice]:
        planes = planes or max(1, SLAB_VOXELS // (self.shape[0] * self.shape[1]))
        for start in range(0, self.shape[2], planes):
            yield slice(start, min(start + planes, self.shape[2]))

    def mean_slabs(self, planes: int | None = None) -> Iterator[tuple[slice, np.ndarray]]:
        """Slabs of the mean over the frames: of the image itself if it has one frame.

        The mean of several frames is held as a whole, in float64.

        Parameters
        ----------
        planes : int, optional
            As `slabs`.

        Yields
        ------
        slab : slice
            Along the third axis.
        values : (n0, n1, planes) array

        Raises
        ------
        InputError
            The file turns out to be damaged.
        """
        if self.frames == 1:
            for slab, _, values in self.slabs(planes):
                yield slab, values
            return
        total = np.zeros(self.shape)
        for slab, _, values in self.slabs():
            total[:, :, slab] += values
        total /= self.frames
        for slab in self._slab_slices(planes):
            yield slab, total[:, :, slab]

    def mean(self) -> np.ndarray:
        """The mean over the frames as one float32 array (n0, n1, n2)."""
        result = np.empty(self.shape, dtype=np.float32, order="F")
        for slab, values in self.mean_slabs():
            result[:, :, slab] = values
        return result

    def check_same_grid(self, other: Volume, role: str) -> None:
        """Refuse another image (a mask, say) that does not lie on this one's voxels.

        Parameters
        ----------
        other : Volume
        role : str
            What it is called in the message.

        Raises
        ------
        InputError
            Another shape, or a corner that lies a hundredth of a voxel or more away.
        """
        if other.shape != self.shape:
            raise InputError(
                other.path,
                f"the {role} has shape {other.shape}, its image {self.path.name} has {self.shape}",
                f"resample the {role} to the image",
            )
        corners = np.array([[*corner, 1] for corner in np.ndindex(2, 2, 2)]) * [*(n - 1 for n in self.shape), 1]
        apart = corners @ (np.linalg.inv(self.affine) @ other.affine - np.eye(4)).T
        # a hundredth of a voxel: rounding in a header passes, a shift does not
        if not np.abs(apart).max() < 0.01:
            raise InputError(
                other.path,
                f"the affine of the {role} differs from that of its image {self.path.name}",
                f"resample the {role} to the image",
            )


@lru_cache(maxsize=1)
def _decompressed(path: Path, length: int, size: int, time_ns: int) -> bytes:
    """The first bytes of a compressed file, which one step after the other reads; of the file as it is now."""
    with igzip.open(path, "rb") as stream:
        return stream.read(length)


class VolumeWriter:
    """Writes an image like another one, slab by slab; the file appears when it is complete.

    Parameters
    ----------
    path : path-like
        .nii or .nii.gz.
    like : Volume
        Gives shape, affine, codes, zooms and units.
    dtype : numpy dtype
    slope, intercept : float
        Stored value times slope plus intercept is the real value (integers only).
    frames : int, optional
        Frames to write; those of `like` by default.
    """

    def __init__(
        self,
        path: str | Path,
        like: Volume,
        dtype: Any,
        *,
        slope: float = 1.0,
        intercept: float = 0.0,
        frames: int | None = None,
    ) -> None:
        self.path = Path(path)
        self.dtype = np.dtype(dtype).newbyteorder(like.header.endianness)  # as the header is written
        self.slope, self.intercept = slope, intercept
        header = like.header.copy()
        header.set_data_dtype(self.dtype)
        header["cal_min"] = header["cal_max"] = 0
        if frames == 1 and like.frames > 1:
            zooms = header.get_zooms()[:3]
            header.set_data_shape(like.shape)
            header.set_zooms(zooms)
        header.set_slope_inter(slope, intercept)
        header["magic"] = header.single_magic
        header.set_data_offset(0)  # lets nibabel put the data right behind the header
        self.header = header

    def __enter__(self) -> Self:
        self._place = contextlib.ExitStack()
        self._file = self._place.enter_context(atomic_bytes(self.path))
        self._stream: Any = self._file
        if self.path.suffix == ".gz":
            # neither name nor time in the gzip header: the same image is the same file
            self._stream = igzip.IGzipFile("", "wb", GZIP_LEVEL, self._file, mtime=0)
        self._piece = bytearray()
        # compressing is half of the work, and needs no lock of the interpreter's
        self._thread = self._place.enter_context(ThreadPoolExecutor(1))
        self._handed_on: deque[Future[None]] = deque()
        start = io.BytesIO()
        self.header.write_to(start)
        offset = self.header.get_data_offset()
        self._missing = offset + math.prod(map(int, self.header.get_data_shape())) * self.dtype.itemsize
        self._put(start.getvalue().ljust(offset, b"\0"))
        return self

    def _put(self, content: Any) -> None:
        """Hand bytes on in pieces of one size: what a compressor makes of them hangs on the pieces."""
        content = memoryview(content).cast("B")
        if len(content) > self._missing:
            raise ValueError(f"{self.path}: {len(content) - self._missing} bytes more than the image holds")
        while content:
            room = WRITE_BYTES - len(self._piece)
            self._piece += content[:room]
            self._missing -= len(content[:room])
            content = content[room:]
            if len(self._piece) == WRITE_BYTES or not self._missing:
                self._handed_on.append(self._thread.submit(self._write_piece, self._piece, not self._missing))
                self._piece = bytearray()
            if len(self._handed_on) > WAITING_PIECES:
                self._handed_on.popleft().result()

    def _write_piece(self, piece: bytearray, last: bool) -> None:
        self._stream.write(piece)
        if last:  # on the disk while others still compute
            if self._stream is not self._file:
                self._stream.close()
            self._file.flush()
            os.fsync(self._file.fileno())

    def write(self, values: np.ndarray) -> np.ndarray:
        """Append the next slab (n0, n1, planes), in real values; returns them as they will be read.

        Integers are rounded and cut off at the limits of their type; NaN becomes 0.
        """
        if np.issubdtype(self.dtype, np.integer):
            if values.dtype == bool:
                values = values.astype(self.dtype)
            if values.dtype == self.dtype and (self.slope, self.intercept) == (1, 0):
                self._put(_as_in_file(values))
                return values
            limits = np.iinfo(self.dtype)
            # the largest float64 that is no larger than the largest integer
            top = float(limits.max) if int(float(limits.max)) <= limits.max else np.nextafter(float(limits.max), 0)
            real = np.where(np.isnan(values), 0, values).astype(np.float64)
            stored = np.clip(np.rint((real - self.intercept) / self.slope), limits.min, top).astype(self.dtype)
            self._put(_as_in_file(stored))
            return stored * self.slope + self.intercept
        stored = np.asarray(values, dtype=self.dtype)
        self._put(_as_in_file(stored))
        return stored

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                if self._missing:
                    raise ValueError(f"{self.path}: {self._missing} bytes of the image have not been written")
                for written in self._handed_on:
                    written.result()
        except BaseException:
            self._thread.shutdown(cancel_futures=True)
            self._place.__exit__(*sys.exc_info())
            raise
        self._thread.shutdown(cancel_futures=kind is not None)  # what waits is of no use after an error
        self._place.__exit__(kind, error, trace)


def _as_in_file(values: np.ndarray) -> Any:
    """The bytes of an array, first axis fastest."""
    return np.asfortranarray(values).T.reshape(-1).view(np.uint8).data
