"""Config and sample sheet: what is wrong is told before anything runs, a line each."""

import gzip
import json
import re
from dataclasses import fields
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import yaml

from n4flow.errors import InputError
from n4flow.parameters import PRESETS, N4Parameters
from n4flow.qc.dataset import OUTLIER_Z
from n4flow.qc.metrics import FLAG_LIMITS
from n4flow.study.bids import Scan
from n4flow.study.inputs import (
    config_problems,
    grid_combinations,
    load_schema,
    place_problem,
    read_sheet,
    results_problem,
    tune_problems,
    voxels_of_frame,
    with_defaults,
    with_least_hash,
)

ROOT = Path(__file__).resolve().parents[2]
CONFIG = yaml.safe_load((ROOT / "config/config.yaml").read_text(encoding="utf-8"))
CONFIG_SCHEMA = load_schema(ROOT / "workflow/schemas/config.schema.yaml")
SHEET_SCHEMA = load_schema(ROOT / "workflow/schemas/samples.schema.yaml")


def test_config_of_the_repository_is_the_defaults():
    assert config_problems(CONFIG, CONFIG_SCHEMA) == []
    assert with_defaults({}, CONFIG_SCHEMA) == CONFIG


def test_parameters_may_be_numbers_of_numpy():
    given = N4Parameters(
        shrink_factor=np.int64(2),
        iterations=np.array([5, 6]),
        spans=(np.int8(1), 2, 3),
        fwhm=np.float32(0.5),
        twicing=np.array([0, 0.75]),
    )
    assert given == N4Parameters(shrink_factor=2, iterations=(5, 6), spans=(1, 2, 3), fwhm=0.5, twicing=(0, 0.75))
    assert json.loads(json.dumps(given.to_mapping()))["iterations"] == [5, 6]
    with pytest.raises(InputError, match=r"n4\.shrink_factor: .* whole number"):
        N4Parameters(shrink_factor=np.float64(2))


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("extension", [".nii", ".nii.gz"])
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("shape", [(5, 6), (5, 6, 7), (5, 6, 7, 8)])
def test_voxels_of_a_frame_as_nibabel_has_them(tmp_path, kind, extension, order, shape):
    path = tmp_path / f"a{extension}"
    nib.save(kind(np.zeros(shape, dtype=np.uint8), np.eye(4), kind.header_class(endianness=order)), path)
    assert voxels_of_frame(path) == np.prod(shape[:3])


