"""OME-Zarr images in a bucket through the workflow, with a server that is cut off while they are divided."""

import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from study import ROOT, snakemake, write_config

from n4flow.images.arrays import open_level
from n4flow.images.ngff import read_image
from tests.buckets import put, server
from tests.pyramids import binned, sheet_volume, write_store

__all__ = ["server"]

pytestmark = pytest.mark.slow

VALUES = np.rint(sheet_volume()[0]).astype(np.uint16)
STORE = "results/sub-01/micr/sub-01_desc-N4_SPIM.ome.zarr"
PARTS = 24


def prepare(folder, image):
    (folder / "config").mkdir(parents=True)
    rows = [["subject", "image"], ["01", image]]
    (folder / "config/samples.tsv").write_text("\n".join("\t".join(row) for row in rows) + "\n")
    write_config(folder, {"zarr": {"job_gb": VALUES.nbytes / PARTS / 1e9}, "reference": {"scans": 0}})


@pytest.fixture(scope="module")
def raw(tmp_path_factory, server):
    levels = [VALUES, np.rint(binned(VALUES)).astype(np.uint16)]
    here = write_store(tmp_path_factory.mktemp("raw") / "in.ome.zarr", levels, chunks=(16, 16, 32), shards=(16, 32, 32))
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


def test_cut_off_while_it_is_divided_it_is_completed_with_the_same_voxels(server, raw, of_folder, tmp_path):
    prepare(tmp_path, "s3://bucket/in.ome.zarr")
    command = [sys.executable, "-m", "snakemake", "-s", ROOT / "Snakefile", "--directory", tmp_path, "--cores", "2"]
    with open(tmp_path / "cut.log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        end = time.monotonic() + 300
        while not parts_of(tmp_path):
            assert process.poll() is None, (tmp_path / "cut.log").read_text()
            assert time.monotonic() < end
            time.sleep(0.02)
        server.say("stop")
        try:
            assert process.wait(300) == 1
        finally:
            server.say("start")
    told = (tmp_path / "cut.log").read_text()
    assert "check the network and the address of the server" in told
    assert "Traceback" not in told
    assert "Unclosed" not in told
    assert 0 < len(parts_of(tmp_path)) < PARTS
    assert not (tmp_path / STORE / "zarr.json").exists()
    before = {path: path.stat().st_mtime_ns for path in parts_of(tmp_path)}

    done = snakemake(tmp_path, "--cores", 2)
    assert done.returncode == 0, done.stdout
    assert "Unclosed" not in done.stdout
    assert {path: path.stat().st_mtime_ns for path in before} == before, "what was complete stays"
    first, second = (read_image(folder / STORE) for folder in (of_folder, tmp_path))
    for level in first.levels:
        np.testing.assert_array_equal(open_level(first, level)[...], open_level(second, level)[...])
    assert "s3://bucket/in.ome.zarr" in (tmp_path / STORE.replace(".ome.zarr", ".json")).read_text()

    again = snakemake(tmp_path, "--cores", 2, "--dry-run")
    assert "Nothing to be done" in again.stdout, again.stdout
    other = shutil.copytree(raw, tmp_path / "other.ome.zarr")
    text = (other / "zarr.json").read_text()
    (other / "zarr.json").write_text(text.replace('"sample"', '"another"'))
    put(other, "s3://bucket/in.ome.zarr")
    changed = snakemake(tmp_path, "--cores", 2, "--dry-run")
    put(raw, "s3://bucket/in.ome.zarr")
    assert "coarse" in changed.stdout, changed.stdout


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
        (tmp_path / "hidden").mkdir()
        (tmp_path / "hidden/s3fs.py").write_text("raise ImportError('No module named s3fs')\n")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path / "hidden"))
    done = snakemake(tmp_path, "--cores", 1, "--dry-run")
    assert done.returncode == 1
    assert line in done.stdout
    assert "Traceback" not in done.stdout
    assert "Unclosed" not in done.stdout
