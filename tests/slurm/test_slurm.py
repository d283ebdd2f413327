"""The built-in dataset through a real SLURM: a node is lost, a job is cancelled, a job exceeds its memory."""

import re
import shutil
import subprocess
import sys
import threading
import time
from typing import NamedTuple

import pytest

from tests.workflow.study import ROOT, partial_files, snakemake

SUBJECTS = ("01", "02", "03", "04")

#: All steps of a subject are one job, and this is what it is called.
SCAN = "rule_scan"

#: For this subject less memory than Snakemake itself takes, at the first attempt.
STARVED = "03"
STEPS = ("mask", "n4", "reference", "qc")
MEMORY = [f"{rule}:mem_mb=60 if attempt < 2 and wildcards.entities == 'sub-{STARVED}' else 900" for rule in STEPS]

#: How jobs end that exceeded their memory: as Snakemake, or SLURM for it, says so.
WITHOUT_MEMORY = {"OUT_OF_MEMORY", "FAILED"}


class Run(NamedTuple):
    """A run with faults: how it ended, what it said, and the jobs that SLURM knows of."""

    code: int
    terminal: str
    jobs: list


def scans_of(jobs):
    """The jobs that work on a scan, in their order."""
    return sorted((job for job in jobs if job["comment"].startswith(SCAN)), key=lambda job: int(job["id"]))


def running(cluster, besides=(), seconds=900):
    """A scan's job that runs, when there is one; none of some."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for job in scans_of(cluster.jobs()):
            if job["state"] == "RUNNING" and job["id"] not in besides:
                return job
        time.sleep(0.2)
    raise TimeoutError("no job of a scan runs")


@pytest.fixture(scope="module")
def run(cluster, tmp_path_factory):
    """A working directory, and the run over the built-in dataset in it."""
    folder = tmp_path_factory.mktemp("slurm")
    shutil.copytree(ROOT / "config", folder / "config")

    def break_something():
        cancelled = running(cluster)
        cluster.ask("scancel", cancelled["id"])
        time.sleep(5)  # into its work
        cluster.power_off(running(cluster, besides=[cancelled["id"]])["node"])

    threading.Thread(target=break_something, daemon=True).start()
    command = [sys.executable, "-m", "snakemake", "-s", ROOT / "Snakefile", "--directory", folder]
    command += ["--profile", ROOT / "workflow/profiles/slurm", "--set-resources", *MEMORY]
    # once more than the profile: a scan may have a fault of its own and fall to the lost node, too
    command += ["--retries", "3"]
    command += ["--slurm-init-seconds-before-status-checks", "1", "--seconds-between-status-checks", "1"]
    done = subprocess.run(
        list(map(str, command)),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    (folder / "terminal.txt").write_text(done.stdout)
    return folder, Run(done.returncode, done.stdout, cluster.jobs())


def test_run_ends_well_in_spite_of_a_lost_node_a_cancelled_job_and_one_without_memory(run):
    assert run[1].code == 0, run[1].terminal
    ended = [job["state"] for job in scans_of(run[1].jobs)]
    assert ended.count("COMPLETED") == len(SUBJECTS)
    assert ended.count("CANCELLED") == 1
    assert 1 <= ended.count("NODE_FAIL") <= 2, "what ran on it"
    assert [state for state in ended if state in WITHOUT_MEMORY] != []


def test_every_scan_is_done_and_nothing_is_half_written(run):
    folder, _ = run
    rows = (folder / "results/qc/metrics.tsv").read_text(encoding="utf-8").splitlines()
    assert {row.split("\t")[0] for row in rows[1:]} == {f"sub-{subject}_T1w" for subject in SUBJECTS}
    assert partial_files(folder / "results") == []


def test_each_job_that_corrects_asked_for_a_gpu_of_its_own(run):
    (log,) = (run[0] / ".snakemake/log").glob("*.snakemake.log")
    asked = re.findall(r"^    rule n4:.*?resources: ([^\n]*)", log.read_text(encoding="utf-8"), re.M | re.S)
    assert asked
    assert all("gpu=1" in resources for resources in asked)


def test_results_are_those_of_a_run_without_a_cluster(run, tmp_path):
    folder, _ = run
    shutil.copytree(ROOT / "config", tmp_path / "config")
    shutil.copytree(folder / "resources", tmp_path / "resources")
    images = [f"results/sub-{s}/anat/sub-{s}_desc-N4_T1w.nii.gz" for s in SUBJECTS]
    images += [f"results/sub-{s}/anat/sub-{s}_desc-N4sitk_T1w.nii.gz" for s in SUBJECTS[:2]]
    done = snakemake(tmp_path, *images, "--cores", 2)
    assert done.returncode == 0, done.stdout
    assert [path for path in images if (folder / path).read_bytes() != (tmp_path / path).read_bytes()] == []