@pytest.mark.parametrize(
    "content", [b"", b"x" * 400, gzip.compress(b"x" * 400, mtime=0)[:30], (348).to_bytes(4, "little")]
)
@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_what_is_no_image_has_no_voxels(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert voxels_of_frame(tmp_path / name) == 0
    assert voxels_of_frame(tmp_path / "not there.nii") == voxels_of_frame(tmp_path) == 0


@pytest.mark.parametrize(
    ("text", "hint"),
    [("2", "write 2 "), ("1e-5", r"write 1\.0e-05 "), ("0.5", r"write 0\.5 "), ("1e300", r"write 1\.0e\+300 ")],
)
def test_a_number_that_is_text_is_shown_as_yaml_reads_it(text, hint):
    (problem,) = config_problems(with_defaults({"n4": {"convergence_threshold": text}}, CONFIG_SCHEMA), CONFIG_SCHEMA)
    assert re.search(hint, problem)
    assert yaml.safe_load(hint.replace("\\", "").removeprefix("write ")) == float(text)


def test_the_order_of_the_keys_in_a_file_does_not_count():
    first = {
        "qc": {"flags": {"self_check": 1, "cjv_worse": 2}, "field_window_log": 1},
        "n4": {"fwhm": 1, "preset": "itk"},
    }
    second = {
        "n4": {"preset": "itk", "fwhm": 1},
        "qc": {"field_window_log": 1, "flags": {"cjv_worse": 2, "self_check": 1}},
    }
    assert repr(with_defaults(first, CONFIG_SCHEMA)) == repr(with_defaults(second, CONFIG_SCHEMA))


def commented_keys():
    """The n4 keys that config.yaml shows as comments, with the values it shows."""
    text = (ROOT / "config/config.yaml").read_text(encoding="utf-8")
    section = text.split("\nn4:\n")[1].split("\n\n")[0]
    names = "|".join(field.name for field in fields(N4Parameters))
    return yaml.safe_load("\n".join(re.findall(rf"^  # ((?:{names}): \S+.*)$", section, flags=re.M)))


def test_n4_keys_that_the_config_shows_are_those_of_the_package_and_show_its_defaults():
    shown = commented_keys()
    assert set(shown) == {field.name for field in fields(N4Parameters)}
    assert set(CONFIG_SCHEMA["properties"]["n4"]["properties"]) == {"preset", *shown}
    assert CONFIG["n4"] == {"preset": "default"}
    del shown["spline_distance_mm"]  # instead of spans: an example, not a default
    assert N4Parameters.from_mapping(shown) == N4Parameters.from_mapping(CONFIG["n4"]) == N4Parameters()


def test_presets_of_the_schema_are_those_of_the_package_and_a_key_wins_over_them():
    assert CONFIG_SCHEMA["properties"]["n4"]["properties"]["preset"]["enum"] == list(PRESETS)
    assert N4Parameters.from_mapping({"preset": "itk"}).iterations == (50, 50, 50, 50)
    assert N4Parameters.from_mapping({"preset": "itk", "iterations": [7]}).iterations == (7,)
    for name in PRESETS:
        parameters = N4Parameters.from_mapping({"preset": name})
        assert N4Parameters.from_mapping(parameters.to_mapping()) == parameters
    assert config_problems({"n4": {"preset": "mri-hed"}}, CONFIG_SCHEMA)


def test_a_distance_wins_over_the_spans_of_a_preset_and_does_not_stand_beside_spans():
    itk = N4Parameters.from_mapping({"preset": "itk"})
    assert itk.spans == (1, 1, 1)
    assert N4Parameters.from_mapping({"preset": "itk", "spline_distance_mm": 50.0}).spans is None
    both = {"n4": {"spans": [4, 4, 4], "spline_distance_mm": 30.0}}
    assert config_problems(both, CONFIG_SCHEMA) == [
        "config: n4.spans: stands beside n4.spline_distance_mm; give one of the two"
    ]


@pytest.mark.parametrize("values", [{"iterations": 50}, {"iterations": None}, {"spans": 4}, {"preset": ["itk"]}])
def test_a_value_of_another_type_is_one_line_too(values):
    with pytest.raises(InputError, match=f"n4.{next(iter(values))}"):
        N4Parameters.from_mapping(values)


def test_limits_of_the_flags_are_those_of_the_package():
    limits = dict(CONFIG["qc"]["flags"])
    assert limits.pop("outlier_z") == OUTLIER_Z
    assert limits == FLAG_LIMITS


def test_every_limit_of_a_flag_has_a_bound_a_default_and_a_description():
    limits = CONFIG_SCHEMA["properties"]["qc"]["properties"]["flags"]["properties"]
    assert [name for name, part in limits.items() if not {"description", "default"} <= set(part)] == []
    for name in limits:
        (problem,) = config_problems({"qc": {"flags": {name: -2}}}, CONFIG_SCHEMA)
        assert problem.startswith(f"config: qc.flags.{name}: -2 is less than")


def test_every_key_of_the_config_is_commented():
    lines = (ROOT / "config/config.yaml").read_text(encoding="utf-8").splitlines()
    keys = [n for n, line in enumerate(lines) if re.match(r"\s*\w+:", line)]
    assert len(keys) > 12
    # two keys that stand together may share a comment
    assert [lines[n] for n in keys if not any("#" in line for line in lines[max(0, n - 2) : n])] == []


def described(schema, path=""):
    for key, part in schema.get("properties", {}).items():
        yield f"{path}{key}", part
        yield from described(part, f"{path}{key}.")


@pytest.mark.parametrize(
    ("key", "part"), [*described(CONFIG_SCHEMA), *described(SHEET_SCHEMA)], ids=lambda part: str(part)[:20]
)
def test_every_key_of_a_schema_has_a_description_and_a_type(key, part):
    assert len(part["description"]) > 5
    assert "type" in part or "enum" in part


def test_package_list_names_every_file_of_the_package():
    package = ROOT / "workflow/scripts/n4flow"
    listed = (package / "files.txt").read_text(encoding="utf-8").split()
    there = {
        p.relative_to(package).as_posix() for p in package.rglob("*") if p.is_file() and "__pycache__" not in p.parts
    }
    assert listed == sorted(there)


# ---------------------------------------------------------------- the config


def changed(key, value):
    section, _, name = key.rpartition(".")
    return {section: {name: value}} if section else {name: value}


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("sample", "a.tsv", "config: sample: there is no such key; did you mean samples?"),
        ("n4.fwmh", 0.1, "config: n4.fwmh: there is no such key; did you mean fwhm?"),
        ("n4.iteration", [9], "config: n4.iteration: there is no such key; did you mean iterations?"),
        ("output.zzz", 1, "config: output.zzz: there is no such key; known are bias_field, keep_dtype"),
        (3, 1, "config: 3: there is no such key; known are "),
        ("samples", 3, "config: samples: 3 is not of type 'string'; path of the sample sheet"),
        ("device", "cuda", "config: device: 'cuda' is not one of ['auto', 'gpu', 'cpu']; where N4 computes"),
        ("n4", None, "config: n4: None is not of type 'object'; the estimate"),
        ("n4.shrink_factor", "4", "config: n4.shrink_factor: '4' is not of type 'integer', 'null'; "),
        ("n4.shrink_factor", 0, "config: n4.shrink_factor: 0 is less than the minimum of 1; "),
        ("n4.shrink_factor", True, "config: n4.shrink_factor: True is not of type 'integer', 'null'; "),
        ("n4.iterations", 50, "config: n4.iterations: 50 is not of type 'array'; "),
        ("n4.iterations", [], "config: n4.iterations: [] should be non-empty; "),
        ("n4.iterations", [50, 0], "config: n4.iterations.1: 0 is less than the minimum of 1; "),
        ("n4.histogram_bins", 9, "config: n4.histogram_bins: 9 is less than the minimum of 10; "),
        ("n4.histogram_bins", 30001, "config: n4.histogram_bins: 30001 is greater than the maximum of 30000; "),
        ("n4.fwhm", 0, "config: n4.fwhm: 0 is less than the minimum of 1e-09; "),
        ("n4.mesh", "coarse", "config: n4.mesh: 'coarse' is not one of ['fixed', 'refined']; "),
        ("mask.percentile", 100, "config: mask.percentile: 100 is greater than or equal to the maximum of 100; "),
        ("output.keep_dtype", "yes", "config: output.keep_dtype: 'yes' is not of type 'boolean'; "),
        ("reference.scans", -1, "config: reference.scans: -1 is less than the minimum of 0; how many scans SimpleITK"),
        ("reference.scans", 0.5, "config: reference.scans: 0.5 is not of type 'integer', 'string'; "),
        ("reference.scans", True, "config: reference.scans: True is not of type 'integer', 'string'; "),
        ("reference.scans", "half", "config: reference.scans: 'half' does not fit; how many scans SimpleITK corrects"),
        ("reference.scans", "20", "config: reference.scans: '20' does not fit; "),
        (
            "reference.fraction",
            0.1,
            "config: reference.fraction: there is no such key; give reference.scans, a number of scans, or all",
        ),
        (
            "qc",
            {"flags": {"reference_r": 0.9}},
            "config: qc.flags.reference_r: there is no such key; give reference_rms, the rms difference from ",
        ),
        ("qc.field_window_log", -0.4, "config: qc.field_window_log: -0.4 is less than or equal to the minimum of 0; "),
    ],
)
def test_wrong_key_or_value_is_one_line_with_what_to_do(key, value, line):
    (problem,) = config_problems(changed(key, value) if isinstance(key, str) else {key: value}, CONFIG_SCHEMA)
    assert problem.startswith(line)
    assert "\n" not in problem
    assert len(problem.partition("; ")[2]) > 8


