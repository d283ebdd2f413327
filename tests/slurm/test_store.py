"""An OME-Zarr image divided by jobs on two nodes, of which one loses its power meanwhile."""

import json
import subprocess
import sys
import threading

import numpy as np
import pytest
import zarr

from n4flow.images.ngff import read_image
from tests.pyramids import binned, sheet_volume, write_store
from tests.workflow.study import ROOT, partial_files, snakemake, write_config

STORE = "results/sub-01/micr/sub-01_desc-N4_SPIM.ome.zarr"

#: Jobs that divide level 0.
PARTS = 8


def prepare(folder):
    values = np.rint(sheet_volume((96, 160, 192))[0]).astype(np.uint16)
    levels = [values, np.rint(binned(values)).astype(np.uint16)]
    write_store(folder / "raw/one.ome.zarr", levels, shards=(32, 64, 64))
    (folder / "config").mkdir()
    (folder / "config/samples.tsv").write_text("subject\timage\n01\traw/one.ome.zarr\n")
    job_gb = values.nbytes / PARTS / 1e9
    changes = {"zarr": {"level_voxels": values.size // 4, "job_gb": job_gb}, "reference": {"scans": 0}}
    write_config(folder, changes)
    return folder


@pytest.fixture(scope="module")
def run(cluster, tmp_path_factory):
    """A working directory, and how its run ended, in which a node lost its power while it divided a part."""
    folder = prepare(tmp_path_factory.mktemp("store"))

    seen, over, lost = {}, threading.Event(), []

    def watch():
        """What became of each job (SLURM forgets them after a while), and a loss of power."""
        while not over.wait(0.2):
            for job in cluster.jobs():
                seen[job["id"]] = job
                if not lost and job["state"] == "RUNNING" and "divide" in job["comment"]:
                    lost.append(job["node"])
                    cluster.power_off(job["node"])

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    command = [sys.executable, "-m", "snakemake", "-s", ROOT / "Snakefile", "--directory", folder]
    command += ["--profile", ROOT / "workflow/profiles/slurm", "--set-threads", "divide=1"]  # a node here has two cores
    command += ["--slurm-init-seconds-before-status-checks", "1", "--seconds-between-status-checks", "1"]
    done = subprocess.run(list(map(str, command)), stdin=subprocess.DEVNULL, capture_output=True, text=True)
    over.set()
    watching.join()
    return folder, done, list(seen.values())


def test_the_loss_of_a_node_costs_the_parts_that_it_divided(run):
    folder, done, jobs = run
    assert done.returncode == 0, done.stderr
    dividing = [job["state"] for job in jobs if "divide" in job["comment"]]
    # a job whose processes are killed before SLURM misses the node has failed
    lost = dividing.count("NODE_FAIL") + dividing.count("FAILED")
    assert dividing.count("NODE_FAIL") >= 1
    assert lost <= 2, "what ran on it"
    parts = sum(1 for _ in (folder / "results/parts").rglob("level-*_part-*.json"))
    assert parts > PARTS
    assert dividing.count("COMPLETED") == parts
    assert len(dividing) == parts + lost
    assert partial_files(folder / "results") == []


def test_the_voxels_are_those_of_a_run_on_one_machine(run, tmp_path):
    folder = prepare(tmp_path)
    done = snakemake(folder, "--cores", 2)
    assert done.returncode == 0, done.stdout
    for level in read_image(folder / STORE).levels:
        here, there = (zarr.open_array(place / STORE / level.path, mode="r")[...] for place in (folder, run[0]))
        assert np.array_equal(here, there)
    sidecars = [json.loads((place / STORE.replace(".ome.zarr", ".json")).read_text()) for place in (folder, run[0])]
    assert sidecars[0]["Levels"] == sidecars[1]["Levels"]
