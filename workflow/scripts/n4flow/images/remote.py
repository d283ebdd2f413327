"""Files in buckets and on web servers (s3://, https://), through fsspec; what goes wrong there is one line.

fsspec is imported where it is used: who has all images on this machine need not have it.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from n4flow.errors import InputError, MachineError

REMOTE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")

#: What fsspec raises where there is no such file.
ABSENT = (FileNotFoundError, IsADirectoryError, NotADirectoryError)

#: Packages whose exceptions are those of a network, though they are no OSError.
NETWORK = {"aiobotocore", "aiohttp", "botocore", "fsspec", "gcsfs", "s3fs"}

#: Files that are read side by side: each is a way to the server and back.
AT_A_TIME = 8


def is_remote(path: str | Path) -> bool:
    """Whether a path is an address (s3://, https://), of what does not lie on this machine."""
    return bool(REMOTE.match(str(path)))


def options(address: str) -> dict[str, Any]:
    """What fsspec is told of a kind of address."""
    # else s3fs asks for the size of each file before it reads it
    return {"max_concurrency": 1} if address.startswith("s3:") else {}


def read_all(addresses: Iterable[str]) -> dict[str, bytes | InputError | None]:
    """Content of some files of one store by their addresses; None of one that is not there.

    Where a bucket may not be listed, what is not there is forbidden: that counts as not there if another file of them
    may be read.

    Parameters
    ----------
    addresses : iterable of str

    Returns
    -------
    dict
        An error, for who needs that file, where it cannot be read.
    """
    addresses = list(addresses)
    system = _file_system(addresses[0])
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        found = dict(zip(addresses, pool.map(lambda address: _read(system, address), addresses), strict=True))
    some = any(isinstance(content, bytes) for content in found.values())
    return {
        address: (None if some and isinstance(content, PermissionError) else refusal(address, content))
        if isinstance(content, Exception)
        else content
        for address, content in found.items()
    }


def _read(system: Any, address: str) -> bytes | Exception | None:
    try:
        content: bytes = system.cat_file(address)
        return content
    except ABSENT as error:
        return error if "bucket" in str(error) else None  # the bucket itself is not there
    except Exception as error:  # every file system has errors of its own
        return error


def write(address: str, content: bytes) -> None:
    """Write a file, which is there when it is complete.

    Raises
    ------
    MachineError
        It cannot be written.
    """
    with _refused(address):
        _file_system(address).pipe_file(address, content)


def remove(address: str) -> None:
    """Remove a file, if it is there.

    Raises
    ------
    MachineError
        It cannot be removed.
    """
    with _refused(address), contextlib.suppress(*ABSENT):
        _file_system(address).rm_file(address)


def names_in(address: str) -> list[str]:
    """Names of the files and folders in a folder; none if it is not there.

    Raises
    ------
    MachineError
        It cannot be read.
    """
    with _refused(address, "read"), contextlib.suppress(*ABSENT):
        found = _file_system(address).ls(address, detail=False, refresh=True)
        return sorted({str(name).rstrip("/").rpartition("/")[2] for name in found})
    return []


def remove_all(address: str) -> None:
    """Remove all files whose addresses begin with that of a folder.

    Raises
    ------
    MachineError
        They cannot be removed.
    """
    with _refused(address), contextlib.suppress(*ABSENT):
        _file_system(address).rm(address, recursive=True)


@contextlib.contextmanager
def _refused(address: str, done: str = "written") -> Any:
    """Turns what file systems raise into a line."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # as above
        raise refusal(address, error, done) from None


def _file_system(address: str) -> Any:
    """What fsspec has for an address.

    Raises
    ------
    InputError
        It has nothing, or lacks a package for it.
    """
    try:
        import fsspec

        return fsspec.core.url_to_fs(address, **options(address))[0]
    except ImportError as error:
        raise MachineError(
            address,
            f"does not lie on this machine, and a package for it is missing ({error})",
            "install envs/requirements-remote.txt, or pip install '.[remote]' in the clone",
        ) from None
    except ValueError as error:
        raise InputError(address, f"is no address that is known ({error})", "give one of s3:// or https://") from None
    except Exception as error:  # as above
        raise refusal(address, error) from None


def is_of_network(error: BaseException) -> bool:
    """Whether an error came on the way to a file, and not of what is in it."""
    return isinstance(error, OSError) or type(error).__module__.partition(".")[0] in NETWORK


def refusal(address: str, error: Exception, done: str = "read") -> MachineError:
    """What is wrong with a file that was to be read or written, in a line.

    Parameters
    ----------
    address : str
    error : Exception
        As the file system raised it.
    done : {"read", "written"}
    """
    text = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    if isinstance(error, PermissionError) or "Credentials" in text:
        return MachineError(
            address,
            f"may not be {done} ({text})",
            "give credentials (AWS_PROFILE, or ~/.aws/credentials); of a public bucket, set FSSPEC_S3_ANON=true",
        )
    if isinstance(error, FileNotFoundError):
        return MachineError(address, f"cannot be {done} ({text})", "check the name of the bucket")
    return MachineError(
        address,
        f"cannot be {done} ({text})",
        "check the network and the address of the server (AWS_ENDPOINT_URL), then run the same command again",
    )