def test_every_problem_is_told_at_once():
    assert len(config_problems({"devices": "cpu", "n4": {"fwhm": 0, "iterations": [0]}}, CONFIG_SCHEMA)) == 3


def refused_by_the_package(values):
    try:
        N4Parameters.from_mapping(values)
    except InputError:
        return True
    return False


@pytest.mark.parametrize(
    "values",
    [
        {"shrink_factor": 4.0},
        {"shrink_factor": None},
        {"twicing": [0, 0.2, 0.4, 0.6, 0.8, 1]},
        {"twicing": [0, 0.2, 0.4, 0.6, 0.8, 1.1]},
        {"twicing": []},
        {"twicing": 1.1},
        {"histogram_bins": 200.0},
        {"histogram_bins": 30001},
        {"iterations": [50.0]},
        {"spline_distance_mm": float("inf")},
        {"spline_distance_mm": float("nan")},
        {"fwhm": float("nan")},
        {"wiener_noise": float("inf")},
        {"convergence_threshold": float("nan")},
    ],
    ids=str,
)
def test_value_that_the_package_refuses_is_found_before_anything_runs(values):
    assert bool(config_problems({"n4": values}, CONFIG_SCHEMA)) == refused_by_the_package(values)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_window_of_the_fields_that_is_no_number_is_found_before_anything_runs(value):
    assert config_problems({"qc": {"field_window_log": value}}, CONFIG_SCHEMA)


