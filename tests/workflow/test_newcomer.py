"""A newcomer's run on a BIDS folder of odd scans: each comes out right or is a clear line, and one report tells."""

import csv
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
import pytest
from study import (
    AFFINE,
    ROOT,
    SHAPE,
    describe_raw,
    edit_header,
    head,
    log_of,
    raw_scan,
    results_of,
    save,
    snakemake,
    write_config,
    write_sheet,
)

from n4flow.images.nifti import Volume
from n4flow.study.bids import Scan

SUFFIXES = ["T1w", "UNIT1", "bold", "dwi", "sbref", "asl", "MPM", "MTS"]
B_VALUES = "0 1000 10 2000"
VECTORS = "0 1 0 0\n0 0 0 1\n1 0 1 0\n"
CONTEXT = "volume_type\ncontrol\nlabel\n"
#: Of frames of a high b value another field, and dark fluid.
OTHER = np.where(head() > 600, 0.2, 0.5) * head()[::-1]


def uniform():
    """MP2RAGE's, of two inversions, in whose ratio air is noise from end to end."""
    rng = np.random.default_rng(3)
    inside = np.where(head() > 150, head(), 0)
    first, second = (inside / 1000 - 0.55) * (inside > 0), 0.8 * (inside > 0)
    first, second = (part + 0.03 * rng.standard_normal(SHAPE) for part in (first, second))
    return np.rint(4095 * (first * second / (first**2 + second**2) + 0.5))


def phase():
    x, y, z = (np.linspace(-np.pi, np.pi, n) for n in SHAPE)
    turning = 2 * x[:, None, None] + 0.3 * y[:, None] ** 2 - z + 0.1 * np.random.default_rng(0).standard_normal(SHAPE)
    return np.where(head() > 150, np.rint((np.angle(np.exp(1j * turning)) / np.pi + 1) / 2 * 4095), 0)


def with_lost_frame():
    frames = np.stack([head(seed=n) for n in range(4)], -1)
    frames[..., 2] = np.nan
    return frames


def write_pixdim(path):
    save(path, head(), qform=0)
    edit_header(path, pixdim=[1, 1, 1, 1, 0, 0, 0, 0])


def write_other(kind):
    return lambda path: nib.save(kind(head().astype(np.float32), AFFINE), path)


def write_five_dimensions(path):
    image = nib.Nifti1Image(head().astype(np.float32)[..., None, None], AFFINE)
    image.header.set_intent("z score")
    nib.save(image, path)


def write(values, **how):
    return lambda path: save(path, values, **how)


class Odd(NamedTuple):
    """An odd scan: its row, and what writes its image."""

    scan: object
    write: object
    words: str = ""  # of the line that says what is wrong with it


MPM = "flip-1_mt-off_part-mag_MPM"
ODD = {
    "pixdim": Odd(raw_scan("01", extension=".nii"), write_pixdim),
    "mgz": Odd(raw_scan("02", extension=".mgz"), write_other(nib.MGHImage)),
    "analyze": Odd(raw_scan("03", extension=".img"), write_other(nib.AnalyzeImage)),
    "uniform": Odd(raw_scan("04", "UNIT1"), write(uniform(), dtype=np.uint16)),
    "lost frame": Odd(raw_scan("05", "task-rest_bold"), write(with_lost_frame(), frame_time=2)),
    "dwi": Odd(raw_scan("06", "dir-AP_dwi"), write(np.stack([head(), OTHER, head(), OTHER], -1), frame_time=3)),
    "sbref": Odd(raw_scan("06", "dir-AP_sbref"), write(head())),
    "asl": Odd(raw_scan("07", "asl"), write(np.stack([head(), 0.98 * head()], -1), frame_time=4)),
    "echo 1": Odd(raw_scan("08", f"echo-1_{MPM}"), write(head())),
    "echo 2": Odd(raw_scan("08", f"echo-2_{MPM}"), write(0.6 * head())),
    "five axes": Odd(raw_scan("09", extension=".nii"), write_five_dimensions),
    "phase": Odd(raw_scan("10"), write(phase(), dtype=np.int16), "wraps around, as a phase does"),
    "unsigned": Odd(
        raw_scan("11"),
        lambda path: save(path, (50 * head()).clip(0, 65535).astype(np.uint16).view(np.int16), dtype=np.int16),
        "has intensities as far below 0 as its foreground lies above it",
    ),
}
SCANS = {name: odd.scan for name, odd in ODD.items()}
SCANS["sbref"] = replace(
    SCANS["sbref"], image=SCANS["sbref"].image.replace("/func/", "/dwi/")
)  # where those of diffusion lie
GOOD = [name for name, odd in ODD.items() if not odd.words]
BAD = [name for name, odd in ODD.items() if odd.words]

