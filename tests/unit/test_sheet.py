"""The sample sheet: what is wrong is told before anything runs, a line each."""

from pathlib import Path

import pytest

from n4flow.errors import InputError
from n4flow.study.bids import Scan
from n4flow.study.config import load_schema
from n4flow.study.sheet import place_problem, read_sheet, results_problem, with_least_hash, zeros_problem

ROOT = Path(__file__).resolve().parents[2]
SHEET_SCHEMA = load_schema(ROOT / "workflow/schemas/samples.schema.yaml")


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


def test_further_columns_group_scans_in_the_report():
    scans = sheet("subject group_site image group_scan_year\n01 A a.nii 2020\n02 . b.nii.gz 2021")
    assert [scan.groups for scan in scans] == [(("site", "A"), ("scan_year", "2020")), (("scan_year", "2021"),)]
    assert [scan.name for scan in scans] == ["sub-01_T1w", "sub-02_T1w"]
    (problem,) = problems_of("subject site image\n01 A a.nii")
    assert problem.endswith("field_from, channel, t, and group_… (group_site) to group scans by in the report")
    assert len(problems_of("subject group_ image\n01 A a.nii")) == 1


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
    assert sheet("subject image\n01 made.nii", to_be_made=["made.nii"]) == [Scan("01", "", "T1w", "made.nii")]


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
            "subject image\n01 a.mnc",
            "sheet.tsv, line 2: image: 'a.mnc' does not fit; path of the image, .nii, .nii.gz, .mgz, .mgh, .img "
            "(beside its .hdr) or .ome.zarr; convert it: mnc2nii a.mnc a.nii.gz",
        ),
        ("subject image\n0_1 a.nii", "sheet.tsv, line 2: subject '0_1' is no BIDS label, use letters and digits only"),
        ("subject image session\n01 a.nii s-1", "sheet.tsv, line 2: session 's-1' is no BIDS label, use letters"),
        ("subject image modality\n01 a.nii T1", "sheet.tsv, line 2: modality 'T1' does not end in a known suffix, "),
        (
            "subject image modality\n01 a.nii part-phase_MEGRE",
            "sheet.tsv, line 2: image a.nii is a part of a complex image (part-phase), give its magnitude",
        ),
        (
            "subject image t\n01 a.ome.zarr 1.0",
            "sheet.tsv, line 2: t: '1.0' does not fit; of an OME-Zarr image of several time points, the one that the "
            "row is, from 0; without it, all of them",
        ),
        ("subject image\n01 a.nii 1", "sheet.tsv, line 2: has another number of columns than the header; "),
        ("subject image session\n01 a.nii", "sheet.tsv, line 2: has another number of columns than the header; "),
    ],
)
def test_what_is_wrong_is_one_line_with_file_line_and_what_to_do(text, line):
    (problem,) = problems_of(text)
    assert problem.startswith(line)
    assert "quotes" not in problem  # of a table, which has none


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


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (
            [("1", "", "raw/sub-01/anat/sub-01_T1w.nii"), ("2", "", "raw/sub-02_T1w.nii")],
            ("sub-1", "sub-01", " (and 1"),
        ),
        ([("01", "1", "raw/sub-01/ses-01/anat/sub-01_ses-01_T1w.nii")], ("ses-1", "ses-01", "")),
        ([("007", "", "a.nii"), ("7", "", "b.nii")], ("sub-7", "sub-007", "")),
        ([("3", "", "c.nii")], ("sub-3", "sub-03", "")),  # an earlier run has it
        ([("01", "1", "raw/sub-01_ses-1_T1w.nii"), ("10", "", "a.nii"), ("0", "", "b.nii")], None),
        ([("1", "", "raw/sub-101/sub-101_T1w.nii"), ("2", "", "raw/sub-a2_T1w.nii"), ("03", "", "sub-3.nii")], None),
    ],
)
def test_labels_that_have_lost_their_zeros_are_told(tmp_path, rows, said):
    (tmp_path / "sub-03").mkdir()
    scans = [Scan(subject, session, "T1w", image) for subject, session, image in rows]
    line = zeros_problem("study.tsv", scans, tmp_path)
    if said is None:
        assert line == ""
        return
    label, other, more = said
    assert line.startswith(f"study.tsv: {label} is taken for another one than {other}{more}")
    assert zeros_problem("study.tsv", scans, tmp_path / "no") != "" or label == "sub-3"