def test_defaults_fill_what_is_not_given_and_nothing_else():
    given = {"n4": {"fwhm": 0.3}, "device": "cpu"}
    filled = with_defaults(given, CONFIG_SCHEMA)
    assert filled["n4"] == {**CONFIG["n4"], "fwhm": 0.3}
    assert filled["device"] == "cpu"
    assert filled["qc"] == CONFIG["qc"]
    assert given == {"n4": {"fwhm": 0.3}, "device": "cpu"}


# ---------------------------------------------------------------- the sheet


@pytest.fixture(autouse=True)
def _working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.nii", "b.nii.gz", "mask.nii.gz"):
        (tmp_path / name).touch()


def sheet(text, **how):
    """Read a sheet of these lines, columns separated by blanks (. is an empty cell)."""
    lines = [line.split() for line in text.strip().splitlines()]
    content = "\n".join("\t".join("" if cell == "." else cell for cell in line) for line in lines)
    Path("sheet.tsv").write_text(content + "\n", encoding="utf-8")
    return read_sheet("sheet.tsv", SHEET_SCHEMA, **how)


def problems_of(text):
    with pytest.raises(InputError) as error:
        sheet(text)
    return str(error.value).splitlines()


def test_rows_become_scans_with_the_defaults():
    scans = sheet("subject image session mask modality\n01 a.nii . . .\n02 b.nii.gz pre mask.nii.gz run-1_T2w")
    assert scans == [
        Scan("01", "", "T1w", "a.nii"),
        Scan("02", "pre", "run-1_T2w", "b.nii.gz", "mask.nii.gz"),
    ]


def test_row_may_take_the_field_of_another_row_of_its_subject_and_session():
    scans = sheet(
        """
        subject session image modality field_from
        01 pre a.nii echo-2_MEGRE echo-1_MEGRE
        01 pre a.nii echo-1_MEGRE .
        01 pre b.nii.gz task-rest_bold echo-1_MEGRE
        01 post a.nii echo-1_MEGRE .
        """
    )
    assert [scan.field_from for scan in scans] == ["echo-1_MEGRE", "", "echo-1_MEGRE", ""]
    assert [scan.field_source for scan in scans] == ["sub-01_ses-pre_echo-1_MEGRE"] * 3 + [
        "sub-01_ses-post_echo-1_MEGRE"
    ]


