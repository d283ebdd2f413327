"""Files: what is wrong with one, and new ones that appear when they are complete."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gzip
import json
import logging
import math
import os
import shlex
import struct
import zlib
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from n4flow.errors import MachineError
from n4flow.images.ngff import is_store

log = logging.getLogger(__name__)

#: What to do where the operating system refuses to write.
REMEDIES = {
    errno.ENOSPC: "make room there, then run the same command again",
    errno.EDQUOT: "make room there or ask for a larger quota, then run the same command again",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f), then run the same command again",
    errno.EROFS: "give a folder that can be written to",
    errno.EACCES: "give a folder that you may write to, or change its owner or permissions",
    errno.ENOENT: "give a path in a folder that is there",
    errno.ENOTDIR: "give a path in a folder that is there",
}


#: The ends of the names of images that are read; each .img has an .hdr beside it.
IMAGE_ENDS = (".nii.gz", ".nii", ".mgz", ".mgh", ".img")

#: What makes NIfTI of images in other formats, by the end of their name; ITK's are those that SimpleITK reads.
_ITK = "python -c 'import sys, SimpleITK as sitk; sitk.WriteImage(sitk.ReadImage(sys.argv[1]), sys.argv[2])' {} {}"
_DCM2NIIX = "dcm2niix -z y -f {2} -o {3} {0}"
CONVERTERS = {
    **dict.fromkeys((".img.gz", ".hdr.gz"), "nib-convert {} {}"),
    **dict.fromkeys((".nrrd", ".nhdr", ".mha", ".mhd"), _ITK),
    **dict.fromkeys((".head", ".brik", ".brik.gz"), "3dAFNItoNIFTI -prefix {1} {0}"),
    ".mnc": "mnc2nii {} {}",
    **dict.fromkeys((".dcm", ".ima", ".par", ".rec"), _DCM2NIIX),
}


def of_other_format(path: str | Path) -> tuple[str, str] | None:
    """The name without its extension, and the command that makes NIfTI of it, of an image in another known format.

    A folder counts as one of DICOM.
    """
    text = str(path)
    end = next((end for end in sorted(CONVERTERS, key=len, reverse=True) if text.lower().endswith(end)), None)
    if end:
        stem, command = text[: -len(end)], CONVERTERS[end]
    elif os.path.isdir(text) and not os.path.splitext(text)[1]:
        stem, command = text, _DCM2NIIX
    else:
        return None
    folder, name = os.path.split(stem)
    return stem, command.format(*map(shlex.quote, (text, f"{stem}.nii.gz", name, folder or ".")))


def header_file(path: str | Path) -> Path:
    """The file that holds the header of an image: of an .img the .hdr, of any other the image itself."""
    path = Path(path)
    return path.with_suffix(".hdr") if path.suffix == ".img" else path


def missing_file(path: str | Path) -> tuple[str, str] | None:
    """What is wrong with a path that should lead to a file to read, and what to do; None if nothing is.

    Parameters
    ----------
    path : path-like

    Returns
    -------
    (problem, remedy), or None
    """
    if os.path.isfile(path):  # False, too, for what no file system takes for a name
        if os.access(path, os.R_OK):
            return None
        return f"cannot be read ({os.strerror(errno.EACCES)})", f"allow it: chmod u+r {shlex.quote(str(path))}"
    if os.path.isdir(path):
        return "is a folder", "give a .nii or .nii.gz file"
    if os.path.islink(path):
        target = os.readlink(path)
        if ".git/annex/" in target:
            return "is a link to a file that is not there", f"fetch it: datalad get {shlex.quote(str(path))}"
        return f"is a link to a file that is not there ({target})", "fetch it, or mend the link"
    if (meant := os.path.expandvars(os.path.expanduser(path))) != str(path):
        return "is not there", f"write it out: {shlex.quote(meant)}"
    return "is not there", "check the path (it is taken from the working directory)"


def voxels_of_frame(path: str | Path) -> int:
    """Voxels of an image, of one frame of a series, as its header has them; 0 if it cannot be read (yet).

    In plain Python: Snakemake's own environment may hold no more.
    """
    name = str(path)
    opener: Any = gzip.open if name.endswith((".gz", ".mgz")) else open
    try:
        with opener(header_file(path), "rb") as file:
            header = file.read(80)
        if name.endswith((".mgh", ".mgz")):
            version, *shape = struct.unpack_from(">4i", header)
            return math.prod(max(0, n) for n in shape) if version == 1 else 0
        for size, place in ((348, "40x8h"), (540, "16x8q")):
            for order in "<>":
                if struct.unpack_from(f"{order}i", header)[0] == size:
                    axes, *shape = struct.unpack_from(order + place, header)
                    return math.prod(max(0, n) for n in shape[: min(axes, 3)])
    except (OSError, EOFError, zlib.error, struct.error):
        pass  # its job tells what is wrong
    return 0


def shortened(text: str, most: int = 200) -> str:
    """Text of any length for a message: its two ends, if it is longer than a line bears."""
    return text if len(text) <= most else f"{text[: most // 2]}…{text[-most // 2 :]}"


def atomic_text(path: str | Path) -> contextlib.AbstractContextManager[Any]:
    """A text file that appears under its name when it is complete; `MachineError` if it cannot be written."""
    return _atomic(path, "w", "utf-8")


def atomic_bytes(path: str | Path) -> contextlib.AbstractContextManager[Any]:
    """A file of bytes that appears under its name when it is complete; `MachineError` if it cannot be written."""
    return _atomic(path, "wb", None)


@contextlib.contextmanager
def _atomic(path: str | Path, mode: str, encoding: str | None) -> Iterator[Any]:
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with _opened(partial, mode, encoding) as file:
            _lock(file)
            yield file
            file.flush()
            os.fsync(file.fileno())  # a name without its content would outlive a loss of power
            os.replace(partial, path)
    except OSError as error:
        _remove(partial)
        raise not_writable(path, error.errno) or error from None
    except BaseException:
        _remove(partial)
        raise


def _opened(path: Path, mode: str, encoding: str | None, *, again: bool = True) -> Any:
    """Open a file to write in a folder that is made: another run that ends removes those that it finds empty."""
    with contextlib.suppress(FileExistsError):  # a file in its place, of which opening says more
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        return open(path, mode, encoding=encoding)
    except FileNotFoundError:
        if not again:
            raise
    return _opened(path, mode, encoding, again=False)


def _lock(file: Any) -> bool:
    """Take a lock that ends with the process; False if another one has it, or the file system knows none."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


