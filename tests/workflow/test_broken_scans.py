"""One run over many broken scans and two good ones: each broken one ends with one line, the good ones are done."""

import csv
import gzip
import html
import json
import re
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
import pytest
from study import (
    AFFINE,
    SHAPE,
    describe_raw,
    edit_header,
    head,
    log_of,
    partial_files,
    raw_scan,
    results_of,
    save,
    snakemake,
    write_config,
    write_sheet,
)

FULL_MASK = "raw/full_mask.nii.gz"


def cut(path, share):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def text(path):
    path.write_text("This is no image.\n" * 50)


def text_in_gzip(path):
    path.write_bytes(gzip.compress(b"This is no image.\n" * 50))


def cut_off(path):
    save(path, head())
    cut(path, 0.6)


def of_complex_numbers(path):
    nib.save(nib.Nifti1Image((head() * np.exp(0.3j)).astype(np.complex64), AFFINE), path)


def in_colour(path):
    rgb = np.repeat(head()[..., None].clip(0, 255).astype(np.uint8), 3, axis=-1)
    nib.save(nib.Nifti1Image(rgb.view([("R", "u1"), ("G", "u1"), ("B", "u1")])[..., 0], AFFINE), path)


def all_zero(path):
    save(path, np.zeros(SHAPE))


def constant(path):
    save(path, np.full(SHAPE, 42))


def mostly_nan(path):
    values = head()
    values[:, :, 12:] = np.nan
    save(path, values)


def all_nan(path):
    save(path, np.full(SHAPE, np.nan))


def one_voxel_wide_zero(path):
    save(path, head())
    edit_header(path, pixdim=[1, 4, 0, 4, 0, 0, 0, 0])


def one_voxel_wide_nan(path):
    save(path, head())
    edit_header(path, pixdim=[1, 4, 4, np.nan, 0, 0, 0, 0])


def flat_affine(path):
    save(path, head(), qform=0)
    edit_header(path, srow_z=[0, 0, 0, 0])


def five_dimensions(path):
    nib.save(nib.Nifti1Image(np.ones((6, 6, 6, 2, 2), np.float32), AFFINE), path)


def good(path):
    save(path, head())


def mask_file(values, **how):
    return lambda path: save(path, values, dtype=np.uint8, **how)


def box(size):
    mask = np.zeros(SHAPE)
    mask[20 : 20 + size, 20 : 20 + size, 18 : 18 + size] = 1
    return mask


class Broken(NamedTuple):
    """A broken scan: what writes its image (and its mask), the step that finds it, and words of the line."""

    image: object
    step: str
    words: str
    extension: str = ".nii.gz"
    mask: object = None
    source: str = "image"  # what the line names


BROKEN = {
    "text": Broken(text, "mask", "is no gzip file"),
    "textnii": Broken(text, "mask", "is no NIfTI image", ".nii"),
    "textgz": Broken(text_in_gzip, "mask", "is no NIfTI image"),
    "cutgz": Broken(cut_off, "mask", "end too early"),
    "cutnii": Broken(cut_off, "mask", "is cut off", ".nii"),
    "empty": Broken(lambda path: path.write_bytes(b""), "mask", "is empty", ".nii"),
    "complex": Broken(of_complex_numbers, "mask", "holds complex values"),
    "rgb": Broken(in_colour, "mask", "holds colour values"),
    "zero": Broken(all_zero, "mask", "no voxel is above 0"),
    "constant": Broken(constant, "mask", "same intensity"),
    "constantmasked": Broken(constant, "n4", "same intensity", mask=mask_file(np.ones(SHAPE))),
    "zeromasked": Broken(all_zero, "n4", "most of the mask cannot be used", mask=mask_file(np.ones(SHAPE))),
    "nan": Broken(mostly_nan, "n4", "most of the mask cannot be used", mask=mask_file(np.ones(SHAPE))),
    "allnan": Broken(all_nan, "mask", "no voxel is above 0"),
    "emptymask": Broken(good, "mask", "the mask is empty", mask=mask_file(np.zeros(SHAPE)), source="mask"),
    "tinymask": Broken(good, "n4", "only 8 usable samples inside the mask", mask=mask_file(box(2))),
    "othershape": Broken(good, "mask", "has shape", mask=mask_file(np.ones((40, 44, 35))), source="mask"),
    "otheraffine": Broken(
        good, "mask", "affine of the mask differs", mask=mask_file(np.ones(SHAPE), affine=AFFINE + 1), source="mask"
    ),
    "mask4d": Broken(good, "mask", "2 frames", mask=mask_file(np.ones((*SHAPE, 2))), source="mask"),
    "textmask": Broken(good, "mask", "is no gzip file", mask=text, source="mask"),
    "zerosize": Broken(one_voxel_wide_zero, "mask", "has the voxel size 4 x 0 x 4", ".nii"),
    "nansize": Broken(one_voxel_wide_nan, "mask", "has the voxel size 4 x 4 x nan", ".nii"),
    "flataffine": Broken(flat_affine, "mask", "affine cannot be inverted", ".nii"),
    "fived": Broken(five_dimensions, "mask", "has 5 dimensions"),
}

