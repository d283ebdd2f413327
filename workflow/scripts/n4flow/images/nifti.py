"""Lazy NIfTI images: slabs in, slabs out, geometry kept, nothing half-written."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import sys
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import nibabel as nib
import numpy as np
from isal import igzip
from nibabel.arrayproxy import ArrayProxy
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError

from n4flow.core.affine import affine_problem
from n4flow.errors import InputError, MachineError
from n4flow.images.files import atomic_bytes, header_file, missing_file
from n4flow.images.formats import STARTS, is_compressed, read_header

log = logging.getLogger(__name__)

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

#: So many frames are named in a warning.
NAMED_FRAMES = 10

#: How files begin that stand for another one, which is to be fetched: the name of the tool, and its command.
POINTERS = {b"version https://git-lfs": ("Git LFS", "git lfs pull"), b"/annex/objects/": ("git-annex", "git annex get")}

#: An unknown unit is taken for mm, and for seconds, as every reader does; what is no time, such as Hz, takes none.
MM_PER_UNIT = {"meter": 1e3, "mm": 1.0, "micron": 1e-3}
SECONDS_PER_UNIT = {"sec": 1.0, "msec": 1e-3, "usec": 1e-6, "hz": 0.0, "ppm": 0.0, "rads": 0.0}


class Volume:
    """An image (NIfTI, MGH, or Analyze; 2-D to 4-D) that is read slab by slab.

    Axes keep the order of the file: slabs run along the third, frames are the fourth.

    Parameters
    ----------
    path : path-like
        .nii, .nii.gz, .mgz, .mgh, or .img with its .hdr.

    Attributes
    ----------
    shape : (n0, n1, n2)
        Voxels per axis; a 2-D image has ``n2 == 1``.
    frames : int
        1 for 2-D and 3-D images.
    averaged : tuple of int
        Frames, counted from 0, that `mean_slabs` takes the mean of: all, unless it is set.
    gains : array, optional
        What `mean_slabs` divides by, with the length of the image along one axis and 1 along the others; None unless it
        is set.
    affine : (4, 4) float64 array
    affine_mm : (4, 4) float64 array
        The affine with world coordinates in mm, whatever the header's units.
    has_spatial_reference : bool
        Whether the header names a space (qform_code or sform_code is not 0); where it does not, the affine is made up,
        with its origin in the middle of the image.
    voxel_size_mm : tuple of three floats
        From the affine: pixdim may say otherwise beside an sform. A plane is 1 mm thick.
    frame_time_s : float
        Time between frames; 0 for one frame, and where the header counts in Hz or ppm.
    header : nibabel header
        Of NIfTI, whatever the format of the file.
    dtype : numpy dtype
        As stored, before scl_slope and scl_inter are applied.
    slope, inter : float
        Values are ``slope * stored + inter``.

    Raises
    ------
    InputError
        The file is missing, is no image of the format that its name says, is cut off, or has values or voxel sizes that
        are no real numbers.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if missing := missing_file(path):
            raise InputError(path, *missing)
        if self.path.suffix == ".hdr":
            raise InputError(
                path, "is the header of a pair of files", f"give the other one: {self.path.with_suffix('.img')}"
            )
        if missing := missing_file(header_file(path)):
            raise InputError(header_file(path), missing[0], f"copy it beside {self.path.name}, whose header it holds")
        self._kept = b""
        self._told = False
        with self._opened() as (header, data):
            self.header = header
            self.affine = header.get_best_affine()
            self.dtype = header.get_data_dtype()
            shape = tuple(map(int, data.shape))
            while len(shape) > 3 and shape[-1] == 1:  # no dimensions
                shape = shape[:-1]
            if len(data.shape) > 4:  # nor are they of what is written
                self.header.set_data_shape(shape)
            self._check(data, shape)
            self.slope, self.inter = float(data.slope), float(data.inter)
        n0, n1, n2, self.frames = (*shape, 1, 1)[:4]
        self.shape = (n0, n1, n2)
        self.averaged = tuple(range(self.frames))
        self.gains: np.ndarray | None = None
        scale = MM_PER_UNIT.get(self._unit(), 1.0)
        self.affine_mm = self.affine * [[scale], [scale], [scale], [1.0]]
        if problem := affine_problem(self.affine_mm):
            raise InputError(self.path, f"its affine {problem}", "mend qform or sform in its header")
        self.has_spatial_reference = bool(self.header["qform_code"] > 0 or self.header["sform_code"] > 0)
        sizes = np.linalg.norm(self.affine_mm[:3, :3], axis=0).tolist()
        self.voxel_size_mm = tuple((*sizes[: len(shape)], 1.0)[:3])
        scale = SECONDS_PER_UNIT.get(self._unit(1), 1.0)
        self.frame_time_s = float(self.header.get_zooms()[3]) * scale if self.frames > 1 else 0.0

    @contextlib.contextmanager
    def _opened(self) -> Iterator[tuple[nib.Nifti1Header, ArrayProxy]]:
        """Header and data, which can be read as long as the context lasts."""
        opener: Any = igzip.open if is_compressed(self.path) else open
        header_path = header_file(self.path)
        with self._errors(), open(self.path, "rb") as file:
            start = file.read(32)
        if not start:
            raise InputError(self.path, "is empty", "copy it again")
        for pointer, (tool, command) in POINTERS.items():
            if start.startswith(pointer):
                raise InputError(self.path, f"is a pointer of {tool}, not the image", f"fetch it: {command}")
        start = start[:4]
        plain, packed = (".mgh", ".mgz") if self.path.suffix in (".mgh", ".mgz") else (".nii", ".nii.gz")
        if opener is igzip.open and start in STARTS:
            raise InputError(self.path, "is not compressed, though its name says so", f"rename it to {plain}")
        if opener is igzip.open and start[:2] != GZIP_MAGIC:
            raise InputError(self.path, "is no gzip file, though its name says so", f"give a {packed} file")
        if header_path == self.path and opener is open and start[:2] == GZIP_MAGIC:
            raise InputError(self.path, "is compressed, which its name does not say", f"rename it to {packed}")
        with self._errors(), io.BytesIO(self._kept) if self._kept else opener(self.path, "rb") as stream:
            with contextlib.nullcontext(stream) if header_path == self.path else open(header_path, "rb") as first:
                header, own = read_header(first, self.path)
            yield header, ArrayProxy(stream, own)

    def _unit(self, which: int = 0) -> str:
        try:
            return self.header.get_xyzt_units()[which]
        except KeyError:  # a code that the standard does not know
            return "unknown"

    def _check(self, data: ArrayProxy, shape: tuple[int, ...]) -> None:
        if len(shape) not in (2, 3, 4) or min(shape) < 1:
            raise InputError(self.path, f"has {len(shape)} dimensions {shape}", "give a 2-D, 3-D or 4-D image")
        if self.dtype.fields is not None or np.issubdtype(self.dtype, np.complexfloating):
            kind = "complex" if self.dtype.fields is None else "colour"
            raise InputError(self.path, f"holds {kind} values", "give an image of real numbers, such as the magnitude")
        self._bytes = int(data.offset) + math.prod(shape) * self.dtype.itemsize
        there = self.path.stat().st_size
        if not is_compressed(self.path) and there < self._bytes:
            raise InputError(self.path, f"is cut off: {there} of {self._bytes} bytes", "copy it again")
        if there * DEFLATE_RATIO < self._bytes:
            raise InputError(
                self.path,
                f"is cut off: {there} compressed bytes cannot hold the {self._bytes} that its header claims",
                "copy it again",
            )
        held = math.prod(shape[:3] if len(shape) == 4 else shape[:2])
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
            kind = "MGH" if self.path.suffix in (".mgh", ".mgz") else "NIfTI"
            raise InputError(self.path, f"is no {kind} image ({error})", "give a .nii or .nii.gz file") from None
        except OSError as error:
            problem = f"cannot be read ({error})"
            raise MachineError(self.path, problem, "copy it again or check its permissions") from None
        except ValueError as error:
            raise InputError(self.path, f"cannot be read ({error})", "copy it again or mend its header") from None

    def slabs(
        self, planes: int | None = None, frames: Sequence[int] | None = None
    ) -> Iterator[tuple[slice, int, np.ndarray]]:
        """Read the image from its first voxel to its last.

        Parameters
        ----------
        planes : int, optional
            Planes per slab; by default about `SLAB_VOXELS` voxels.
        frames : sequence of int, optional
            These alone; all by default.

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
            for frame in range(self.frames) if frames is None else frames:
                for slab in self._slab_slices(planes):
                    index = (slice(None), slice(None), slab, frame, 0, 0, 0)[: len(data.shape)]
                    values = np.asarray(data[index] if len(index) > 2 else data)
                    yield slab, frame, values.reshape(*self.shape[:2], -1, order="F")

    def _keep(self) -> None:
        """Decompress a small file once for all passes over it."""
        if is_compressed(self.path) and not self._kept and self._bytes <= KEPT_BYTES:
            with self._errors():
                found = self.path.stat()
                self._kept = _decompressed(self.path, self._bytes, found.st_size, found.st_mtime_ns)

    def _slab_slices(self, planes: int | None) -> Iterator[slice]:
        planes = planes or max(1, SLAB_VOXELS // (self.shape[0] * self.shape[1]))
        for start in range(0, self.shape[2], planes):
            yield slice(start, min(start + planes, self.shape[2]))

    def mean_slabs(self, planes: int | None = None) -> Iterator[tuple[slice, np.ndarray]]:
        """Slabs of the mean over the frames (those in `averaged`): of the image itself if it has one frame.

        The mean of several frames is held as a whole, in float64. At each voxel it is that of the finite values: a lost
        frame costs no other.

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
        if len(self.averaged) == 1:
            for slab, _, values in self.slabs(planes, self.averaged):
                yield slab, self._levelled(slab, values)
            return
        total = np.zeros(self.shape)
        used: Any = len(self.averaged)
        lost = dict.fromkeys(self.averaged, 0)
        for slab, frame, values in self.slabs(frames=self.averaged):
            if values.dtype.kind == "f" and not (finite := np.isfinite(values)).all():
                if not any(lost.values()):
                    used = np.full(self.shape, len(self.averaged), np.int32)
                lost[frame] += int(np.count_nonzero(~finite))
                used[:, :, slab] -= ~finite
                values = np.where(finite, values, 0)
            total[:, :, slab] += values
        # what all lack is background
        spoilt = [str(frame + 1) for frame, count in lost.items() if count > min(lost.values())]
        if spoilt and not self._told:
            self._told = True
            log.warning(
                "%s: %d of %d frames hold values that are not finite, which are left out of the mean: %s",
                self.path,
                len(spoilt),
                len(self.averaged),
                " ".join(spoilt[:NAMED_FRAMES]) + (" …" if len(spoilt) > NAMED_FRAMES else ""),
            )
        with np.errstate(invalid="ignore"):  # where all are lost
            total /= used
        for slab in self._slab_slices(planes):
            yield slab, self._levelled(slab, total[:, :, slab])

    def _levelled(self, slab: slice, values: np.ndarray) -> np.ndarray:
        """Values divided by the gains of their planes, if there are any."""
        if self.gains is None:
            return values
        return values / (self.gains if self.gains.shape[2] == 1 else self.gains[:, :, slab])

    def mean(self) -> np.ndarray:
        """The mean over the frames in `averaged` as one float32 array (n0, n1, n2)."""
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
            Another shape, or a corner that lies a hundredth of a voxel or more away, by whichever of qform and sform.
        """
        if other.shape != self.shape:
            raise InputError(
                other.path,
                f"the {role} has shape {other.shape}, its image {self.path.name} has {self.shape}",
                f"resample the {role} to the image",
            )
        corners = np.array([[*corner, 1] for corner in np.ndindex(2, 2, 2)]) * [*(n - 1 for n in self.shape), 1]

        def agree(own: np.ndarray, others: np.ndarray) -> bool:
            apart = corners @ (np.linalg.inv(own) @ others - np.eye(4)).T
            # a hundredth of a voxel: rounding in a header passes, a shift does not
            return bool(np.abs(apart).max() < 0.01)

        if agree(self.affine, other.affine):
            return
        if self.has_spatial_reference and other.has_spatial_reference:
            fit = any(agree(own, others) for own in self._forms() for others in other._forms())
        else:  # one of them says nothing of where it lies
            fit = np.allclose(self.voxel_size_mm, other.voxel_size_mm, rtol=1e-3)
            lacking = self if other.has_spatial_reference else other
            if fit:
                log.warning(
                    "%s: names no space (qform_code and sform_code are 0); the %s is taken voxel for voxel, look at "
                    "its outline, or copy the header of %s to it",
                    lacking.path,
                    role,
                    (other if lacking is self else self).path.name,
                )
        if not fit:
            raise InputError(
                other.path,
                f"the affine of the {role} differs from that of its image {self.path.name}",
                f"if its voxels are those of the image, copy the image's header to it (fslcpgeom {self.path.name} "
                f"{other.path.name}); else resample the {role} to the image",
            )

    def _forms(self) -> list[np.ndarray]:
        """The affines that the header has a code for, those that cannot be used left out."""
        found = []
        forms: list[Any] = [self.header.get_sform, self.header.get_qform]
        for form in forms:
            with contextlib.suppress(ValueError, HeaderDataError, np.linalg.LinAlgError):
                affine = form(coded=True)[0]
                if affine is not None and not affine_problem(affine):
                    found.append(affine)
        return found


@lru_cache(maxsize=1)
def _decompressed(path: Path, length: int, size: int, time_ns: int) -> bytes:
    """The first bytes of a compressed file, which one step after the other reads; of the file as it is now."""
    with igzip.open(path, "rb") as stream:
        return stream.read(length)


class Grid(NamedTuple):
    """What an image that is written takes over of another one, or of none."""

    header: Any
    shape: tuple[int, ...]
    frames: int

    @classmethod
    def of(cls, shape: Sequence[int], affine_mm: np.ndarray) -> Grid:
        """A volume of this shape, whose affine is in mm and names a space."""
        header = nib.Nifti1Header()
        header.set_data_shape(shape)
        header.set_xyzt_units("mm", "unknown")
        header.set_qform(affine_mm, "scanner")
        header.set_sform(affine_mm, "scanner")
        return cls(header, tuple(shape), 1)


class VolumeWriter:
    """Writes an image like another one, slab by slab; the file appears when it is complete.

    Parameters
    ----------
    path : path-like
        .nii or .nii.gz.
    like : Volume or Grid
        Gives shape, affine, codes, zooms and units.
    dtype : numpy dtype
    slope, intercept : float
        Stored value times slope plus intercept is the real value (integers only).
    frames : int, optional
        1 for what lies on the voxels of `like` and holds other values, such as its field, which then inherits nothing
        that is said of these; by default an image like it, of all its frames.
    """

    def __init__(
        self,
        path: str | Path,
        like: Volume | Grid,
        dtype: Any,
        *,
        slope: float = 1.0,
        intercept: float = 0.0,
        frames: int | None = None,
    ) -> None:
        self.path = Path(path)
        if not self.path.name.endswith((".nii", ".nii.gz")):
            raise InputError(path, "is no name of a NIfTI image, which is what is written", "let it end in .nii.gz")
        self.dtype = np.dtype(dtype).newbyteorder(like.header.endianness)  # as the header is written
        self.slope, self.intercept = slope, intercept
        header = like.header.copy()
        header.set_data_dtype(self.dtype)
        header["cal_min"] = header["cal_max"] = 0
        if frames == 1:
            for name in ("intent_code", "intent_name", "intent_p1", "intent_p2", "intent_p3", "descrip", "aux_file"):
                header[name] = nib.Nifti1Header()[name]
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
        """Hand bytes on in pieces of one size: what a compressor makes of them depends on the pieces."""
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
