"""A disk that is full or read-only, and two runs on one folder: one clear line, and nothing is lost that was done."""

import os
import signal
import subprocess
import sys
import time

import pytest
from study import (
    ROOT,
    describe_raw,
    head,
    partial_files,
    raw_scan,
    results_of,
    save,
    snakemake,
    write_config,
    write_sheet,
)

DONE, NEXT = SCANS = [raw_scan("done"), raw_scan("next")]


def mount(*options):
    subprocess.run(["mount", *map(str, options)], check=True, capture_output=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working directory with two scans whose results lie on a disk of their own, the first of them corrected."""
    folder = tmp_path_factory.mktemp("disk")
    describe_raw(folder)
    for seed, scan in enumerate(SCANS):
        save(folder / scan.image, head((24, 26, 22), seed))
    write_sheet(folder / "config" / "samples.tsv", SCANS)
    write_config(folder, {"n4": {"shrink_factor": 1}})
    results = folder / "results"
    results.mkdir(exist_ok=True)
    try:
        mount("-t", "tmpfs", "-o", "size=2m", "tmpfs", results)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("a small disk cannot be mounted here: it needs root")
    done = snakemake(folder, results_of(DONE)["corrected"], "--cores", 1)
    assert done.returncode == 0, done.stdout
    yield folder
    subprocess.run(["umount", results], check=True)


@pytest.fixture
def contents(folder):
    """What is there of the first scan."""
    made = {path: path.read_bytes() for path in (folder / "results" / DONE.folder).iterdir()}
    assert len(made) == 6
    return made


def test_full_disk_ends_a_job_with_one_line_and_what_was_done_stays(folder, contents):
    results = folder / "results"
    disk = os.statvfs(results)
    used = (disk.f_blocks - disk.f_bfree) * disk.f_frsize
    mount("-o", f"remount,size={used + 40_000}", results)
    done = snakemake(folder, results_of(NEXT)["corrected"], "--cores", 1)
    assert done.returncode == 1
    (line,) = [line for line in done.stdout.splitlines() if NEXT.name in line and "failed" in line]
    assert line.startswith(f"[1/1] {NEXT.name}: n4 failed: results/{NEXT.folder}/")
    assert line.endswith(
        ": cannot be written (No space left on device); make room there, then run the same command again"
    )
    assert "Traceback" not in done.stdout
    assert partial_files(folder) == []
    assert {path: path.read_bytes() for path in contents} == contents
    assert not (folder / results_of(NEXT)["corrected"]).exists()

    mount("-o", "remount,size=2m", results)
    assert not (folder / "results/qc/failed.tsv").exists(), "that the disk was full is no fault of the scan"
    done = snakemake(folder, results_of(NEXT)["corrected"], "--cores", 1)
    assert done.returncode == 0, done.stdout


def test_read_only_folder_ends_the_run_before_its_first_job(folder, contents):
    results = folder / "results"
    mount("-o", "remount,ro", results)
    try:
        new = snakemake(folder, results_of(DONE)["page"], "--cores", 1)
        again = snakemake(folder, results_of(DONE)["corrected"], "--cores", 1, "--forcerun", "n4")
    finally:
        mount("-o", "remount,rw", results)
    assert new.returncode == again.returncode == 1
    assert f"{results}: cannot be written (Read-only file system); give a folder that can be written to" in new.stdout
    assert "Write-protected output files for rule n4" in again.stdout  # Snakemake's own
    assert "Traceback" not in new.stdout + again.stdout
    assert "[1/" not in new.stdout + again.stdout
    assert {path: path.read_bytes() for path in contents} == contents


def test_folder_of_one_scan_that_cannot_be_written_ends_the_run_before_its_first_job(folder):
    place = folder / "results" / NEXT.folder
    mount("-t", "tmpfs", "-o", "ro,size=4k", "tmpfs", place)
    try:
        done = snakemake(folder, results_of(NEXT)["page"], "--cores", 1)
        other = snakemake(folder, results_of(DONE)["page"], "--cores", 1)
    finally:
        subprocess.run(["umount", place], check=True)
    assert other.returncode == 0, other.stdout  # nothing is to be written there
    assert done.returncode == 1
    said = f"{place}: cannot be written (Read-only file system); give a folder that can be written to: "
    assert f"{said}{place} is to be there" in done.stdout
    assert "Traceback" not in done.stdout
    assert "[1/" not in done.stdout


def test_second_run_on_a_folder_is_told_of_the_first(folder):
    command = [sys.executable, "-m", "snakemake", "-s", ROOT / "Snakefile", "--directory", folder, "--cores", "1"]
    targets = [results_of(scan)["page"] for scan in SCANS]
    command += [*targets, "--forcerun", "qc"]
    with open(folder / "first.txt", "w") as said:
        first = subprocess.Popen([*map(str, command)], stdin=subprocess.DEVNULL, stdout=said, stderr=said)
    # the lock of inputs comes first, and keeps nobody from anything
    while not any(lock.stat().st_size for lock in (folder / ".snakemake/locks").glob("*.output.lock")):
        assert first.poll() is None
        time.sleep(0.01)
    first.send_signal(signal.SIGSTOP)  # it holds its lock for as long as the second takes to come
    try:
        # without the option it may first complain of what the other one is just writing
        second = snakemake(folder, *targets, "--cores", 1, "--rerun-incomplete")
    finally:
        first.send_signal(signal.SIGCONT)
    assert first.wait() == 0, (folder / "first.txt").read_text()
    assert second.returncode == 1
    assert f"{folder}: another run is at work there on the same files; wait for it. If none is alive, " in second.stdout
    assert "remove its lock: snakemake --unlock\n" in second.stdout
    assert "Exception" not in second.stdout
