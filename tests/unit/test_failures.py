"""Which scans failed, and which of them would fail again."""

import copy
import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from n4flow.console import PASSING, PREFIX
from n4flow.errors import InputError
from n4flow.study import failures
from n4flow.study.bids import Scan
from n4flow.study.config import load_schema, with_defaults
from n4flow.study.failures import NO_FIELD, NO_STORE, STEPS, Failure, failed_scans, log_of, read_failed, write_failed
from n4flow.study.outputs import output_of
from n4flow.study.provenance import package_digest
from tests.pyramids import write_store

ROOT = Path(__file__).parents[2]
CONFIG = yaml.safe_load((ROOT / "config/config.yaml").read_text())
CONFIG = with_defaults(CONFIG, load_schema(ROOT / "workflow/schemas/config.schema.yaml"))


@pytest.fixture
def study(tmp_path, monkeypatch):
    """Two scans and one with the field of the first, in a working directory; images that are older than the run."""
    monkeypatch.chdir(tmp_path)
    scans = {}
    for subject, modality, source in (("1", "T1w", ""), ("1", "T2w", "T1w"), ("2", "T1w", "")):
        scan = Scan(subject, "", modality, f"{subject}_{modality}.nii", field_from=source)
        Path(scan.image).write_bytes(b"image")
        scans[scan.name] = scan
    return scans


def log(scan, step, *lines):
    path = log_of(scan, step, "logs")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def found(study, since=0.0):
    return failed_scans(study.values(), Path("logs"), Path("results"), since)


def note(study, config=CONFIG, since=None):
    """What a run notes whose images were there before it began."""
    failed = list(found(study).values())
    write_failed(Path("failed.tsv"), failed, study, config, since or time.time() + 1, study)


def left_out(study, config=CONFIG):
    return {name: failure.step for name, failure in read_failed(Path("failed.tsv"), study, config, "logs").items()}


def test_the_first_step_that_failed_counts(study):
    log(study["sub-2_T1w"], "mask", "computing", "done")
    log(study["sub-2_T1w"], "n4", f"{PREFIX}too few")
    log(study["sub-2_T1w"], "qc", f"{PREFIX}not there")
    (failure,) = found(study).values()
    assert failure[:4] == ("sub-2_T1w", "n4", "too few", "logs/n4/sub-2/anat/sub-2_T1w.log")
    assert failure.again


def test_logs_of_earlier_runs_do_not_count(study):
    log(study["sub-2_T1w"], "mask", f"{PREFIX}broken")
    assert found(study, since=time.time() + 1) == {}


@pytest.mark.parametrize("lines", [(PASSING, f"{PREFIX}disk full"), ("computing",), ()])
def test_what_the_machine_failed_at_would_not_fail_again(study, lines):
    log(study["sub-2_T1w"], "mask", *lines)
    (failure,) = found(study).values()
    assert not failure.again
    note(study)
    assert not Path("failed.tsv").exists()


@pytest.mark.parametrize("step", ["mask", "n4"])
def test_scans_that_take_their_field_from_one_without_are_left_out_with_it(study, step):
    log(study["sub-1_T1w"], step, f"{PREFIX}broken")
    note(study)
    assert left_out(study) == {"sub-1_T1w": step, "sub-1_T2w": NO_FIELD}
    # the row of the source alone decides
    rows = Path("failed.tsv").read_text().splitlines(keepends=True)
    assert rows[2].startswith("sub-1_T2w\tfield\tits field is that of sub-1_T1w, which failed\t")
    Path("failed.tsv").write_text("".join(rows[::2]))
    assert left_out(study) == {}
    Path("failed.tsv").write_text("".join(rows[:2]))
    assert left_out(study) == {"sub-1_T1w": step, "sub-1_T2w": NO_FIELD}


def test_a_source_that_fails_after_its_field_is_made_takes_nobody_with_it(study):
    log(study["sub-1_T1w"], "reference", f"{PREFIX}broken")
    note(study)
    assert left_out(study) == {"sub-1_T1w": "reference"}


def test_field_that_was_made_nevertheless_counts(study):
    log(study["sub-1_T1w"], "n4", f"{PREFIX}broken")
    made = Path("results") / output_of(study["sub-1_T2w"], "corrected")
    made.parent.mkdir(parents=True)
    made.touch()
    assert set(found(study)) == {"sub-1_T1w"}


