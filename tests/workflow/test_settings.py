"""What the keys of the config change: the device, which files are written, and how."""

import json
import os
import re
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from study import (
    ROOT,
    describe_raw,
    head,
    load,
    log_of,
    raw_scan,
    results_of,
    save,
    snakemake,
    write_config,
    write_sheet,
)

from n4flow.images.fields import load_field

needs_no_gpu = pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="this machine has a GPU")

#: Images of integers: how they are saved. The largest values of int32 have no float32 of their own.
INTEGERS = {
    "int16": {"dtype": np.int16, "scaling": (0.25, 10)},
    "int32": {"dtype": np.int32},
    "uint8": {"dtype": np.uint8, "scaling": (8, 0)},
}
SCANS = {name: raw_scan(name, extension=".nii") for name in INTEGERS}


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """A working directory without a config: images and sheet."""
    folder = tmp_path_factory.mktemp("settings")
    describe_raw(folder)
    for name, how in INTEGERS.items():
        save(folder / SCANS[name].image, head(), **how)
    write_sheet(folder / "config" / "samples.tsv", SCANS.values())
    return folder


@pytest.fixture(scope="module")
def code(tmp_path_factory):
    """A copy of the workflow, to be changed."""
    folder = tmp_path_factory.mktemp("code")
    shutil.copy2(ROOT / "Snakefile", folder)
    shutil.copytree(ROOT / "workflow", folder / "workflow", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "envs", folder / "envs")
    return folder


@pytest.fixture(scope="module")
def lean(raw, code, tmp_path_factory):
    """A run without reference and field images, integers kept, on the CPU, with results elsewhere."""
    folder = tmp_path_factory.mktemp("lean") / "copy"
    shutil.copytree(raw, folder)
    write_config(
        folder,
        {
            "reference": {"scans": 0},
            "output": {"bias_field": False, "keep_dtype": True},
            "qc": {"viewer_mb": 0},
            "pathvars": {"results": "out/n4"},
        },
        guide=True,
    )
    done = snakemake(folder, "--cores", 2, "--resources", "gpu=0", workflow=code)
    assert done.returncode == 0, done.stdout
    return folder


def jobs_of(done):
    """The rules of a dry run, once for each job."""
    assert done.returncode == 0, done.stdout
    rules = re.findall(r"^(?:local)?rule (\w+):", done.stdout, re.M)
    return sorted(rule for rule in rules if rule != "default")


#: What is over all scans.
OVER_ALL = ["figures", "index", "manifest"]


@pytest.mark.parametrize(
    ("changed", "rules"),
    [
        ("qc: {flags: {cjv_worse: 1.5}}", ["guide", *["qc"] * 3, *OVER_ALL]),
        ("qc: {flags: {outlier_z: 4}}", OVER_ALL),
        ("n4: {fwhm: 0.2}", [*["n4", "qc"] * 3, *OVER_ALL]),
    ],
)
def test_a_changed_key_makes_again_what_it_changes_and_what_follows(lean, code, tmp_path, changed, rules):
    config = tmp_path / "changed.yaml"
    config.write_text(changed)
    assert jobs_of(snakemake(lean, "-n", "--configfile", config, workflow=code)) == sorted(rules)


@pytest.mark.parametrize(
    ("file", "rules"),
    [
        ("estimate.py", ["guide", *["mask", "n4", "qc"] * 3, *OVER_ALL]),
        ("study/manifest.py", ["manifest"]),
    ],
)
def test_a_changed_file_of_the_package_makes_again_what_uses_it_and_what_follows(lean, code, file, rules):
    path = code / "workflow/scripts/n4flow" / file
    content = path.read_bytes()
    path.write_bytes(content + b"\n")
    try:
        assert jobs_of(snakemake(lean, "-n", workflow=code)) == sorted(rules)
    finally:
        path.write_bytes(content)


