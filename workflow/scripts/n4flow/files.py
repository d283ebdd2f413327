"""Files that appear when they are complete."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


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
