"""A light-sheet object of 10 mm through the steps of an OME-Zarr image: how much of its field is left."""

import functools

import nibabel as nib
import numpy as np
import pytest

from n4flow.images.fields import load_field
from n4flow.steps.correct import correct_scan
from n4flow.steps.mask import mask_scan
from n4flow.steps.pyramid import coarse_scan, place_mask
from tests.phantoms import light_sheet, sparse_stain
from tests.pyramids import write_store

#: Of a field of sd 0.24, what may be left as a share; where there is none, the rms of what may be found.
LEFT, FOUND = 0.1, 0.01

object_of = functools.cache(light_sheet)


def error(folder, scan, image, offset=0.0, mask=None, shape=(62, 50, 37)):
    """Sd of the difference between the field that is found and the true one in the object; and that of the true one.

    The coarse volume has that shape: each of its voxels is the average of 64 or 8.
    """
    values = np.rint(image).clip(0, 65535).astype(np.uint16).T
    store = write_store(folder / "a.ome.zarr", [values], scale_um=(40, 40, 40), compressors=None)
    coarse, given, found = (folder / name for name in ("c.nii.gz", "given.nii.gz", "m.nii.gz"))
    settings = {"level": "auto", "level_voxels": int(1.1 * np.prod(shape)), "offset": offset, "pyramid_origin": "auto"}
    coarse_scan(store, coarse, folder / "c.json", channel="", **settings)
    assert nib.load(coarse).shape == shape
    affine = np.diag([0.04, 0.04, 0.04, 1])
    if mask is not None:
        nib.save(nib.Nifti1Image(mask.astype(np.uint8), affine), folder / "own.nii.gz")
        place_mask(coarse, folder / "own.nii.gz", given, pyramid_origin="auto")
    mask_scan(coarse, given if mask is not None else None, found, folder / "m.json", method="otsu", percentile=50)
    files = {"corrected": folder / "n.nii.gz", "sidecar": folder / "n_SPIM.json", "field": folder / "f.json"}
    correct_scan(coarse, found, files, parameters={}, device="cpu")
    field = load_field(files["field"]).on_grid(image.shape, affine).log_tile((slice(None),) * 3)
    return np.std((field - scan.log_bias)[scan.brain]), np.std(scan.log_bias[scan.brain])


@pytest.mark.parametrize("contrast", [1, 0.5, 0.25])
def test_a_field_is_found_above_a_pedestal(tmp_path, contrast):
    scan = object_of(contrast, 0.24, 2)
    left, whole = error(tmp_path, scan, scan.image + 100, "auto")
    assert left <= LEFT * whole


def test_none_is_found_where_there_is_none(tmp_path):
    scan = object_of(0.25, 0, 2)
    assert error(tmp_path, scan, scan.image + 100, 100)[0] <= FOUND


def test_a_pedestal_that_stays_flattens_the_field(tmp_path):
    """What `zarr.offset` is for."""
    scan = object_of(1, 0.24, 2)
    left, whole = error(tmp_path, scan, scan.image + 100)
    assert left > LEFT * whole


def test_a_sparse_stain_on_a_ground_that_shows_needs_a_mask_of_the_object(tmp_path):
    scan = object_of(1, 0.24, 2)
    left, whole = error(tmp_path, scan, sparse_stain(scan, 0.2, 3), mask=scan.brain, shape=(125, 100, 75))
    assert left <= LEFT * whole


def test_a_sparse_stain_on_a_ground_below_the_noise_has_too_little_for_a_field_of_its_own(tmp_path):
    """What `field_from` is for: the stain's own field is not found, and none is made up."""
    scan = object_of(1, 0.24, 2)
    left, whole = error(tmp_path, scan, sparse_stain(scan, 0.01, 3), mask=scan.brain)
    assert 0.3 * whole < left < 1.1 * whole
