"""The command n4flow: the same bytes, sidecars and errors as the steps of the workflow, by names of one's own."""

import csv
import io
import json
import logging
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier

import nibabel as nib
import numpy as np
import pytest
import yaml

from n4flow import cli, load_field
from n4flow.console import PARTICIPANTS, TYPED, Terminal, commanding
from n4flow.errors import InputError
from n4flow.parameters import N4Parameters
from n4flow.steps.apply import apply_scan
from n4flow.steps.correct import correct_scan
from n4flow.steps.mask import mask_scan
from n4flow.study.bids import Scan
from n4flow.study.config import config_problems, load_schema
from n4flow.study.manifest import content_sha256
from n4flow.study.sheet import add_to_sheet, found_file, read_sheet
from tests.pyramids import sheet_volume, write_store

COMMANDS = ["correct", "apply", "sheet", "verify", "run"]
SETTINGS = {"method": "otsu", "percentile": 50}


@pytest.fixture(scope="module")
def image(head, tmp_path_factory):
    """A head in a folder of its own, with a sidecar."""
    folder = tmp_path_factory.mktemp("raw")
    path = folder / "sub-01_T1w.nii.gz"
    nib.save(nib.Nifti1Image(head.image[::2, ::2, ::2].astype(np.int16), np.diag([4.0, 4, 4, 1])), path)
    (folder / "sub-01_T1w.json").write_text('{"EchoTime": 0.003}')
    inside = (head.image[::2, ::2, ::2] > 300).astype(np.uint8)
    nib.save(nib.Nifti1Image(inside, np.diag([4.0, 4, 4, 1])), folder / "brain.nii.gz")
    return path


@pytest.fixture(scope="module")
def by_steps(image, tmp_path_factory):
    """What the workflow's rules mask and n4 make of it."""
    folder = tmp_path_factory.mktemp("steps")
    files = {"corrected": "c.nii.gz", "sidecar": "c.json", "field": "f.json", "field_image": "f.nii.gz"}
    files = {role: folder / name for role, name in files.items()}
    mask_scan(image, None, folder / "m.nii.gz", folder / "m.json", **SETTINGS)
    correct_scan(image, folder / "m.nii.gz", files, parameters={}, device="cpu")
    return files


def n4flow(*arguments):
    cli.main([str(argument) for argument in arguments])


def failure(*arguments):
    """The line with which the command ends."""
    with pytest.raises(SystemExit) as ended:
        n4flow(*arguments)
    (line,) = str(ended.value.code).splitlines()
    return line.removeprefix("n4flow: ")


