"""The steps of the chain on files: an image goes in, BIDS derivatives with their sidecars come out."""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from n4flow.bids import dataset_root
from n4flow.correction import keep_mean_intensity, write_corrected
from n4flow.device import DeviceChoice, select_device
from n4flow.estimate import Estimate, estimate_field
from n4flow.field import BiasField
from n4flow.mask import MaskMethod, adopt_mask, make_mask
from n4flow.parameters import N4Parameters
from n4flow.provenance import provenance, write_json
from n4flow.samples import Samples, read_samples, shrink_per_axis
from n4flow.volume import Volume

log = logging.getLogger(__name__)

BIDS_VERSION = "1.10.0"

#: Files that BIDS has no name for yet.
BIDSIGNORE = "*_biasfield.*\n**/perf/*_mask.*\n**/micr/*_mask.*\nqc\n"


def mask_scan(
    image: Path, own_mask: Path | None, output: Path, sidecar: Path, *, method: MaskMethod, percentile: float
) -> None:
    """Write the mask of a scan and its sidecar; the user's own mask wins over `method`.

    Raises
    ------
    InputError
        As `mask.make_mask` and `mask.adopt_mask`.
    """
    if own_mask:
        made = adopt_mask(image, own_mask, output)
    else:
        made = make_mask(image, output, method=method, percentile=percentile)
    sources = {"image": image} | ({"mask": own_mask} if own_mask else {})
    write_json(
        sidecar,
        {
            "Type": "ROI",
            "Sources": [_raw_uri(path, output) for path in sources.values()],
            "Mask": made,
            "Provenance": provenance(sources, ("numpy", "nibabel")),
        },
    )
    log.info("%s: %s", image, made)


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
    keep_dtype: bool = False,
) -> None:
    """Estimate the field of a scan, divide the scan by it and write what came about.

    Parameters
    ----------
    image, mask : Path
    files : CorrectionFiles
    parameters : N4Parameters
    device : {"auto", "gpu", "cpu"}
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
    samples = read_samples(image, mask, parameters.shrink_factor)
    estimate = estimate_field(samples, parameters, xp=chosen.xp)
    facts = {**_estimate_facts(estimate, samples, parameters), "Device": chosen.name, "DeviceReason": chosen.reason}
    packages = ("numpy", "nibabel", "isal", *(["cupy"] if chosen.kind == "gpu" else []))
    _write(image, mask, files, estimate.field, facts, packages, start, keep_dtype=keep_dtype, xp=chosen.xp)


def reference_scan(
    image: Path, mask: Path, files: CorrectionFiles, *, parameters: N4Parameters, keep_dtype: bool = False
) -> None:
    """As `correct_scan`, with the field that SimpleITK estimates."""
    from n4flow.reference import THREADS, reference_field

    start = time.perf_counter()
    samples = read_samples(image, mask, parameters.shrink_factor)
    estimate = reference_field(samples, parameters)
    facts = {**_estimate_facts(estimate, samples, parameters), "Device": "CPU", "Threads": THREADS}
    packages = ("numpy", "nibabel", "isal", "SimpleITK")
    _write(image, mask, files, estimate.field, facts, packages, start, keep_dtype=keep_dtype, xp=np)


def _write(
    image: Path,
    mask: Path,
    files: CorrectionFiles,
    field: BiasField,
    facts: Mapping[str, Any],
    packages: tuple[str, ...],
    start: float,
    *,
    keep_dtype: bool,
    xp: Any,
) -> None:
    volume = Volume(image)
    field = keep_mean_intensity(field, volume, Volume(mask), xp)
    self_check = write_corrected(volume, field, files.corrected, files.bias, keep_dtype=keep_dtype, xp=xp)
    sources = [_raw_uri(image, files.corrected), _own_uri(mask)]
    write_json(files.lattice, {"Sources": sources, **field.to_mapping()})
    seconds = round(time.perf_counter() - start, 3)
    write_json(
        files.sidecar,
        {
            **_image_metadata(volume),
            "Sources": sources,
            "N4": {**facts, "SelfCheck": self_check, "WallTimeSeconds": seconds},
            "Provenance": provenance({"image": image, "mask": mask}, packages),
        },
    )


def _estimate_facts(estimate: Estimate, samples: Samples, parameters: N4Parameters) -> dict[str, Any]:
    """Parameters, and what the estimate did with them, for the sidecar."""
    last = {line.level: line.cv for line in estimate.history}
    return {
        "Parameters": parameters.to_mapping(),
        "Shrink": list(shrink_per_axis(samples.image_shape, parameters.shrink_factor)),
        "Spans": list(estimate.field.mesh.spans),
        "Samples": int(samples.mask.sum()),
        "Dropped": samples.dropped,
        "History": [{"Level": n.level, "Iteration": n.iteration, "CV": float(n.cv)} for n in estimate.history],
        "Converged": [bool(cv <= parameters.convergence_threshold) for cv in last.values()],
    }


def _image_metadata(volume: Volume) -> dict[str, Any]:
    """What the raw image's own sidecar says, and what BIDS asks of a derivative beside it."""
    own = volume.path.with_name(volume.path.name.removesuffix(".gz").removesuffix(".nii") + ".json")
    try:
        metadata = json.loads(own.read_text(encoding="utf-8"), parse_constant=_refuse) if own.is_file() else {}
        if not isinstance(metadata, dict):
            raise ValueError("it holds no object")
    except (OSError, ValueError) as error:
        log.warning("%s: left out of the sidecar, cannot be read (%s)", own, error)
        metadata = {}
    task = re.search(r"_task-([A-Za-z0-9]+)_", volume.path.name)
    if task:
        metadata.setdefault("TaskName", task[1])
    if volume.frames > 1 and volume.frame_time_s > 0:
        metadata.setdefault("RepetitionTime", volume.frame_time_s)
    metadata.setdefault("SkullStripped", False)
    return metadata


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _raw_uri(path: Path, output: Path) -> str:
    """BIDS URI of a raw file, as a sidecar in the outputs names it; its mere name outside of a dataset."""
    root = dataset_root(path)
    if not root:
        return path.name
    return f"bids:{_link_name(root, _output_root(output))}:{Path(os.path.abspath(path)).relative_to(root).as_posix()}"


