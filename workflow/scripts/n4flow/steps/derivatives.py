"""A correction on files: a scan goes in, BIDS derivatives with their sidecars come out."""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from n4flow.core.field import BiasField
from n4flow.images.division import write_corrected
from n4flow.images.fields import save_field
from n4flow.images.files import write_json
from n4flow.images.nifti import Volume
from n4flow.study.bids import own_uri, raw_uri, sidecars_of
from n4flow.study.provenance import provenance

log = logging.getLogger(__name__)


class CorrectionFiles(NamedTuple):
    """What a correction writes."""

    corrected: Path
    sidecar: Path  # JSON of the corrected image
    lattice: Path  # JSON of the field, see `fields.load_field`
    bias: Path | None = None  # the multiplicative field as an image, if it is wanted

    @classmethod
    def of(cls, files: CorrectionFiles | Mapping[str, str | Path]) -> CorrectionFiles:
        """These files, also if they are given as a mapping, as a job has them."""
        if isinstance(files, CorrectionFiles):
            return files
        return cls(**{role: Path(path) for role, path in files.items()})


def write_derivatives(
    volume: Volume,
    inputs: Mapping[str, Path],
    files: CorrectionFiles,
    field: BiasField,
    facts: Mapping[str, Any],
    packages: tuple[str, ...],
    start: float,
    *,
    keep_dtype: bool,
    xp: Any,
) -> None:
    """Divide a scan by a field and write all `CorrectionFiles`, wherever the field comes from.

    Parameters
    ----------
    volume : Volume
        The scan.
    inputs : mapping of str to Path
        Further files that went in, by role; all of them are outputs of other steps.
    files : CorrectionFiles
    field : BiasField
        On the grid of the image.
    facts : mapping
        What the sidecar says of the field.
    packages : tuple of str
        Distributions whose versions matter, beside those that are always used.
    start : float
        When the work began, by ``time.perf_counter``.
    keep_dtype : bool
    xp : module
    """
    self_check = write_corrected(volume, field, files.corrected, files.bias, keep_dtype=keep_dtype, xp=xp)
    if files.bias is None:
        # one of an earlier run would be of another field
        files.lattice.with_suffix(".nii.gz").unlink(missing_ok=True)
    sources = [raw_uri(volume.path, files.corrected), *map(own_uri, inputs.values())]
    save_field(replace(field, has_spatial_reference=volume.has_spatial_reference), files.lattice, Sources=sources)
    seconds = round(time.perf_counter() - start, 3)
    write_json(
        files.sidecar,
        {
            **_image_metadata(volume),
            "Sources": sources,
            "N4": {**facts, "SelfCheck": self_check, "WallTimeSeconds": seconds},
            "Provenance": provenance({"image": volume.path, **inputs}, ("numpy", "nibabel", "isal", *packages)),
        },
    )


def _image_metadata(volume: Volume) -> dict[str, Any]:
    """What the raw image's sidecars say, and what BIDS asks of a derivative beside it."""
    metadata: dict[str, Any] = {}
    for path in sidecars_of(volume.path):
        try:
            content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
            if not isinstance(content, dict):
                raise ValueError("it holds no object")
            metadata |= content
        except (OSError, ValueError, RecursionError) as error:
            log.warning("%s: left out of the sidecar, cannot be read (%s)", path, error)
    task = re.search(r"_task-([A-Za-z0-9]+)_", volume.path.name)
    if task:
        metadata.setdefault("TaskName", task[1])
    if volume.frames > 1 and volume.frame_time_s > 0:
        metadata.setdefault("RepetitionTime", volume.frame_time_s)
    metadata.setdefault("SkullStripped", False)
    return metadata


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")
