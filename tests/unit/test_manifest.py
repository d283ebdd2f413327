"""Hashes of what a run made, and what they say of another run."""

import gzip
import json
import os
import runpy
import shutil
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from n4flow.core.field import BiasField, Mesh
from n4flow.errors import InputError
from n4flow.images.fields import save_field
from n4flow.study.failures import Failure
from n4flow.study.manifest import CLOSE, DIFFERENT, EQUAL, FAILED, content_sha256, read_manifest, verify, write_manifest

SHAPE, AFFINE = (20, 18, 16), np.diag([4.0, 4, 4, 1])
IMAGE = np.random.default_rng(0).uniform(50, 150, SHAPE).astype(np.float32)
LATTICE = np.random.default_rng(1).normal(0, 0.1, Mesh.of_distance(SHAPE, (4, 4, 4), 40.0).lattice_shape)

STEM = "sub-01/anat/sub-01"
MASK, MASK_SIDECAR = f"{STEM}_desc-foregroundT1w_mask.nii.gz", f"{STEM}_desc-foregroundT1w_mask.json"
CORRECTED, SIDECAR = f"{STEM}_desc-N4_T1w.nii.gz", f"{STEM}_desc-N4_T1w.json"
FIELD, BIAS = f"{STEM}_desc-N4T1w_biasfield.json", f"{STEM}_desc-N4T1w_biasfield.nii.gz"
REFERENCE, REFERENCE_FIELD = f"{STEM}_desc-N4sitk_T1w.nii.gz", f"{STEM}_desc-N4sitkT1w_biasfield.json"
PAGE, METRICS = "qc/sub-01_T1w.html", "qc/data/sub-01_T1w.json"
SCAN = [MASK, MASK_SIDECAR, CORRECTED, SIDECAR, FIELD, BIAS, REFERENCE, REFERENCE_FIELD, PAGE, METRICS]
DATASET = ["dataset_description.json", "qc/index.html"]


def save(path, array):
    nib.save(nib.Nifti1Image(array, AFFINE), path)


def write(path, content):
    path.write_text(json.dumps(content))


def make(folder, *, lattice=LATTICE, reference=LATTICE, image=IMAGE, mask=None, seconds=1.5, distance=40.0, raw="raw"):
    """What a run leaves of a scan, and its manifest."""
    for place in ("sub-01/anat", "qc/data"):
        (folder / place).mkdir(parents=True)
    save(folder / MASK, np.ones(SHAPE, np.uint8) if mask is None else mask)
    write(folder / MASK_SIDECAR, {"Type": "ROI", "Sources": [raw], "Mask": {"Voxels": 5760}, "Provenance": {}})
    for values, field_path, path in ((lattice, FIELD, CORRECTED), (reference, REFERENCE_FIELD, REFERENCE)):
        field = BiasField(values, Mesh.of_distance(SHAPE, (4, 4, 4), distance), SHAPE, AFFINE)
        save_field(field, folder / field_path, Sources=[raw])
        ratio = field.ratio_tile(np.s_[:, :, :])
        save(folder / path, image / ratio)
        if path == CORRECTED:
            save(folder / BIAS, ratio)
    history = {"History": [float(lattice.sum())], "WallTimeSeconds": seconds, "Device": "CPU"}
    provenance = {"InputSHA256": {"image": str(float(image.sum()))}, "Versions": {"numpy": "2"}, "Machine": "x86_64"}
    write(
        folder / SIDECAR, {"Sources": [raw], "N4": {"Parameters": {"fwhm": 0.15}, **history}, "Provenance": provenance}
    )
    (folder / PAGE).write_text(f"took {seconds} s")
    write(folder / METRICS, {"cjv": float(lattice.sum()), "wall_time_s": seconds})
    write(folder / DATASET[0], {"Name": "x", "DatasetLinks": {raw: f"../{raw}"}})
    (folder / DATASET[1]).write_text(f"took {seconds} s")
    scans = {"sub-01_T1w": [folder / file for file in SCAN]}
    write_manifest(folder / "manifest.json", scans, [folder / file for file in DATASET])
    return folder


