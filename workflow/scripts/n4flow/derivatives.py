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

import numpy as np

from n4flow.bids import own_uri, raw_uri, sidecars_of
from n4flow.correction import read_samples, write_corrected
from n4flow.device import DeviceChoice, select_device
from n4flow.estimate import Estimate, estimate_field, repeatability
from n4flow.field import BiasField
from n4flow.files import write_json
from n4flow.parameters import N4Parameters
from n4flow.provenance import provenance
from n4flow.quadrature import keep_mean_intensity
from n4flow.samples import Samples
from n4flow.volume import Volume

log = logging.getLogger(__name__)


class CorrectionFiles(NamedTuple):
    """What a correction writes."""

    corrected: Path
    sidecar: Path  # JSON of the corrected image
    lattice: Path  # JSON of the field, see `BiasField.load`
    bias: Path | None = None  # the multiplicative field as an image, if it is wanted


def correct_scan(
    image: Path,
    mask: Path,
    files: CorrectionFiles,
    *,
    parameters: N4Parameters,
    device: DeviceChoice = "auto",
    threads: int = 1,
    keep_dtype: bool = False,
) -> None:
    """Estimate the field of a scan, divide the scan by it and write what came about.

    Parameters
    ----------
    image, mask : Path
    files : CorrectionFiles
    parameters : N4Parameters
    device : {"auto", "gpu", "cpu"}
    threads : int
        On the CPU; the result does not depend on it.
    keep_dtype : bool
        See `correction.write_corrected`.

    Raises
    ------
    InputError
        The scan or its mask is unusable, or the device is not there.
    """
    start = time.perf_counter()
    chosen = select_device(device)
    log.info("%s: computing on %s (%s)", image, chosen.name, chosen.reason)
    volume, inside = Volume(image), Volume(mask)
    samples, intensity = read_samples(volume, inside, parameters)
    estimate = estimate_field(samples, parameters, xp=chosen.xp, threads=threads)
    field = keep_mean_intensity(estimate.field, intensity, image)
    facts = {
        **estimate_facts(estimate, samples, parameters),
        "Repeatability": repeatability(samples, parameters, xp=chosen.xp, threads=threads),
        "Device": chosen.name,
        "DeviceReason": chosen.reason,
    }
    packages = ("cupy",) if chosen.kind == "gpu" else ("numba",)
    write_derivatives(volume, {"mask": mask}, files, field, facts, packages, start, keep_dtype=keep_dtype, xp=chosen.xp)


def apply_scan(image: Path, lattice: Path, files: CorrectionFiles, *, keep_dtype: bool = False) -> None:
    """Divide a scan by the field of another one of the same space, and write what came about.

    The field is taken as it is. Its mean over this scan is not set to anything: so the ratios between scans that are
    divided by one field, such as the echoes of a sequence, are what they were. What SimpleITK made of this scan in an
    earlier run, when it had a field of its own, is removed.

    Parameters
    ----------
    image : Path
    lattice : Path
        Field of the other scan: one of the outputs, see `BiasField.load`.
    files : CorrectionFiles
    keep_dtype : bool
        See `correction.write_corrected`.

    Raises
    ------
    InputError
        The scan or the field is unusable, or they do not meet.
    """
    start = time.perf_counter()
    volume = Volume(image)
    source = BiasField.load(lattice)
    same_grid = volume.shape == source.image_shape and np.array_equal(volume.affine_mm, source.affine)
    if not (same_grid or (volume.has_world and source.has_world)):
        log.warning(
            "%s: %s names no space (qform_code and sform_code are 0), so that where the field lies in this image is a "
            "guess; set its qform or sform",
            lattice if volume.has_world else image,
            "the header of the image that it was estimated on" if volume.has_world else "its header",
        )
    field = source.on_grid(volume.shape, volume.affine_mm, image)
    outside = round(source.share_outside(volume.shape, volume.affine_mm), 4)
    facts = {"FieldFrom": own_uri(lattice), "ShareOutside": outside}
    write_derivatives(volume, {"lattice": lattice}, files, field, facts, (), start, keep_dtype=keep_dtype, xp=np)
    for path in (files.corrected, files.sidecar, files.lattice):
        # no rule makes it for this scan any longer, or would notice that it is of another field
        if "_desc-N4" in path.name:
            path.with_name(path.name.replace("_desc-N4", "_desc-N4sitk")).unlink(missing_ok=True)


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
    replace(field, has_world=volume.has_world).save(files.lattice, Sources=sources)
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


def estimate_facts(estimate: Estimate, samples: Samples, parameters: N4Parameters) -> dict[str, Any]:
    """Parameters, and what the estimate did with them, for the sidecar.

    Parameters
    ----------
    estimate : Estimate
    samples : Samples
        What the estimate was made from.
    parameters : N4Parameters

    Returns
    -------
    dict
        Plain values, ready for JSON: ``Parameters``, as set; ``Shrink``, per axis; ``Spans``, per axis at the last
        stage, and their ``SpanLengthMm``; ``Samples``, how many there were; ``Dropped``, voxels of the mask that had
        no logarithm, by reason; ``History``, the CV of the update (without unit) at every iteration of each
        stage; ``Converged``, whether each stage came to the threshold.
    """
    converged = []
    for stage in range(1, len(parameters.stages) + 1):
        cvs = [line.cv for line in estimate.history if line.stage == stage]
        # a stage without an iteration found all values the same
        converged.append(not cvs or cvs[-1] <= parameters.convergence_threshold)
    return {
        "Parameters": parameters.to_mapping(),
        "Shrink": [int(p[1] - p[0]) if len(p) > 1 else 1 for p in samples.positions],
        "Spans": list(estimate.field.mesh.spans),
        "SpanLengthMm": [
            round(float(length * size), 3)
            for length, size in zip(estimate.field.mesh.span_voxels, samples.voxel_size_mm, strict=True)
        ],
        "Samples": int(samples.mask.sum()),
        "Dropped": samples.dropped,
        "History": [{"Stage": n.stage, "Iteration": n.iteration, "CV": float(n.cv)} for n in estimate.history],
        "Converged": converged,
    }


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
