"""A bias field as a JSON file of a few kilobytes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from n4flow.core.field import BiasField
from n4flow.errors import InputError
from n4flow.images.files import write_json

#: How the name of a NIfTI image ends.
IMAGE = re.compile(r"\.nii(\.gz)?$", re.IGNORECASE)

#: Bytes of a lattice of some million control points.
LARGEST_FILE = 2**26


def save_field(field: BiasField, path: str | Path, **notes: Any) -> None:
    """Write a field as a JSON file, which appears when it is complete; `load_field` reads it.

    Parameters
    ----------
    field : BiasField
    path : path-like
    **notes
        Further keys of the file, ready for JSON, which `load_field` passes over.
    """
    write_json(path, {**notes, **field.to_mapping()})


def load_field(path: str | Path) -> BiasField:
    """Read a field from a file that `save_field` wrote.

    Parameters
    ----------
    path : path-like
        JSON, see `BiasField.to_mapping`.

    Returns
    -------
    BiasField
        The one that was saved, to the last bit.

    Raises
    ------
    InputError
        The file is missing, or does not hold a field of this format.
    """
    if (image := IMAGE.search(str(path))) is not None:
        points = f"{str(path)[: image.start()]}.json"
        raise InputError(path, "is an image", f"give its control points, the JSON file beside it: {points}")
    try:
        if (size := Path(path).stat().st_size) > LARGEST_FILE:
            raise ValueError(f"it has {size} bytes")
        return BiasField.from_mapping(json.loads(Path(path).read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(
            path,
            f"is no n4flow bias field ({error})",
            "give the control points, *_biasfield.json, that lie beside the corrected image",
        ) from None
