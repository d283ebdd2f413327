"""OME-Zarr images through the workflow: channels that share a field, a store without units; the first try is killed."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter

import nibabel as nib
import numpy as np
import pytest
import zarr
from study import ROOT, head, save, snakemake, write_config

from n4flow.errors import InputError
from n4flow.images.fields import load_field
from n4flow.images.ngff import read_image
from n4flow.study.bids import Scan
from n4flow.study.config import load_schema
from n4flow.study.manifest import verify
from n4flow.study.sheet import read_sheet, results_problem
from n4flow.study.stores import stores_of
from tests.pyramids import binned, sheet_volume, write_store

VALUES, LOG_BIAS = sheet_volume()
AUTO = np.rint(VALUES).astype(np.uint16)
#: A stain of few cells.
SPARSE = np.where(np.random.default_rng(0).random(AUTO.shape) < 0.02, AUTO, AUTO // 40).astype(np.uint16)
SHEET = [
    ["subject", "image", "channel", "modality", "field_from", "mask", "t"],
    ["01", "raw/two.ome.zarr", "auto", "stain-auto_SPIM", "", "", ""],
    ["01", "raw/two.ome.zarr", "cFos", "stain-cFos_SPIM", "stain-auto_SPIM", "", ""],
    ["02", "raw/one.ome.zarr", "", "", "", "raw/mask.nii.gz", ""],
    ["03", "raw/times.ome.zarr", "", "run-1_SPIM", "", "raw/label.ome.zarr", "0"],
    ["03", "raw/times.ome.zarr", "", "run-2_SPIM", "", "raw/label.ome.zarr", "1"],
]
PARTS = 5
TWO, ONE = "results/sub-01/micr/sub-01_desc-N4_SPIM", "results/sub-02/micr/sub-02_desc-N4_SPIM"
FIELDS = {
    TWO: "results/sub-01/micr/sub-01_stain-auto_res-coarse_desc-N4SPIM_biasfield.json",
    ONE: "results/sub-02/micr/sub-02_res-coarse_desc-N4SPIM_biasfield.json",
}
INPUTS = {TWO: "raw/two.ome.zarr", ONE: "raw/one.ome.zarr"}
stores = pytest.mark.parametrize("store", INPUTS, ids=["two channels, 0.5", "no units, 0.4"])


def pyramid(values):
    return [values, np.rint(binned(values)).astype(np.uint16)]


def prepare(folder):
    both = pyramid(np.stack([AUTO, SPARSE]))
    write_store(folder / "raw/two.ome.zarr", both, axes="czyx", labels=("auto", "cFos"), shards=(32, 64, 64))
    write_store(folder / "raw/one.ome.zarr", pyramid(AUTO), version="0.4", unit=None, translations=False)
    # of time points that are lit from opposite sides
    times = np.stack([AUTO, AUTO[::-1, ::-1, ::-1]])[:, ::2, ::2, ::2]
    write_store(folder / "raw/times.ome.zarr", [times], axes="tzyx", scale_um=(8, 8, 8))
    write_store(folder / "raw/label.ome.zarr", [(times > 500).astype(np.uint8)], axes="tzyx", scale_um=(8, 8, 8))
    # of the voxels of level 0, where the coarse volume has those of level 1
    affine = np.diag([0.004, 0.004, 0.004, 1])
    nib.save(nib.Nifti1Image((AUTO.T > 500).astype(np.uint8), affine), folder / "raw/mask.nii.gz")
    (folder / "config").mkdir()
    (folder / "config/samples.tsv").write_text("\n".join("\t".join(row) for row in SHEET) + "\n")
    job_gb = 2 * AUTO.nbytes / PARTS / 1e9
    changes = {"zarr": {"level_voxels": AUTO.size // 2, "job_gb": job_gb}, "reference": {"scans": 0}}
    write_config(folder, changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working directory after a run whose first try was killed while parts were divided."""
    folder = tmp_path_factory.mktemp("zarr")
    prepare(folder)
    command = [sys.executable, "-m", "snakemake", "-s", ROOT / "Snakefile", "--directory", folder, "--cores", "2"]
    with open(folder / "killed.log", "w") as log:
        process = subprocess.Popen([*command, TWO + ".json"], stdout=log, stderr=log, start_new_session=True)
        end = time.monotonic() + 300
        while not list(folder.glob("results/parts/sub-01/**/level-0_part-*.json")):
            assert process.poll() is None, (folder / "killed.log").read_text()
            assert time.monotonic() < end
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert not (folder / f"{TWO}.ome.zarr/zarr.json").exists()
    (folder / f"{TWO}.ome.zarr/0/c.abandoned.partial").write_text("")
    snakemake(folder, "--unlock")
    done = snakemake(folder, "--cores", 2, "--rerun-incomplete")
    assert done.returncode == 0, done.stdout
    return folder