@pytest.mark.parametrize(
    ("rows", "lines"),
    [
        ("01 . a.nii T2w T1w", {2: "T1w leads to sub-01_T1w, which has no row; add one, or"}),
        ("01 . a.nii T2w T1w\n02 . a.nii T1w .", {2: "T1w leads to sub-01_T1w, which has no row; add one, or"}),
        ("01 x a.nii T2w T1w\n01 y a.nii T1w .", {2: "T1w leads to sub-01_ses-x_T1w, which has no row; add one, or"}),
        ("01 . a.nii T2w T1", {2: "T1 leads to sub-01_T1, which has no row; add one, or"}),
        ("01 . a.nii T1w T1w", {2: "T1w is the row itself; leave it empty"}),
        (
            "01 . a.nii T1w .\n01 . a.nii T2w T1w\n01 . a.nii FLAIR T2w",
            {4: "T2w leads to sub-01_T2w, which has no field of its own; name the row that"},
        ),
        (
            "01 . a.nii T1w T2w\n01 . a.nii T2w T1w",
            {2: "T2w leads to sub-01_T2w, which has no field", 3: "T1w leads to sub-01_T1w, which has no field"},
        ),
        # the row of the field is there, though something else is wrong with it
        ("01 . absent.nii T1w .\n01 . a.nii T2w T1w", {2: None}),
    ],
)
def test_field_that_is_not_there_is_one_line_for_each_row(rows, lines):
    problems = problems_of(f"subject session image modality field_from\n{rows}")
    assert len(problems) == len(lines)
    for problem, (number, words) in zip(problems, lines.items(), strict=True):
        assert problem.startswith(f"sheet.tsv, line {number}: {f'field_from {words}' if words else ''}")


def test_a_sheet_of_a_spreadsheet_in_another_encoding_is_told_how_to_be_saved():
    Path("sheet.tsv").write_text("subject\timage\n01\ta.nii\n", encoding="utf-16")
    with pytest.raises(InputError, match=r"sheet\.tsv: is no text in UTF-8; save it as tab-separated text in UTF-8"):
        read_sheet("sheet.tsv", SHEET_SCHEMA)


def test_two_columns_are_enough_in_any_order():
    assert sheet("image subject\na.nii 01") == [Scan("01", "", "T1w", "a.nii")]


@pytest.mark.parametrize(
    "content",
    [
        "\ufeffsubject\timage\n01\ta.nii\n",
        "subject\timage\r\n01\ta.nii\r\n",
        "subject\timage\n\n01\t a.nii \n\n",
        "subject\timage\n01\ta.nii",
    ],
    ids=["byte order mark", "Windows line ends", "blanks and empty lines", "no line end"],
)
def test_sheets_that_spreadsheets_write_are_read(content):
    Path("sheet.tsv").write_bytes(content.encode())
    assert read_sheet("sheet.tsv", SHEET_SCHEMA) == [Scan("01", "", "T1w", "a.nii")]


@pytest.mark.parametrize("empty", ["\t\t\t", "", "  ", '""\t""\t\t', "\t\t\t\t\t", "\t"])
def test_rows_of_nothing_but_tabs_are_no_rows(empty):
    """Spreadsheets write them where something was deleted."""
    lines = ["subject\timage\tmask\tmodality", "01\ta.nii\t\tT1w", empty, "02\tb.nii.gz\t\tT1w", empty, empty]
    Path("sheet.tsv").write_text("\r\n".join(lines), encoding="utf-8")
    assert [scan.subject for scan in read_sheet("sheet.tsv", SHEET_SCHEMA)] == ["01", "02"]
    Path("sheet.tsv").write_text("\n".join([lines[0], empty, "03\tabsent.nii\t\t"]), encoding="utf-8")
    with pytest.raises(InputError, match=r"sheet\.tsv, line 3: image absent\.nii is not there"):
        read_sheet("sheet.tsv", SHEET_SCHEMA)


def test_columns_of_nothing_but_tabs_are_no_columns():
    Path("sheet.tsv").write_text("subject\timage\t\t\n01\ta.nii\n02\tb.nii.gz\t\t \n", encoding="utf-8")
    assert [scan.subject for scan in read_sheet("sheet.tsv", SHEET_SCHEMA)] == ["01", "02"]
    Path("sheet.tsv").write_text("subject\timage\t\n01\ta.nii\tT1w\n", encoding="utf-8")
    with pytest.raises(InputError, match="line 2: has another number of columns than the header"):
        read_sheet("sheet.tsv", SHEET_SCHEMA)


