"""Series of diffusion: the field is that of the frames that show it; what says so goes along."""

import hashlib
import json

import nibabel as nib
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from n4flow import InputError, N4Parameters
from n4flow.qc.measuring import measure_subject
from n4flow.steps.correct import correct_scan
from n4flow.steps.derivatives import CorrectionFiles
from n4flow.steps.mask import mask_scan
from n4flow.steps.reference import reference_scan
from n4flow.study.bids import Scan, beside_image, counted_beside
from n4flow.study.series import open_scan

AFFINE = np.diag([8.0, 8, 8, 1])
B_VALUES = "0 1000 5 1000 50 2000"
LOW = (0, 2, 4)


def chain(folder, values, b_values=None, reference=True):
    """Mask, field and reference of a series; gives the folder that holds them."""
    folder.mkdir()
    image = folder / "sub-01_dwi.nii.gz"
    nib.save(nib.Nifti1Image(values, AFFINE), image)
    if b_values:
        (folder / "sub-01_dwi.bval").write_text(b_values)
    files = {}
    for kind in ("n4", "sitk"):
        names = {"corrected": f"{kind}.nii.gz", "sidecar": f"{kind}.json", "field": f"{kind}_field.json"}
        files[kind] = CorrectionFiles.of({role: folder / name for role, name in names.items()})
    mask = folder / "m.nii.gz"
    mask_scan(image, None, mask, folder / "m.json", method="otsu", percentile=50)
    correct_scan(image, mask, files["n4"], parameters=N4Parameters(), device="cpu")
    if reference:
        reference_scan(image, mask, files["sitk"])
    return folder


@pytest.fixture(scope="module")
def series(head):
    """Of a head every fourth voxel; in frames of high b other tissue is dark, and another field."""
    still = head.image[::4, ::4, ::4]
    rng = np.random.default_rng(0)
    other = np.where(still > 600, 0.1, 0.5) * still[::-1]
    frames = [still if n in LOW else other for n in range(6)]
    return np.stack([frame + rng.normal(0, 3, still.shape) for frame in frames], -1).clip(0).astype(np.float32)


@pytest.fixture(scope="module")
def weighted(series, tmp_path_factory):
    return chain(tmp_path_factory.mktemp("series") / "raw", series, B_VALUES)


def field_of(folder, kind="n4"):
    return json.loads((folder / f"{kind}_field.json").read_text())["Lattice"]


def test_mask_and_fields_are_those_of_the_frames_up_to_b_50(series, weighted, tmp_path):
    alone = chain(tmp_path / "alone", series[..., LOW])
    assert (weighted / "m.nii.gz").read_bytes() == (alone / "m.nii.gz").read_bytes()
    for kind in ("n4", "sitk"):
        assert_array_equal(field_of(weighted, kind), field_of(alone, kind))
    mixed = chain(tmp_path / "mixed", series, reference=False)
    assert np.ptp(np.subtract(field_of(weighted), field_of(mixed))) > 0.05


def test_every_frame_is_divided_by_it(series, weighted):
    corrected = np.asarray(nib.load(weighted / "n4.nii.gz").dataobj)
    inside = series[..., 0] > 100
    ratios = series[inside] / np.maximum(corrected[inside], 1e-9)
    there = series[inside] > 0
    np.testing.assert_allclose(ratios[there], np.broadcast_to(ratios[:, :1], there.shape)[there], rtol=1e-5)


def test_sidecar_names_the_frames_and_the_file(weighted):
    content = json.loads((weighted / "n4.json").read_text())
    assert content["N4"]["AveragedFrames"] == [1, 3, 5]
    digest = hashlib.sha256((weighted / "sub-01_dwi.bval").read_bytes()).hexdigest()
    assert content["Provenance"]["InputSHA256"]["bval"] == digest


def test_the_page_shows_the_same_mean_before_and_after(series, weighted):
    names = {"mask": "m.nii.gz", "corrected": "n4.nii.gz", "field": "n4_field.json", "sidecar": "n4.json"}
    files = {role: weighted / name for role, name in names.items()}
    image = weighted / "sub-01_dwi.nii.gz"
    subject = measure_subject(name="sub-01_dwi", image=image, **files, field_window_log=0.4)
    assert (subject.values["frames"], subject.values["averaged_frames"]) == (6, 3)
    assert subject.values["mean_ratio"] == pytest.approx(1, abs=1e-5)
    inside = np.asarray(nib.load(weighted / "m.nii.gz").dataobj) > 0
    np.testing.assert_allclose(np.sort(subject.before), np.sort(series[..., LOW].mean(-1)[inside]), rtol=1e-5)