# ---------------------------------------------------------------- help


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_fits_a_screen_and_loads_no_numeric_library(command):
    code = (
        "import sys; from n4flow.cli import main\ntry: main()\nexcept SystemExit: print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *command.split(), "--help"],
        env={**os.environ, "COLUMNS": "80", "PYTHONPATH": str(Path(cli.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=True,
    )
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"usage: n4flow {command}".strip())
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
    assert not {"numpy", "nibabel", "yaml", "snakemake"} & set(done.stderr.split())


# ---------------------------------------------------------------- correct


def test_correct_makes_the_bytes_and_sidecars_of_the_steps(image, by_steps, tmp_path, capsys):
    n4flow("correct", image, tmp_path / "x.nii.gz", "--bias-field", tmp_path / "y.nii.gz", "--device", "cpu")
    made = {"corrected": "x.nii.gz", "sidecar": "x.json", "field": "y.json", "field_image": "y.nii.gz"}
    assert {path.name for path in tmp_path.iterdir()} == set(made.values())
    for role, name in made.items():
        assert content_sha256(tmp_path / name) == content_sha256(by_steps[role]), role
    for role in ("corrected", "field_image"):
        assert (tmp_path / made[role]).read_bytes() == by_steps[role].read_bytes()
    mine, theirs = (json.loads(path.read_text()) for path in (tmp_path / "x.json", by_steps["sidecar"]))
    assert mine["Provenance"] == theirs["Provenance"]
    assert mine["Sources"] == [os.path.relpath(image, tmp_path)], "the mask is not kept"
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("n4flow: done in ")
    assert all(str(tmp_path / name) in line for name in made.values())


def test_without_a_field_image_the_control_points_lie_beside_the_output(image, by_steps, tmp_path):
    n4flow("correct", image, tmp_path / "x.nii", "--device", "cpu")
    assert {path.name for path in tmp_path.iterdir()} == {"x.nii", "x.json", "x_biasfield.json"}
    assert np.array_equal(load_field(tmp_path / "x_biasfield.json").lattice, load_field(by_steps["field"]).lattice)


def test_a_mask_of_ones_own_is_named_and_counts(image, tmp_path):
    own = image.with_name("brain.nii.gz")
    n4flow("correct", image, tmp_path / "x.nii.gz", "--mask", own, "--device", "cpu")
    mask_scan(image, own, tmp_path / "m.nii.gz", tmp_path / "m.json", **SETTINGS)
    files = {role: tmp_path / f"by_steps.{role}" for role in ("sidecar", "field")}
    correct_scan(image, tmp_path / "m.nii.gz", {"corrected": tmp_path / "y.nii.gz", **files}, parameters={})
    assert (tmp_path / "x.nii.gz").read_bytes() == (tmp_path / "y.nii.gz").read_bytes()
    sources = json.loads((tmp_path / "x.json").read_text())["Sources"]
    assert sources == [os.path.relpath(path, tmp_path) for path in (image, own)]


def test_weights_count_and_are_named(image, tmp_path):
    own, weights = image.with_name("brain.nii.gz"), image.with_name("sure.nii.gz")
    planes = np.linspace(0, 1, nib.load(image).shape[2], dtype=np.float32)
    sure = np.broadcast_to(planes, nib.load(image).shape)
    nib.save(nib.Nifti1Image(sure, np.diag([4.0, 4, 4, 1])), weights)
    n4flow("correct", image, tmp_path / "x.nii.gz", "--mask", own, "--weights", weights, "--device", "cpu")
    mask_scan(image, own, tmp_path / "m.nii.gz", tmp_path / "m.json", **SETTINGS)
    files = {"corrected": tmp_path / "y.nii.gz"} | {role: tmp_path / f"y.{role}" for role in ("sidecar", "field")}
    correct_scan(image, tmp_path / "m.nii.gz", files, parameters={}, weights=weights)
    assert (tmp_path / "x.nii.gz").read_bytes() == (tmp_path / "y.nii.gz").read_bytes()
    named = json.loads((tmp_path / "x.json").read_text())["Sources"]
    assert named == [os.path.relpath(path, tmp_path) for path in (image, own, weights)]


def test_settings_come_from_a_config_of_the_workflow_and_the_command_line_wins(image, tmp_path):
    config = {"n4": {"preset": "itk", "iterations": [3, 2]}, "mask": {"method": "head"}, "samples": "a.tsv"}
    config["output"] = {"keep_dtype": True}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    n4flow("correct", image, tmp_path / "x.nii.gz", "--config", tmp_path / "c.yaml", "--preset", "fixed")
    used = json.loads((tmp_path / "x.json").read_text())["N4"]["Parameters"]
    assert used == N4Parameters.from_mapping({"preset": "fixed", "iterations": [3, 2]}).to_mapping()
    mask_scan(image, None, tmp_path / "m.nii.gz", tmp_path / "m.json", method="head", percentile=50)
    files = {role: tmp_path / f"by_steps.{role}" for role in ("sidecar", "field")} | {
        "corrected": tmp_path / "y.nii.gz"
    }
    correct_scan(image, tmp_path / "m.nii.gz", files, parameters=used, keep_dtype=True)
    assert (tmp_path / "x.nii.gz").read_bytes() == (tmp_path / "y.nii.gz").read_bytes()


def test_defaults_are_those_of_the_workflow(pytestconfig):
    given = cli._parser().parse_args(["correct", "a.nii", "b.nii"])
    own = yaml.safe_load((pytestconfig.rootpath / "config/config.yaml").read_text())
    config = cli._config(given)
    assert {section: config[section] for section in ("mask", "n4", "output", "qc", "device")} == {
        section: own[section] if section != "n4" else {"preset": "default"}
        for section in ("mask", "n4", "output", "qc", "device")
    } | {"n4": config["n4"]}
    assert N4Parameters.from_mapping(config["n4"]) == N4Parameters.from_mapping(own["n4"])


def test_report_is_one_file_that_leads_nowhere_and_its_flags_are_told(image, tmp_path, capsys):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"qc": {"flags": {"field_range": 1.01}}}))
    options = ("--report", tmp_path / "p.html", "--config", tmp_path / "c.yaml", "--device", "cpu")
    n4flow("correct", image, tmp_path / "x.nii.gz", *options)
    assert {path.name for path in tmp_path.iterdir()} == {"c.yaml", "x.nii.gz", "x.json", "x_biasfield.json", "p.html"}
    page = (tmp_path / "p.html").read_text()
    assert "<h1>sub-01_T1w</h1>" in page
    body = page.split("<script>")[0]
    assert [
        word for word in ("index.html", "guide.html", 'data-key="1"', 'href="sub', 'src="sub') if word in body
    ] == []
    told = [line for line in capsys.readouterr().err.splitlines() if "flagged" in line]
    assert any(line.startswith(f"n4flow: {image}: flagged: field_range: ") for line in told)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["{image}", "{out}/x.img"], "{out}/x.img: is no name for a NIfTI image; let it end in .nii.gz or .nii"),
        (["{image}", "{image}"], "{image}: would be overwritten, and goes in; give another name"),
        (
            ["{image}", "{raw}/sub-01_T1w.nii"],
            "{raw}/sub-01_T1w.json: would be overwritten, and goes in; give another name",
        ),
        (
            ["{image}", "{out}/x.nii", "--bias-field", "{out}/x.nii.gz"],
            "{out}/x.json: would be overwritten, and is written already; give another name",
        ),
        (
            ["{image}", "{out}/no/x.nii"],
            "{out}/no/x.nii: cannot be written (its folder is not there); make it: mkdir -p {out}/no",
        ),
        (
            ["{image}", "{out}/x.nii", "--preset", "ants"],
            "n4.preset: 'ants' is not known; choose from default, itk, linumpy, fixed",
        ),
        (
            ["{image}", "{out}/x.nii", "--device", "tpu"],
            "device: 'tpu' is not a device; give auto, gpu or cpu",
        ),
        (["{image}", "{out}/x.nii", "--config", "{image}"], "{image}: cannot be read ("),
        (["{raw}/no.nii", "{out}/x.nii"], "{raw}/no.nii: is not there; check the path"),
        (["{image}", "{out}/x.nii", "--mask", "{raw}/no.nii"], "{raw}/no.nii: is not there; check the path"),
    ],
)
def test_what_is_wrong_is_one_line_and_nothing_is_written(image, tmp_path, arguments, line):
    before = {path: path.stat().st_mtime_ns for path in image.parent.iterdir()}
    words = {"image": image, "raw": image.parent, "out": tmp_path}
    assert failure("correct", *(argument.format(**words) for argument in arguments)).startswith(line.format(**words))
    assert {path: path.stat().st_mtime_ns for path in image.parent.iterdir()} == before
    assert list(tmp_path.iterdir()) == []


