"""Text files that appear when they are complete."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def atomic_text(path: str | Path) -> Iterator[Any]:
    """A text file that appears under its name when it is complete."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "w", encoding="utf-8") as file:
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