def _own_uri(path: Path) -> str:
    """BIDS URI of a file of the outputs."""
    return f"bids::{Path(os.path.abspath(path)).relative_to(_output_root(path)).as_posix()}"


def _output_root(path: Path) -> Path:
    """The folder of derivatives that an output lies in: the parent of its ``sub-`` folder, or its own."""
    folders = Path(os.path.abspath(path)).parents
    return next((folder.parent for folder in folders if folder.name.startswith("sub-")), folders[0])


def _link_name(root: Path, output_root: Path) -> str:
    """How DatasetLinks and URIs call a raw dataset: by the way to it, which no two datasets share."""
    return re.sub(r"[^A-Za-z0-9]+", "-", os.path.relpath(root, output_root)).strip("-") or "raw"


def describe_dataset(images: Iterable[str | Path], description: Path, bidsignore: Path) -> None:
    """Write dataset_description.json, with links to the raw datasets, and .bidsignore.

    Parameters
    ----------
    images : iterable of path-like
        All raw images.
    description, bidsignore : Path
        In the folder of the derivatives.
    """
    from n4flow import __version__

    folder = Path(os.path.abspath(description.parent))
    roots = {root for image in images if (root := dataset_root(image))}
    write_json(
        description,
        {
            "Name": "N4 bias-corrected images",
            "BIDSVersion": BIDS_VERSION,
            "DatasetType": "derivative",
            "GeneratedBy": [{"Name": "n4flow", "Version": __version__}],
            "DatasetLinks": {_link_name(root, folder): os.path.relpath(root, folder) for root in sorted(roots)},
        },
    )
    bidsignore.write_text(BIDSIGNORE, encoding="utf-8")


def demo_dataset(tissues: Path, folder: Path) -> None:
    """Write the built-in dataset: four simulated heads with known fields, in BIDS.

    The fields have 0, 20, 40 and 100 % INU. Subject 03 comes with a brain mask, subject 04 as int16
    with a scl_slope, its axes pointing to posterior, superior and right. The truth lies beside the
    images, as ``desc-truth_biasfield`` and ``desc-truth_T1w``.

    Parameters
    ----------
    tissues : Path
        4-D image of grey matter, white matter and fluid, 0 to 255.
    folder : Path
    """
    import nibabel as nib
    from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform

    from n4flow.phantom import make_phantom

    template: Any = nib.load(tissues)
    shares = np.asarray(template.dataobj)
    size = float(template.header.get_zooms()[0])

    def save(array: np.ndarray, path: Path, axes: str) -> None:
        image = nib.Nifti1Image(array, template.affine)
        image = image.as_reoriented(ornt_transform(io_orientation(image.affine), axcodes2ornt(axes)))
        image.header.set_xyzt_units("mm", "sec")
        image.set_qform(image.affine, 1)
        image.set_sform(image.affine, 1)
        if array.dtype == np.int16:
            image.header.set_slope_inter(0.25, 0)
        nib.save(image, path)

    for number, inu_percent in enumerate((0, 20, 40, 100), start=1):
        subject = f"sub-{number:02d}"
        anat = folder / subject / "anat"
        anat.mkdir(parents=True, exist_ok=True)
        phantom = make_phantom(shares, size, inu_percent=inu_percent, noise_percent=3, seed=number)
        axes = "PSR" if number == 4 else "RAS"
        stored = np.rint(phantom.image / 0.25).astype(np.int16) if number == 4 else phantom.image
        save(stored, anat / f"{subject}_T1w.nii.gz", axes)
        save(phantom.truth, anat / f"{subject}_desc-truth_T1w.nii.gz", axes)
        save(phantom.bias.astype(np.float32), anat / f"{subject}_desc-truth_biasfield.nii.gz", axes)
        if number == 3:
            save(phantom.brain.astype(np.uint8), anat / f"{subject}_desc-brain_mask.nii.gz", axes)
    write_json(folder / "dataset_description.json", {"Name": "n4flow's built-in dataset", "BIDSVersion": BIDS_VERSION})