#: What the maker of the sheet leaves out, and how its line ends.
LEFT_OUT = {
    "sub-12/anat/sub-12_T1w.nrrd": "is no NIfTI image; convert it: python -c",
    "sub-13/anat/sub-13_T1w": "is no NIfTI image; convert it: dcm2niix",
    "sub-09/anat/sub-09_part-phase_T1w.nii.gz": "a part of a complex image; only its magnitude can be corrected",
    "sub-09/ses-a/anat/sub-09_ses-b_T1w.nii.gz": "its name is of ses-b, and it lies in ses-a",
}


class Run(NamedTuple):
    """A working directory after a run."""

    folder: Path
    said_of_the_folder: str
    sheet: list
    terminal: str

    def sidecar(self, name):
        return json.loads((self.folder / results_of(SCANS[name])["sidecar"]).read_text())

    def metrics(self, name):
        return json.loads((self.folder / results_of(SCANS[name])["metrics"]).read_text())

    def page(self, name):
        return " ".join((self.folder / results_of(SCANS[name])["page"]).read_text(encoding="utf-8").split())

    def image(self, name, role):
        return nib.load(self.folder / results_of(SCANS[name])[role])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("newcomer")
    describe_raw(folder)
    raw = folder / "raw"
    for name, odd in ODD.items():
        path = folder / SCANS[name].image
        path.parent.mkdir(parents=True, exist_ok=True)
        odd.write(path)
    save(raw / "sub-04/anat/sub-04_inv-2_MP2RAGE.nii.gz", head())
    (raw / "sub-04/anat/sub-04_UNIT1.json").write_text('{"ImageType": ["DERIVED", "PRIMARY", "M", "UNI"]}')
    timing = {"VolumeTiming": [0, 2, 5, 7], "FrameAcquisitionDuration": 2}
    (raw / "task-rest_bold.json").write_text(json.dumps({"TaskName": "rest", **timing}))
    (raw / "dwi.bval").write_text(B_VALUES)
    (raw / "sub-06/dwi/sub-06_dir-AP_dwi.bvec").write_text(VECTORS)
    (raw / "sub-07/perf/sub-07_aslcontext.tsv").write_text(CONTEXT)
    for name in LEFT_OUT:
        (raw / name).parent.mkdir(parents=True, exist_ok=True)
        if Path(name).suffix:
            (raw / name).touch()
        else:
            (raw / name).mkdir()
            (raw / name / "1.dcm").touch()
    (folder / "config").mkdir()
    made = subprocess.run(
        [sys.executable, ROOT / "workflow/scripts/bids_sheet.py", "raw", "--suffix", *SUFFIXES, "--output", "made.tsv"],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert made.returncode == 0, made.stderr
    with open(folder / "made.tsv", newline="") as file:
        scans = {scan.name: scan for scan in (Scan(**row) for row in csv.DictReader(file, delimiter="\t"))}
    # what one edits in the sheet: echoes are to share a field, and one scan has weights
    weights = np.broadcast_to(np.linspace(0.1, 1, SHAPE[0], dtype=np.float32)[:, None, None], SHAPE)
    nib.save(nib.MGHImage(weights, AFFINE), folder / "weights.mgz")
    edited = {name: SCANS[name].name for name in ("echo 2", "mgz")}
    scans[edited["echo 2"]] = replace(scans[edited["echo 2"]], field_from=SCANS["echo 1"].modality)
    scans[edited["mgz"]] = replace(scans[edited["mgz"]], weights="weights.mgz")
    write_sheet(folder / "config/samples.tsv", scans.values())
    write_config(folder, {"reference": {"scans": 0}})
    done = snakemake(folder, "--cores", 2)
    return Run(folder, made.stderr, list(scans.values()), done.stdout)


def test_every_scan_is_in_the_sheet_or_has_a_line(run):
    assert {scan.name: scan.image for scan in run.sheet} == {scan.name: scan.image for scan in SCANS.values()}
    lines = run.said_of_the_folder.splitlines()
    for name, words in LEFT_OUT.items():
        (line,) = [line for line in lines if line.startswith(f"n4flow: raw/{name}: ")]
        assert words in line
    others = [line for line in lines if not any(f"raw/{name}" in line for name in LEFT_OUT)]
    echoes, last = others[-2:]
    assert all("subjects have no" in line for line in others[:-2])
    assert "Each echo gets a field of its own" in echoes
    assert "field_from" in echoes
    where = f"--snakefile {ROOT}/Snakefile --cores 8 --config samples=made.tsv --configfile {ROOT}/config/config.yaml"
    assert last == f"{len(SCANS)} scans; next: snakemake {where}"


@pytest.mark.parametrize("name", GOOD)
def test_the_scan_is_corrected_as_it_is(run, name):
    scan = SCANS[name]
    roles = set(results_of(scan)) - {role for role in results_of(scan) if "reference" in role}
    assert [role for role in roles if not (run.folder / results_of(scan)[role]).is_file()] == []
    original = [values for *_, values in Volume(run.folder / scan.image).slabs(1)]
    corrected = [values for *_, values in Volume(run.folder / results_of(scan)["corrected"]).slabs(1)]
    field = np.asarray(run.image(name, "field_image").dataobj)
    assert np.ptp(np.log(field)) > 0.2
    for number, (before, after) in enumerate(zip(original, corrected, strict=True)):
        np.testing.assert_allclose(after * field[:, :, [number % SHAPE[2]]], before, rtol=1e-6)


@pytest.mark.parametrize("name", [name for name in GOOD if name not in ("uniform", "mgz")])
def test_shading_of_the_head_is_gone(run, name):
    """All are of one head and field; weights find it elsewhere, and a uniform image has none."""
    field = np.asarray(run.image(name, "field_image").dataobj)
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in SHAPE), indexing="ij")
    left = (np.log(field) - (0.3 * x - 0.2 * y + 0.15 * z - 0.2 * x * y))[x**2 + y**2 + z**2 < 0.6]
    assert left.std() < 0.05


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_corrected_is_one_line_everywhere(run, name):
    scan = SCANS[name]
    line = (run.folder / log_of(scan, "mask")).read_text().rstrip("\n").rpartition("\n")[2]
    assert line.startswith(f"n4flow: {scan.image}: {ODD[name].words}")
    assert "; give" in line
    assert f"{scan.name}: mask failed: {line.removeprefix('n4flow: ')}\n" in run.terminal
    index = (run.folder / "results/qc/index.html").read_text(encoding="utf-8")
    assert f"{scan.name}</td>" in index
    assert not (run.folder / results_of(scan)["corrected"]).exists()


