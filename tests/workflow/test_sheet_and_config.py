"""What is wrong with sheet or config stops the run before anything is made; each problem is a line."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
from study import ROOT, head, raw_scan, save, snakemake, write_config, write_sheet

from n4flow.console import PARTICIPANTS


def assert_stopped_with(done, folder, lines):
    assert done.returncode == 1
    said = done.stdout.splitlines()
    assert [line for line in lines if line not in said] == []
    assert [line for line in said if "Error in file" in line or line.lstrip().startswith("File ")] == []
    assert "Traceback" not in done.stdout
    assert sorted(path.name for path in folder.iterdir() if path.name != ".snakemake") == ["config"]


def test_sheet_with_errors_stops_the_run_with_a_line_each(tmp_path):
    write_config(tmp_path, guide=True)
    absent = raw_scan("01")
    sheet = tmp_path / "config/samples.tsv"
    write_sheet(sheet, [absent, raw_scan("0_2")])
    image = "raw/sub-01/anat/sub-01_T1w.nii.gz"
    assert_stopped_with(
        snakemake(tmp_path, "--cores", 1),
        tmp_path,
        [
            f"{sheet}, line 2: image {image} is not there; check the path (it is taken from the working directory)",
            f"{sheet}, line 3: subject '0_2' is no BIDS label, use letters and digits only",
        ],
    )


def test_config_with_errors_stops_the_run_with_a_line_each(tmp_path):
    write_config(tmp_path, {"n4": {"fwmh": 0.2, "shrink_factor": 0}, "reference": {"fraction": 0.1}}, guide=True)
    settings, mine = tmp_path / "config/config.yaml", tmp_path / "config/mine.yaml"
    mine.write_text("reference: {scans: half}\n")
    write_sheet(tmp_path / "config/samples.tsv", [])
    assert_stopped_with(
        snakemake(tmp_path, "--cores", 1, "--configfile", mine, "--config", "device=tpu"),
        tmp_path,
        [
            "config: device: 'tpu' is not one of ['auto', 'gpu', 'cpu']; where N4 computes: auto (a GPU if there is "
            "one), gpu or cpu",
            f"{settings}: n4.fwmh: there is no such key; did you mean fwhm?",
            f"{settings}: n4.shrink_factor: 0 is less than the minimum of 1; estimate on every n-th voxel along each "
            "axis, a whole number from 1",
            f"{settings}: reference.fraction: there is no such key; give reference.scans, a number of scans, or all",
            f"{mine}: reference.scans: 'half' does not fit; how many scans SimpleITK corrects too, a whole number from "
            "0 (off), or all",
        ],
    )


def test_no_sheet_stops_the_run_with_a_line(tmp_path):
    write_config(tmp_path, {"samples": ""}, guide=True)
    line = "config: samples: is empty; path of the sample sheet"
    assert_stopped_with(snakemake(tmp_path, "--cores", 1), tmp_path, [line])


def test_unknown_scan_as_target_is_named(tmp_path):
    write_config(tmp_path)
    scan = raw_scan("01")
    save(tmp_path / scan.image, head())
    write_sheet(tmp_path / "config/samples.tsv", [scan])
    done = snakemake(tmp_path, "results/sub-02/anat/sub-02_desc-N4_T1w.nii.gz", "--cores", 1)
    assert done.returncode == 1
    assert f"sub-02_T1w: no such scan in {tmp_path}/config/samples.tsv; add a line for it" in done.stdout


def test_a_label_that_has_lost_its_zeros_is_a_line(tmp_path):
    write_config(tmp_path)
    scan = raw_scan("01")
    save(tmp_path / scan.image, head())
    write_sheet(tmp_path / "config/samples.tsv", [replace(scan, subject="1")])
    done = snakemake(tmp_path, "--dry-run", "--cores", 1)
    assert done.returncode == 0
    assert (
        done.stdout.count("samples.tsv: sub-1 is taken for another one than sub-01; if a spreadsheet has removed") == 1
    )


@pytest.mark.parametrize(("subjects", "over_all"), [("01", False), ("01 02", True)])
def test_report_is_made_where_the_sheet_that_is_read_holds_no_other_participants(
    tmp_path, monkeypatch, subjects, over_all
):
    write_config(tmp_path)
    scans = [raw_scan("01"), raw_scan("02")]
    for scan in scans:
        save(tmp_path / scan.image, head((8, 8, 8)))
    write_sheet(tmp_path / "config/samples.tsv", scans)
    monkeypatch.setenv(PARTICIPANTS, subjects)
    done = snakemake(tmp_path, "-n", "--quiet", "rules")
    assert done.returncode == 0, done.stdout
    rules = {line.split()[0]: line.split()[-1] for line in done.stdout.splitlines() if line}
    assert rules["n4"] == str(len(subjects.split()))
    assert ("index" in rules) == over_all


@pytest.fixture
def bids_folder(tmp_path):
    """A dataset with sessions, runs, an image that was not fetched, and derivatives; and a working directory."""
    raw = tmp_path / "raw"
    for scan in (
        raw_scan("01", session="a"),
        raw_scan("01", session="b"),
        raw_scan("02", "run-1_T1w"),
        raw_scan("02", "run-2_T1w", extension=".nii"),
        raw_scan("02", "acq-fast_FLAIR"),
        raw_scan("03", "task-rest_bold"),
    ):
        save(tmp_path / scan.image, head((8, 8, 8)))
    (raw / "sub-04/anat").mkdir(parents=True)
    (raw / "sub-04/anat/sub-04_T1w.nii.gz").symlink_to("../../.git/annex/objects/absent.nii.gz")
    save(raw / "derivatives/other/sub-01/ses-a/anat/sub-01_ses-a_desc-other_T1w.nii.gz", head((8, 8, 8)))
    write_config(tmp_path)
    return tmp_path


def bids_sheet(folder, *arguments):
    return subprocess.run(
        [sys.executable, ROOT / "workflow/scripts/bids_sheet.py", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
    )


def test_sheet_of_a_bids_folder_is_accepted(bids_folder):
    made = bids_sheet(bids_folder, "raw", "--suffix", "T1w", "FLAIR", "bold", "--output", "config/study.tsv")
    assert made.returncode == 0, made.stderr
    done = snakemake(bids_folder, "-n", "--quiet", "rules", "--config", "samples=config/study.tsv")
    assert done.returncode == 0, done.stdout
    sheet = (bids_folder / "config/study.tsv").read_text().splitlines()
    assert sheet == [
        "subject\tsession\timage\tmask\tmodality",
        "01\ta\traw/sub-01/ses-a/anat/sub-01_ses-a_T1w.nii.gz\t\tT1w",
        "01\tb\traw/sub-01/ses-b/anat/sub-01_ses-b_T1w.nii.gz\t\tT1w",
        "02\t\traw/sub-02/anat/sub-02_acq-fast_FLAIR.nii.gz\t\tacq-fast_FLAIR",
        "02\t\traw/sub-02/anat/sub-02_run-1_T1w.nii.gz\t\trun-1_T1w",
        "02\t\traw/sub-02/anat/sub-02_run-2_T1w.nii\t\trun-2_T1w",
        "03\t\traw/sub-03/func/sub-03_task-rest_bold.nii.gz\t\ttask-rest_bold",
    ]


def test_image_that_was_not_fetched_is_named_when_the_sheet_is_made(bids_folder):
    made = bids_sheet(bids_folder, "raw", "--output", "config/study.tsv")
    assert "raw/sub-04/anat/sub-04_T1w.nii.gz" in made.stderr
    assert "Traceback" not in made.stderr


def test_filters_of_the_command_choose_the_rows(bids_folder):
    chosen = ("--suffix", "T1w", "FLAIR", "--participant", "01", "02", "--entity", "run-2")
    assert bids_sheet(bids_folder, "raw", *chosen).stdout.splitlines()[1:] == [
        "02\t\traw/sub-02/anat/sub-02_run-2_T1w.nii\t\trun-2_T1w"
    ]
    made = bids_sheet(bids_folder, "raw", "--session", "b")
    assert made.stdout.splitlines()[1:] == ["01\tb\traw/sub-01/ses-b/anat/sub-01_ses-b_T1w.nii.gz\t\tT1w"]


def test_sheet_goes_to_standard_output(bids_folder):
    made = bids_sheet(bids_folder, "raw", "--suffix", "bold")
    assert made.stdout.splitlines()[1:] == ["03\t\traw/sub-03/func/sub-03_task-rest_bold.nii.gz\t\ttask-rest_bold"]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["absent"], "n4flow: absent: there is no such folder; give the folder that holds the sub-* folders"),
        (
            ["raw", "--suffix", "angio"],
            "n4flow: raw: holds no scan with the suffix angio; check the folder and the filters",
        ),
    ],
)
def test_folder_without_scans_is_an_error_of_one_line(bids_folder, arguments, line):
    made = bids_sheet(bids_folder, *arguments, "--output", "config/study.tsv")
    assert made.returncode == 1
    assert made.stderr.splitlines()[-1] == line
    assert "Traceback" not in made.stderr
    assert not (bids_folder / "config/study.tsv").exists()