def test_a_sheet_of_nothing_but_tabs_has_no_rows():
    Path("sheet.tsv").write_text("subject\timage\n\t\n\t\n", encoding="utf-8")
    with pytest.raises(InputError, match="the sheet has no rows; add a line per scan"):
        read_sheet("sheet.tsv", SHEET_SCHEMA)


def test_files_that_the_workflow_makes_need_not_be_there():
    assert sheet("subject image\n01 made.nii", made=["made.nii"]) == [Scan("01", "", "T1w", "made.nii")]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("subject image age\n01 a.nii 3", "sheet.tsv: unknown column 'age'; known are subject, session, image, mask,"),
        ("subject\n01", "sheet.tsv: there is no column 'image'; add it"),
        ("subject image image\n01 a.nii b.nii.gz", "sheet.tsv: column 'image' "),
        ("subject image", "sheet.tsv: the sheet has no rows; add a line per scan"),
        ("subject image\n01 a.nii\n01 b.nii.gz", "sheet.tsv, line 3: sub-01_T1w stands in line 2 already; remove one"),
        ("subject image\n01 absent.nii", "sheet.tsv, line 2: image absent.nii is not there; check the path"),
        ("subject image mask\n01 a.nii absent.nii", "sheet.tsv, line 2: mask absent.nii is not there; check the path"),
        ("subject image\n01 .", "sheet.tsv, line 2: 'image' is a required property; "),
        ("subject image\n. a.nii", "sheet.tsv, line 2: 'subject' is a required property; "),
        (
            "subject image\n01 a.mgz",
            "sheet.tsv, line 2: image: 'a.mgz' does not fit; path of the image, .nii or .nii.gz; convert it: "
            "nib-convert a.mgz a.nii.gz",
        ),
        ("subject image\n0_1 a.nii", "sheet.tsv, line 2: subject '0_1' is no BIDS label, use letters and digits only"),
        ("subject image session\n01 a.nii s-1", "sheet.tsv, line 2: session 's-1' is no BIDS label, use letters"),
        ("subject image modality\n01 a.nii T1", "sheet.tsv, line 2: modality 'T1' does not end in a known suffix, "),
        (
            "subject image modality\n01 a.nii part-phase_MEGRE",
            "sheet.tsv, line 2: image a.nii is a part of a complex image (part-phase), give its magnitude",
        ),
        ("subject image\n01 a.nii 1", "sheet.tsv, line 2: has another number of columns than the header; "),
        ("subject image session\n01 a.nii", "sheet.tsv, line 2: has another number of columns than the header; "),
    ],
)
def test_what_is_wrong_is_one_line_with_file_line_and_what_to_do(text, line):
    (problem,) = problems_of(text)
    assert problem.startswith(line)


def test_every_wrong_line_is_told_with_its_number():
    problems = problems_of("subject image\n01 a.nii\n0_2 a.nii\n03 absent.nii\n01 b.nii.gz")
    assert [problem.partition(":")[0] for problem in problems] == [f"sheet.tsv, line {n}" for n in (3, 4, 5)]


def test_same_subject_may_have_sessions_and_runs():
    rows = "01 a . T1w\n01 a x T1w\n01 a . run-1_T1w\n01 a . T2w".replace(" a ", " a.nii ")
    assert len(sheet(f"subject image session modality\n{rows}")) == 4


def test_sheet_separated_by_commas_is_told_about_tabs():
    Path("sheet.tsv").write_text("subject,image\n01,a.nii\n")
    with pytest.raises(InputError, match="columns are separated by tabs"):
        read_sheet("sheet.tsv", SHEET_SCHEMA)


@pytest.mark.parametrize("content", [None, b"", b"subject\timage\n\xff\xfe\n", b'subject\timage\n"01\ta.nii\n'])
def test_unreadable_sheet_is_one_error_that_names_it(content):
    if content is not None:
        Path("sheet.tsv").write_bytes(content)
    with pytest.raises(InputError) as error:
        read_sheet("sheet.tsv", SHEET_SCHEMA)
    assert all(line.startswith("sheet.tsv: ") for line in str(error.value).splitlines())


def test_link_to_a_file_that_was_not_fetched_is_told_as_such():
    Path("link.nii").symlink_to("absent.nii")
    (problem,) = problems_of("subject image\n01 link.nii")
    assert "link" in problem.replace("link.nii", "")