@pytest.fixture
def here(tmp_path):
    return make(tmp_path / "here")


def verdict_of(folder, other):
    dataset, scan = verify(folder, other, threads=2)
    assert dataset == ("dataset", EQUAL, "")
    return scan.verdict, scan.reason


def test_manifest_names_every_file_with_parameters_and_versions(here):
    scans = read_manifest(here)
    assert set(scans) == {"dataset", "sub-01_T1w"}
    assert set(scans["dataset"]["Files"]) == set(DATASET)
    scan = scans["sub-01_T1w"]
    assert set(scan["Files"]) == set(SCAN)
    assert scan["Made"][SIDECAR]["Parameters"] == {"fwhm": 0.15}
    assert scan["Made"][SIDECAR]["Versions"] == {"numpy": "2"}
    np.testing.assert_allclose(scan["Fields"][FIELD]["Lattice"], LATTICE, atol=1e-9, rtol=0)


def test_a_changed_voxel_changes_one_line(here):
    before = (here / "manifest.json").read_text().splitlines()
    save(here / BIAS, np.ones(SHAPE, np.float32))
    write_manifest(here / "manifest.json", {"sub-01_T1w": [here / n for n in SCAN]}, [here / n for n in DATASET])
    after = (here / "manifest.json").read_text().splitlines()
    (changed,) = [line for line, old in zip(after, before, strict=True) if line != old]
    assert BIAS in changed


def test_same_bytes_whatever_the_number_of_threads(here):
    before = (here / "manifest.json").read_bytes()
    scans = {"sub-01_T1w": [here / file for file in SCAN]}
    write_manifest(here / "manifest.json", scans, [here / file for file in DATASET], threads=3)
    assert (here / "manifest.json").read_bytes() == before


def test_compression_clock_machine_and_place_do_not_count(here, tmp_path):
    other = make(tmp_path / "other", seconds=99.0, raw="elsewhere")
    content = gzip.decompress((other / CORRECTED).read_bytes())
    (other / CORRECTED).write_bytes(gzip.compress(content, 1, mtime=1234))
    sidecar = json.loads((other / SIDECAR).read_text())
    write(other / SIDECAR, dict(reversed(sidecar.items())))
    (other / "manifest.json").unlink()  # whoever has none is compared as well
    assert verdict_of(other, here / "manifest.json") == (EQUAL, "")


@pytest.mark.parametrize("role", ["lattice", "reference"])
def test_fields_that_differ_by_rounding_are_equal_within_a_hundred_thousandth(here, tmp_path, role):
    moved = LATTICE.copy()
    moved[1, 2, 1] += 8e-6
    other = make(tmp_path / "other", **{role: moved})
    assert verdict_of(here, other / "manifest.json") == (CLOSE, "the log field differs by up to 8.0e-06")
    assert CLOSE == "equal within 1e-5"


def test_what_the_manifest_bounds_bounds_the_images(here, tmp_path):
    other = make(tmp_path / "other", lattice=LATTICE + np.random.default_rng(2).uniform(-1e-5, 1e-5, LATTICE.shape))
    assert verdict_of(here, other)[0] == CLOSE
    images = [np.asarray(nib.load(folder / CORRECTED).dataobj, dtype=np.float64) for folder in (here, other)]
    assert np.abs(np.log(images[0] / images[1])).max() < 1e-5 + 2e-7  # and rounding to float32


def flip_a_voxel(folder):
    image = nib.load(folder / CORRECTED)
    values = np.asarray(image.dataobj).copy()
    values[3, 4, 5] += 1
    save(folder / CORRECTED, values)


def cut_off(folder):
    (folder / CORRECTED).write_bytes((folder / CORRECTED).read_bytes()[:-200])