@pytest.mark.parametrize("step", STEPS)
def test_a_failure_is_left_out_until_image_settings_or_code_change(study, monkeypatch, step):
    scan = study["sub-2_T1w"]
    log(scan, step, f'{PREFIX}broken\tby a tab, "quotes"')
    note(study)
    assert left_out(study) == {scan.name: step}
    other = copy.deepcopy(CONFIG)
    other["n4"]["spans"] = 5
    assert left_out(study, other) == {}
    of_pages = copy.deepcopy(CONFIG)
    of_pages["qc"]["viewer_mb"] = 1
    assert left_out(study, of_pages) == ({} if step == "qc" else {scan.name: step})
    ratings = copy.deepcopy(CONFIG)
    ratings["qc"] |= {"ratings": "r.tsv", "flags": CONFIG["qc"]["flags"] | {"outlier_z": 9}}
    assert left_out(study, ratings) == {scan.name: step}, "the index alone reads these"
    assert left_out(study | {scan.name: replace(scan, mask="mask.nii")}) == {}
    with monkeypatch.context() as patch:
        patch.setattr(failures, "_code_of", lambda step: "other code")
        assert left_out(study) == {}
    os.utime(scan.image, (1, 1))
    assert left_out(study) == {}


def test_code_counts_from_the_first_step_to_the_one_that_failed():
    digests = {step: failures._code_of(step) for step in STEPS}
    assert len(set(digests.values())) == len(set(STEPS.values()))
    assert digests["n4"] == package_digest(*["steps.pyramid"] * 2, "steps.mask", "steps.correct")


def test_rows_of_scans_that_are_not_in_the_sheet_do_not_count(study):
    log(study["sub-2_T1w"], "mask", f"{PREFIX}broken")
    note(study)
    assert left_out({name: scan for name, scan in study.items() if scan.subject == "1"}) == {}


def test_an_image_that_changed_during_the_run_is_tried_again(study):
    log(study["sub-2_T1w"], "mask", f"{PREFIX}broken")
    note(study, since=os.stat("2_T1w.nii").st_ctime - 1)
    assert not Path("failed.tsv").exists()


def test_without_failures_the_table_goes(study):
    log(study["sub-2_T1w"], "mask", f"{PREFIX}broken")
    note(study)
    log(study["sub-2_T1w"], "mask", "done")
    note(study)
    assert not Path("failed.tsv").exists()


def test_rows_of_scans_that_a_run_was_not_for_stay_as_they_are(study):
    """Another run may have written them since this one began, of scans that its sheet had not yet."""
    first, second = ({name: scan for name, scan in study.items() if scan.subject == label} for label in "12")
    for scan in study.values():
        log(scan, "mask", f"{PREFIX}broken")
    note(second)
    (row,) = Path("failed.tsv").read_text().splitlines()[1:]
    note(first)
    lines = Path("failed.tsv").read_text().splitlines()
    assert [line.split("\t")[0] for line in lines] == ["scan", *sorted(study)]
    assert row in lines
    for scan in study.values():
        log(scan, "mask", "done")
    note(first)
    assert Path("failed.tsv").read_text().splitlines()[1:] == [row]
    failed = [Failure(name, "mask", "broken", "", True) for name in study]
    write_failed(Path("failed.tsv"), failed, study, CONFIG, time.time() + 1, first)
    assert row in Path("failed.tsv").read_text().splitlines()
    assert len(Path("failed.tsv").read_text().splitlines()) == 4


@pytest.mark.parametrize("text", ["scan\tstep\nsub-2_T1w\tmask\n", "scan\tstep\terror\tfingerprint\na\tb\tc\td\n"])
def test_another_table_is_refused_with_a_line(study, text):
    Path("failed.tsv").write_text(text)
    with pytest.raises(InputError, match=r"failed.tsv: is no table of failed scans; remove it"):
        left_out(study)


@pytest.mark.parametrize("column", ["mask", "mask_image", "weights", "channel"])
def test_a_cell_of_the_row_counts(study, column):
    log(study["sub-2_T1w"], "mask", f"{PREFIX}broken")
    Path("other.nii").write_bytes(b"mask")
    note(study)
    assert set(left_out(study)) == {"sub-2_T1w"}
    assert left_out(study | {"sub-2_T1w": replace(study["sub-2_T1w"], **{column: "other.nii"})}) == {}


def test_a_file_in_another_column_counts(study):
    Path("other.nii").write_bytes(b"mask")
    study["sub-2_T1w"] = replace(study["sub-2_T1w"], mask="other.nii")
    log(study["sub-2_T1w"], "mask", f"{PREFIX}broken")
    note(study)
    assert left_out(study | {"sub-2_T1w": replace(study["sub-2_T1w"], mask="", weights="other.nii")}) == {}


