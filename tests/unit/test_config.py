"""The config: what is wrong is told before anything runs, a line each."""

import json
import re
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import yaml

from n4flow.errors import InputError
from n4flow.parameters import PRESETS, N4Parameters
from n4flow.qc.dataset import OUTLIER_Z
from n4flow.qc.flags import FLAG_LIMITS
from n4flow.study.bids import Scan
from n4flow.study.config import config_problems, grid_combinations, load_schema, tune_problems, with_defaults

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


@pytest.mark.parametrize(
    ("n4", "line"),
    [
        (
            {"iterations": [5]},
            "n4.iterations: is for 1 stage, n4.fwhm and n4.twicing are for 6; give n4.iterations for 6, such as "
            "[5, 5, 5, 5, 5, 5], or n4.fwhm and n4.twicing for 1: a number, or a list of 1",
        ),
        (
            {"iterations": [5, 7], "fwhm": 0.15},
            "n4.iterations: is for 2 stages, n4.twicing is for 6; give n4.iterations for 6, such as "
            "[5, 7, 7, 7, 7, 7], or n4.twicing for 2: a number, or a list of 2",
        ),
        (
            {"preset": "itk", "fwhm": [0.2, 0.1]},
            "n4.iterations: is for 4 stages, n4.fwhm is for 2; give n4.iterations for 2, such as [50, 50], or n4.fwhm "
            "for 4: a number, or a list of 4",
        ),
    ],
)
def test_stages_that_do_not_go_together_are_told_with_what_to_write(n4, line):
    assert config_problems({"n4": n4}, CONFIG_SCHEMA) == [f"config: {line}"]


def test_every_default_of_the_manual_is_what_yaml_reads_as_that_value():
    """2e-6 is text in YAML."""
    manual = (ROOT / "config/README.md").read_text(encoding="utf-8")
    shown = dict(re.findall(r"^\| `n4\.(\w+)` \| ([^|]*\d[^|]*) \| ", manual, re.MULTILINE))
    del shown["iterations"]  # 6 x 40
    for name, text in shown.items():
        bare = text.strip("`[]")
        value = yaml.safe_load(f"[{bare}]" if "," in bare else bare)
        default = getattr(N4Parameters(), name)
        assert value == (list(default) if isinstance(default, tuple) else default), name
    assert {"stiffness", "spans", "fwhm", "twicing", "convergence_threshold"} <= set(shown)


def test_text_that_looks_like_a_number_is_told_as_yaml_takes_it():
    (problem,) = config_problems(yaml.safe_load("n4: {stiffness: 2e-6}"), CONFIG_SCHEMA)
    assert "(YAML takes 2e-6 for text: write 2.0e-06 instead; " in problem
    (problem,) = config_problems(yaml.safe_load("n4: {stiffness: '0.1'}"), CONFIG_SCHEMA)
    assert "(it is text here: write 0.1 without quotes; " in problem


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


# ---------------------------------------------------------------- the grid of tune


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
