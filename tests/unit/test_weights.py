"""The confidence of each voxel, as a file that the sheet names."""

import hashlib
import json
import logging

import nibabel as nib
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from n4flow import InputError, N4Parameters, correct
from n4flow.steps.correct import correct_scan
from n4flow.steps.derivatives import CorrectionFiles
from n4flow.study.bids import Scan, describe_dataset

AFFINE = np.diag([2.0, 2, 2, 1])


def save(path, values, affine=AFFINE):
    nib.save(nib.Nifti1Image(values, affine), path)
    return path


@pytest.fixture(scope="module")
def folder(head, tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    (folder / "raw").mkdir()
    (folder / "raw/dataset_description.json").write_text('{"Name": "raw", "BIDSVersion": "1.10.0"}')
    save(folder / "raw/image.nii.gz", head.image)
    save(folder / "mask.nii.gz", head.brain.astype(np.uint8))
    return folder


@pytest.fixture
def corrected_with(folder, tmp_path):
    """Correct the scan with weights; gives its sidecar and the folder that holds what was made."""

    def run(weights, affine=AFFINE):
        save(folder / "raw/weights.nii.gz", weights, affine)
        names = {"corrected": "c.nii.gz", "sidecar": "c.json", "field": "f.json", "field_image": "f.nii.gz"}
        files = CorrectionFiles(**{role: tmp_path / name for role, name in names.items()})
        images = folder / "raw/image.nii.gz", folder / "mask.nii.gz"
        correct_scan(*images, files, parameters=N4Parameters(), device="cpu", weights=folder / "raw/weights.nii.gz")
        return json.loads(files.sidecar.read_text()), tmp_path

    return run


@pytest.fixture(scope="module")
def ramp(head):
    """From 0, at an end of the brain, to 1; NaN, negative and infinite outside of it, where they do not count."""
    weights = np.broadcast_to(np.linspace(-0.3, 1, head.image.shape[0])[:, None, None], head.image.shape)
    weights = weights.clip(0).astype(np.float32)
    outside = np.argwhere(~head.brain)[:3]
    weights[tuple(outside.T)] = np.nan, -1, np.inf
    return weights


def test_weights_of_a_file_are_those_of_an_array(head, ramp, corrected_with, folder, caplog):
    caplog.set_level(logging.INFO)
    sidecar, made = corrected_with(ramp)
    weights = np.where(head.brain, ramp, 0)
    result = correct(head.image, head.brain, weights=weights, voxel_size_mm=(2, 2, 2), device="cpu")
    assert_array_equal(np.asarray(nib.load(made / "f.nii.gz").dataobj), result.bias)
    without = correct(head.image, head.brain, voxel_size_mm=(2, 2, 2), device="cpu")
    assert np.ptp(np.log(result.bias[head.brain] / without.bias[head.brain])) > 0.005
    assert sidecar["N4"]["Weights"] == sidecar["Sources"][-1]
    assert sidecar["Sources"][-1].endswith("raw/weights.nii.gz")
    content = (folder / "raw/weights.nii.gz").read_bytes()
    assert sidecar["Provenance"]["InputSHA256"]["weights"] == hashlib.sha256(content).hexdigest()
    none, voxels = np.count_nonzero(weights[head.brain] == 0), np.count_nonzero(head.brain)
    assert f"weights.nii.gz: {none} of {voxels} voxels of the mask have no weight (0 or NaN)" in caplog.text


def test_nan_is_as_good_as_0(head, ramp, corrected_with):
    fields = []
    for nothing in (0, np.nan):
        _, made = corrected_with(np.where(head.brain & (ramp < 0.3), np.float32(nothing), ramp))
        fields.append((made / "f.nii.gz").read_bytes())
    assert fields[0] == fields[1]


def test_integers_are_weights_too(head, corrected_with):
    steps = np.broadcast_to((np.arange(head.image.shape[0]) // 20)[:, None, None], head.image.shape).astype(np.uint8)
    _, made = corrected_with(steps)
    result = correct(head.image, head.brain, weights=steps, voxel_size_mm=(2, 2, 2), device="cpu")
    assert_array_equal(np.asarray(nib.load(made / "f.nii.gz").dataobj), result.bias)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda weights: weights - 0.5, r"weights\.nii\.gz: \d+ of \d+ weights in the mask are negative; give weights"),
        (lambda weights: weights / np.float32(0), r"weights\.nii\.gz: \d+ of \d+ weights in the mask are infinite; "),
        (lambda weights: 0 * weights, r"weights\.nii\.gz: all weights in the mask are 0 or NaN; give a weight to"),
        (lambda weights: weights * np.nan, r"weights\.nii\.gz: all weights in the mask are 0 or NaN"),
        (lambda weights: weights[:, :, 1:], r"weights\.nii\.gz: the weight image has shape"),
        (lambda weights: np.stack([weights] * 2, -1), r"weights\.nii\.gz: the weights have 2 frames; give a 3-D"),
    ],
    ids=["negative", "infinite", "zero", "NaN", "shape", "frames"],
)
@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value")
def test_weights_that_say_nothing_are_one_line(ramp, corrected_with, tmp_path, change, problem):
    with pytest.raises(InputError, match=problem):
        corrected_with(change(ramp))
    assert not list(tmp_path.iterdir())


def test_weights_on_other_voxels_are_one_line(ramp, corrected_with):
    with pytest.raises(InputError, match="the affine of the weight image differs from that of its image"):
        corrected_with(ramp, np.diag([2, 2, 2.1, 1]))


def test_weights_beside_the_field_of_another_row_are_refused():
    assert Scan("01", "", "T1w", "a.nii", weights="w.nii").problems() == []
    (problem,) = Scan("01", "", "T1w", "a.nii", weights="w.nii", field_from="T2w").problems()
    assert problem.startswith("weights count nothing beside field_from")


def test_dataset_links_lead_to_where_weights_lie(tmp_path):
    for name in ("raw", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "dataset_description.json").write_text("{}")
    scan = Scan("01", "", "T1w", f"{tmp_path}/raw/a.nii", weights=f"{tmp_path}/other/w.nii")
    (tmp_path / "results").mkdir()
    describe_dataset(scan.paths, tmp_path / "results/dataset_description.json", tmp_path / "results/.bidsignore")
    links = json.loads((tmp_path / "results/dataset_description.json").read_text())["DatasetLinks"]
    assert set(links.values()) == {"../raw", "../other"}
