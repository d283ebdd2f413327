"""The built-in dataset: simulated heads, with the truth beside them."""

from __future__ import annotations

import base64
import gzip
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform

from n4flow.core.phantom import make_phantom
from n4flow.images.files import atomic_bytes, write_json
from n4flow.study.bids import BIDS_VERSION


def load_tissues(path: str | Path) -> Any:
    """The tissue maps that ship with the workflow.

    Parameters
    ----------
    path : path-like
        A .nii.gz as base64: Snakemake fetches the files of a module from a remote repository as text.

    Returns
    -------
    nibabel image
        4-D, of grey matter, white matter and fluid, 0 to 255.
    """
    return nib.Nifti1Image.from_bytes(gzip.decompress(base64.b64decode(Path(path).read_bytes())))


def demo_dataset(tissues: Path, folder: Path) -> None:
    """Write the built-in dataset: four simulated heads with known fields, in BIDS.

    The fields have 0, 20, 40 and 100 % INU. Subject 03 comes with a brain mask, subject 04 as int16
    with a scl_slope, its axes pointing to posterior, superior and right. The truth lies beside the
    images, as ``desc-truth_biasfield`` and ``desc-truth_T1w``.

    Parameters
    ----------
    tissues : Path
        See `load_tissues`.
    folder : Path
    """
    template = load_tissues(tissues)
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
        with atomic_bytes(path) as file:
            file.write(gzip.compress(image.to_bytes(), compresslevel=1, mtime=0))

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
