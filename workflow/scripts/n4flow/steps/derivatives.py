"""A correction on files: a scan goes in, BIDS derivatives with their sidecars come out."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from n4flow.core.field import BiasField
from n4flow.images.division import write_corrected
from n4flow.images.fields import save_field
from n4flow.images.files import write_json
from n4flow.images.nifti import Volume
from n4flow.study.bids import DATATYPE_OF, metadata_of, source_uri
from n4flow.study.provenance import provenance

#: Suffixes of series whose frames follow each other in time.
TIME_SERIES = ("bold", "cbv", "asl", "dwi")

#: Of an image without a skull, no more than this share of any of its faces is above 0.
BORDER_SHARE = 0.05


class CorrectionFiles(NamedTuple):
    """What a correction writes."""

    corrected: Path
    sidecar: Path  # JSON of the corrected image
    field: Path  # JSON of the field, see `fields.load_field`
    field_image: Path | None = None  # the multiplicative field as an image, if it is wanted

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
    sources: Sequence[Path] | None = None,
) -> None:
    """Divide a scan by a field and write all `CorrectionFiles`, wherever the field comes from.

    Parameters
    ----------
    volume : Volume
        The scan.
    inputs : mapping of str to Path
        Further files that went in, by role.
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
    sources : sequence of Path, optional
        What the sidecars name in place of `inputs`, for inputs that are not kept.
    """
    border = Border(volume.shape)
    self_check = write_corrected(
        volume, field, files.corrected, files.field_image, keep_dtype=keep_dtype, xp=xp, look=border.add
    )
    named = inputs.values() if sources is None else sources
    uris = [source_uri(path, files.corrected) for path in (volume.path, *named)]
    save_field(replace(field, has_spatial_reference=volume.has_spatial_reference), files.field, Sources=uris)
    seconds = round(time.perf_counter() - start, 3)
    write_json(
        files.sidecar,
        {
            **_image_metadata(volume, files.sidecar.stem.rpartition("_")[2], border),
            "Sources": uris,
            "N4": {**facts, "SelfCheck": self_check, "WallTimeSeconds": seconds},
            "Provenance": provenance({"image": volume.path, **inputs}, ("numpy", "nibabel", "isal", *packages)),
        },
    )


def _image_metadata(volume: Volume, suffix: str, border: Border) -> dict[str, Any]:
    """What the raw image's sidecars say, and what BIDS asks of a derivative of this suffix beside it."""
    metadata = metadata_of(volume.path)
    task = re.search(r"_task-([A-Za-z0-9]+)_", volume.path.name)
    if task:
        metadata.setdefault("TaskName", task[1])
    # of other series, such as echoes, the fourth axis is no time
    if suffix in TIME_SERIES and volume.frame_time_s > 0 and "VolumeTiming" not in metadata:
        metadata.setdefault("RepetitionTime", volume.frame_time_s)
    if DATATYPE_OF.get(suffix) != "micr" and "SkullStripped" not in metadata:
        metadata["SkullStripped"] = border.is_empty
    return metadata


class Border:
    """How much of an image lies on its faces: of a stripped brain next to nothing, of a head noise, and the neck.

    Parameters
    ----------
    shape : three ints
    """

    def __init__(self, shape: Sequence[int]) -> None:
        self.shape = shape
        self.counts = [np.zeros(2) for _ in shape]

    def add(self, planes: slice, values: np.ndarray) -> None:
        """Look at a slab of the third axis."""
        self.counts[0] += [np.count_nonzero(values[end] > 0) for end in (0, -1)]
        self.counts[1] += [np.count_nonzero(values[:, end] > 0) for end in (0, -1)]
        for end, plane in enumerate((0, self.shape[2] - 1)):
            if planes.start <= plane < planes.stop:
                self.counts[2][end] = np.count_nonzero(values[:, :, plane - planes.start] > 0)

    @property
    def is_empty(self) -> bool:
        """Whether all faces are, but for single voxels."""
        voxels = math.prod(self.shape)
        return all(
            count.max() <= BORDER_SHARE * voxels / n for count, n in zip(self.counts, self.shape, strict=True) if n > 1
        )
