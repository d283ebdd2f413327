"""Scans in batches: what each gets is what it would get alone, and what befalls one is nothing to the others."""

import html
import json
import re
import shutil

import pytest
from study import (
    REFERENCE_ROLES,
    describe_raw,
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

GOOD = [raw_scan(name) for name in ("first", "second", "third")]
BAD = raw_scan("bad")
ADDED = raw_scan("added")
SMALL = (32, 30, 28)


def outputs_of(folder, scan):
    return {role: folder / path for role, path in results_of(scan).items() if role not in REFERENCE_ROLES}


def times(folder, scans):
    return {path: path.stat().st_mtime_ns for scan in scans for path in outputs_of(folder, scan).values()}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Four scans, a bad one among them, in batches of three."""
    folder = tmp_path_factory.mktemp("batches")
    describe_raw(folder)
    for seed, scan in enumerate(GOOD):
        save(folder / scan.image, head(SMALL, seed))
    save(folder / BAD.image, 0 * head(SMALL))
    write_sheet(folder / "config/samples.tsv", [GOOD[0], BAD, *GOOD[1:]])
    write_config(folder, {"batch": 3, "reference": {"scans": 0}})
    return folder, snakemake(folder, "--cores", 2)


def test_threads_set_for_n4_are_those_of_its_batches(tmp_path):
    save(tmp_path / GOOD[0].image, head(SMALL))
    write_sheet(tmp_path / "config/samples.tsv", GOOD[:1])
    write_config(tmp_path, {"reference": {"scans": 0}})
    planned = snakemake(tmp_path, "--cores", 2, "--set-threads", "n4=2", "-n").stdout
    blocks = re.findall(r"^rule (\w+):\n((?:    .+\n)*)", planned, re.M)
    threads = {rule: re.findall(r"threads: (\d+)", text) for rule, text in blocks}
    assert threads["fields_1"] == threads["n4"] == ["2"]
    assert threads["pages_1"] == []


def test_neighbours_of_a_bad_scan_are_done(run):
    folder, done = run
    assert [path for scan in GOOD for path in outputs_of(folder, scan).values() if not path.is_file()] == []
    assert done.stdout.count("rule fields_") == 2


def test_bad_scan_is_tried_alone_fails_with_its_line_and_leaves_nothing(run):
    folder, done = run
    assert done.returncode == 1
    assert f"{BAD.name}: failed again, alone" in (folder / "logs/batches/fields_1.log").read_text()
    line = (folder / log_of(BAD, "mask")).read_text().splitlines()[-1]
    assert line.startswith(f"n4flow: {BAD.image}: no voxel is above 0; ")
    assert [said for said in done.stdout.splitlines() if said.endswith(line)] != []
    page = " ".join(html.unescape((folder / "results/qc/index.html").read_text(encoding="utf-8")).split())
    assert f"{BAD.name}</td><td>{line.removeprefix('n4flow: ')}" in page
    assert [path for path in outputs_of(folder, BAD).values() if path.exists()] == []
    assert partial_files(folder) == []


@pytest.mark.parametrize("step", ["mask", "n4", "qc"])
def test_each_scan_has_a_log_of_its_own(run, step):
    for scan in GOOD:
        log = (run[0] / log_of(scan, step)).read_text()
        assert log.splitlines()[-1] == "done"
        assert not any(other.name in log for other in [*GOOD, BAD] if other is not scan)


@pytest.fixture(scope="module")
def mended(run, tmp_path_factory):
    """The bad image replaced, and a scan put before all others, which moves them to other batches."""
    folder = tmp_path_factory.mktemp("mended") / "copy"
    shutil.copytree(run[0], folder)
    before = times(folder, GOOD)
    save(folder / BAD.image, head(SMALL, 8))
    save(folder / ADDED.image, head(SMALL, 9))
    write_sheet(folder / "config/samples.tsv", [ADDED, GOOD[0], BAD, *GOOD[1:]])
    return folder, before, snakemake(folder, "--cores", 2)


def test_added_and_mended_scans_make_no_other_one_run_again(mended):
    folder, before, done = mended
    assert done.returncode == 0, done.stdout
    assert [p for scan in (ADDED, BAD) for p in outputs_of(folder, scan).values() if not p.is_file()] == []
    assert times(folder, GOOD) == before


def test_folders_of_the_batches_hold_receipts_alone_when_all_is_done(mended):
    found = {path.name for path in (mended[0] / "results/.batches").rglob("*") if path.is_file()}
    assert found == {"receipt.json", ".snakemake_timestamp"}


def test_size_of_the_batches_makes_nothing_run_again(mended):
    folder = mended[0]
    write_config(folder, {"batch": 2, "reference": {"scans": 0}})
    assert "Nothing to be done" in snakemake(folder, "-n").stdout


def test_touched_image_is_compared_by_its_content_up_to_the_size_that_snakemake_is_told(mended):
    (mended[0] / GOOD[0].image).touch()
    assert "Nothing to be done" in snakemake(mended[0], "-n").stdout
    assert "rule fields_" in snakemake(mended[0], "-n", "--max-checksum-file-size", 10).stdout


def test_batch_that_fails_as_a_whole_shows_in_the_report_by_its_scans(run, tmp_path):
    shutil.copytree(run[0], tmp_path / "copy", ignore=shutil.ignore_patterns("results", "logs", ".snakemake"))
    done = snakemake(tmp_path / "copy", "--cores", 2, "--set-resources", "fields_1:attempt='none'")
    assert done.returncode == 1
    page = (tmp_path / "copy/results/qc/index.html").read_text(encoding="utf-8")
    assert all(f"{scan.name}</td><td>TypeError" in page for scan in (GOOD[0], BAD, GOOD[1]))
    assert f"{GOOD[2].name}</td><td>TypeError" not in page


def test_changed_key_makes_again_in_a_batch_what_hangs_on_it_and_no_mask(mended, tmp_path):
    folder = tmp_path / "changed"
    shutil.copytree(mended[0], folder)
    scans = [ADDED, *GOOD, BAD]
    masks = {path: path.stat().st_mtime_ns for scan in scans for path in [outputs_of(folder, scan)["mask"]]}
    write_config(folder, {"batch": 3, "reference": {"scans": 0}, "n4": {"spline_distance_mm": 80}})
    done = snakemake(folder, "--cores", 2)
    assert done.returncode == 0, done.stdout
    for scan in scans:
        assert (
            json.loads(outputs_of(folder, scan)["sidecar"].read_text())["N4"]["Parameters"]["spline_distance_mm"] == 80
        )
    assert {path: path.stat().st_mtime_ns for path in masks} == masks
    assert "Nothing to be done" in snakemake(folder, "-n").stdout


def content(path):
    """A file's bytes, but for how long it took."""
    seconds = rb'(WallTimeSeconds": |wall_time_s": |WallTimeSeconds</dt><dd>)[0-9.]+'
    return re.sub(seconds, rb"\1", path.read_bytes()) if path.suffix in (".json", ".html") else path.read_bytes()


def test_outputs_are_those_of_each_scan_alone(mended, tmp_path):
    folder = tmp_path / "alone"
    shutil.copytree(mended[0], folder, ignore=shutil.ignore_patterns("results", "logs", ".snakemake"))
    scan = GOOD[1]
    write_sheet(folder / "config/samples.tsv", [scan])
    write_config(folder, {"batch": 1, "reference": {"scans": 0}})
    done = snakemake(folder, "--cores", 2, "--until", "qc")
    assert done.returncode == 0, done.stdout
    theirs = outputs_of(mended[0], scan)
    different = {role for role, path in outputs_of(folder, scan).items() if content(path) != content(theirs[role])}
    # an output that is gone is made by its own job, without a batch
    for path in outputs_of(folder, scan).values():
        path.unlink()
    done = snakemake(folder, "--cores", 2, "--until", "qc")
    assert done.returncode == 0, done.stdout
    assert "rule fields_" not in done.stdout
    different |= {role for role, path in outputs_of(folder, scan).items() if content(path) != content(theirs[role])}
    assert different == set()