def expected(folder, store):
    """What each level should be, in float64, and the level."""
    image, field = read_image(folder / INPUTS[store]), load_field(folder / FIELDS[store])
    for level in image.levels:
        values = zarr.open_array(folder / INPUTS[store] / level.path, mode="r")[...]
        shape, affine = image.grid(level)
        ratio = np.exp(field.on_grid(shape, np.array(affine)).log_tile((slice(None),) * 3)).T
        yield level, np.rint(values / ratio)


@stores
def test_every_level_is_the_input_divided_by_the_field(folder, store):
    for level, values in expected(folder, store):
        written = zarr.open_array(folder / f"{store}.ome.zarr" / level.path, mode="r")[...]
        assert (written != values).mean() < 1e-4
        assert np.abs(written - values).max() <= 1


@stores
def test_the_store_is_of_the_kind_that_went_in(folder, store):
    before, after = read_image(folder / INPUTS[store]), read_image(folder / f"{store}.ome.zarr")
    assert (after.levels, after.attributes, after.version) == (before.levels, before.attributes, before.version)
    assert not [path for path in (folder / "results").rglob("*") if path.name.endswith(".partial")]


def test_the_field_is_found(folder):
    field = load_field(folder / FIELDS[TWO])
    image = read_image(folder / INPUTS[TWO])
    shape, affine = image.grid(image.levels[0])
    found = field.on_grid(shape, np.array(affine)).log_tile((slice(None),) * 3).T
    left = (found - LOG_BIAS)[AUTO > 500]
    assert left.std() < 0.2 * LOG_BIAS[AUTO > 500].std()


def test_time_points_have_fields_of_their_own(folder):
    stem = "results/sub-03/micr/sub-03"
    before = read_image(folder / "raw/times.ome.zarr")
    values, written = (
        zarr.open_array(folder / path / "0", mode="r")[...]
        for path in ("raw/times.ome.zarr", f"{stem}_desc-N4_SPIM.ome.zarr")
    )
    shape, affine = before.grid(before.levels[0])
    masks = []
    for number in (0, 1):
        field = load_field(folder / f"{stem}_run-{number + 1}_res-coarse_desc-N4SPIM_biasfield.json")
        ratio = np.exp(field.on_grid(shape, np.array(affine)).log_tile((slice(None),) * 3)).T
        assert (written[number] != np.rint(values[number] / ratio)).mean() < 1e-4
        name = f"{stem}_run-{number + 1}_res-coarse_desc-foregroundSPIM_mask.nii.gz"
        masks.append(np.asarray(nib.load(folder / name).dataobj).T != 0)
        assert np.array_equal(masks[-1], values[number] > 500)
    inside = masks[0] & masks[1]
    one, other = (np.log(values[number][inside] / written[number][inside]) for number in (0, 1))
    assert np.corrcoef(one, other)[0, 1] < 0


@stores
def test_the_sidecar_says_what_was_seen(folder, store):
    told = json.loads((folder / f"{store}.json").read_text())
    assert told["PixelSize"] == [4, 4, 4]
    assert told["PixelSizeUnits"] == "um"
    assert (told["OriginAssumed"], told["UnitAssumed"]) == ((store == ONE),) * 2
    assert {row["Field"] for row in told["Channels"].values()} == {f"bids::{FIELDS[store][8:]}"}
    assert told["SelfCheck"] < 1e-9