@contextlib.contextmanager
def locked(path: str | Path) -> Iterator[None]:
    """Have a file to oneself among the processes that lock it, one after the other; it need not be there.

    Where the file system knows no locks, nothing is locked, and a warning says so.

    Raises
    ------
    InputError
        Nothing can be written to its folder.
    """
    path = Path(path)
    lock = path.with_name(f".{path.name}.lock")  # one that stays: the file itself is replaced by a new one
    try:
        number = os.open(lock, os.O_CREAT | os.O_WRONLY, 0o666)
    except OSError as error:
        raise not_writable(lock, error.errno) or error from None
    try:
        try:
            fcntl.flock(number, fcntl.LOCK_EX)
        except OSError as error:
            _warn_of_no_locks(path.parent, str(error.strerror))
        yield
    finally:
        os.close(number)


@cache
def _warn_of_no_locks(folder: Path, reason: str) -> None:
    log.warning(
        "%s: files there cannot be locked (%s): start one run at a time on this folder, or rows may be lost",
        folder,
        reason,
    )


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()


def remove_abandoned(folder: str | Path) -> None:
    """Remove what processes that were killed had begun to write in a folder; not what is being written now.

    OME-Zarr stores are left alone: zarr takes no locks, and a store that is not complete is finished by its own step.
    """
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not is_store(name)]
        for name in names:
            if name.endswith(".partial"):
                with contextlib.suppress(OSError), open(Path(place, name), "rb") as file:
                    if _lock(file):
                        _remove(Path(place, name))


def why_not_writable(folder: str | Path) -> str:
    """Why nothing can be written to a folder, or to where it would be made, in one line; empty if it can."""
    path = Path(os.path.abspath(folder))
    there = next(place for place in (path, *path.parents) if place.exists())
    if os.access(there, os.W_OK | os.X_OK):
        return ""
    read_only = os.statvfs(there).f_flag & os.ST_RDONLY
    return str(not_writable(there, errno.EROFS if read_only else errno.EACCES))


def not_writable(path: str | Path, number: int | None) -> MachineError | None:
    """The error of a path that the operating system refuses to write to, by its number; None for other numbers."""
    if number not in REMEDIES:
        return None
    return MachineError(path, f"cannot be written ({os.strerror(number)})", REMEDIES[number])


def write_json(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file that appears when it is complete. NaN is refused: it is no JSON."""
    with atomic_text(path) as file:
        json.dump(content, file, indent=2, allow_nan=False)
        file.write("\n")


def read_json(path: str | Path) -> Any:
    """Content of a JSON file of our own; None if there is none that can be read."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
