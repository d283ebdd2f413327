"""One run over scans of every kind that the workflow takes: all of them come out corrected, as they went in."""

import hashlib
import json
import os
import re
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import yaml
from study import (
    AFFINE,
    REFERENCE_ROLES,
    ROOT,
    SHAPE,
    describe_raw,
    head,
    load,
    log_of,
    partial_files,
    raw_scan,
    results_of,
    save,
    snakemake,
    write_config,
    write_sheet,
)

from n4flow.parameters import N4Parameters
from n4flow.study.sheet import with_least_hash

#: The names are such that a scan of several frames is among them.
WITH_REFERENCE = 5

#: Rotated by 20 and 10 degrees.
OBLIQUE = AFFINE @ np.array(
    [[0.9254, -0.3420, 0.1632, 0], [0.3368, 0.9397, 0.0594, 0], [-0.1736, 0, 0.9848, 0], [0, 0, 0, 1]]
)
#: Axes point to inferior, left and posterior.
TURNED = np.array([[0.0, -4, 0, 80], [0, 0, -4, 90], [-4, 0, 0, 70], [0, 0, 0, 1]])


def frames(count, shape=(32, 36, 20)):
    still = head(shape)
    rng = np.random.default_rng(5)
    return np.stack([still * (1 + 0.02 * n) + rng.normal(0, 3, shape) for n in range(count)], axis=-1).clip(0)


def with_dropped():
    """A head of which the mask (everything) has 7 voxels that are not finite, 5 below 0 and 11 that are 0."""
    values = head() + 1
    flat = values.reshape(-1)
    flat[100:105] = np.nan
    flat[40_000:40_002] = (np.inf, -np.inf)
    flat[30_000:30_005] = -3
    flat[20_000:20_011] = 0
    return values


def mask_of_values():
    """0, 7 and 255, as float."""
    inside = head() > 300
    inside_twice = inside & (np.indices(SHAPE)[0] > 20)
    return inside * 7.0 + inside_twice * 248.0


def _scans():
    """Of each scan: its row, its values, and how it is saved."""
    micron = np.diag([1e3, 1e3, 1e3, 1]) @ AFFINE
    plain = replace(raw_scan("plain"), groups=(("site", "A"),))
    shared = {"plain": plain, "other grid": raw_scan("plain", "T2w", extension=".nii")}
    return {
        "plain": (shared["plain"], head(), {}),
        "other grid": (shared["other grid"], head((48, 36, 30), 1), {"affine": AFFINE * [0.9, 1.1, 1.2, 1]}),
        "session a": (raw_scan("twice", session="a"), head(seed=2), {}),
        "session b": (raw_scan("twice", session="b"), head(seed=3), {"qform": 1, "sform": 4}),
        "run 1": (raw_scan("runs", "run-1_T1w"), head(seed=4), {}),
        "run 2": (raw_scan("runs", "run-2_T1w"), head(seed=5), {}),
        "echo": (raw_scan("twice", "run-1_echo-2_MEGRE", session="a"), head(seed=7), {}),
        "bold": (raw_scan("frames", "task-rest_bold"), frames(5), {"dtype": np.int16, "frame_time": 2.5}),
        "asl": (raw_scan("pcasl", "asl", extension=".nii"), frames(3), {"units": ("mm", "msec"), "frame_time": 4000}),
        "one frame": (raw_scan("oneframe", "T2w"), head()[..., None], {"frame_time": 3}),
        "scaled": (raw_scan("scaled", extension=".nii"), head(), {"dtype": np.int16, "scaling": (0.25, 10)}),
        "big-endian": (raw_scan("big", extension=".nii"), head(), {"dtype": np.int16, "endianness": ">"}),
        "NIfTI-2": (raw_scan("nifti2"), head(), {"kind": nib.Nifti2Image}),
        "microns": (raw_scan("micron"), head(), {"affine": micron, "units": ("micron", "sec")}),
        "bytes": (raw_scan("byte"), head() / 8, {"dtype": np.uint8}),
        "doubles": (replace(raw_scan("double"), image="another place/scan 1.nii"), head(), {"dtype": np.float64}),
        "anisotropic": (raw_scan("thin"), head((40, 44, 18)), {"affine": AFFINE * [1, 1, 2, 1], "sform": 0}),
        "oblique": (raw_scan("oblique"), head(), {"affine": OBLIQUE, "sform": 2}),
        "turned": (raw_scan("turned"), head((36, 40, 44)), {"affine": TURNED, "qform": 0}),
        "no codes": (raw_scan("nocodes"), head(), {"qform": 0, "sform": 0}),
        "2-D": (raw_scan("flat", "T2w"), head((192, 180)), {"affine": np.diag([1.0, 1, 5, 1])}),
        "a plane": (raw_scan("plane", "T2w"), head((1, 192, 180)), {"affine": np.diag([5.0, 1, 1, 1])}),
        "annexed": (raw_scan("annexed"), head(seed=6), {}),
        "own mask": (raw_scan("own", mask="raw/own_mask.nii.gz"), head(), {}),
        "dropped": (raw_scan("few", mask="raw/all_mask.nii.gz"), with_dropped(), {}),
    }