def test_config_that_the_workflow_would_refuse_is_refused(image, tmp_path):
    (tmp_path / "c.yaml").write_text("n4: {iteration: [3]}\n")
    line = failure("correct", image, tmp_path / "x.nii.gz", "--config", tmp_path / "c.yaml")
    assert line == f"{tmp_path}/c.yaml: n4.iteration: there is no such key; did you mean iterations?"


@pytest.mark.parametrize("name", ["p.pdf", "p", "p.html.gz"])
def test_a_page_is_html_and_nothing_else(image, tmp_path, name):
    line = failure("correct", image, tmp_path / "x.nii.gz", "--report", tmp_path / name)
    assert line == f"{tmp_path}/{name}: is no name for a page; let it end in .html"
    assert list(tmp_path.iterdir()) == []


def test_what_a_page_would_flag_is_told_without_one(image, tmp_path, capsys):
    limits = {"repeatability": 1e-9, "dropped_voxels": 1e-9}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"n4": {"iterations": [2] * 6}, "qc": {"flags": limits}}))
    values = np.asarray(nib.load(image).dataobj).copy()
    values[20, 20, 15] = -1  # in the mask that is given, and without a logarithm
    nib.save(nib.Nifti1Image(values, nib.load(image).affine), tmp_path / "raw.nii")
    inputs = [tmp_path / "raw.nii", tmp_path / "x.nii", "--mask", image.with_name("brain.nii.gz")]
    options = ["--config", tmp_path / "c.yaml", "--device", "cpu"]
    n4flow("correct", *inputs, *options)
    told = [line for line in capsys.readouterr().err.splitlines() if "flagged" in line]
    n4flow("correct", *inputs, *options, "--report", tmp_path / "p.html")
    of_page = [line for line in capsys.readouterr().err.splitlines() if "flagged" in line]
    begin = f"n4flow: {tmp_path}/raw.nii: flagged: "
    of_run = [f"{begin}{name}: " for name in ("repeatability", "dropped_voxels", "iterations_exhausted")]
    assert [line for line, start in zip(told, of_run, strict=True) if not line.startswith(start)] == []
    assert [line for line in of_page if line.startswith(tuple(of_run))] == told


def test_a_good_correction_has_no_line_but_the_last(image, tmp_path, capsys):
    n4flow("correct", image, tmp_path / "x.nii", "--device", "cpu")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("n4flow: done in ")


