"""Rule n4: a scan corrected with a field of its own."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from n4flow.core.quadrature import keep_mean_intensity
from n4flow.core.samples import Samples
from n4flow.device import DeviceChoice, select_device
from n4flow.estimate import Estimate, estimate_twice
from n4flow.images.nifti import Volume
from n4flow.images.planes import level_planes
from n4flow.images.sampling import read_samples
from n4flow.parameters import N4Parameters
from n4flow.steps import preload as preload  # what the worker looks for
from n4flow.steps.derivatives import CorrectionFiles, write_derivatives
from n4flow.study.bids import source_uri
from n4flow.study.series import open_scan, series_files

log = logging.getLogger(__name__)


def correct_scan(
    image: str | Path,
    mask: str | Path,
    files: CorrectionFiles | Mapping[str, str | Path],
    *,
    parameters: N4Parameters | Mapping[str, Any],
    device: DeviceChoice = "auto",
    threads: int = 1,
    weights: str | Path | None = None,
    keep_dtype: bool = False,
    plane_gains: str | None = None,
    sources: Sequence[Path] | None = None,
) -> None:
    """Estimate the field of a scan, divide the scan by it and write what came about.

    Parameters
    ----------
    image, mask : path-like
    files : CorrectionFiles or mapping of str to path-like
        A mapping by the names of `CorrectionFiles`.
    parameters : N4Parameters or mapping
        A mapping as the config has it.
    device : {"auto", "gpu", "cpu"}
    threads : int
        On the CPU; the result does not depend on it.
    weights : path-like, optional
        Confidence of each voxel of the mask, see `images.sampling.read_samples`.
    keep_dtype : bool
        See `images.division.write_corrected`.
    plane_gains : {"i", "j", "k"}, optional
        The axis along which single planes are levelled before the field is estimated, see `images.planes`.
    sources : sequence of Path, optional
        What the sidecars name in place of the mask, where that is not kept: the mask that it was made from, if any.

    Raises
    ------
    InputError
        The scan, its mask or the weights are unusable, or the device is not there.
    """
    start = time.perf_counter()
    image, mask, files = Path(image), Path(mask), CorrectionFiles.of(files)
    if not isinstance(parameters, N4Parameters):
        parameters = N4Parameters.from_mapping(parameters)
    chosen = select_device(device)
    log.info("%s: computing on %s (%s)", image, chosen.name, chosen.reason)
    volume, inside = open_scan(image), Volume(mask)
    inputs = {"mask": mask} | series_files(volume) | ({"weights": Path(weights)} if weights else {})
    levelled = level_planes(volume, plane_gains, inside)
    samples, intensity = read_samples(volume, inside, parameters, inputs.get("weights"))
    estimate = estimate_twice(samples, parameters, xp=chosen.xp, threads=threads)
    field = keep_mean_intensity(estimate.field, intensity, image)
    facts = {
        **estimate_facts(estimate, samples, parameters),
        "Repeatability": estimate.repeatability,
        "Device": chosen.name,
        "DeviceReason": chosen.reason,
    }
    if levelled:
        field = replace(field, gains=levelled.gains)
        facts["PlaneGains"] = levelled.facts()
    packages = ("cupy",) if chosen.kind == "gpu" else ("numba",)
    if len(volume.averaged) < volume.frames:
        facts["AveragedFrames"] = [frame + 1 for frame in volume.averaged]
    if weights:
        facts["Weights"] = source_uri(inputs["weights"], files.corrected)
    write_derivatives(
        volume,
        inputs,
        files,
        field,
        facts,
        packages,
        start,
        keep_dtype=keep_dtype,
        xp=chosen.xp,
        sources=sources,
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
        stage (0 is the one before the first, for a strong field), ``Half`` by half of the samples where the field is
        the mean of two; ``Converged``, whether each stage came to the threshold, of both halves.
    """
    last = {(line.half, line.stage): line.cv for line in estimate.history}
    # a stage without an iteration found all values the same
    converged = [
        all(cv <= parameters.convergence_threshold for (_, of), cv in last.items() if of == stage)
        for stage in sorted({*range(1, len(parameters.stages) + 1), *(line.stage for line in estimate.history)})
    ]
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
        "History": [
            {"Stage": n.stage, "Iteration": n.iteration, "CV": float(n.cv)} | ({"Half": n.half} if n.half else {})
            for n in estimate.history
        ],
        "Converged": converged,
    }
