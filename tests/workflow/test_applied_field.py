"""Scans that are divided by the field of another one: other contrasts, echoes and resolutions of the same space."""

import hashlib
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from study import (
    AFFINE,
    REFERENCE_ROLES,
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

from n4flow.images.fields import load_field

#: From voxels of 2 x 4 x 4 mm whose axes run to posterior, right and inferior, over the same head.
TO_TURNED = np.array([[0, 1.0, 0, 0], [-0.5, 0, 0, SHAPE[1] - 0.75], [0, 0, -1, SHAPE[2] - 1], [0, 0, 0, 1]])
TURNED = np.repeat(head().transpose(1, 0, 2)[::-1, :, ::-1], 2, axis=0)
#: Rotated by 20 and 10 degrees.
OBLIQUE = AFFINE @ np.array(
    [[0.9254, -0.3420, 0.1632, 2], [0.3368, 0.9397, 0.0594, -3], [-0.1736, 0, 0.9848, 4], [0, 0, 0, 1]]
)

SOURCES = {"T1w": raw_scan("01"), "echo 1": raw_scan("01", "echo-1_MEGRE")}
#: Of each scan: its row, its values, its affine, and the scan that the field is from.
APPLIED = {
    "echo 2": (raw_scan("01", "echo-2_MEGRE"), 0.6 * head() ** 0.9, AFFINE, "echo 1"),
    "turned": (raw_scan("01", "T2w"), 0.8 * TURNED + 5, AFFINE @ TO_TURNED, "T1w"),
    "oblique": (
        raw_scan("01", "task-rest_bold"),
        np.stack([head((32, 30, 20)) + n for n in range(3)], axis=-1),
        OBLIQUE,
        "T1w",
    ),
}
SCANS = {
    **SOURCES,
    **{name: replace(scan, field_from=SOURCES[source].modality) for name, (scan, _, _, source) in APPLIED.items()},
}
each_applied = pytest.mark.parametrize("name", APPLIED)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working directory after a run."""
    folder = tmp_path_factory.mktemp("applied")
    describe_raw(folder)
    for seed, scan in enumerate(SOURCES.values()):
        save(folder / scan.image, head(seed=seed))
    for scan, values, affine, _ in APPLIED.values():
        save(folder / scan.image, values, affine=affine)
    # the order of the rows is of no importance
    write_sheet(folder / "config" / "samples.tsv", reversed(SCANS.values()))
    write_config(folder)
    done = snakemake(folder, "--cores", 2)
    assert done.returncode == 0, done.stdout
    return folder


def sidecar_of(folder, name):
    return json.loads((folder / results_of(SCANS[name])["sidecar"]).read_text())


def lattice_of_source(name):
    return results_of(SOURCES[APPLIED[name][3]])["field"]


@each_applied
def test_outputs_are_those_of_n4_but_for_the_reference(folder, name):
    there = {role for role, path in results_of(SCANS[name]).items() if (folder / path).is_file()}
    assert there == set(results_of(SCANS[name])) - REFERENCE_ROLES
    assert partial_files(folder) == []


@each_applied
def test_field_is_that_of_the_source_at_the_same_place_in_the_world(folder, name):
    scan, _, affine, _ = APPLIED[name]
    source = load_field(folder / lattice_of_source(name))
    bias = load(folder / results_of(scan)["field_image"])
    voxels = np.random.default_rng(0).integers(0, bias.shape, (200, 3))
    points = np.linalg.inv(source.affine) @ affine @ np.c_[voxels, np.ones(len(voxels))].T
    expected = [source.log_at([[x], [y], [z]])[0, 0, 0] for x, y, z, _ in points.T]
    np.testing.assert_allclose(np.log(bias[tuple(voxels.T)]), expected, atol=1e-6)
    assert np.ptp(expected) > 0.2
    # and so says the lattice that lies beside the image
    own = load_field(folder / results_of(scan)["field"])
    assert np.array_equal(own.ratio_tile((slice(None),) * 3), bias.astype(np.float32))


@each_applied
def test_image_is_divided_by_it(folder, name):
    scan, values, *_ = APPLIED[name]
    bias = load(folder / results_of(scan)["field_image"])
    corrected = nib.load(folder / results_of(scan)["corrected"])
    original = load(folder / scan.image)
    assert np.array_equal(corrected.affine, nib.load(folder / scan.image).affine)
    assert corrected.shape == values.shape
    back = np.asarray(corrected.dataobj) * (bias if values.ndim == 3 else bias[..., None])
    np.testing.assert_allclose(back, original, rtol=3e-7, atol=1e-30)


def test_ratio_of_two_echoes_is_what_it_was(folder):
    echoes = [SCANS["echo 1"], SCANS["echo 2"]]
    before = [load(folder / scan.image) for scan in echoes]
    after = [load(folder / results_of(scan)["corrected"]) for scan in echoes]
    head_only = before[0] > 100
    np.testing.assert_allclose((after[1] / after[0])[head_only], (before[1] / before[0])[head_only], rtol=3e-7)
    # the same grid gets the same bits
    assert len({(folder / results_of(scan)["field_image"]).read_bytes() for scan in echoes}) == 1


@each_applied
def test_sidecar_names_the_field_and_nothing_of_an_estimate(folder, name):
    content = sidecar_of(folder, name)
    assert set(content["N4"]) == {"FieldFrom", "ShareOutside", "SelfCheck", "WallTimeSeconds"}
    assert (content["N4"]["ShareOutside"] > 0) == (name == "oblique")
    assert 0 <= content["N4"]["SelfCheck"] < 1e-6
    links = json.loads((folder / "results/dataset_description.json").read_text())["DatasetLinks"]
    links[""] = "."  # bids::path lies in the dataset of the sidecar
    split = [uri.split(":", 2) for uri in [*content["Sources"], content["N4"]["FieldFrom"]]]
    places = [os.path.normpath(folder / "results" / links[dataset] / path) for _, dataset, path in split]
    inputs = {"image": SCANS[name].image, "field": lattice_of_source(name)}
    assert places == [str(folder / path) for path in [*inputs.values(), inputs["field"]]]
    digests = {role: hashlib.sha256((folder / path).read_bytes()).hexdigest() for role, path in inputs.items()}
    assert content["Provenance"]["InputSHA256"] == digests
    lattice = json.loads((folder / results_of(SCANS[name])["field"]).read_text())
    assert lattice["Sources"] == content["Sources"]


@each_applied
def test_page_says_whose_field_it_is(folder, name):
    files, source = results_of(SCANS[name]), SOURCES[APPLIED[name][3]]
    page = (folder / files["page"]).read_text(encoding="utf-8")
    assert f"<dt>field from</dt><dd>{source.name}</dd>" in page
    for words in ("Convergence", "<dt>iterations</dt>", "Reference field"):
        assert words not in page
        assert words in (folder / results_of(source)["page"]).read_text(encoding="utf-8")
    metrics = json.loads((folder / files["metrics"]).read_text())
    assert metrics["field_from"] == source.name
    assert {flag.partition(":")[0] for flag in metrics["flags"]} <= {"cjv_worse", "entropy_worse"}


def test_index_and_table_say_whose_field_it_is(folder):
    header, *rows = [line.split("\t") for line in (folder / "results/qc/metrics.tsv").read_text().splitlines()]
    found = {row[0]: row[header.index("field_from")] for row in rows}
    assert found == {scan.name: scan.field_source if scan.field_from else "n/a" for scan in SCANS.values()}
    index = (folder / "results/qc/index.html").read_text(encoding="utf-8")
    assert '"field from"' in index


def test_share_outside_of_the_source_is_said_in_the_log(folder):
    assert "lies outside of the image" in (folder / log_of(SCANS["oblique"], "apply")).read_text()
    assert "lies outside of the image" not in (folder / log_of(SCANS["turned"], "apply")).read_text()


def test_results_are_valid_bids(folder):
    validator = Path(sys.executable).with_name("bids-validator-deno")
    done = subprocess.run(
        [validator, folder / "results", "--ignoreWarnings", "--format", "json"], capture_output=True, text=True
    )
    issues = json.loads(done.stdout)["issues"]["issues"]
    assert [issue for issue in issues if issue["severity"] == "error"] == []


def rules_of_a_dry_run(folder, scans, target):
    write_sheet(folder / "config" / "other.tsv", scans)
    done = snakemake(folder, results_of(target)["corrected"], "-n", "--config", "samples=config/other.tsv")
    assert done.returncode == 0, done.stdout
    return re.findall(r"^(?:local)?rule (\w+):", done.stdout, re.M)


def test_sheet_decides_between_a_field_of_its_own_and_that_of_another(folder):
    scan = SCANS["turned"]
    others = [SCANS["T1w"], SCANS["echo 1"], SCANS["echo 2"]]
    assert rules_of_a_dry_run(folder, [*others, scan], scan) == []
    assert rules_of_a_dry_run(folder, [*others, replace(scan, field_from="")], scan) == ["n4"]
    assert rules_of_a_dry_run(folder, [*others, replace(scan, field_from="echo-1_MEGRE")], scan) == ["apply"]


def test_scan_whose_source_fails_is_named_as_failed_with_it(folder, tmp_path):
    source, taking = SOURCES["T1w"], SCANS["turned"]
    save(tmp_path / source.image, np.zeros(SHAPE))
    save(tmp_path / taking.image, APPLIED["turned"][1], affine=APPLIED["turned"][2])
    write_sheet(tmp_path / "config" / "samples.tsv", [taking, source])
    write_config(tmp_path)
    done = snakemake(tmp_path, "--cores", 2)
    assert done.returncode == 1
    assert f"{taking.name}: its field is that of {source.name}, which failed" in done.stdout
    assert "0 of 2 scans are done, 2 failed" in done.stdout
    assert partial_files(tmp_path) == []
    # both are set aside: what is over all scans is made of none
    done = snakemake(tmp_path, "--cores", 2)
    assert done.returncode == 0, done.stdout
    assert list(json.loads((tmp_path / "results/manifest.json").read_text())["Failed"]) == [source.name, taking.name]
    # and both are tried again, where the source is mended
    save(tmp_path / source.image, head())
    assert sorted(rules_of_a_dry_run(tmp_path, [taking, source], taking)) == ["apply", "mask", "n4"]


def test_scan_is_done_where_only_the_reference_of_its_source_fails(folder, tmp_path, monkeypatch):
    source, taking = SOURCES["T1w"], SCANS["turned"]
    save(tmp_path / source.image, head())
    save(tmp_path / taking.image, APPLIED["turned"][1], affine=APPLIED["turned"][2])
    write_sheet(tmp_path / "config" / "samples.tsv", [taking, source])
    write_config(tmp_path)
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "SimpleITK.py").write_text("raise RuntimeError('broken')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "modules"))
    done = snakemake(tmp_path, "--cores", 2)
    assert done.returncode == 1
    assert "1 of 2 scans are done, 1 failed" in done.stdout
    assert f"{source.name}: reference failed: RuntimeError: broken" in done.stdout
    assert f"{taking.name}: done in" in done.stdout
    index = (tmp_path / "results/qc/index.html").read_text(encoding="utf-8")
    assert f'"{taking.name}.html"' in index
    # the next run leaves out the reference, not the scan
    done = snakemake(tmp_path, "--cores", 2)
    assert done.returncode == 0, done.stdout
    index = (tmp_path / "results/qc/index.html").read_text(encoding="utf-8")
    assert f'"{source.name}.html"' in index
    assert "RuntimeError: broken" in index
    assert list(json.loads((tmp_path / "results/manifest.json").read_text())["Failed"]) == [source.name]


def test_image_of_another_space_ends_with_one_line(tmp_path):
    source, taking = SOURCES["T1w"], SCANS["turned"]
    away = AFFINE.copy()
    away[0, 3] += 500
    save(tmp_path / source.image, head())
    save(tmp_path / taking.image, head(), affine=away)
    write_sheet(tmp_path / "config" / "samples.tsv", [source, taking])
    write_config(tmp_path)
    done = snakemake(tmp_path, results_of(taking)["corrected"], "--cores", 2)
    assert done.returncode == 1
    line = (tmp_path / log_of(taking, "apply")).read_text().splitlines()[-1]
    assert line.startswith(f"n4flow: {taking.image}: lies outside of the image that its field was estimated on (")
    assert f"apply failed: {line.removeprefix('n4flow: ')}\n" in done.stdout
    assert not (tmp_path / results_of(taking)["corrected"]).exists()
