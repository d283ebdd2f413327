"""Sheets and configs made to do harm: nothing of them runs, and nothing is written but the outputs."""

from dataclasses import replace

import pytest
from study import head, raw_scan, results_of, save, snakemake, write_config, write_sheet

#: Where images may lie, as far as file systems go, seen from the working directory.
PLACES = {
    "shell": 'raw/it\'s "quoted" $(touch was_run)/`touch was_run`; touch was_run & #%s.nii',
    "outside": "../elsewhere/./x/../Übung 日本/e\u0301🧠.nii.gz",
    "long": "raw/" + "/".join(["long" * 50] * 15) + "/x.nii",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A working directory beside a folder of images, after a run."""
    folder = tmp_path_factory.mktemp("hostile") / "work"
    (folder / "../elsewhere/x").resolve().mkdir(parents=True)
    scans = [replace(raw_scan(name), image=place) for name, place in PLACES.items()]
    for scan in scans:
        save(folder / scan.image, head())
    absolute = folder.parent / "elsewhere" / "own mask (1).nii"
    save(absolute, head() > 300, dtype="uint8")
    scans[-1] = replace(scans[-1], image=str(folder / scans[-1].image), mask=str(absolute))
    write_sheet(folder / "config/samples.tsv", scans)
    write_config(folder, {"reference": {"scans": 0}})
    before = {path: path.stat().st_mtime_ns for path in folder.parent.rglob("*") if path.is_file()}
    targets = [results_of(scan)["corrected"] for scan in scans] + [results_of(scans[0])["page"], "dataset"]
    return folder, scans, before, snakemake(folder, *targets, "--cores", 2)


def test_every_path_that_a_file_may_have_is_taken(run):
    folder, scans, _, done = run
    assert done.returncode == 0, done.stdout
    assert [scan.name for scan in scans if not (folder / results_of(scan)["corrected"]).is_file()] == []
    assert (folder / results_of(scans[0])["page"]).is_file()


def test_nothing_ran_and_nothing_was_written_but_the_outputs(run):
    folder, _, before, _ = run
    after = {path: path.stat().st_mtime_ns for path in folder.parent.rglob("*") if path.is_file()}
    assert {path: time for path, time in after.items() if path in before} == before
    made = {path.relative_to(folder.parent).parts[:2] for path in after.keys() - before.keys()}
    assert made == {("work", name) for name in (".snakemake", "results", "logs", "benchmarks")}


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("samples: !!python/object/apply:os.system ['touch was_run']\n", "Config file is not valid JSON or YAML"),
        ("device: !!python/name:os.system\n", "config: device: <built-in function system> is not one of"),
    ],
)
def test_tags_of_a_config_do_nothing_and_stop_the_run_with_a_line(tmp_path, text, line):
    (tmp_path / "config").mkdir()
    (tmp_path / "config/config.yaml").write_text(text)
    done = snakemake(tmp_path, "--cores", 1)
    assert done.returncode == 1
    assert line in done.stdout
    assert "Traceback" not in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != ".snakemake") == ["config"]
