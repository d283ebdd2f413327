"""Rule apply: a scan divided by the field of another one."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from n4flow.images.fields import load_field
from n4flow.images.nifti import Volume
from n4flow.steps.derivatives import CorrectionFiles, write_derivatives
from n4flow.study.bids import check_magnitude, source_uri

log = logging.getLogger(__name__)


def apply_scan(
    image: str | Path,
    field: str | Path,
    files: CorrectionFiles | Mapping[str, str | Path],
    *,
    keep_dtype: bool = False,
) -> None:
    """Divide a scan by the field of another one of the same space, and write what came about.

    The field is taken as it is. Its mean over this scan is not set to anything: so the ratios between scans that are
    divided by one field, such as the echoes of a sequence, are what they were.

    Parameters
    ----------
    image : path-like
    field : path-like
        Field of the other scan: one of the outputs, see `images.fields.load_field`.
    files : CorrectionFiles or mapping of str to path-like
        A mapping by the names of `CorrectionFiles`.
    keep_dtype : bool
        See `images.division.write_corrected`.

    Raises
    ------
    InputError
        The scan or the field is unusable, or they do not meet.
    """
    start = time.perf_counter()
    image, field, files = Path(image), Path(field), CorrectionFiles.of(files)
    check_magnitude(image)
    volume = Volume(image)
    source = load_field(field)
    same_grid = volume.shape == source.image_shape and np.array_equal(volume.affine_mm, source.affine)
    if not (same_grid or (volume.has_spatial_reference and source.has_spatial_reference)):
        log.warning(
            "%s: %s names no space (qform_code and sform_code are 0), so that where the field lies in this image is a "
            "guess; set its qform or sform",
            field if volume.has_spatial_reference else image,
            "the header of the image that it was estimated on" if volume.has_spatial_reference else "its header",
        )
    here = source.on_grid(volume.shape, volume.affine_mm, image)
    outside = round(source.share_outside(volume.shape, volume.affine_mm), 4)
    facts = {"FieldFrom": source_uri(field, files.corrected), "ShareOutside": outside}
    write_derivatives(volume, {"field": field}, files, here, facts, (), start, keep_dtype=keep_dtype, xp=np)