@pytest.mark.parametrize(
    ("place", "problem"),
    [
        ("results", ""),
        ("../out/a b (1)", ""),
        ("/data/~/it's $5", ""),
        ("~/out", "~/out is taken as it stands; write it out: /home/me/out"),
        ("$HOME/out", "$HOME/out is taken as it stands; write it out: /home/me/out"),
        ("/data/${HOME}/out", "/data/${HOME}/out holds { }, which Snakemake takes for wildcards; rename it"),
        ("a{b}", "a{b} holds { }, which Snakemake takes for wildcards; rename it"),
        ("<results>/x", "<results>/x holds < >, which Snakemake takes for wildcards; rename it"),
    ],
)
def test_folders_that_are_written_to_are_what_they_are_called(monkeypatch, place, problem):
    monkeypatch.setenv("HOME", "/home/me")
    assert place_problem("logs", place) == (f"config: pathvars.logs: {problem}" if problem else "")


@pytest.mark.parametrize("path", ["~/x.nii", "$HOME/x.nii"])
def test_a_path_for_the_shell_is_told_in_full(monkeypatch, path):
    monkeypatch.setenv("HOME", "/home/me")
    (problem,) = problems_of(f"subject image\n01 {path}")
    assert problem == f"sheet.tsv, line 2: image {path} is not there; write it out: /home/me/x.nii"


@pytest.mark.parametrize(
    ("results", "image", "fits"),
    [
        ("results", "raw/sub-01/anat/a.nii", True),
        ("raw/derivatives/n4", "raw/sub-01/anat/a.nii", True),
        ("raw2", "raw/a.nii", True),
        ("raw", "raw/sub-01/anat/a.nii", False),
        (".", "raw/a.nii", False),
        ("link", "raw/sub-01/anat/a.nii", False),
        ("raw", "other/../raw/a.nii", False),
    ],
)
def test_results_do_not_go_where_images_lie(tmp_path, results, image, fits):
    (tmp_path / "link").symlink_to("raw")
    problem = results_problem(results, [Scan("01", "", "T1w", image)])
    assert bool(problem) != fits
    if problem:
        assert problem.startswith(f"config: pathvars: the results would be written to {results}, where {image} lies; ")


# ---------------------------------------------------------------- the scans with a reference


NAMES = [f"sub-{n:04d}_T1w" for n in range(400)]


@pytest.mark.parametrize("count", [0, 1, 20, 399, 400])
def test_as_many_are_chosen_as_asked_for(count):
    chosen = with_least_hash(NAMES, count)
    assert len(chosen) == count
    assert chosen <= set(NAMES)


@pytest.mark.parametrize("count", [401, 10**9, "all"])
def test_all_are_chosen_where_there_are_no_more(count):
    assert with_least_hash(NAMES, count) == set(NAMES)


def test_more_keep_those_of_fewer():
    assert with_least_hash(NAMES, 20) < with_least_hash(NAMES, 21)


def test_a_further_name_takes_the_place_of_one_at_most():
    before = with_least_hash(NAMES, 20)
    lost = [len(before - with_least_hash([*NAMES, f"sub-new{n}_T1w"], 20)) for n in range(200)]
    assert set(lost) == {0, 1}


def test_choice_hangs_on_the_names_alone():
    # SHA-256 of the name: the same on every machine and in every version
    assert sorted(with_least_hash(NAMES[:20][::-1], 4)) == [f"sub-{n:04d}_T1w" for n in (6, 15, 16, 19)]


def test_a_grid_gives_every_combination_a_name_of_its_own_that_is_good_in_a_path():
    grid = {"spline_distance_mm": [40, 60.5], "iterations": [[50], [50, 20]], "convergence_threshold": [1e-5]}
    combinations = grid_combinations(grid)
    assert combinations["spline_distance_mm-60.5_iterations-50x20_convergence_threshold-1e-05"] == {
        "spline_distance_mm": 60.5,
        "iterations": [50, 20],
        "convergence_threshold": 1e-5,
    }
    assert len(combinations) == 4
    assert [name for name in combinations if not re.fullmatch(r"[A-Za-z0-9_.+-]+", name)] == []
    assert grid_combinations({}) == {}


