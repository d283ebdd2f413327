"""Batches without Snakemake: processes that die, and what is taken from a batch."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from n4flow.errors import InputError
from n4flow.study.batches import RECEIPT, BatchScan, clear, is_current, place, run_batch, take
from n4flow.study.provenance import PACKAGE

SETTINGS = {"work": {"key": 1}}


def scan(tmp_path, name, work=lambda: None):
    """A scan whose one step notes the process it runs in, works, and writes an output."""
    folder = tmp_path / "results" / ".batches" / "fields" / name

    def step():
        (tmp_path / f"{name}.pids").open("a").write(f"{os.getpid()} ")
        work()
        made = place(folder, tmp_path / "results" / f"{name}.txt")
        made.write_text(name)

    return BatchScan(folder, SETTINGS, [], {"work": step})


def pids(tmp_path, name):
    return (tmp_path / f"{name}.pids").read_text().split()


def taken(tmp_path, name, settings=SETTINGS["work"], attempt=1):
    folder = tmp_path / "results" / ".batches" / "fields" / name
    outputs = [tmp_path / "results" / f"{name}.txt"]
    return take(folder, "work", settings, outputs, tmp_path / f"{name}.log", attempt=attempt)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def refuse():
    raise InputError("image.nii", "is broken", "mend it")


@pytest.mark.parametrize(("fault", "words"), [(die, "was killed twice"), (refuse, "image.nii: is broken; mend it")])
def test_scan_that_fails_or_kills_its_process_costs_the_others_nothing(tmp_path, capsys, fault, words):
    scans = [scan(tmp_path, "before"), scan(tmp_path, "bad", fault), scan(tmp_path, "after")]
    run_batch(scans)
    for name in ("before", "after"):
        assert taken(tmp_path, name)
        assert (tmp_path / "results" / f"{name}.txt").read_text() == name
        assert (tmp_path / f"{name}.log").read_text().splitlines()[-1] == "done"
    first, alone = pids(tmp_path, "bad")
    assert first == pids(tmp_path, "before")[0]
    assert alone not in (first, *pids(tmp_path, "after"))
    with pytest.raises(SystemExit):
        taken(tmp_path, "bad")
    assert words in capsys.readouterr().err
    assert words in (tmp_path / "bad.log").read_text()
    with pytest.raises(SystemExit):
        taken(tmp_path, "bad", attempt=2)
    assert words in capsys.readouterr().err
    assert not is_current(scans[1].folder, SETTINGS), "to be tried again in the next run"
    assert not taken(tmp_path, "bad"), "if not in a batch, then by its own job"


def test_scan_that_cannot_be_read_costs_the_others_nothing(tmp_path):
    folder = tmp_path / "folder"  # opening it fails as reading does without permission, even for root
    folder.mkdir()
    bad = scan(tmp_path, "bad", refuse)._replace(inputs=[str(folder)])
    run_batch([bad, scan(tmp_path, "after")])
    assert taken(tmp_path, "after")
    assert not is_current(bad.folder, SETTINGS, bad.inputs)


def test_scan_that_fails_once_is_done_alone(tmp_path):
    def fail_first():
        if len(pids(tmp_path, "moody")) == 1:
            die()

    run_batch([scan(tmp_path, "moody", fail_first)])
    assert taken(tmp_path, "moody")


def test_job_that_was_killed_as_a_whole_leaves_out_in_the_end_what_it_was_killed_at(tmp_path, capsys):
    scans = [scan(tmp_path, "culprit"), scan(tmp_path, "other")]
    mark = scans[0].folder.with_name(".culprit.working")
    mark.parent.mkdir(parents=True)
    mark.write_text("x")
    run_batch(scans, attempt=3)
    assert taken(tmp_path, "culprit"), "killed once, by the loss of a node perhaps"
    (tmp_path / "culprit.pids").unlink()
    mark.write_text("xx")
    run_batch(scans, attempt=3)
    assert not (tmp_path / "culprit.pids").exists()
    assert taken(tmp_path, "other")
    with pytest.raises(SystemExit):
        taken(tmp_path, "culprit")
    assert "killed whenever it came to this scan" in capsys.readouterr().err
    # another run begins anew
    mark.write_text("xx")
    run_batch(scans)
    assert taken(tmp_path, "culprit")


def test_worker_ends_with_the_job_and_what_it_had_begun_counts_for_nothing(tmp_path):
    code = (
        "import sys, time, os; from pathlib import Path; from n4flow.study.batches import BatchScan, run_batch\n"
        "def work(): Path(sys.argv[1], 'pid').write_text(str(os.getpid())); time.sleep(60)\n"
        "run_batch([BatchScan(Path(sys.argv[1], 'a/b/c'), {}, [], {'work': work})])\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    job = subprocess.Popen([sys.executable, "-c", code, tmp_path], env=environment)
    wait_for(lambda: (tmp_path / "pid").is_file() and (tmp_path / "pid").read_text())
    job.kill()
    job.wait()
    worker = int((tmp_path / "pid").read_text())
    wait_for(lambda: not is_running(worker))
    folder = tmp_path / "a/b/c"
    assert folder.with_name(".c.working").read_text() == "x"
    assert not is_current(folder, {})
    assert not take(folder, "work", {}, [], tmp_path / "log")


def wait_for(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_nothing_is_taken_that_was_made_with_other_settings_or_is_not_there(tmp_path):
    run_batch([scan(tmp_path, "scan")])
    assert not taken(tmp_path, "scan", {"key": 2})
    assert not take(None, "work", SETTINGS["work"], [], "log")
    assert taken(tmp_path, "scan")
    clear(tmp_path / "results/.batches/fields/scan")
    assert not taken(tmp_path, "scan")
    assert [path.name for path in (tmp_path / "results/.batches/fields/scan").iterdir()] == [RECEIPT]


def test_nothing_is_taken_that_was_made_from_another_file_of_the_step_before(tmp_path):
    batch = scan(tmp_path, "scan")
    mask = tmp_path / "results" / "mask"
    mask.parent.mkdir()
    mask.write_text("mask")
    run_batch([batch._replace(between=[(mask, mask)])])
    out = [tmp_path / "results" / "scan.txt"]
    assert take(batch.folder, "work", SETTINGS["work"], out, tmp_path / "log", [mask])
    mask.write_text("other")
    assert not take(batch.folder, "work", SETTINGS["work"], out, tmp_path / "log", [mask])


def test_batch_is_current_until_settings_or_content_change(tmp_path):
    image = tmp_path / "image"
    image.write_text("image")
    batch = scan(tmp_path, "scan")._replace(inputs=[str(image)])
    assert not is_current(batch.folder, SETTINGS, [str(image)])
    run_batch([batch])
    assert is_current(batch.folder, SETTINGS, [str(image)])
    os.utime(image, (1, 1))
    assert is_current(batch.folder, SETTINGS, [str(image)]), "touched, and the same"
    assert not is_current(batch.folder, SETTINGS, [str(image)], hashed_bytes=4), "too large to be read"
    assert not is_current(batch.folder, {"work": {"key": 2}}, [str(image)])
    assert not is_current(batch.folder, SETTINGS, [str(image), "mask"])
    image.write_text("other")
    assert not is_current(batch.folder, SETTINGS, [str(image)])


def test_scan_whose_image_changes_while_it_is_worked_on_is_not_current(tmp_path):
    image = tmp_path / "image"
    image.write_text("image")
    batch = scan(tmp_path, "scan", lambda: image.write_text("other"))._replace(inputs=[str(image)])
    run_batch([batch])
    assert not is_current(batch.folder, SETTINGS, [str(image)])
