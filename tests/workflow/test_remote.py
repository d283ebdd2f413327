"""OME-Zarr images in a bucket through the workflow, with a server that is cut off while they are divided."""

import json
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import zarr
from study import ROOT, snakemake, write_config

from n4flow.errors import InputError
from n4flow.images.arrays import open_level
from n4flow.images.ngff import read_image
from n4flow.study.manifest import verify
from n4flow.study.voxels import verify_voxels
from tests.buckets import put, server
from tests.pyramids import binned, sheet_volume, write_store

__all__ = ["server"]

VALUES = np.rint(sheet_volume()[0]).astype(np.uint16)
SHARD = (16, 32, 32)
SHARD_BYTES = int(np.prod(SHARD)) * VALUES.itemsize
STORE = "results/sub-01/micr/sub-01_desc-N4_SPIM.ome.zarr"
#: Of both levels, of six shards at most.
PARTS = 7


def prepare(folder, image, write_to=""):
    (folder / "config").mkdir(parents=True)
    rows = [["subject", "image"], ["01", image]]
    (folder / "config/samples.tsv").write_text("\n".join("\t".join(row) for row in rows) + "\n")
    zarr = {"job_gb": 6 * SHARD_BYTES / 1e9, "write_to": write_to}
    write_config(folder, {"zarr": zarr, "reference": {"scans": 0}})


@pytest.fixture(scope="module")
def raw(tmp_path_factory, server):
    levels = [VALUES, np.rint(binned(VALUES)).astype(np.uint16)]
    here = write_store(tmp_path_factory.mktemp("raw") / "in.ome.zarr", levels, chunks=(16, 16, 32), shards=SHARD)
    put(here, "s3://bucket/in.ome.zarr")
    return here


@pytest.fixture(scope="module")
def of_folder(raw, tmp_path_factory):
    folder = tmp_path_factory.mktemp("of_folder")
    prepare(folder, str(raw))
    done = snakemake(folder, "--cores", 2, STORE.replace(".ome.zarr", ".json"), f"{STORE}/zarr.json")
    assert done.returncode == 0, done.stdout
    return folder


def parts_of(folder):
    return list(folder.glob("results/parts/sub-01/**/level-*.json"))


def cut_off_while_it_is_divided(folder, server):
    """A run whose server is gone once a part is done."""
    command = [sys.executable, "-m", "snakemake", "-s", ROOT / "Snakefile", "--directory", folder, "--cores", "2"]
    with open(folder / "cut.log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        end = time.monotonic() + 300
        while not parts_of(folder):
            assert process.poll() is None, (folder / "cut.log").read_text()
            assert time.monotonic() < end
            time.sleep(0.02)
        server.say("stop")
        try:
            assert process.wait(300) == 1
        finally:
            server.say("start")
    told = (folder / "cut.log").read_text()
    assert "check the network and the address of the server" in told
    assert "Traceback" not in told
    assert "Unclosed" not in told
    assert 0 < len(parts_of(folder)) < PARTS


def assert_same_voxels(one, other):
    first, second = read_image(one), read_image(other)
    assert (first.levels, first.attributes) == (second.levels, second.attributes)
    for level in first.levels:
        np.testing.assert_array_equal(open_level(first, level)[...], open_level(second, level)[...])


def test_cut_off_while_it_is_divided_it_is_completed_with_the_same_voxels(server, raw, of_folder, tmp_path):
    prepare(tmp_path, "s3://bucket/in.ome.zarr")
    cut_off_while_it_is_divided(tmp_path, server)
    assert not (tmp_path / STORE / "zarr.json").exists()
    before = {path: path.stat().st_mtime_ns for path in parts_of(tmp_path)}

    goals = [STORE.replace(".ome.zarr", ".json"), f"{STORE}/zarr.json"]
    done = snakemake(tmp_path, "--cores", 2, *goals)
    assert done.returncode == 0, done.stdout
    assert "Unclosed" not in done.stdout
    assert len(parts_of(tmp_path)) == PARTS
    assert {path: path.stat().st_mtime_ns for path in before} == before, "what was complete stays"
    assert_same_voxels(of_folder / STORE, tmp_path / STORE)
    assert "s3://bucket/in.ome.zarr" in (tmp_path / STORE.replace(".ome.zarr", ".json")).read_text()

    again = snakemake(tmp_path, "--cores", 2, "--dry-run", *goals)
    assert "Nothing to be done" in again.stdout, again.stdout
    other = shutil.copytree(raw, tmp_path / "other.ome.zarr")
    text = (other / "zarr.json").read_text()
    (other / "zarr.json").write_text(text.replace('"sample"', '"another"'))
    put(other, "s3://bucket/in.ome.zarr")
    changed = snakemake(tmp_path, "--cores", 2, "--dry-run", *goals)
    put(raw, "s3://bucket/in.ome.zarr")
    assert "coarse" in changed.stdout, changed.stdout


def test_a_store_is_written_to_a_bucket_and_is_none_before_it_is_complete(server, raw, of_folder, tmp_path):
    prepare(tmp_path, str(raw), "s3://results/study")
    there = STORE.replace("results", "s3://results/study", 1)
    cut_off_while_it_is_divided(tmp_path, server)
    with pytest.raises(InputError, match="holds neither"):
        read_image(there)

    done = snakemake(tmp_path, "--cores", 2)
    assert done.returncode == 0, done.stdout
    assert_same_voxels(of_folder / STORE, there)
    assert not (tmp_path / STORE).exists()
    sidecar = tmp_path / STORE.replace(".ome.zarr", ".json")
    assert json.loads(sidecar.read_text())["Store"] == there
    again = snakemake(tmp_path, "--cores", 2, "--dry-run")
    assert "Nothing to be done" in again.stdout, again.stdout
    results = tmp_path / "results"
    assert {verdict.verdict for verdict in verify(results, results / "manifest.json")} == {"equal"}
    assert verify_voxels(results, results / "manifest.json") == ([], [])

    image = read_image(there)
    zarr.open_array(f"{there}/0", mode="r+")[0, 0, 0] += 1
    assert "the voxels of level 0 have changed (1 units" in verify_voxels(results, results / "manifest.json")[0][0]
    write_config(tmp_path, {"zarr": {"dtype": "float32", "write_to": "s3://results/study"}})
    plan = snakemake(tmp_path, "--cores", 2, "--forcerun", "plan", "--until", "plan")
    assert plan.returncode == 0, plan.stdout
    with pytest.raises(InputError, match="holds neither"):
        read_image(there)
    written = zarr.open_array(f"{there}/0", mode="r")
    assert written.dtype == np.float32
    assert written.nchunks_initialized == 0
    assert image.levels[0].dtype == "uint16"


@pytest.mark.parametrize("why", ["credentials", "package"])
def test_what_cannot_be_read_when_the_run_is_planned_is_a_line(server, raw, tmp_path, monkeypatch, why):
    prepare(tmp_path, "s3://bucket/in.ome.zarr")
    line = {
        "credentials": "s3://bucket/in.ome.zarr/zarr.json: may not be read (NoCredentialsError",
        "package": "install envs/requirements-remote.txt",
    }[why]
    if why == "credentials":
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    else:
        # where Python looks first
        (tmp_path / "s3fs.py").write_text("raise ImportError('No module named s3fs')\n")
        monkeypatch.chdir(tmp_path)
    done = snakemake(tmp_path, "--cores", 1, "--dry-run")
    assert done.returncode == 1
    assert line in done.stdout
    assert "Traceback" not in done.stdout
    assert "Unclosed" not in done.stdout