def test_parts_are_those_of_the_config(folder):
    assert len(list(folder.glob("results/parts/sub-01/micr/sub-01_SPIM/level-0_part-*.json"))) >= PARTS


def test_the_page_shows_crops_of_the_finest_level(folder):
    crops = "data/sub-02_res-coarse_SPIM_crops.webp"
    for place in ("results/qc", "results/qc/bundle"):
        assert f'src="{crops}"' in (folder / place / "sub-02_res-coarse_SPIM.html").read_text()
        assert (folder / place / crops).stat().st_size > 1000


def test_a_mask_of_the_sheet_is_brought_onto_the_coarse_grid(folder):
    stem = folder / "results/sub-02/micr/sub-02_res-coarse_desc-foregroundSPIM_mask"
    mask = np.asarray(nib.load(f"{stem}.nii.gz").dataobj) != 0
    assert np.mean(mask != (binned(AUTO > 500).T >= 0.5)) < 0.1
    assert 0.1 < mask.mean() < 0.9


def test_nothing_is_left_to_do_and_the_manifest_agrees(folder):
    done = snakemake(folder, "--cores", 1, "--dry-run", "--verbose")
    assert "InputFunctionException" not in done.stdout, "n4 is asked for no store"
    assert "Nothing to be done" in done.stdout, done.stdout
    assert "no such scan" not in done.stdout
    manifest = json.loads((folder / "results/manifest.json").read_text())
    files = manifest["Scans"]["sub-01_stain-cFos_res-coarse_SPIM"]["Files"]
    assert {f"{TWO[8:]}.json", f"{TWO[8:]}.ome.zarr/zarr.json"} <= set(files)
    verdicts = verify(folder / "results", folder / "results/manifest.json")
    assert {verdict.verdict for verdict in verdicts} == {"equal"}


def test_a_part_whose_marker_is_gone_is_divided_again_alone(folder):
    store = folder / f"{TWO}.ome.zarr"
    before = {path: path.read_bytes() for path in store.rglob("*") if path.is_file()}
    times = {path: path.stat().st_mtime_ns for path in before}
    (folder / "results/parts/sub-01/micr/sub-01_SPIM/level-0_part-1.json").unlink()
    done = snakemake(folder, "--cores", 2)
    assert done.returncode == 0, done.stdout
    assert {path: path.read_bytes() for path in store.rglob("*") if path.is_file()} == before
    again = [path for path in before if path.stat().st_mtime_ns != times[path]]
    arrays = {path.relative_to(store).parts[0] for path in again}
    assert arrays == {"0", "zarr.json"}
    assert len(again) < len(before) / 2


def rules_to_run(folder, *arguments):
    done = snakemake(folder, "-n", *arguments)
    assert done.returncode == 0, done.stdout
    return Counter(re.findall(r"^(?:local)?rule (\w+):", done.stdout, re.M)), done.stdout


@pytest.mark.parametrize("level", [0, 1])
def test_changed_metadata_of_a_level_are_noticed(folder, tmp_path, level):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy, symlinks=True)
    file = copy / f"raw/two.ome.zarr/{level}/zarr.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "attributes": {"new": 1}}))
    rules, _ = rules_to_run(copy)
    assert (rules["coarse"], rules["plan"], rules["finish"], rules["crops"]) == (2, 1, 1, 2)