@pytest.mark.parametrize("spoil", [flip_a_voxel, cut_off, lambda folder: (folder / CORRECTED).unlink()])
@pytest.mark.parametrize("close", [False, True])
def test_image_that_changed_after_its_run_is_different_even_if_its_field_is_close(here, tmp_path, spoil, close):
    other = make(tmp_path / "other", lattice=LATTICE + 1e-6) if close else here
    manifest = shutil.copy(other / "manifest.json", tmp_path / "manifest.json")
    spoil(here)
    assert verdict_of(here, Path(manifest)) == (DIFFERENT, f"changed since the run: {CORRECTED}")


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ({"lattice": LATTICE + 3e-5}, f"the log field differs by up to 3.0e-05: {FIELD}"),
        ({"reference": LATTICE + 1e-3}, f"the log field differs by up to 1.0e-03: {REFERENCE_FIELD}"),
        ({"lattice": LATTICE[:-1], "reference": LATTICE[:-1], "distance": 60.0}, "the field has another mesh or image"),
        ({"image": IMAGE * 2}, f"differs by more than its field: {CORRECTED}, {REFERENCE}"),
        ({"image": IMAGE * 2, "lattice": LATTICE + 1e-6, "reference": LATTICE + 1e-6}, "made of another image file"),
        ({"mask": np.zeros(SHAPE, np.uint8)}, f"differs by more than its field: {MASK}"),
        ({"mask": np.zeros(SHAPE, np.uint8), "lattice": LATTICE + 1e-6}, f"differs by more than its field: {MASK}"),
    ],
)
def test_what_is_different_is_named(here, tmp_path, how, reason):
    if how.get("distance"):
        shape = Mesh.of_distance(SHAPE, (4, 4, 4), 60.0).lattice_shape
        how = {**how, "lattice": np.zeros(shape), "reference": np.zeros(shape)}
    verdict, why = verdict_of(here, make(tmp_path / "other", **how))
    assert verdict == DIFFERENT
    assert why.startswith(reason)


def test_close_fields_prove_nothing_of_images_without_an_own_manifest(here, tmp_path):
    other = make(tmp_path / "other", lattice=LATTICE + 1e-6)
    (here / "manifest.json").unlink()
    verdict, why = verdict_of(here, other)
    assert verdict == DIFFERENT
    assert why.startswith("without a manifest.json of its own")


def test_scans_and_files_of_one_side_alone_are_different(here, tmp_path):
    content = json.loads((here / "manifest.json").read_text())
    scan = content["Scans"].pop("sub-01_T1w")
    content["Scans"]["sub-02_T1w"] = {"Files": {path.replace("01", "02"): sha for path, sha in scan["Files"].items()}}
    write(tmp_path / "other.json", content)
    found = {name: (verdict, reason) for name, verdict, reason in verify(here, tmp_path / "other.json")}
    assert found["sub-01_T1w"] == (DIFFERENT, "the manifest has no such scan")
    assert found["sub-02_T1w"][0] == DIFFERENT
    assert found["sub-02_T1w"][1].startswith("not there: sub-02/anat/")


NO_VOXEL = Failure("sub-01_T1w", "mask", "raw/x.nii: no voxel is above 0", "", again=True)


def failed_in(folder, failure=NO_VOXEL, left=()):
    """The same run, in which the scan failed, and left these files."""
    scans = {"sub-01_T1w": [folder / file for file in left]} if left else {}
    for file in set(SCAN) - set(left):
        (folder / file).unlink()
    write_manifest(folder / "manifest.json", scans, [folder / file for file in DATASET], [failure])
    return folder


def test_a_scan_that_failed_is_said_to_have_failed(here, tmp_path):
    other = failed_in(make(tmp_path / "other"))
    assert verdict_of(other, here) == (DIFFERENT, "failed when the run was made: mask: raw/x.nii: no voxel is above 0")
    assert verdict_of(here, other) == (
        DIFFERENT,
        "failed when the manifest was made: mask: raw/x.nii: no voxel is above 0",
    )
    assert verdict_of(other, other) == (FAILED, "mask: raw/x.nii: no voxel is above 0")
    (other / "manifest.json").rename(tmp_path / "other.json")  # nothing tells what became of it here
    assert verdict_of(other, tmp_path / "other.json")[0] == DIFFERENT