GOOD = [raw_scan("good1"), raw_scan("good2", mask=FULL_MASK)]


def scan_of(name):
    broken = BROKEN[name]
    scan = raw_scan(name, extension=broken.extension)
    return replace(scan, mask=f"raw/{name}_mask.nii.gz") if broken.mask else scan


class Run(NamedTuple):
    """What was there when the run had ended."""

    folder: Path
    code: int
    terminal: str
    incomplete: str  # the report


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("broken")
    describe_raw(folder)
    for name, broken in BROKEN.items():
        scan = scan_of(name)
        (folder / scan.image).parent.mkdir(parents=True)
        broken.image(folder / scan.image)
        if broken.mask:
            broken.mask(folder / scan.mask)
    for scan in GOOD:
        save(folder / scan.image, head())
    save(folder / FULL_MASK, np.ones(SHAPE), dtype=np.uint8)
    # good ones first and last: neither order may save them
    write_sheet(folder / "config/samples.tsv", [GOOD[0], *map(scan_of, BROKEN), GOOD[1]])
    write_config(folder)
    done = snakemake(folder, "--cores", 2)
    page = folder / "results/qc/index.html"
    return Run(folder, done.returncode, done.stdout, page.read_text(encoding="utf-8") if page.is_file() else "")


each_broken = pytest.mark.parametrize("name", BROKEN)


def line_of(run, name):
    """The last line of the log of the step that failed."""
    return (run.folder / log_of(scan_of(name), BROKEN[name].step)).read_text().rstrip("\n").rpartition("\n")[2]


def test_run_fails(run):
    assert run.code == 1


@pytest.mark.parametrize("scan", GOOD, ids=lambda scan: scan.name)
def test_good_scan_is_done(run, scan):
    assert [role for role, path in results_of(scan).items() if not (run.folder / path).is_file()] == []


@each_broken
def test_last_line_of_the_log_names_file_problem_and_remedy(run, name):
    scan, broken = scan_of(name), BROKEN[name]
    line = line_of(run, name)
    prefix, source, rest = line.split(": ", 2)
    assert prefix == "n4flow"
    assert source == getattr(scan, broken.source)
    problem, _, remedy = rest.rpartition("; ")
    assert broken.words in problem
    assert len(remedy) > 10


@each_broken
def test_log_says_it_once_without_a_traceback(run, name):
    log = (run.folder / log_of(scan_of(name), BROKEN[name].step)).read_text()
    assert log.count("n4flow: ") == 1
    assert "Traceback" not in log


