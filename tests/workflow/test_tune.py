"""The target tune, on a subject of the built-in dataset."""

import json
import re
import shutil
import time
from pathlib import Path

import pytest
from study import ROOT, snakemake, write_config

from n4flow.study.config import load_config, load_schema, with_defaults
from n4flow.study.failures import Failure, write_failed
from n4flow.study.sheet import read_sheet, with_least_hash

GRID = {"spline_distance_mm": [40, 80], "convergence_threshold": [0.0015, 0.01]}


def tune_config(folder, grid=GRID, subjects=("02",)):
    write_config(folder, {"tune": {"subjects": list(subjects), "grid": grid}})


def rules_to_run(folder, *arguments):
    done = snakemake(folder, *arguments, "-n")
    assert done.returncode == 0, done.stdout
    return re.findall(r"^(?:local)?rule (\w+):", done.stdout, re.M)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working directory after `snakemake tune`."""
    folder = tmp_path_factory.mktemp("tune")
    shutil.copytree(ROOT / "config", folder / "config")
    tune_config(folder)
    done = snakemake(folder, "tune", "--cores", 2)
    assert done.returncode == 0, done.stdout
    return folder


def test_every_combination_is_corrected_with_its_own_settings(folder):
    sidecars = sorted((folder / "results/tune/sub-02/anat/sub-02_T1w").glob("*/corrected.json"))
    used = [json.loads(path.read_text())["N4"]["Parameters"] for path in sidecars]
    assert {(p["spline_distance_mm"], p["convergence_threshold"]) for p in used} == {
        (mm, cv) for mm in GRID["spline_distance_mm"] for cv in GRID["convergence_threshold"]
    }
    assert len(used) == 4


def test_the_page_compares_them_all_with_the_reference(folder):
    page = (folder / "results/tune/index.html").read_text(encoding="utf-8")
    assert re.findall(r"<h2>(.*?)</h2>", page) == ["sub-02_T1w"]
    assert len(re.findall(r'<th scope="row">convergence_threshold\s[\d.]+ · spline_distance_mm\s\d+</th>', page)) == 4
    assert "r to reference" in page


def test_nothing_of_it_is_mixed_with_the_derivatives_nor_part_of_all(folder):
    assert {path.name for path in (folder / "results/sub-02/anat").iterdir()} == {
        f"sub-02_desc-{name}"
        for name in (
            "foregroundT1w_mask.nii.gz", "foregroundT1w_mask.json", "N4sitk_T1w.nii.gz", "N4sitk_T1w.json",
            "N4sitkT1w_biasfield.json", "N4_T1w.nii.gz", "N4_T1w.json", "N4T1w_biasfield.nii.gz",
            "N4T1w_biasfield.json",
        )
    }  # fmt: skip
    assert "qc" in rules_to_run(folder)
    assert not {"tune", "tune_n4"} & set(rules_to_run(folder))


def test_a_further_value_adds_its_own_corrections_and_the_page(folder, tmp_path):
    assert rules_to_run(folder, "tune") == []
    shutil.copytree(folder, tmp_path / "copy", symlinks=True)
    tune_config(tmp_path / "copy", {**GRID, "spline_distance_mm": [40, 60, 80]})
    assert sorted(rules_to_run(tmp_path / "copy", "tune")) == ["tune", "tune_n4", "tune_n4"]


def test_a_reference_that_failed_before_is_not_tried_again(folder, tmp_path, monkeypatch):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy, symlinks=True)
    monkeypatch.chdir(copy)
    for path in copy.glob("results/sub-02/anat/*N4sitk*"):
        path.unlink()
    schemas = {name: load_schema(ROOT / f"workflow/schemas/{name}.schema.yaml") for name in ("config", "samples")}
    config = with_defaults(load_config("config/config.yaml"), schemas["config"])
    rows = [line for line in Path(config["samples"]).read_text().splitlines() if line.startswith(("subject", "02"))]
    Path("02.tsv").write_text("\n".join(rows) + "\n")
    (scan,) = read_sheet("02.tsv", schemas["samples"])
    failure = Failure(scan.name, "reference", "broken", "", True)
    (copy / "results/qc").mkdir(exist_ok=True)
    write_failed(copy / "results/qc/failed.tsv", [failure], {scan.name: scan}, config, time.time() + 1, [scan.name])
    assert rules_to_run(copy, "tune") == ["tune"]


def test_the_reference_hangs_on_no_setting_of_ours(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy", symlinks=True)
    write_config(tmp_path / "copy", {"n4": {"fwhm": 0.2}})
    anat = "results/sub-02/anat/sub-02_desc"
    to_run = rules_to_run(tmp_path / "copy", f"{anat}-N4_T1w.json", f"{anat}-N4sitk_T1w.json")
    assert "n4" in to_run
    assert "reference" not in to_run


def test_every_tuned_scan_has_the_yardstick_unless_it_is_off(folder, tmp_path):
    shutil.copytree(ROOT / "config", tmp_path / "config")
    chosen = with_least_hash([f"sub-{n:02d}_T1w" for n in range(1, 5)], 1)
    (other, *_) = (label for label in ("01", "02") if f"sub-{label}_T1w" not in chosen)
    for scans, wanted in ((1, True), (0, False)):
        changes = {"reference": {"scans": scans}, "tune": {"subjects": [other], "grid": GRID}}
        write_config(tmp_path, changes)
        assert ("reference" in rules_to_run(tmp_path, "tune")) == wanted


def test_tune_without_subjects_says_what_to_give(tmp_path):
    shutil.copytree(ROOT / "config", tmp_path / "config")
    done = snakemake(tmp_path, "tune", "--cores", 1)
    assert done.returncode == 1
    assert "tune: there is nothing to compare; give tune.subjects and tune.grid, see config/README.md" in done.stdout


def test_a_wrong_grid_stops_the_run_with_a_line_each(tmp_path):
    tune_config(tmp_path, {"fwmh": [0.1], "shrink_factor": [2, 0]}, subjects=["07"])
    shutil.copy(ROOT / "config/samples.tsv", tmp_path / "config")
    done = snakemake(tmp_path, "--cores", 1)
    assert done.returncode == 1
    said = [line.strip() for line in done.stdout.splitlines()]
    assert f"{tmp_path}/config/config.yaml: tune.grid.fwmh: there is no such key; did you mean fwhm?" in said
    assert [line for line in said if "config.yaml: tune.grid.shrink_factor: 0 is less than" in line]
    tune_config(tmp_path, {"shrink_factor": [2]}, subjects=["07"])
    done = snakemake(tmp_path, "--cores", 1)
    assert (
        "config: tune.subjects: no scan of '07' in the sheet has a field of its own; give other labels" in done.stdout
    )