def test_an_image_with_a_damaged_chunk_is_set_aside_with_its_channels(tmp_path):
    write_store(tmp_path / "raw/bad.ome.zarr", pyramid(np.stack([AUTO, SPARSE])), axes="czyx", labels=("auto", "cFos"))
    save(tmp_path / "raw/02.nii.gz", head())
    chunk = tmp_path / "raw/bad.ome.zarr/0/c/1/0/1/1"
    chunk.write_bytes(chunk.read_bytes()[:20])
    write_config(tmp_path, {"zarr": {"level_voxels": AUTO.size // 2}, "reference": {"scans": 0}})
    rows = [["subject", "image", "channel", "modality", "field_from"]]
    rows += [["01", "raw/bad.ome.zarr", "auto", "stain-auto_SPIM", ""]]
    rows += [["01", "raw/bad.ome.zarr", "cFos", "stain-cFos_SPIM", "stain-auto_SPIM"]]
    rows += [["02", "raw/02.nii.gz", "", "T1w", ""]]
    (tmp_path / "config/samples.tsv").write_text("\n".join("\t".join(row) for row in rows) + "\n")
    done = snakemake(tmp_path, "--cores", 2, f"{TWO}.ome.zarr/zarr.json")
    assert done.returncode != 0
    problem = "divide failed: raw/bad.ome.zarr: cannot be read ("
    assert f"sub-01_stain-auto_res-coarse_SPIM: {problem}" in done.stdout
    assert f"sub-01_stain-cFos_res-coarse_SPIM: {problem}" in done.stdout
    assert not (tmp_path / f"{TWO}.ome.zarr/zarr.json").exists()
    rules, said = rules_to_run(tmp_path)
    assert "2 left out that failed before: sub-01_stain-auto_res-coarse_SPIM, sub-01_stain-cFos_res-coarse_SPIM" in said
    assert not rules.keys() & {"coarse", "plan", "divide", "describe", "finish"}
    assert (rules["n4"], rules["manifest"]) == (1, 1)


@pytest.mark.parametrize("file", ["zarr.json", "1/zarr.json"])
def test_an_image_with_damaged_metadata_is_set_aside_alone(tmp_path, file):
    write_store(tmp_path / "raw/bad.ome.zarr", pyramid(AUTO))
    text = (tmp_path / "raw/bad.ome.zarr" / file).read_text()
    (tmp_path / "raw/bad.ome.zarr" / file).write_text(text[:60])
    save(tmp_path / "raw/02.nii.gz", head())
    write_config(tmp_path, {"reference": {"scans": 0}})
    rows = [["subject", "image", "modality"], ["01", "raw/bad.ome.zarr", "SPIM"], ["02", "raw/02.nii.gz", "T1w"]]
    (tmp_path / "config/samples.tsv").write_text("\n".join("\t".join(row) for row in rows) + "\n")
    done = snakemake(tmp_path, "--cores", 2, "--until", "coarse", "mask")
    assert done.returncode != 0
    assert f"sub-01_res-coarse_SPIM: coarse failed: raw/bad.ome.zarr/{file}: cannot be read (" in done.stdout
    assert (tmp_path / "results/sub-02/anat/sub-02_desc-foregroundT1w_mask.nii.gz").exists()
    rules, said = rules_to_run(tmp_path)
    assert "1 left out that failed before: sub-01_res-coarse_SPIM" in said
    assert not rules.keys() & {"coarse", "plan", "divide", "describe", "finish"}
    assert (rules["n4"], rules["manifest"]) == (1, 1)
    (tmp_path / "raw/bad.ome.zarr" / file).write_text(text)
    rules, said = rules_to_run(tmp_path)
    assert (rules["coarse"], rules["finish"]) == (1, 1)


BAD = {
    "several channels, none named": (
        "01\traw/two.ome.zarr\t\tSPIM\t\t",
        "two.ome.zarr: has 2 channels; name one in the column channel: 0 auto, 1 cFos",
    ),
    "a channel without a row": (
        "01\traw/two.ome.zarr\tauto\tSPIM\t\t",
        "two.ome.zarr: has no row for its channels 1; add one each, or set zarr.other_channels to copy",
    ),
    "two rows of one channel": (
        "01\traw/two.ome.zarr\tauto\tstain-a_SPIM\t\t\n01\traw/two.ome.zarr\t0\tstain-b_SPIM\t\t",
        "two.ome.zarr: has two rows of one channel; remove one",
    ),
    "two stores of one name": (
        "01\traw/one.ome.zarr\t\tsample-1_SPIM\t\t\n01\traw/../raw/two.ome.zarr\tauto\tsample-1_stain-a_SPIM\t\t\n"
        "01\traw/two.ome.zarr\tcFos\tsample-1_stain-b_SPIM\t\t",
        "would be written to the same store as raw/one.ome.zarr; tell them apart",
    ),
    "names of an image that is none": (
        "01\traw/one.ome.zarr\t\tSPIM\t\t\n01\traw/mask.nii.gz\t\tSPIM\t\t",
        "one.ome.zarr: would be written under the names of raw/mask.nii.gz; tell them apart",
    ),
    "rows of two subjects": (
        "01\traw/two.ome.zarr\tauto\tSPIM\t\t\n02\traw/two.ome.zarr\tcFos\tSPIM\t\t",
        "two.ome.zarr: has rows of several subjects, sessions or suffixes",
    ),
    "two rows of one time point": (
        "03\traw/times.ome.zarr\t\trun-1_SPIM\t\t\t1\n03\traw/times.ome.zarr\t\trun-2_SPIM\t\t\t01",
        "times.ome.zarr: has two rows of one time point of channel 0; remove one",
    ),
    "a time point and all of them": (
        "03\traw/times.ome.zarr\t\trun-1_SPIM\t\t\t1\n03\traw/times.ome.zarr\t\trun-2_SPIM\t\t\t",
        "has rows of single time points of channel 0, and one of all of them; remove the one whose column t is empty",
    ),
    "a time point without a row": (
        "03\traw/times.ome.zarr\t\tSPIM\t\t\t1",
        "has no row for the time points 0 of channel 0; add one each, or set zarr.other_channels to copy",
    ),
    "a time point that is not there": (
        "03\traw/times.ome.zarr\t\tSPIM\t\t\t2",
        "times.ome.zarr: has 2 time points, and no '2'; give one from 0 to 1 in the column t",
    ),
    "a time point of a NIfTI image": (
        "01\traw/mask.nii.gz\t\tSPIM\t\t\t0",
        "t 0: raw/mask.nii.gz is no OME-Zarr image",
    ),
    "no store": ("01\traw/no.ome.zarr\t\tSPIM\t\t", "raw/no.ome.zarr: is not there; check the path"),
    "a channel of a NIfTI image": (
        "01\traw/mask.nii.gz\tauto\tSPIM\t\t",
        "channel auto: raw/mask.nii.gz is no OME-Zarr image",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_sheet_that_cannot_be_used_is_one_line(folder, tmp_path, name, monkeypatch):
    rows, message = BAD[name]
    monkeypatch.chdir(folder)
    sheet = tmp_path / "sheet.tsv"
    lines = [line + "\t" * (len(SHEET[0]) - 1 - line.count("\t")) for line in ["\t".join(SHEET[0]), *rows.split("\n")]]
    sheet.write_text("\n".join(lines) + "\n")
    with pytest.raises(InputError) as caught:
        stores_of(read_sheet(sheet, load_schema(ROOT / "workflow/schemas/samples.schema.yaml")), "auto", "error")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_store_that_cannot_be_used_ends_the_run_with_its_line(folder, tmp_path):
    os.symlink(folder / "raw", tmp_path / "raw")
    write_config(tmp_path)
    (tmp_path / "config/samples.tsv").write_text("subject\timage\n01\traw/two.ome.zarr\n")
    done = snakemake(tmp_path, "--cores", 1, "--dry-run")
    assert done.returncode != 0
    assert "raw/two.ome.zarr: has 2 channels; name one in the column channel: 0 auto, 1 cFos" in done.stdout
    assert "Traceback" not in done.stdout


def test_the_results_may_not_lie_where_a_store_does(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert "where results/x.ome.zarr lies" in results_problem("results", [Scan("01", "", "SPIM", "results/x.ome.zarr")])


def test_names_of_rows_and_store(folder):
    scan = Scan("01", "", "stain-auto_SPIM", "raw/two.ome.zarr", channel="auto")
    assert scan.name == "sub-01_stain-auto_res-coarse_SPIM"
    assert (folder / f"results/{scan.folder}/{scan.entities}_desc-original_SPIM.nii.gz").is_file()