def test_terminal_has_one_line_for_each_scan(run):
    said = [line for line in run.terminal.splitlines() if line.startswith("[")]
    count = len(BROKEN) + len(GOOD)
    assert [line.split("] ")[0] for line in said] == [f"[{n}/{count}" for n in range(1, count + 1)]
    of_scans = {line.split("] ")[1].split(": ")[0]: line.split(": ", 1)[1] for line in said}
    for name, broken in BROKEN.items():
        assert (
            of_scans.pop(scan_of(name).name) == f"{broken.step} failed: {line_of(run, name).removeprefix('n4flow: ')}"
        )
    assert of_scans.keys() == {scan.name for scan in GOOD}
    assert [line for line in of_scans.values() if not re.fullmatch(r"done in [0-9.]+ s", line)] == []


def test_terminal_is_calm_and_the_log_complete(run):
    assert "\033" not in run.terminal
    for word in ("Traceback", "RuleException", "Error in rule", "jobid", "Select jobs"):
        assert word not in run.terminal
    longest = max(len(line_of(run, name)) for name in BROKEN)
    assert len(run.terminal) < 1500 + (len(BROKEN) + len(GOOD)) * (longest + 40)
    (log,) = (run.folder / ".snakemake/log").glob("*.snakemake.log")
    text = log.read_text(encoding="utf-8")
    assert text.count("Error in rule") == len(BROKEN)
    assert text.count("rule qc:") == len(GOOD)


@each_broken
def test_failed_step_and_those_after_it_leave_no_output(run, name):
    kept = {"mask", "mask sidecar"} if BROKEN[name].step == "n4" else set()
    there = {role for role, path in results_of(scan_of(name)).items() if (run.folder / path).exists()}
    assert there == kept


def test_no_partial_file_is_left(run):
    assert partial_files(run.folder) == []


@each_broken
def test_report_lists_the_failed_scan_with_its_line(run, name):
    line = line_of(run, name).removeprefix("n4flow: ")
    page = " ".join(html.unescape(run.incomplete).split())
    assert page.count(f"{scan_of(name).name}</td><td>{BROKEN[name].step}</td><td>{line}") == 1


@pytest.mark.parametrize("scan", GOOD, ids=lambda scan: scan.name)
def test_report_links_the_page_of_the_good_scan(run, scan):
    assert f"{scan.name}.html" in run.incomplete


def test_report_and_terminal_count_the_failed(run):
    assert f"{len(BROKEN)} failed" in run.incomplete
    assert f"2 of {len(BROKEN) + 2} scans are done, {len(BROKEN)} failed" in run.terminal
    assert not (run.folder / "results/qc/bundle").exists(), "the index is to be made anew"


@pytest.fixture(scope="module")
def mended(run, tmp_path_factory):
    """A copy of the folder in which one broken image was replaced and the other rows taken out, run again."""
    folder = tmp_path_factory.mktemp("mended") / "copy"
    shutil.copytree(run.folder, folder, symlinks=True)
    good(folder / scan_of("zero").image)
    write_sheet(folder / "config/samples.tsv", [*GOOD, scan_of("zero")])
    return folder, snakemake(folder, "--cores", 2)


def test_mended_scan_is_done_and_the_good_ones_are_not_made_again(mended, run):
    folder, done = mended
    assert done.returncode == 0, done.stdout
    assert (folder / results_of(scan_of("zero"))["page"]).is_file()
    for scan in GOOD:
        page = results_of(scan)["corrected"]
        assert (folder / page).stat().st_mtime == (run.folder / page).stat().st_mtime


def test_complete_report_takes_the_place_of_the_incomplete_one(mended):
    folder, _ = mended
    assert scan_of("constant").name not in (folder / "results/qc/index.html").read_text(encoding="utf-8")
    assert (folder / "results/qc/bundle/index.html").is_file()


@pytest.fixture(scope="module")
def spoilt(mended, tmp_path_factory):
    """A copy of the mended folder in which a scan that was done is replaced by a broken file, run again."""
    folder = tmp_path_factory.mktemp("spoilt") / "copy"
    shutil.copytree(mended[0], folder, symlinks=True)
    all_zero(folder / GOOD[0].image)
    return folder, snakemake(folder, "--cores", 2)