def test_a_sidecar_that_is_mended_counts(study):
    Path("2_T1w.json").write_text("{}")
    log(study["sub-2_T1w"], "mask", f"{PREFIX}is a part of a complex image")
    note(study)
    assert set(left_out(study)) == {"sub-2_T1w"}
    Path("2_T1w.json").write_text('{"ImageType": ["M"]}')
    assert left_out(study) == {}


def test_the_image_that_the_field_comes_from_counts(study):
    log(study["sub-1_T2w"], "apply", f"{PREFIX}lies outside")
    note(study)
    assert left_out(study) == {"sub-1_T2w": "apply"}
    Path("1_T1w.nii").write_bytes(b"another image")
    assert left_out(study) == {}


@pytest.fixture
def channels(study):
    """Three channels of an image, the last of which takes the field of the first."""
    levels = [np.zeros((3, 8, 8, 8), np.uint16)]
    write_store(Path("2.ome.zarr"), levels, axes="czyx", labels=("a", "b", "c"), scale_um=(20, 20, 20))
    scans = {}
    for channel, source in (("a", ""), ("b", ""), ("c", "stain-a_SPIM")):
        scan = Scan("2", "", f"stain-{channel}_SPIM", "2.ome.zarr", field_from=source, channel=channel)
        scans[scan.name] = scan
    return scans


A, B, C = (f"sub-2_stain-{channel}_res-coarse_SPIM" for channel in "abc")


def log_of_part(step, name, *lines):
    path = Path("logs", step, "sub-2/micr", f"{name}.log")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


@pytest.mark.parametrize("step", ["coarse", "mask", "n4"])
def test_channels_of_an_image_are_set_aside_with_one_that_has_no_field(channels, step):
    log(channels[B], step, f"{PREFIX}broken")
    log(channels[A], "reference", f"{PREFIX}broken, too")
    note(channels)
    assert left_out(channels) == {A: NO_STORE, B: step, C: NO_STORE}
    assert read_failed(Path("failed.tsv"), channels, CONFIG, "logs")[A].error.endswith(f"not written, as {B} failed")
    # the row of the one that failed alone decides
    rows = Path("failed.tsv").read_text().splitlines(keepends=True)
    Path("failed.tsv").write_text("".join(row for row in rows if not row.startswith(B)))
    assert left_out(channels) == {}


def test_a_channel_takes_those_along_that_have_its_field_and_these_the_image(channels):
    log(channels[A], "mask", f"{PREFIX}broken")
    note(channels)
    assert left_out(channels) == {A: "mask", B: NO_STORE, C: NO_FIELD}


@pytest.mark.parametrize("step", ["reference", "qc"])
def test_an_image_is_written_without_a_page_or_a_reference(channels, step):
    log(channels[A], step, f"{PREFIX}broken")
    note(channels)
    assert left_out(channels) == {A: step}


@pytest.mark.parametrize(
    ("step", "name"),
    [
        ("plan", "sub-2_SPIM"),
        ("divide", "sub-2_SPIM/level-0_part-3"),
        ("describe", "sub-2_SPIM"),
        ("finish", "sub-2_SPIM_zarr.json"),
    ],
)
def test_an_image_that_cannot_be_written_is_set_aside_as_a_whole(channels, step, name):
    log_of_part("divide", "sub-2_SPIM/level-0_part-0", "done")
    log_of_part(step, name, f"{PREFIX}2.ome.zarr: cannot be read")
    note(channels)
    assert left_out(channels) == dict.fromkeys((A, B, C), step)
    failure = read_failed(Path("failed.tsv"), channels, CONFIG, "logs")[B]
    assert (failure.error, failure.log) == ("2.ome.zarr: cannot be read", f"logs/{step}/sub-2/micr/{name}.log")
    changed = copy.deepcopy(CONFIG)
    changed["zarr"]["saturated"] = "divide"
    assert left_out(channels, changed) == {}
    assert left_out(channels | {C: replace(channels[C], field_from="")}) == {}
    os.utime("2.ome.zarr/0/zarr.json", (1, 1))
    assert left_out(channels) == {}


def test_a_part_that_the_machine_failed_at_is_tried_again(channels):
    log_of_part("divide", "sub-2_SPIM/level-0_part-0", PASSING, f"{PREFIX}disk full")
    assert {failure.step for failure in found(channels).values()} == {"divide"}
    note(channels)
    assert not Path("failed.tsv").exists()