def test_a_scan_without_the_reference_that_failed_has_all_else_compared(here, tmp_path):
    left = [file for file in SCAN if "sitk" not in file]
    failure = NO_VOXEL._replace(step="reference", error="it took too long")
    other = failed_in(make(tmp_path / "other"), failure, left)
    assert verdict_of(other, here) == (DIFFERENT, "failed when the run was made: reference: it took too long")
    assert verdict_of(here, other) == verdict_of(other, other) == (EQUAL, "")


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"[]", b"3", b"\xff", b"[" * 100_000, b'{"Format": "x"}',
        *(
            json.dumps({"Format": "n4flow manifest, version 1", "Dataset": {"Files": {}}, "Scans": scans}).encode()
            for scans in (
                [], {"a": 1}, {"a": {"Files": {"../../etc/passwd": ""}}}, {"a": {"Files": {"/dev/zero": ""}}},
                {"a": {"Files": {"a\0": ""}}}, {"a": {"Files": [1]}}, {"a": {"Files": {}, "Fields": {"x": {}}}},
                {"a": {"Files": {}, "Fields": {"x": {"Lattice": "no"}}}},
                {"a": {"Files": {}, "Fields": {"x": {"Lattice": [float("nan")]}}}},
                {"a": {"Files": {}, "Fields": {"../x": {"Lattice": [0]}}}},
            )
        ),
        *(
            json.dumps(
                {"Format": "n4flow manifest, version 1", "Dataset": {"Files": {}}, "Scans": {}, "Failed": failed}
            ).encode()
            for failed in ([], "a", {"a": 1}, {"a": {"Step": "mask"}})
        ),
    ],
)  # fmt: skip
def test_what_is_no_manifest_is_refused_with_one_line(here, tmp_path, content):
    (tmp_path / "other.json").write_bytes(content)
    with pytest.raises(InputError, match=r"other.json: is no n4flow manifest \(") as error:
        verify(here, tmp_path / "other.json")
    assert len(str(error.value).splitlines()) == 1


def test_hash_of_a_file_is_that_of_its_bytes_and_a_damaged_one_is_an_error(tmp_path):
    (tmp_path / "a.html").write_bytes(b"abc")
    assert content_sha256(tmp_path / "a.html").startswith("ba7816bf8f01cfea")  # NIST's example
    for name in ("a.nii.gz", "a.json"):
        (tmp_path / name).write_bytes(b"{abc")
        with pytest.raises(InputError, match="cannot be read"):
            content_sha256(tmp_path / name)


def run_script(monkeypatch, pytestconfig, results, manifest):
    """Status of the script."""
    monkeypatch.setattr(sys, "argv", ["verify.py", str(results), str(manifest)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(pytestconfig.rootpath / "workflow/scripts/verify.py"), run_name="__main__")
    return int(ended.value.code)


@pytest.mark.parametrize(("how", "status", "last"), [({}, 0, "1 equal, 0 equal within 1e-5, 0 different"), (
    {"lattice": LATTICE + 1e-3}, 1, "0 equal, 0 equal within 1e-5, 1 different")])  # fmt: skip
def test_script_prints_a_line_per_scan_and_its_status_says_it_too(
    here, tmp_path, monkeypatch, capsys, pytestconfig, how, status, last
):
    other = make(tmp_path / "other", **how)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)  # macOS has none
    assert run_script(monkeypatch, pytestconfig, here, other / "manifest.json") == status
    said = capsys.readouterr()
    assert [line.split("\t")[0] for line in said.out.splitlines()] == ["scan", "dataset", "sub-01_T1w"]
    assert said.err.splitlines() == [last]


def test_script_counts_what_failed_in_both_runs_apart(here, monkeypatch, capsys, pytestconfig):
    failed_in(here)
    assert run_script(monkeypatch, pytestconfig, here, here) == 0
    assert capsys.readouterr().err.splitlines() == ["0 equal, 0 equal within 1e-5, 0 different, 1 failed"]
