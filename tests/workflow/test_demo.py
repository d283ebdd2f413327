"""The built-in dataset: a reader's first command, checked against the truth that lies beside the images."""

import json
import re
import shutil

import nibabel as nib
import numpy as np
import pytest
from study import ROOT, load, partial_files, snakemake, write_config

HEADER = "participant_id\tmodality\trater\trating\treasons\treport_hash\n"


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A working directory with the repository's own config, after a run."""
    folder = tmp_path_factory.mktemp("demo")
    shutil.copytree(ROOT / "config", folder / "config")
    done = snakemake(folder, "--cores", 2)
    assert done.returncode == 0, done.stdout
    (folder / "terminal.txt").write_text(done.stdout)
    return folder


def test_terminal_has_a_line_for_each_scan_and_little_else(demo):
    text = (demo / "terminal.txt").read_text()
    assert sorted(line.split(" ")[1] for line in text.splitlines() if line.startswith("[")) == [
        f"sub-{n:02d}_T1w:" for n in range(1, 5)
    ]
    assert re.search(
        r"^4 of 4 scans are done, (none|\d) flagged\. The report: \S*results/qc/index\.html$", text, re.MULTILINE
    )
    assert len(text) < 2000


def log_errors(folder, subject):
    """The rms of the demeaned log field in the truth's brain: of the whole field, and of what the estimate misses."""
    anat = folder / f"resources/demo/sub-{subject}/anat"
    results = folder / f"results/sub-{subject}/anat"
    truth = np.log(load(anat / f"sub-{subject}_desc-truth_biasfield.nii.gz"))
    noise_free = load(anat / f"sub-{subject}_desc-truth_T1w.nii.gz")
    brain = (noise_free > 500) & brain_of(folder, subject)
    ours = np.log(load(results / f"sub-{subject}_desc-N4T1w_biasfield.nii.gz"))
    sitk_free = truth[brain] - truth[brain].mean()
    error = (ours - truth)[brain]
    return np.sqrt(np.mean(sitk_free**2)), np.sqrt(np.mean((error - error.mean()) ** 2))


def brain_of(folder, subject):
    """The brain that the dataset gives for subject 03, on the grid of another subject."""
    mask = nib.load(folder / "resources/demo/sub-03/anat/sub-03_desc-brain_mask.nii.gz")
    image = nib.load(folder / f"resources/demo/sub-{subject}/anat/sub-{subject}_T1w.nii.gz")
    to_image = nib.orientations.ornt_transform(
        nib.orientations.io_orientation(mask.affine), nib.orientations.io_orientation(image.affine)
    )
    turned = mask.as_reoriented(to_image)
    assert np.allclose(turned.affine, image.affine)
    return np.asarray(turned.dataobj) != 0


@pytest.mark.parametrize("subject", ["02", "03", "04"])
def test_error_of_the_field_is_well_below_the_field_itself(demo, subject):
    before, after = log_errors(demo, subject)
    assert after < 0.5 * before, (before, after)


def test_head_without_a_field_gets_hardly_one(demo):
    before, after = log_errors(demo, "01")
    assert before == 0
    assert after < 0.03


def test_fourth_subject_is_stored_otherwise(demo):
    image = nib.load(demo / "resources/demo/sub-04/anat/sub-04_T1w.nii.gz")
    assert nib.aff2axcodes(image.affine) == ("P", "S", "R")
    assert image.get_data_dtype() == np.int16
    assert image.dataobj.slope == 0.25
    corrected = nib.load(demo / "results/sub-04/anat/sub-04_desc-N4_T1w.nii.gz")
    assert np.array_equal(corrected.affine, image.affine)


def test_dataset_is_complete(demo):
    rows = (demo / "results/qc/metrics.tsv").read_text(encoding="utf-8").splitlines()
    assert {row.split("\t")[0] for row in rows[1:]} == {f"sub-{n:02d}_T1w" for n in range(1, 5)}
    assert len(list((demo / "results").rglob("*desc-N4sitk_T1w.nii.gz"))) == 4
    assert partial_files(demo) == []


def test_dataset_is_simulated_the_same_each_time(demo, tmp_path):
    shutil.copytree(ROOT / "config", tmp_path / "config")
    image = "resources/demo/sub-04/anat/sub-04_T1w.nii.gz"
    done = snakemake(tmp_path, image, "--cores", 1)
    assert done.returncode == 0, done.stdout
    assert np.array_equal(load(tmp_path / image), load(demo / image))


def test_ratings_go_back_into_the_workflow(demo, tmp_path):
    folder = tmp_path / "rated"
    shutil.copytree(demo, folder)
    ratings = folder / "config" / "ratings.tsv"
    write_config(folder, {"qc": {"ratings": "config/ratings.tsv"}})
    ratings.write_text(HEADER + "sub-09\tT1w\tann\tfail\tn/a\tn/a\nsub-01\tT1w\tann\tgood\tn/a\tn/a\n")
    done = snakemake(folder, "--cores", 1)
    assert done.returncode == 1
    lines = [line.strip() for line in done.stdout.splitlines()]
    where = "config/ratings.tsv, line"
    assert f"{where} 2: sub-09_T1w is not in the sample sheet; remove the line, or add the scan" in lines
    assert f"{where} 3: rating 'good' is not valid; use one of pass warn fail" in lines

    now = json.loads((folder / "results/qc/data/sub-01_T1w.json").read_text())["report_hash"]
    rows = [("sub-01", "fail", "mask wrong", now), ("sub-02", "fail", "n/a", "0" * 12), ("sub-03", "pass", "n/a", now)]
    ratings.write_text(HEADER + "".join("\t".join((s, "T1w", "ann", r, why, h)) + "\n" for s, r, why, h in rows))
    pages = {path: path.stat().st_mtime for path in folder.glob("results/qc/sub-*.html")}
    done = snakemake(folder, "--cores", 1)
    assert done.returncode == 0, done.stdout
    assert (folder / "results/qc/exclude.tsv").read_text().splitlines() == [
        "participant_id\tsession\tmodality\treason",
        "sub-01\tn/a\tT1w\tann: fail, mask wrong",
        "sub-02\tn/a\tT1w\tann: fail (stale: the scan has changed since, look again)",
    ]
    assert (folder / "results/qc/agreement.tsv").read_text().startswith("rater\tother\tscans\talike\tkappa")
    assert '"rater":"ann"' in (folder / "results/qc/index.html").read_text(encoding="utf-8")
    assert {path: path.stat().st_mtime for path in pages} == pages, "pages do not hang on ratings"