def test_one_report_has_them_all(run):
    index = (run.folder / "results/qc/index.html").read_text(encoding="utf-8")
    assert [name for name in GOOD if f'"{SCANS[name].name}.html"' not in index] == []
    assert f"{len(GOOD)} of {len(SCANS)} scans are done, {len(BAD)} failed" in run.terminal
    assert "Traceback" not in run.terminal


def test_lengths_are_those_of_the_space(run):
    """4 mm, whatever pixdim says."""
    volumes = [run.metrics(name)["mask_volume_ml"] for name in ("pixdim", "mgz", "five axes", "sbref")]
    np.testing.assert_allclose(volumes, volumes[0], rtol=0.01)
    assert volumes[0] == pytest.approx((head() > 450).sum() * 0.064, rel=0.05)


def test_other_formats_come_out_as_nifti_with_their_space(run):
    for name in ("mgz", "analyze"):
        image = run.image(name, "corrected")
        assert type(image) is nib.Nifti1Image
        assert (image.header["sform_code"] > 0) == (name == "mgz")
    np.testing.assert_allclose(run.image("mgz", "corrected").affine, AFFINE)
    assert set(run.sidecar("analyze")["Provenance"]["InputSHA256"]) == {"image", "image header", "mask"}


def test_the_uniform_image_has_the_mask_of_its_second_inversion(run):
    (scan,) = [scan for scan in run.sheet if scan.name == SCANS["uniform"].name]
    assert scan.mask_image == "raw/sub-04/anat/sub-04_inv-2_MP2RAGE.nii.gz"
    mask = np.asarray(run.image("uniform", "mask").dataobj) > 0
    inside = head() > 300
    assert 2 * (mask & inside).sum() / (mask.sum() + inside.sum()) > 0.95