def test_the_page_of_one_file_has_the_flag_of_its_size_whatever_it_is_called(image, tmp_path, capsys):
    tiny = tmp_path / "head.nii"  # of a thousandth: mm that are said to be µm
    nib.save(nib.Nifti1Image(np.asarray(nib.load(image).dataobj), np.diag([4e-3, 4e-3, 4e-3, 1])), tiny)
    n4flow("correct", tiny, tmp_path / "x.nii", "--report", tmp_path / "p.html", "--device", "cpu")
    assert "flagged: size: the longest edge" in capsys.readouterr().err
    assert "the longest edge of the image is" in (tmp_path / "p.html").read_text()


def test_a_warning_of_several_steps_is_one_line(tmp_path, capsys, head):
    values = np.stack([head.image[::2, ::2, ::2].astype(np.float32)] * 3, axis=-1)
    values[..., 1] = np.nan
    nib.save(nib.Nifti1Image(values, np.diag([4.0, 4, 4, 1])), tmp_path / "series.nii")
    n4flow("correct", tmp_path / "series.nii", tmp_path / "x.nii", "--device", "cpu")
    said = [line for line in capsys.readouterr().err.splitlines() if "not finite" in line]
    assert len(said) == 1
    assert "1 of 3 frames" in said[0]


def test_what_a_report_needs_is_named_before_any_work(image, tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name == "matplotlib" else name)
    line = failure("correct", image, tmp_path / "x.nii.gz", "--report", tmp_path / "p.html")
    assert line == "--report: needs matplotlib; install what it needs: pip install '.[qc]' in the clone"


# ---------------------------------------------------------------- apply


def test_apply_divides_as_the_step_does(image, by_steps, tmp_path):
    n4flow("apply", by_steps["field"], image, tmp_path / "x.nii.gz")
    files = {"corrected": tmp_path / "y.nii.gz", "sidecar": tmp_path / "y.json", "field": tmp_path / "y_field.json"}
    apply_scan(image, by_steps["field"], files)
    assert (tmp_path / "x.nii.gz").read_bytes() == (tmp_path / "y.nii.gz").read_bytes()
    assert content_sha256(tmp_path / "x.json") == content_sha256(tmp_path / "y.json")
    assert content_sha256(tmp_path / "x_biasfield.json") == content_sha256(tmp_path / "y_field.json")


def test_apply_takes_the_settings_of_a_study_and_tells_what_lies_outside(image, by_steps, tmp_path, capsys):
    settings, aside = tmp_path / "c.yaml", tmp_path / "aside.nii.gz"
    settings.write_text(yaml.safe_dump({"output": {"keep_dtype": True}}))
    own = nib.load(image)
    affine = own.affine.copy()
    affine[0, 3] += 0.7 * 4 * own.shape[0]
    nib.save(nib.Nifti1Image(np.asarray(own.dataobj), affine), aside)
    n4flow("apply", by_steps["field"], aside, tmp_path / "x.nii.gz", "--config", settings)
    files = {"corrected": tmp_path / "y.nii.gz", "sidecar": tmp_path / "y.json", "field": tmp_path / "y_field.json"}
    apply_scan(aside, by_steps["field"], files, keep_dtype=True)
    assert (tmp_path / "x.nii.gz").read_bytes() == (tmp_path / "y.nii.gz").read_bytes()
    assert nib.load(tmp_path / "x.nii.gz").get_data_dtype() == own.get_data_dtype()
    assert "flagged: field_outside: 70 % of the image lies outside" in capsys.readouterr().err


def test_of_a_store_the_flags_of_each_channel_are_told_without_a_page(tmp_path, capsys):
    store = tmp_path / "in.ome.zarr"
    write_store(store, [np.rint(sheet_volume((16, 24, 28))[0]).astype(np.uint16)])
    config = tmp_path / "config.yaml"
    config.write_text("n4: {iterations: [2, 2, 2, 2, 2, 2]}\nmask: {method: percentile}\n")
    cli.main(["correct", str(store), str(tmp_path / "out.ome.zarr"), "--config", str(config), "--device", "cpu"])
    assert f"{store}: channel 0: flagged: iterations_exhausted: " in capsys.readouterr().err


def test_apply_given_the_field_as_an_image_names_its_control_points(image, by_steps, tmp_path):
    field = by_steps["field_image"]
    line = failure("apply", field, image, tmp_path / "x.nii.gz")
    remedy = f"give its control points, the JSON file beside it: {by_steps['field']}"
    assert line == f"{field}: is an image; {remedy}"


# ---------------------------------------------------------------- the terminal


class Screen(io.StringIO):
    def isatty(self):
        return True


def test_progress_is_one_line_on_a_terminal_and_gone_at_the_end(monkeypatch):
    monkeypatch.setattr(sys, "stderr", screen := Screen())
    monkeypatch.setenv("COLUMNS", "20")
    log = logging.getLogger("n4flow.steps")
    with commanding():
        log.info("/data/one %s", 23 * "x")
        log.warning("two")
        log.info("three")
    empty = "\r" + 19 * " " + "\r"
    assert screen.getvalue() == f"one {15 * 'x'}{empty}n4flow: two\nthree{empty}"