CASES = _scans()
SCANS = {name: scan for name, (scan, _, _) in CASES.items()}
CHOSEN = with_least_hash([scan.name for scan in SCANS.values()], WITH_REFERENCE)
each_scan = pytest.mark.parametrize("name", CASES)


def state_of(folder):
    """Everything in a folder: when it was changed last, and what files hold."""
    return {
        path.relative_to(folder).as_posix(): [
            path.lstat().st_mtime_ns,
            hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "",
        ]
        for path in folder.rglob("*")
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working directory after a run over all scans."""
    folder = tmp_path_factory.mktemp("good")
    describe_raw(folder)
    for scan, values, how in CASES.values():
        save(folder / scan.image, values, **how)
    # as DataLad keeps it: a link to an object that is named after its content
    image = folder / SCANS["annexed"].image
    annexed = folder / "raw/.git/annex/objects/MD5E-s100--0123.nii.gz"
    annexed.parent.mkdir(parents=True)
    image.replace(annexed)
    image.symlink_to(os.path.relpath(annexed, image.parent))
    own = folder / SCANS["plain"].image.replace(".nii.gz", ".json")
    own.write_text(json.dumps({"EchoTime": 0.003, "Manufacturer": "Größe"}), encoding="utf-8")
    save(folder / "raw/own_mask.nii.gz", mask_of_values())
    save(folder / "raw/all_mask.nii.gz", np.ones(SHAPE), dtype=np.uint8)
    write_sheet(folder / "config" / "samples.tsv", SCANS.values())
    above = folder / "raw/task-rest_bold.json"
    above.write_text(json.dumps({"EchoTime": 0.03, "FlipAngle": 70, "TaskName": "rest"}))
    (folder / SCANS["bold"].image.replace(".nii.gz", ".json")).write_text(json.dumps({"FlipAngle": 75}))
    write_config(folder, {"reference": {"scans": WITH_REFERENCE}}, guide=True)
    (folder / "before.json").write_text(json.dumps(state_of(folder / "raw")))
    done = snakemake(folder, "--cores", 2, threads=2)
    assert done.returncode == 0, done.stdout
    return folder


def roles_of(scan):
    """What there must be of a scan."""
    roles = results_of(scan)
    return {r: path for r, path in roles.items() if r not in REFERENCE_ROLES or scan.name in CHOSEN}


def images_of(folder, scan):
    """The NIfTI outputs of a scan, by role."""
    return {role: nib.load(folder / path) for role, path in roles_of(scan).items() if path.endswith(".nii.gz")}


@each_scan
def test_outputs_are_there_and_those_of_sitk_for_the_chosen_scans_alone(folder, name):
    there = {role for role, path in results_of(SCANS[name]).items() if (folder / path).is_file()}
    assert there == set(roles_of(SCANS[name]))


def test_nothing_was_written_where_the_images_lie(folder):
    assert state_of(folder / "raw") == json.loads((folder / "before.json").read_text())


def test_results_hold_nothing_else_and_no_partial_file(folder):
    expected = {path for scan in SCANS.values() for path in roles_of(scan).values()}
    qc = ("index.html", "guide.html", "metrics.tsv", "metrics_mqc.tsv", "distributions.png", "worst.png")
    qc += ("methods.md", "outliers.js")
    top = ("dataset_description.json", ".bidsignore", "manifest.json")
    expected |= {f"results/{n}" for n in (*top, *(f"qc/{n}" for n in qc))}
    found = {p.relative_to(folder).as_posix() for p in (folder / "results").rglob("*") if p.is_file()}
    bundle = {path for path in found if path.startswith("results/qc/bundle/")}
    assert found - bundle == expected
    packed = {path.replace("/bundle", "") for path in bundle} - {"results/qc/.snakemake_timestamp"}
    wanted = (
        ".html",
        "/metrics.tsv",
        ".webp",
        "/outliers.js",
        "/methods.md",
    )  # not what only the viewer, the index and MultiQC need
    assert packed == {path for path in expected if path.startswith("results/qc/") and path.endswith(wanted)}
    assert partial_files(folder) == []


@each_scan
def test_geometry_comes_out_as_it_went_in(folder, name):
    original = nib.load(folder / SCANS[name].image)
    for role, image in images_of(folder, SCANS[name]).items():
        whole = role in ("corrected", "reference")
        shape = original.shape if whole or original.shape[3:] in ((), (1,)) else original.shape[:3]
        assert image.shape == shape, role
        assert type(image) is type(original), role
        assert np.array_equal(image.affine, original.affine), role
        ours, theirs = image.header, original.header
        assert ours.get_zooms() == theirs.get_zooms()[: len(shape)], role
        assert ours.get_xyzt_units() == theirs.get_xyzt_units(), role
        for code in ("qform_code", "sform_code", "dim_info"):
            assert ours[code] == theirs[code], (role, code)
        for row in ("srow_x", "srow_y", "srow_z"):
            assert np.array_equal(ours[row], theirs[row]), role
        if theirs["qform_code"]:
            assert np.array_equal(image.get_qform(), original.get_qform()), role


@each_scan
def test_corrected_times_field_is_the_original(folder, name):
    scan = SCANS[name]
    original = load(folder / scan.image)
    images = images_of(folder, scan)
    assert images["corrected"].get_data_dtype().newbyteorder("=") == np.float32
    assert images["field_image"].get_data_dtype().newbyteorder("=") == np.float32
    bias = load(folder / results_of(scan)["field_image"])
    back = load(folder / results_of(scan)["corrected"]) * (bias if bias.ndim == original.ndim else bias[..., None])
    np.testing.assert_allclose(back, original, rtol=3e-7, atol=0)
    sidecar = json.loads((folder / results_of(scan)["sidecar"]).read_text())
    assert 0 <= sidecar["N4"]["SelfCheck"] < 1e-6


@each_scan
def test_field_varies_smoothly_about_one(folder, name):
    bias = load(folder / results_of(SCANS[name])["field_image"])
    assert 0.2 < bias.min() < 0.97
    assert 1.03 < bias.max() < 6  # most where the mask holds air
    steps = [np.abs(np.diff(np.log(bias), axis=axis)).max() for axis in range(bias.ndim) if bias.shape[axis] > 1]
    assert max(steps) < 0.15


@each_scan
def test_mean_in_the_mask_does_not_change(folder, name):
    scan = SCANS[name]
    files = results_of(scan)
    before, after, mask = load(folder / scan.image), load(folder / files["corrected"]), load(folder / files["mask"])
    if before.ndim == 4 and mask.ndim == 3:
        before, after = before.mean(axis=-1), after.mean(axis=-1)
    used = (mask == 1) & np.isfinite(before) & (before > 0)
    assert after[used].mean() == pytest.approx(before[used].mean(), rel=1e-6)


@each_scan
def test_mask_is_bytes_of_0_and_1_with_a_type(folder, name):
    files = results_of(SCANS[name])
    mask = nib.load(folder / files["mask"])
    assert mask.get_data_dtype() == np.uint8
    assert mask.header.get_slope_inter() in ((None, None), (1, 0))
    values = np.asarray(mask.dataobj)
    assert set(np.unique(values)) <= {0, 1}
    sidecar = json.loads((folder / files["mask sidecar"]).read_text())
    assert sidecar["Type"] == "ROI"
    assert sidecar["Mask"]["Voxels"] == values.sum() > 1000


def test_own_mask_is_taken_whatever_its_values(folder):
    files = results_of(SCANS["own mask"])
    assert np.array_equal(load(folder / files["mask"]), load(folder / "raw/own_mask.nii.gz") != 0)
    sidecar = json.loads((folder / files["mask sidecar"]).read_text())
    assert sidecar["Mask"]["Method"] == "given"
    assert set(sidecar["Provenance"]["InputSHA256"]) == {"image", "mask"}


def test_voxels_without_a_logarithm_are_counted_in_sidecar_log_and_metrics(folder):
    files = results_of(SCANS["dropped"])
    assert json.loads((folder / files["sidecar"]).read_text())["N4"]["Dropped"] == {
        "not finite": 7,
        "zero": 11,
        "negative": 5,
    }
    assert json.loads((folder / files["metrics"]).read_text())["dropped_voxels"] == 23
    log = (folder / log_of(SCANS["dropped"], "n4")).read_text()
    assert "7 not finite, 11 zero, 5 negative" in log


@each_scan
def test_sidecar_says_how_to_make_it_again(folder, name):
    scan = SCANS[name]
    files = roles_of(scan)
    for role in {"sidecar", "reference sidecar"} & set(files):
        content = json.loads((folder / files[role]).read_text())
        n4, made_by = content["N4"], content["Provenance"]
        ours = role == "sidecar"
        expected = N4Parameters() if ours else N4Parameters.from_mapping({"preset": "itk"})
        # SimpleITK gets more samples of small images, and has fewer levels on thin ones
        given = () if ours else ("shrink_factor", "iterations")
        assert {key: n4["Parameters"][key] for key in expected.to_mapping() if key not in given} == {
            key: value for key, value in expected.to_mapping().items() if key not in given
        }, role
        assert n4["History"], role
        assert all(line["CV"] >= 0 for line in n4["History"]), role
        assert len(n4["History"]) <= sum(n4["Parameters"]["iterations"]), role
        assert n4["WallTimeSeconds"] > 0, role
        assert {"python", "numpy", "nibabel"} <= {k for k, version in made_by["Versions"].items() if version}, role
        assert ("SimpleITK" in made_by["Versions"]) == role.startswith("reference"), role
        for source, path in (("image", scan.image), ("mask", files["mask"])):
            assert made_by["InputSHA256"][source] == hashlib.sha256((folder / path).read_bytes()).hexdigest(), role
        assert len(made_by["PackageDigest"]) == 16


@each_scan
def test_log_names_the_device_once_and_shows_progress(folder, name):
    scan = SCANS[name]
    log = (folder / log_of(scan, "n4")).read_text()
    assert log.count("computing on") == 1
    assert Path(scan.image).name in log
    first, *others = N4Parameters().iterations
    assert re.search(rf"stage 1 of {1 + len(others)}, .* \d+ of at most {first} iterations, cv \d", log)
    assert re.search(r"frame 1 of \d+, plane (\d+) of \1 written", log), "to the last plane"


def test_own_results_agree_with_those_of_sitk(folder):
    chosen = [scan for scan in SCANS.values() if scan.name in CHOSEN]
    metrics = {scan.name: json.loads((folder / results_of(scan)["metrics"]).read_text()) for scan in chosen}
    assert len(metrics) == WITH_REFERENCE
    r = {name: values["reference_r"] for name, values in metrics.items()}
    assert min(r.values()) > 0.8, r
    rms = {name: values["agreement_rms_log"] for name, values in metrics.items()}
    assert max(rms.values()) <= 5e-5, rms


def test_4_d_sidecar_has_what_bids_asks_of_a_series(folder):
    bold = json.loads((folder / results_of(SCANS["bold"])["sidecar"]).read_text())
    assert (bold["TaskName"], bold["RepetitionTime"], bold["SkullStripped"]) == ("rest", 2.5, False)
    assert json.loads((folder / results_of(SCANS["asl"])["sidecar"]).read_text())["RepetitionTime"] == 4.0


def test_sidecar_keeps_what_that_of_the_image_says(folder):
    sidecar = json.loads((folder / results_of(SCANS["plain"])["sidecar"]).read_text(encoding="utf-8"))
    assert (sidecar["EchoTime"], sidecar["Manufacturer"]) == (0.003, "Größe")
    bold = json.loads((folder / results_of(SCANS["bold"])["sidecar"]).read_text(encoding="utf-8"))
    assert (bold["EchoTime"], bold["FlipAngle"]) == (0.03, 75)  # of the dataset, and of the scan itself


@pytest.mark.parametrize("name", ["plain", "bold", "annexed"])
@pytest.mark.parametrize("role", ["mask sidecar", "sidecar", "field"])
def test_sources_are_uris_of_files_in_the_linked_datasets(folder, name, role):
    scan = SCANS[name]
    sources = json.loads((folder / results_of(scan)[role]).read_text())["Sources"]
    links = json.loads((folder / "results/dataset_description.json").read_text())["DatasetLinks"]
    links[""] = "."  # bids::path lies in the dataset of the sidecar
    split = [uri.split(":", 2) for uri in sources]
    places = [os.path.normpath(folder / "results" / links[dataset] / path) for _, dataset, path in split]
    wanted = [scan.image] if role == "mask sidecar" else [scan.image, results_of(scan)["mask"]]
    assert places == [str(folder / path) for path in wanted]


def test_second_run_has_nothing_to_do(folder):
    done = snakemake(folder, "-n")
    assert done.returncode == 0
    assert "Nothing to be done" in done.stdout


def test_what_somebody_removed_is_made_again(folder):
    removed = results_of(SCANS["plain"])["corrected"]
    aside = folder / "aside"
    (folder / removed).rename(aside)
    try:
        done = snakemake(folder, "-n")
    finally:
        aside.rename(folder / removed)
    assert done.returncode == 0, done.stdout
    assert f"reason: Missing output files: {removed}" in done.stdout


PAGES = [results_of(scan)["page"] for scan in SCANS.values()] + [
    "results/qc/index.html",
    "results/qc/guide.html",
]


@pytest.mark.parametrize("page", PAGES, ids=[Path(page).stem for page in PAGES])
def test_page_asks_nothing_of_the_network(folder, page):
    text = (folder / page).read_text(encoding="utf-8")
    assert text.lstrip().lower().startswith("<!doctype html>")
    assert len(text) > 2000
    request = r"""(?:src|href|action|srcset)\s*=\s*["']?\s*(?:https?:)?//|url\(\s*["']?(?:https?:)?//|@import"""
    assert re.findall(request, text) == []
    assert re.findall(r"""(?:fetch|import|open)\(\s*["'`](?:https?:)?//""", text) == []


def test_index_and_table_hold_every_scan(folder):
    index = (folder / "results/qc/index.html").read_text(encoding="utf-8")
    rows = (folder / "results/qc/metrics.tsv").read_text(encoding="utf-8").splitlines()[1:]
    names = {scan.name for scan in SCANS.values()}
    assert {row.split("\t")[0] for row in rows} == names
    assert [name for name in names if f"{name}.html" not in index] == []


def test_results_are_valid_bids(folder):
    validator = Path(sys.executable).with_name("bids-validator-deno")
    done = subprocess.run(
        [validator, folder / "results", "--ignoreWarnings", "--format", "json"], capture_output=True, text=True
    )
    issues = json.loads(done.stdout)["issues"]["issues"]
    errors = [(i["code"], i.get("subCode"), i.get("location")) for i in issues if i["severity"] == "error"]
    assert errors == []
    assert done.returncode == 0


def without_volatile(path):
    """What a JSON file says, without what the clock and the machine decide."""
    content = json.loads(path.read_text())
    content.pop("Provenance", None)
    content.get("N4", {}).pop("WallTimeSeconds", None)
    return content


def test_same_bytes_on_one_core_and_one_thread(folder, tmp_path):
    names = ["plain", "bold", "dropped", "2-D", "other grid"]
    scans = [SCANS[name] for name in names]
    (tmp_path / "raw").symlink_to(folder / "raw")
    write_sheet(tmp_path / "config" / "samples.tsv", scans)
    write_config(tmp_path)
    targets = [roles_of(s)[role] for s in scans for role in ("corrected", "reference") if role in roles_of(s)]
    assert len(targets) == len(scans) + 1
    done = snakemake(tmp_path, *targets, "--cores", 1, threads=1)
    assert done.returncode == 0, done.stdout
    made = [path for scan in scans for path in roles_of(scan).values() if (tmp_path / path).is_file()]
    assert len(made) >= 6 * len(scans)
    images = [path for path in made if path.endswith(".nii.gz")]
    assert [path for path in images if (folder / path).read_bytes() != (tmp_path / path).read_bytes()] == []
    sidecars = [path for path in made if path.endswith(".json")]
    assert [path for path in sidecars if without_volatile(folder / path) != without_volatile(tmp_path / path)] == []


def test_manifest_names_all_that_was_made_and_the_results_are_equal_to_it(folder):
    content = json.loads((folder / "results/manifest.json").read_text())
    groups = [content["Dataset"], *content["Scans"].values()]
    named = [f"results/{file}" for group in groups for file in group["Files"]]
    found = {p.relative_to(folder).as_posix() for p in (folder / "results").rglob("*") if p.is_file()}
    assert len(named) == len(set(named))
    left = {path for path in found - set(named) if "/bundle/" not in path}
    assert left == {"results/manifest.json"}
    verify = [sys.executable, ROOT / "workflow/scripts/verify.py", folder / "results", folder / "results"]
    done = subprocess.run(verify, capture_output=True, text=True, check=False)
    assert done.stderr == f"{len(SCANS)} equal, 0 equal within 1e-5, 0 different\n"
    assert done.returncode == 0


def test_gzip_header_holds_neither_name_nor_time(folder):
    start = (folder / results_of(SCANS["plain"])["corrected"]).read_bytes()[:10]
    assert start[:4] == b"\x1f\x8b\x08\x00"
    assert start[4:8] == bytes(4)


def test_report_groups_scans_by_the_sheet(folder):
    assert '{"name":"site","values":["","A"]' in (folder / "results/qc/index.html").read_text(encoding="utf-8")


def test_report_zip_holds_the_pages(folder):
    done = snakemake(folder, "--report", "report.zip")
    assert done.returncode == 0, done.stdout
    with zipfile.ZipFile(folder / "report.zip") as report:
        index = next(name for name in report.namelist() if name.endswith("/index.html"))
        place = index.removesuffix("index.html")
        # side by side, as in the folder: so the links between them lead somewhere
        over_all = ["results/qc/metrics.tsv", "results/qc/outliers.js", "results/qc/methods.md"]
        for path in [*PAGES, *over_all, results_of(SCANS["plain"])["pictures"]]:
            inside = Path(path).relative_to("results/qc").as_posix()
            assert report.read(place + inside) == (folder / path).read_bytes()
        listed = report.read(next(name for name in report.namelist() if name.endswith("/report.html"))).decode()
        shown = ("distributions of the metrics", "the worst scans", "the report, with a page per scan")
        assert [what for what in shown if what not in listed] == []
        # sorted by this label: a sign comes before letters
        labels = re.findall(r'"what": "(.*?)"', listed)
        assert [what for what in labels if not what[0].isalpha()] == ["\\u25b8 the report, with a page per scan"]
        assert "volumes are not in this archive" in listed


def test_config_of_the_repository_names_its_own_sheet():
    config = yaml.safe_load((ROOT / "config/config.yaml").read_text())
    assert (ROOT / config["samples"]).is_file()