def test_weights_count_and_the_page_names_them(run):
    sidecar = run.sidecar("mgz")
    assert sidecar["N4"]["Weights"] == "weights.mgz"
    assert "weights" in sidecar["Provenance"]["InputSHA256"]
    assert "<dt>weights</dt><dd>weights.mgz</dd>" in run.page("mgz")
    assert "<dt>weights</dt>" not in run.page("pixdim")
    fields = [np.asarray(run.image(name, "field_image").dataobj) for name in ("mgz", "pixdim")]
    assert np.ptp(np.log(fields[0] / fields[1])) > 0.002


def test_a_lost_frame_is_named_and_the_timing_is_not_invented(run):
    assert "frames hold values that are not finite" in (run.folder / log_of(SCANS["lost frame"], "n4")).read_text()
    sidecar = run.sidecar("lost frame")
    assert "RepetitionTime" not in sidecar
    assert sidecar["VolumeTiming"] == [0, 2, 5, 7]


def test_the_field_of_diffusion_is_that_of_the_low_b_values(run):
    assert run.sidecar("dwi")["N4"]["AveragedFrames"] == [1, 3]
    assert "bval" in run.sidecar("dwi")["Provenance"]["InputSHA256"]
    assert "Mean of the 2 of 4 frames up to b = 50 s/mm²." in run.page("dwi")
    fields = [run.image(name, "field_image").get_fdata() for name in ("dwi", "sbref")]
    np.testing.assert_allclose(*fields, rtol=1e-4)


def test_what_tells_the_frames_goes_along(run):
    dwi, asl = (f"results/{SCANS[name].folder}/{SCANS[name].entities}_" for name in ("dwi", "asl"))
    expected = {f"{dwi}dwi.bval": B_VALUES, f"{dwi}dwi.bvec": VECTORS, f"{asl}aslcontext.tsv": CONTEXT}
    assert {name: (run.folder / name).read_text() for name in expected} == expected
    assert SCANS["sbref"].folder == "sub-06/dwi"


def test_echoes_keep_their_ratio(run):
    one, two = (np.asarray(run.image(name, "corrected").dataobj) for name in ("echo 1", "echo 2"))
    np.testing.assert_allclose(two[head() > 100] / one[head() > 100], 0.6, rtol=1e-6)
    assert run.metrics("echo 2")["field_from"] == SCANS["echo 1"].name


def test_a_volume_of_five_axes_is_one_and_its_field_inherits_nothing(run):
    assert run.image("five axes", "corrected").shape == run.image("five axes", "field_image").shape == SHAPE
    assert run.image("five axes", "field_image").header["intent_code"] == 0


def test_results_are_valid_bids(run):
    validator = Path(sys.executable).with_name("bids-validator-deno")
    done = subprocess.run(
        [validator, run.folder / "results", "--ignoreWarnings", "--format", "json"], capture_output=True, text=True
    )
    issues = json.loads(done.stdout)["issues"]["issues"]
    assert [issue for issue in issues if issue["severity"] == "error"] == []