@pytest.mark.parametrize(
    ("n4", "grid", "lines"),
    [
        ({}, {"spline_distance_mm": [40, 60], "preset": ["default", "linumpy", "itk"]}, []),
        ({}, {"fwmh": [0.1, 0.2]}, ["tune.grid.fwmh: there is no such key; did you mean fwhm?"]),
        (
            {},
            {"fwhm": [0.1, -1], "shrink_factor": [0]},
            [
                "tune.grid.fwhm: -1 is less than the minimum of 1e-09; full width at half maximum",
                "tune.grid.shrink_factor: 0 is less than the minimum of 1; estimate on every n-th voxel",
            ],
        ),
        (
            {},
            {"convergence_threshold": ["1e-3"]},
            ["tune.grid.convergence_threshold: '1e-3' is not of type 'number'; "],
        ),
        ({}, {"fwhm": 0.1}, ["tune.grid.fwhm: 0.1 is not of type 'array'; a list of the values to try, each once"]),
        ({}, {"fwhm": [0.1, 0.1]}, ["tune.grid.fwhm: [0.1, 0.1] has non-unique elements; a list of the values"]),
        ({}, {"fwhm": []}, ["tune.grid.fwhm: [] "]),
        ({}, {"fwhm": [0.1, float("nan")]}, ["tune.grid.fwhm: is no finite number; give one"]),
        (
            {"spans": [1, 1, 1]},
            {"spline_distance_mm": [40, 60]},
            [f"tune.grid: spline_distance_mm-{mm}: n4.spans: stands beside n4.spline_distance_mm" for mm in (40, 60)],
        ),
    ],
)
def test_each_problem_of_a_grid_is_one_line(n4, grid, lines):
    found = config_problems({"n4": n4, "tune": {"subjects": ["01"], "grid": grid}}, CONFIG_SCHEMA)
    assert len(found) == len(lines)
    assert [line for line, problem in zip(lines, found, strict=True) if not problem.startswith(f"config: {line}")] == []


def test_a_name_that_no_folder_can_have_is_told_once():
    grid = {"iterations": [[10] * 90], "fwhm": [0.1, 0.2]}
    (found,) = config_problems({"tune": {"subjects": ["01"], "grid": grid}}, CONFIG_SCHEMA)
    assert found == "config: tune.grid: has too many keys; put those with one value under n4"


SCANS = [Scan(label, session, "T1w", "x.nii") for label, session in (("01", "a"), ("01", "b"), ("02", ""))]
SCANS += [Scan("01", "a", "T2w", "y.nii", field_from="T1w")]  # it is not estimated, so there is nothing to tune


@pytest.mark.parametrize(
    ("subjects", "grid", "found"),
    [
        ([], {}, []),
        (["01"], {"fwhm": [0.1, 0.2]}, []),
        (
            ["03"],
            {"fwhm": [0.1]},
            ["tune.subjects: no scan of '03' in the sheet has a field of its own; give other labels"],
        ),
        (["01"], {}, ["tune.grid: is empty; give both subjects and grid, or neither"]),
        ([], {"fwhm": [0.1]}, ["tune.subjects: is empty; give both subjects and grid, or neither"]),
        (
            ["01"],
            {"histogram_bins": list(range(100, 151))},
            [
                "tune: 2 scans with every combination are 102 corrections, more than the 100 of a page; "
                "take fewer subjects or values"
            ],
        ),
    ],
)
def test_what_tune_asks_of_the_sheet_is_checked(subjects, grid, found):
    assert tune_problems({"subjects": subjects, "grid": grid}, SCANS) == [f"config: {line}" for line in found]


def test_a_huge_grid_is_not_spelt_out():
    grid = {
        key: list(range(10, 1010))
        for key in ("histogram_bins", "spline_distance_mm", "shrink_factor", "convergence_threshold")
    }
    assert config_problems({"tune": {"subjects": ["01"], "grid": grid}}, CONFIG_SCHEMA) == []
    (problem,) = tune_problems({"subjects": ["01"], "grid": grid}, SCANS)
    assert "more than the 100" in problem