def test_no_progress_where_there_is_no_terminal(capsys):
    with commanding():
        logging.getLogger("n4flow").info("one")
    assert capsys.readouterr().err == ""
    assert not [handler for handler in logging.getLogger("n4flow").handlers if isinstance(handler, Terminal)]


def test_ctrl_c_ends_it_without_a_traceback():
    with pytest.raises(SystemExit) as ended, commanding():
        raise KeyboardInterrupt
    assert ended.value.code == 130


# ---------------------------------------------------------------- sheet and run


@pytest.fixture
def schema(pytestconfig):
    return yaml.safe_load((pytestconfig.rootpath / "workflow/schemas/samples.schema.yaml").read_text())


def counts(addition):
    """How many rows a sheet has, how many are new, and how many found scans are left out."""
    return len(addition.rows), len(addition.added), len(addition.removed)


def test_a_sheet_keeps_its_rows_and_gets_those_that_are_new(tmp_path, schema):
    for name in ("a.nii", "b.nii", "brain.nii"):
        (tmp_path / name).touch()
    scans = [Scan("1", "", "T1w", str(tmp_path / "a.nii")), Scan("1", "x", "T1w", str(tmp_path / "b.nii"))]
    sheet = tmp_path / "sheet.tsv"
    assert counts(add_to_sheet(sheet, scans[:1], schema)) == (1, 1, 0)
    edited = sheet.read_text().replace("\t\tT1w", f"\t{tmp_path / 'brain.nii'}\tT1w")
    sheet.write_text(edited)
    assert counts(add_to_sheet(sheet, scans[:1], schema)) == (1, 0, 0)
    assert sheet.read_text() == edited
    assert counts(add_to_sheet(sheet, scans, schema)) == (2, 1, 0)
    assert [(scan.name, scan.mask) for scan in read_sheet(sheet, schema)] == [
        ("sub-1_T1w", str(tmp_path / "brain.nii")),
        ("sub-1_ses-x_T1w", ""),
    ]


def test_a_sheet_keeps_columns_that_only_some_have(tmp_path, schema):
    for name in ("a.nii", "b.nii", "c.nii"):
        (tmp_path / name).touch()
    echoes = [
        Scan("1", "", "echo-1_MEGRE", str(tmp_path / "a.nii")),
        Scan("1", "", "echo-2_MEGRE", str(tmp_path / "b.nii"), field_from="echo-1_MEGRE"),
    ]
    sheet = tmp_path / "sheet.tsv"
    add_to_sheet(sheet, echoes, schema)
    other = Scan("2", "", "T1w", str(tmp_path / "c.nii"), groups=(("site", "A"),))
    assert counts(add_to_sheet(sheet, [other], schema)) == (3, 1, 0)
    with open(sheet, newline="") as file:
        assert [row["field_from"] for row in csv.DictReader(file, delimiter="\t")] == ["", "echo-1_MEGRE", ""]
    assert read_sheet(sheet, schema) == [*echoes, other]


def test_an_image_whose_time_points_have_rows_is_in_the_sheet(tmp_path, schema):
    path = write_store(tmp_path / "a.ome.zarr", [np.zeros((2, 8, 8, 8), np.uint8)], axes="tzyx")
    found = [Scan("1", "", "SPIM", str(path))]
    sheet = tmp_path / "sheet.tsv"
    rows = [f"9\t{path}\trun-{t}_SPIM\t{t}\n" for t in (0, 1)]
    sheet.write_text("subject\timage\tmodality\tt\n" + "".join(rows))
    for _ in range(2):
        addition = add_to_sheet(sheet, found, schema)
        assert counts(addition) == (2, 0, 0)
        assert [scan.t for scan in addition.of_found] == ["0", "1"]


@pytest.fixture
def three(tmp_path):
    """Scans of three subjects, in a folder."""
    scans = [Scan(label, "", "T1w", str(tmp_path / f"{label}.nii")) for label in "123"]
    for scan in scans:
        Path(scan.image).touch()
    return scans