def test_scan_that_was_done_and_now_fails_counts_as_failed_alone(spoilt):
    folder, done = spoilt
    assert done.returncode == 1
    assert "2 of 3 scans are done, 1 failed" in done.stdout
    page = (folder / "results/qc/index.html").read_text(encoding="utf-8")
    assert json.dumps(f"{GOOD[0].name}.html") not in page


# ---------------------------------------------------------------- the next runs, in the folder itself


def rows_of(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


ALL_BROKEN = {scan_of(name).name for name in BROKEN}


@pytest.fixture(scope="module")
def again(run):
    """The same command once more."""
    return snakemake(run.folder, "--cores", 2)


def test_next_run_leaves_out_what_would_fail_again_and_ends_well(again):
    assert again.returncode == 0, again.stdout
    (line,) = [line for line in again.stdout.splitlines() if "left out" in line]
    assert line.startswith(f"{len(BROKEN)} left out that failed before: ")
    assert "results/qc/failed.tsv" in line
    assert [line for line in again.stdout.splitlines() if line.startswith("[")] == []
    assert f"2 of {len(BROKEN) + 2} scans are done, {len(BROKEN)} failed before" in again.stdout


def test_failed_scans_are_named_with_their_logs_in_all_that_is_over_all_scans(again, run):
    qc = run.folder / "results/qc"
    rows = {row["name"]: row["flags"] for row in rows_of(qc / "metrics.tsv")}
    assert rows.keys() == ALL_BROKEN | {scan.name for scan in GOOD}
    manifest = json.loads((qc.parent / "manifest.json").read_text())
    assert manifest["Failed"].keys() == ALL_BROKEN
    assert manifest["Scans"].keys() == {scan.name for scan in GOOD}
    page = (qc / "index.html").read_text(encoding="utf-8")
    for name in BROKEN:
        scan, error = scan_of(name).name, line_of(run, name).removeprefix("n4flow: ")
        assert rows[scan] == f"{BROKEN[name].step} failed: {error}; log: data/{scan}.log"
        assert manifest["Failed"][scan] == {"Step": BROKEN[name].step, "Error": error, "Log": f"qc/data/{scan}.log"}
        assert f'<a href="data/{scan}.log">' in page
        assert (qc / "data" / f"{scan}.log").read_text().endswith(f"n4flow: {error}\n")
    assert all((qc / figure).is_file() for figure in ("distributions.png", "worst.png"))


def test_report_of_snakemake_holds_the_logs(again, run):
    done = snakemake(run.folder, "--report", "report.zip")
    assert done.returncode == 0, done.stdout
    with zipfile.ZipFile(run.folder / "report.zip") as report:
        logs = {Path(name).stem for name in report.namelist() if name.endswith(".log")}
    assert logs == ALL_BROKEN


def test_table_of_the_failed_says_what_and_stays_as_long_as_nothing_changes(again, run):
    rows = rows_of(run.folder / "results/qc/failed.tsv")
    assert [set(row) for row in rows] == [{"scan", "step", "error", "fingerprint"}] * len(BROKEN)
    assert {row["scan"]: (row["step"], row["error"]) for row in rows} == {
        scan_of(name).name: (BROKEN[name].step, line_of(run, name).removeprefix("n4flow: ")) for name in BROKEN
    }


def test_scan_that_was_mended_and_one_without_its_row_are_tried_again(again, run):
    table = run.folder / "results/qc/failed.tsv"
    mended, removed = scan_of("rgb"), scan_of("constant")
    good(run.folder / mended.image)
    rows = table.read_text().splitlines(keepends=True)
    table.write_text("".join(row for row in rows if not row.startswith(f"{removed.name}\t")))
    done = snakemake(run.folder, "--cores", 2)
    assert done.returncode == 1
    said = sorted(line.split("] ")[1].split(" ")[0] for line in done.stdout.splitlines() if line.startswith("["))
    assert said == sorted([f"{mended.name}:", f"{removed.name}:"])
    assert f"3 of {len(BROKEN) + 2} scans are done, {len(BROKEN) - 1} failed" in done.stdout
    assert {row["scan"] for row in rows_of(table)} == ALL_BROKEN - {mended.name}