@pytest.mark.parametrize(
    ("b_values", "frames", "averaged"),
    [
        (None, 4, (0, 1, 2, 3)),
        ("0 1000 50 51\n", 4, (0, 2)),
        ("0\t1e3\n5.0\n1000.\n", 4, (0, 2)),  # by lines, too
        ("1000,0,1000,1000", 4, (1,)),
        ("1000 0", 1, (0,)),  # of a mean that somebody made
    ],
)
def test_b_values_tell_the_frames(tmp_path, b_values, frames, averaged):
    values = np.arange(1, frames + 1) * np.ones((4, 5, 6, 1), np.float32)
    nib.save(nib.Nifti1Image(values, AFFINE), tmp_path / "a_dwi.nii")
    if b_values:
        (tmp_path / "a_dwi.bval").write_text(b_values)
    volume = open_scan(tmp_path / "a_dwi.nii")
    assert volume.averaged == averaged
    assert_array_equal(volume.mean(), np.full((4, 5, 6), values[..., averaged].mean(), np.float32))


@pytest.mark.parametrize(
    ("b_values", "problem"),
    [
        ("0 1000 1000", r"a_dwi\.bval: holds 3 b values, a_dwi\.nii has 4 frames; give one for each frame"),
        ("0 1000 1000 nan", r"a_dwi\.bval: holds 3 b values, a_dwi\.nii has 4 frames"),
        ("zero 1 2 3", r"a_dwi\.bval: holds no b values \(.*\); give numbers, one for each frame"),
        ("", r"a_dwi\.bval: holds 0 b values"),
    ],
)
def test_b_values_that_do_not_fit_are_one_line(tmp_path, b_values, problem):
    nib.save(nib.Nifti1Image(np.ones((4, 5, 6, 4), np.float32), AFFINE), tmp_path / "a_dwi.nii")
    (tmp_path / "a_dwi.bval").write_text(b_values)
    with pytest.raises(InputError, match=problem):
        open_scan(tmp_path / "a_dwi.nii")


def test_a_series_without_a_low_b_value_says_so(tmp_path, caplog):
    nib.save(nib.Nifti1Image(np.ones((4, 5, 6, 2), np.float32), AFFINE), tmp_path / "a_dwi.nii")
    (tmp_path / "a_dwi.bval").write_text("700 1000")
    assert open_scan(tmp_path / "a_dwi.nii").averaged == (0, 1)
    assert "no frame has a b value up to 50, the least is 700" in caplog.text
    assert "field_from" in caplog.text


def test_a_lost_frame_is_told_by_its_number_in_the_series(tmp_path, caplog):
    values = np.ones((4, 5, 6, 4), np.float32)
    values[..., 3] = np.nan
    values[..., 1] = np.inf  # of a high b value: nothing depends on it
    nib.save(nib.Nifti1Image(values, AFFINE), tmp_path / "a_dwi.nii")
    (tmp_path / "a_dwi.bval").write_text("0 1000 0 0")
    assert open_scan(tmp_path / "a_dwi.nii").mean().max() == 1
    assert "1 of 3 frames hold values that are not finite, which are left out of the mean: 4" in caplog.text


@pytest.mark.parametrize("suffix", ["dwi", "bold"])
def test_the_b_values_that_a_step_goes_by_count_in_the_rules(tmp_path, suffix):
    image = tmp_path / f"sub-01_{suffix}.nii"
    nib.save(nib.Nifti1Image(np.ones((4, 5, 6, 2), np.float32), AFFINE), image)
    image.with_suffix(".bval").write_text("0 1000")
    assert open_scan(image).averaged == (0,)
    assert counted_beside(Scan("01", "", suffix, str(image))) == [str(image.with_suffix(".bval"))]


def test_what_lies_beside_a_series_is_found_by_inheritance(tmp_path):
    """The nearest file counts; each is looked for again when a folder has changed."""
    place = tmp_path / "sub-01/dwi"
    place.mkdir(parents=True)
    (tmp_path / "dataset_description.json").write_text("{}")
    image = place / "sub-01_dir-AP_dwi.nii.gz"
    assert beside_image(image, "bval") is None
    for file in (tmp_path / "dwi.bval", place / "sub-01_dir-PA_dwi.bval"):
        file.touch()
    assert beside_image(image, "bval") == tmp_path / "dwi.bval"
    (place / "sub-01_dir-AP_dwi.bval").touch()
    assert beside_image(image, "bval") == place / "sub-01_dir-AP_dwi.bval"
    context = tmp_path / "sub-01/perf/sub-01_aslcontext.tsv"
    context.parent.mkdir()
    context.touch()
    assert beside_image(context.parent / "sub-01_asl.nii.gz", "aslcontext") == context
