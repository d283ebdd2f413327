"""Files that appear when they are complete."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


def missing_file(path: str | Path) -> tuple[str, str] | None:
    """What is wrong with a path that should lead to a file, and what to do; None if nothing is.

    Parameters
    ----------
    path : path-like

    Returns
    -------
    (problem, remedy), or None
    """
    if os.path.isfile(path):  # False, too, for what no file system takes for a name
        return None
    if os.path.isdir(path):
        return "is a folder", "give a .nii or .nii.gz file"
    if os.path.islink(path):
        target = os.readlink(path)
        if ".git/annex/" in target:
            return "is a link to a file that is not there", f"fetch it: datalad get {shlex.quote(str(path))}"
        return f"is a link to a file that is not there ({target})", "fetch it, or mend the link"
    return "is not there", "check the path (it is taken from the working directory)"


def shortened(text: str, most: int = 200) -> str:
    """Text of any length for a message: its two ends, if it is longer than a line bears."""
    return text if len(text) <= most else f"{text[: most // 2]}…{text[-most // 2 :]}"


def atomic_text(path: str | Path) -> contextlib.AbstractContextManager[Any]:
    """A text file that appears under its name when it is complete."""
    return _atomic(path, "w", "utf-8")


def atomic_bytes(path: str | Path) -> contextlib.AbstractContextManager[Any]:
    """A file of bytes that appears under its name when it is complete."""
    return _atomic(path, "wb", None)


@contextlib.contextmanager
def _atomic(path: str | Path, mode: str, encoding: str | None) -> Iterator[Any]:
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, mode, encoding=encoding) as file:
            yield file
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_json(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file that appears when it is complete. NaN is refused: it is no JSON."""
    with atomic_text(path) as file:
        json.dump(content, file, indent=2, allow_nan=False)
        file.write("\n")