def test_a_row_that_was_removed_stays_out_and_one_renamed_as_it_is(tmp_path, schema, three):
    sheet = tmp_path / "sheet.tsv"
    add_to_sheet(sheet, three[:2], schema)
    rows = sheet.read_text().splitlines(keepends=True)
    edited = rows[0] + rows[1].replace("T1w", "run-1_T1w")
    sheet.write_text(edited)
    again = add_to_sheet(sheet, three[:2], schema)
    assert counts(again) == (1, 0, 1)
    assert again.removed == three[1:2]
    assert sheet.read_text() == edited
    assert counts(add_to_sheet(sheet, three, schema)) == (2, 1, 1), "what is new in BIDS still comes in"
    names = ["sub-1_run-1_T1w", "sub-3_T1w"]
    assert [scan.name for scan in read_sheet(sheet, schema)] == names
    listed = found_file(sheet).read_text().splitlines(keepends=True)
    found_file(sheet).write_text("".join(line for line in listed if not line.startswith("2")))
    assert [scan.name for scan in add_to_sheet(sheet, three, schema).added] == ["sub-2_T1w"]


def test_a_dataset_by_another_path_is_the_same(tmp_path, schema, three):
    sheet = tmp_path / "sheet.tsv"
    add_to_sheet(sheet, three, schema)
    rows = sheet.read_text().splitlines(keepends=True)
    sheet.write_text("".join(rows[:2]).replace("T1w", "run-1_T1w"))
    (tmp_path / "link").symlink_to(tmp_path)
    moved = [replace(scan, image=scan.image.replace(str(tmp_path), f"{tmp_path}/link")) for scan in three]
    assert counts(add_to_sheet(sheet, moved, schema)) == (1, 0, 2)


def test_a_scan_whose_name_another_image_has_comes_in_when_that_row_is_renamed(tmp_path, schema, three):
    sheet = tmp_path / "sheet.tsv"
    add_to_sheet(sheet, three[:1], schema)
    new = replace(three[0], image=three[1].image)
    for _ in range(2):
        again = add_to_sheet(sheet, [new], schema)
        assert (counts(again), again.taken) == ((1, 0, 0), [(new, three[0])])
    sheet.write_text(sheet.read_text().replace("T1w", "run-1_T1w"))
    again = add_to_sheet(sheet, [new], schema)
    assert (counts(again), again.taken) == ((2, 1, 0), [])


def test_a_row_that_was_given_another_image_keeps_its_name_without_a_word(tmp_path, schema, three):
    sheet = tmp_path / "sheet.tsv"
    add_to_sheet(sheet, three[:1], schema)
    sheet.write_text(sheet.read_text().replace(three[0].image, three[1].image))
    again = add_to_sheet(sheet, three[:1], schema)
    assert (counts(again), again.taken) == ((1, 0, 0), [])


def test_without_the_sheet_all_begins_anew(tmp_path, schema, three):
    sheet = tmp_path / "sheet.tsv"
    add_to_sheet(sheet, three, schema)
    sheet.unlink()
    assert counts(add_to_sheet(sheet, three[:2], schema)) == (2, 2, 0)
    assert counts(add_to_sheet(sheet, three, schema)) == (3, 1, 0)


def test_paths_are_resolved_once(tmp_path, schema, three, monkeypatch):
    """Each takes a look at every folder above it, of thousands of scans."""
    sheet = tmp_path / "sheet.tsv"
    add_to_sheet(sheet, three, schema)
    resolved, resolve = [], os.path.realpath
    monkeypatch.setattr(os.path, "realpath", lambda path: resolved.append(path) or resolve(path))
    add_to_sheet(sheet, three, schema)
    assert sorted(resolved) == [scan.image for scan in three]


def test_a_list_of_found_scans_that_is_none_is_a_line(tmp_path, schema, three):
    sheet = tmp_path / "sheet.tsv"
    add_to_sheet(sheet, three, schema)
    found_file(sheet).write_text("image\na.nii\n")
    with pytest.raises(InputError, match="is no list of found scans; remove it: rows that were removed then come back"):
        add_to_sheet(sheet, three, schema)


def test_of_several_at_once_none_loses_rows(tmp_path, schema):
    scans = [Scan(str(n), "", "T1w", str(tmp_path / f"{n}.nii")) for n in range(8)]
    for scan in scans:
        Path(scan.image).touch()
    together = Barrier(len(scans))

    def add(scan):
        together.wait()
        return add_to_sheet(tmp_path / "sheet.tsv", [scan], schema)

    with ThreadPoolExecutor(len(scans)) as threads:
        list(threads.map(add, scans))
    for path in (tmp_path / "sheet.tsv", found_file(tmp_path / "sheet.tsv")):
        assert {scan.name for scan in read_sheet(path, schema)} == {scan.name for scan in scans}


class Became(Exception):
    """In place of a process that becomes Snakemake."""