@pytest.fixture
def touched(lean):
    """The run again, after a time at which one of the images was written anew with the same bytes."""
    image = lean / SCANS["int16"].image
    times = image.stat()
    os.utime(image)
    yield lean
    os.utime(image, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_a_touched_image_is_known_by_its_content(touched, code):
    assert jobs_of(snakemake(touched, "-n", workflow=code)) == []


def test_a_touched_image_that_is_too_large_to_be_compared_costs_its_own_jobs_alone(touched, code):
    limit = (touched / SCANS["int16"].image).stat().st_size - 1
    done = snakemake(touched, "-n", "--max-checksum-file-size", limit, workflow=code)
    assert jobs_of(done) == sorted(["mask", "n4", "qc", *OVER_ALL])


each_integer = pytest.mark.parametrize("name", INTEGERS)


def files(name):
    return results_of(SCANS[name], results="out/n4")


@each_integer
def test_files_that_were_not_asked_for_are_not_written(lean, name):
    there = {role for role, path in files(name).items() if (lean / path).is_file()}
    assert there == {"mask", "mask sidecar", "corrected", "sidecar", "field", "page", "metrics", "pictures"}
    assert list(lean.rglob("*sitk*")) == []
    assert not (lean / "results").exists()


@each_integer
def test_page_without_reference_shows_none(lean, name):
    page = (lean / files(name)["page"]).read_text(encoding="utf-8")
    assert "Reference field" not in page
    assert "Ours against the reference" not in page
    assert "Bias field" in page
    assert json.loads((lean / files(name)["metrics"]).read_text()).get("reference_r") is None


@each_integer
def test_integers_stay_integers_with_a_sound_slope(lean, name):
    image = nib.load(lean / files(name)["corrected"])
    assert image.get_data_dtype() == INTEGERS[name]["dtype"]
    slope, inter = image.dataobj.slope, image.dataobj.inter
    assert inter == 0
    field = load_field(lean / files(name)["field"])
    wanted = load(lean / SCANS[name].image) / np.exp(field.log_tile((slice(None),) * 3))
    got = load(lean / files(name)["corrected"])
    # rounding to the slope, and float32 on the way
    np.testing.assert_allclose(got, wanted, rtol=3e-7, atol=slope / 2 * 1.001)
    stored = np.asarray(image.dataobj.get_unscaled())
    assert stored.max() >= 0.99 * np.iinfo(stored.dtype).max  # the slope uses the range


@each_integer
def test_no_gpu_resource_means_the_cpu_with_one_line(lean, name):
    log = (lean / log_of(SCANS[name], "n4")).read_text()
    (line,) = [line for line in log.splitlines() if "computing on" in line]
    assert line.endswith("computing on CPU (asked for)")


def n4_targets(scans):
    return [results_of(scan)["corrected"] for scan in scans]


@needs_no_gpu
def test_gpu_that_is_not_there_ends_the_run_before_anything_is_removed(lean, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(lean, folder)
    there = {path: path.read_bytes() for path in (folder / "out").rglob("*") if path.is_file()}
    write_config(folder, {"reference": {"scans": 0}, "pathvars": {"results": "out/n4"}})
    done = snakemake(folder, files("int16")["corrected"], "--cores", 2, "--forcerun", "n4", "--config", "device=gpu")
    assert done.returncode == 1
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("device: gpu: ")]
    assert line.endswith("; install envs/requirements-gpu.txt on a machine with a GPU, or use auto")
    assert "Traceback" not in done.stdout
    assert "[1/" not in done.stdout
    assert {path: path.read_bytes() for path in (folder / "out").rglob("*") if path.is_file()} == there


@needs_no_gpu
def test_auto_without_a_gpu_means_the_cpu_with_one_line(raw, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(raw, folder)
    write_config(folder)
    done = snakemake(folder, *n4_targets(SCANS.values()), "--cores", 2, "--config", "device=auto")
    assert done.returncode == 0, done.stdout
    for scan in SCANS.values():
        (line,) = [n for n in (folder / log_of(scan, "n4")).read_text().splitlines() if "computing on" in n]
        assert "computing on CPU (CuPy" in line or "computing on CPU (there is no NVIDIA driver" in line
        assert (folder / results_of(scan)["field_image"]).is_file()


def fake_gpu_tool(folder: Path):
    """A folder whose ``nvidia-smi`` makes the machine look as if it had a GPU."""
    tool = folder / "tools" / "nvidia-smi"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    return tool.parent


@pytest.mark.parametrize(("device", "gpus"), [("cpu", 0), ("auto", 1)])
def test_jobs_on_the_cpu_do_not_wait_for_each_other_where_there_is_a_gpu(raw, tmp_path, device, gpus):
    folder = tmp_path / "copy"
    shutil.copytree(raw, folder)
    write_config(folder, {"device": device})
    done = snakemake(folder, *n4_targets(SCANS.values()), "-n", path_first=fake_gpu_tool(tmp_path))
    assert done.returncode == 0, done.stdout
    asked = re.findall(r"^rule n4:.*?gpu=(\d)", done.stdout, re.DOTALL | re.MULTILINE)
    assert set(map(int, asked)) == {gpus}


def test_memory_goes_by_the_voxels_whatever_their_type_and_by_the_share_of_them_that_is_used(raw, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(raw, folder)
    asked = {}
    for factor in (1, 4):
        write_config(folder, {"n4": {"shrink_factor": factor}})
        done = snakemake(folder, *n4_targets(SCANS.values()), "-n", "--forcerun", "n4")
        assert done.returncode == 0, done.stdout
        jobs = re.findall(r"^rule n4:.*?mem_mb=(\d+)", done.stdout, re.M | re.S)
        asked[factor] = sorted(map(int, jobs))
    (megavoxels,) = {np.prod(nib.load(folder / scan.image).shape) / 1e6 for scan in SCANS.values()}
    (every,), (fourth,) = set(asked[1]), set(asked[4])
    assert every - fourth == pytest.approx(250 * megavoxels * (1 - 1 / 64), abs=1)
