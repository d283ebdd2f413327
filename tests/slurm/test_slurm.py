"""The built-in dataset through a real SLURM: a node is lost, a job is cancelled, a job exceeds its memory."""

import importlib.util
import re
import shutil
import subprocess
import sys
import threading
import time
from typing import NamedTuple

import pytest
from cluster import Cluster, wait_for, what_is_missing

from tests.workflow.study import ROOT, partial_files, snakemake

SUBJECTS = ("01", "02", "03", "04")

#: Subjects whose jobs meet a fault.
POWER_LOST, CANCELLED, MEMORY_EXCEEDED = "01", "02", "03"

#: Batches of two subjects that meet a fault.
BATCH_CANCELLED, BATCH_MEMORY_EXCEEDED = "fields_1", "fields_2"

#: How jobs end that exceeded their memory: as Snakemake, or SLURM for it, says so.
WITHOUT_MEMORY = {"OUT_OF_MEMORY", "FAILED"}

#: For these less memory than Snakemake itself takes. A reference has it until its third attempt, since one may fall to
#: the lost node; a batch is past its first before the node is lost.
MEMORY = [
    f"reference:mem_mb=60 if attempt < 3 and wildcards.entities == 'sub-{MEMORY_EXCEEDED}' else 900",
    f"{BATCH_MEMORY_EXCEEDED}:mem_mb=60 if attempt < 2 else 900",
]


@pytest.fixture(scope="module")
def cluster():
    if not importlib.util.find_spec("snakemake_executor_plugin_slurm"):
        pytest.skip("no snakemake-executor-plugin-slurm: install envs/requirements-slurm.txt")
    if problem := what_is_missing():
        pytest.skip(problem)
    cluster = Cluster()
    try:
        cluster.__enter__()
    except TimeoutError as error:
        pytest.skip(f"SLURM does not start here: {error}")
    yield cluster
    cluster.__exit__()


class Run(NamedTuple):
    """A run with faults: how it ended, what it said, and the jobs that SLURM knows of."""

    code: int
    terminal: str
    jobs: list


def jobs_of(jobs, rule, subject=None):
    """Those of a rule, on a subject if one is given, in their order."""
    wanted = re.compile(rf"rule_{rule}" + (rf"_wildcards_sub-{subject}" if subject else r"\b"))
    return sorted((job for job in jobs if wanted.match(job["comment"])), key=lambda job: int(job["id"]))


def first_running(cluster, rule, subject=None, seconds=900):
    """The first job of a rule (on a subject), once it runs."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for job in jobs_of(cluster.jobs(), rule, subject):
            if job["state"] == "RUNNING":
                return job
        time.sleep(0.5)
    raise TimeoutError(f"no job of {rule} runs")


@pytest.fixture(scope="module")
def run(cluster, tmp_path_factory):
    """A working directory, and the run over the built-in dataset in it."""
    folder = tmp_path_factory.mktemp("slurm")
    shutil.copytree(ROOT / "config", folder / "config")

    def cancel():
        cluster.ask("scancel", first_running(cluster, "reference", CANCELLED)["id"])

    def cancel_batch():
        cluster.ask("scancel", first_running(cluster, BATCH_CANCELLED)["id"])

    def lose_power():
        job = first_running(cluster, "reference", POWER_LOST)
        # as a rule it is long past it: this reference waits for a batch that was cancelled
        wait_for(lambda: len(jobs_of(cluster.jobs(), BATCH_MEMORY_EXCEEDED)) > 1, 60, "the batch has memory enough")
        cluster.power_off(job["node"])

    for break_something in (cancel, cancel_batch, lose_power):  # each at once: a job takes seconds
        threading.Thread(target=break_something, daemon=True).start()
    command = [sys.executable, "-m", "snakemake", "-s", ROOT / "Snakefile", "--directory", folder]
    command += ["--profile", ROOT / "workflow/profiles/slurm", "--set-resources", *MEMORY]
    # once more than the profile: a reference may fall to the lost node besides its own faults
    command += ["--retries", "3"]
    command += ["--config", "batch=2"]
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


def states(run, rule, subject=None):
    """How the jobs of a rule (on a subject) ended, in their order."""
    return [job["state"] for job in jobs_of(run[1].jobs, rule, subject)]


def states_but_lost(run, rule, subject=None):
    """As `states`, but that at most one attempt may have been on the node that was lost, whichever that was."""
    ended = states(run, rule, subject)
    assert ended.count("NODE_FAIL") <= 1
    return [state for state in ended if state != "NODE_FAIL"]


def test_run_ends_well_in_spite_of_five_faults(run):
    assert run[1].code == 0, run[1].terminal


def test_job_of_a_lost_node_is_done_on_the_other(run):
    assert states(run, "reference", POWER_LOST) == ["NODE_FAIL", "COMPLETED"]


def test_cancelled_job_is_done_again(run):
    assert states(run, "reference", CANCELLED)[0] in {"CANCELLED", "NODE_FAIL"}
    assert states(run, "reference", CANCELLED)[-1] == "COMPLETED"


def test_job_that_exceeded_its_memory_is_done_with_more(run):
    *before, last = states_but_lost(run, "reference", MEMORY_EXCEEDED)
    assert len(before) in {1, 2}
    assert set(before) <= WITHOUT_MEMORY
    assert last == "COMPLETED"


def test_batches_are_done_again(run):
    assert states_but_lost(run, BATCH_CANCELLED) == ["CANCELLED", "COMPLETED"]
    first, last = states_but_lost(run, BATCH_MEMORY_EXCEEDED)
    assert first in WITHOUT_MEMORY
    assert last == "COMPLETED"


def test_every_scan_is_done_and_nothing_is_half_written(run):
    folder, _ = run
    rows = (folder / "results/qc/metrics.tsv").read_text(encoding="utf-8").splitlines()
    assert {row.split("\t")[0] for row in rows[1:]} == {f"sub-{subject}_T1w" for subject in SUBJECTS}
    assert partial_files(folder / "results") == []


def test_each_job_that_corrects_asked_for_a_gpu_of_its_own(run):
    asked = re.findall(r"^rule fields_\d+:.*?resources: ([^\n]*)", run[1].terminal, re.M | re.S)
    assert asked
    assert all("gpu=1" in resources for resources in asked)


def test_results_are_those_of_a_run_without_a_cluster(run, tmp_path):
    folder, _ = run
    shutil.copytree(ROOT / "config", tmp_path / "config")
    shutil.copytree(folder / "resources", tmp_path / "resources")
    images = [f"results/sub-{s}/anat/sub-{s}_desc-N4_T1w.nii.gz" for s in SUBJECTS]
    images += [f"results/sub-{s}/anat/sub-{s}_desc-N4sitk_T1w.nii.gz" for s in (POWER_LOST, CANCELLED)]
    done = snakemake(tmp_path, *images, "--cores", 2)
    assert done.returncode == 0, done.stdout
    assert [path for path in images if (folder / path).read_bytes() != (tmp_path / path).read_bytes()] == []