@pytest.fixture
def study(tmp_path, monkeypatch):
    """Runs n4flow run on a BIDS folder of three subjects; what Snakemake would be asked for, and how."""
    pytest.importorskip("snakemake")
    for label in ("01", "02", "03"):
        for suffix in ("T1w", "FLAIR"):
            image = tmp_path / f"bids/sub-{label}/anat/sub-{label}_{suffix}.nii.gz"
            image.parent.mkdir(parents=True, exist_ok=True)
            image.touch()

    def become(program, words):
        raise Became(words)

    monkeypatch.setattr(os, "execv", become)
    for name in (PARTICIPANTS, TYPED):  # and back again after the test
        monkeypatch.setenv(name, "of another run")

    def run(*options):
        with pytest.raises(Became) as became:
            n4flow("run", tmp_path / "bids", tmp_path / "out", "participant", *options)
        return became.value.args[0], os.environ[PARTICIPANTS], os.environ[TYPED]

    return run


def names_in(sheet):
    with open(sheet, newline="") as file:
        return [f"{row['subject']} {row['modality']}" for row in csv.DictReader(file, delimiter="\t")]


def test_labels_are_all_that_a_run_works_on(study, tmp_path, capsys):
    sheet = tmp_path / "out/code/config/samples.tsv"
    _, participants, typed = study("--participant-label", "01", "--suffix", "T1w", "FLAIR", "--cores", "1")
    assert participants == "01", "though the sheet holds no others: who knows when Snakemake reads it"
    assert "alone" not in capsys.readouterr().err
    assert names_in(sheet) == ["01 FLAIR", "01 T1w"]
    assert typed == f"n4flow run {tmp_path}/bids {tmp_path}/out participant --suffix T1w FLAIR"
    _, participants, typed = study("--participant-label", "sub-03", "02")
    assert participants == "02 03"
    assert typed == f"n4flow run {tmp_path}/bids {tmp_path}/out participant"
    assert f"{sheet}: 4 scans, 2 of them new; this run is for 02 03 alone\n" in capsys.readouterr().err
    assert study("--participant-label", "01")[1] == "01", "with all of its suffixes"
    assert study("--participant-label", "01", "02", "03")[1] == "01 02 03"
    assert study()[1] == ""


def test_a_scan_whose_name_is_taken_is_told(study, tmp_path, capsys):
    mine = tmp_path / "mine.nii"
    mine.touch()
    sheet = tmp_path / "out/code/config/samples.tsv"
    sheet.parent.mkdir(parents=True)
    sheet.write_text(f"subject\timage\n01\t{mine}\n02\t{mine}\n")
    study()
    line = f"{tmp_path}/bids/sub-01/anat/sub-01_T1w.nii.gz is left out: its name, sub-01_T1w, is taken by the row of "
    assert f"n4flow: {line}{mine}: rename that row (and 1 more of this kind)\n" in capsys.readouterr().err


def test_a_participant_that_the_sheet_calls_otherwise_is_meant(study, tmp_path):
    study()
    sheet = tmp_path / "out/code/config/samples.tsv"
    sheet.write_text(sheet.read_text().replace("\n01\t", "\nA\t"))
    assert study("--participant-label", "01")[1] == "A"


def test_a_participant_without_a_row_is_a_line(study, tmp_path, capsys):
    study()
    sheet = tmp_path / "out/code/config/samples.tsv"
    sheet.write_text("".join(line for line in sheet.read_text().splitlines(keepends=True) if line[:2] != "02"))
    line = failure("run", tmp_path / "bids", tmp_path / "out", "participant", "--participant-label", "02")
    assert line == f"{sheet}: holds no row of 02; add one, or give other labels"
    left_out = (
        f"1 left out whose rows were removed from the sheet; to have one back, remove it from {found_file(sheet)}, too"
    )
    assert f"n4flow: {left_out}\n" in capsys.readouterr().err


def test_the_command_after_a_sheet_runs_this_workflow(tmp_path, study, monkeypatch, capsys, pytestconfig):
    """Whatever other workflow lies in the working folder."""
    monkeypatch.chdir(tmp_path)
    mine = pytestconfig.rootpath / "Snakefile"
    Path("Snakefile").write_text("rule another:\n")
    n4flow("sheet", "bids", "--output", "study.tsv")
    assert f"next: snakemake --snakefile {mine} --cores 8" in capsys.readouterr().err
    Path("Snakefile").unlink()
    Path("Snakefile").symlink_to(mine)
    n4flow("sheet", "bids", "--output", "study.tsv")
    assert "next: snakemake --cores 8" in capsys.readouterr().err


def test_a_sheet_in_a_folder_that_is_not_there_is_a_line(tmp_path, study):
    line = failure("sheet", tmp_path / "bids", "--output", tmp_path / "confgi/study.tsv")
    assert line.startswith(f"{tmp_path}/confgi/study.tsv: cannot be written (its folder is not there); make it: ")
    assert not (tmp_path / "confgi").exists()


def test_an_unknown_participant_is_a_line_that_lists_those_there_are(tmp_path, study):
    line = failure("run", tmp_path / "bids", tmp_path / "out", "participant", "--participant-label", "1")
    assert line == f"{tmp_path}/bids: holds no participant 1; there are 01 02 03"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("cores", ["0", "-1", "two", "1.5", ""])
def test_a_number_of_cores_that_is_none_is_a_line(tmp_path, study, cores):
    line = failure("run", tmp_path / "bids", tmp_path / "out", "participant", f"--cores={cores}")
    assert line == f"--cores: {cores!r} is no number of cores; give one from 1 on, or all"
    assert study("--cores", "all")[0][-2:] == ["--cores", "all"]


def test_run_without_snakemake_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "find_spec", lambda _: None)
    line = failure("run", tmp_path, tmp_path / "out", "participant", "--cores", "1")
    assert line == "n4flow run: needs snakemake; install what it needs: pip install '.[workflow]' in the clone"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("folder", ["absent", "."])
def test_run_on_a_folder_without_scans_is_one_line_and_makes_nothing(tmp_path, folder):
    line = failure("run", tmp_path / folder, tmp_path / "out", "participant", "--cores", "1")
    assert line.startswith(f"{tmp_path / folder}: ")
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- what the manual says


@pytest.mark.parametrize("mesh", ["spline_distance_mm", "spans"])
def test_keys_that_stand_for_options_of_ants_are_taken_beside_the_preset(pytestconfig, mesh):
    manual = (pytestconfig.rootpath / "config/README.md").read_text(encoding="utf-8")
    table = manual.split("### From ANTs and SimpleITK")[1].split("\n## ")[0]
    cells = [line.split("|")[3] for line in table.splitlines() if line.startswith("| `-")]
    known = load_schema(pytestconfig.rootpath / "workflow/schemas/config.schema.yaml")
    keys = {}
    for text in re.findall(r"`(\w+: [^`]+)`", " ".join(cells)):
        keys |= yaml.safe_load(text)
    assert set(keys) >= {"shrink_factor", "iterations", "convergence_threshold", "spans", "fwhm", "wiener_noise"}
    del keys["spans" if mesh != "spans" else "spline_distance_mm"]
    assert config_problems({"n4": {"preset": "itk", **keys}}, known) == []
    as_itk = N4Parameters.from_mapping({"preset": "itk", **keys})
    assert (as_itk.mesh, as_itk.fit, as_itk.iterations) == ("refined", "lee-wolberg-shin", (50, 50, 50, 50))


def test_the_program_ends_at_once_and_loses_nothing_that_it_said(tmp_path):
    for number in range(300):
        image = tmp_path / f"sub-{number}/anat/sub-{number}_T1w.nii.gz"
        image.parent.mkdir(parents=True)
        image.touch()
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1])}
    command = [sys.executable, "-m", "n4flow.cli", "sheet", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert len(done.stdout.splitlines()) == 301


@pytest.mark.parametrize("how", ["name", "sidecar"])
@pytest.mark.parametrize("command", ["correct", "apply"])
def test_a_part_of_a_complex_image_is_refused(image, tmp_path, command, how):
    n4flow("correct", image, tmp_path / "x.nii.gz", "--device", "cpu")
    part = tmp_path / ("sub-01_part-phase_T1w.nii.gz" if how == "name" else "sub-01_T1w.nii.gz")
    part.write_bytes(image.read_bytes())
    if how == "sidecar":
        (tmp_path / "sub-01_T1w.json").write_text(json.dumps({"ImageType": ["ORIGINAL", "PRIMARY", "P", "ND"]}))
    field = [tmp_path / "x_biasfield.json"] if command == "apply" else []
    line = failure(command, *field, part, tmp_path / "y.nii.gz")
    assert line.startswith(f"{part}: is a part of a complex image (")
    assert line.endswith("give its magnitude")


def test_the_results_of_a_dataset_do_not_go_into_it(tmp_path):
    pytest.importorskip("snakemake")
    (tmp_path / "sub-01").mkdir()
    assert "is the dataset itself; give a folder of its own" in failure("run", tmp_path, f"{tmp_path}/.", "participant")
    assert [path.name for path in tmp_path.iterdir()] == ["sub-01"]


def test_the_command_ends_after_ctrl_c_whatever_its_threads_wait_for():
    code = (
        "import signal, threading; from n4flow import cli; signal.signal(signal.SIGINT, cli._interrupted)\n"
        "lock = threading.Lock(); lock.acquire()\n"
        "try: signal.raise_signal(signal.SIGINT)\n"
        "except KeyboardInterrupt: lock.acquire()"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(Path(cli.__file__).parents[1])}, timeout=60
    )
    assert ended.returncode == 130
