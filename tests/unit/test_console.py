import pickle
import subprocess
import sys
from types import SimpleNamespace

import pytest

from n4flow import InputError
from n4flow.console import TOLD, end_of, last_error, reporting
from n4flow.errors import MachineError

KILLED = """
import os, sys, signal
sys.path.insert(0, sys.argv[1])
from n4flow.console import reporting
with reporting(sys.argv[2]):
    os.kill(os.getpid(), signal.SIGKILL)
"""


def fail_in(log, error):
    with reporting(log):
        raise error


def test_a_job_that_is_done_has_no_error(tmp_path):
    with reporting(tmp_path / "log"):
        pass
    assert last_error(tmp_path / "log") == ""


def test_an_input_error_is_one_line_without_a_traceback(tmp_path, capsys):
    with pytest.raises(SystemExit, match="1"):
        fail_in(tmp_path / "log", InputError("a.nii", "is\nbroken", "mend it"))
    assert capsys.readouterr().err == "n4flow: a.nii: is broken; mend it\n"
    assert (tmp_path / "log").read_text() == "n4flow: a.nii: is broken; mend it\n"
    assert last_error(tmp_path / "log") == "a.nii: is broken; mend it"


def test_a_defect_leaves_its_traceback_in_the_log_and_one_line_on_the_terminal(tmp_path, capsys):
    with pytest.raises(SystemExit, match="1"):
        fail_in(tmp_path / "log", KeyError("nonsense"))
    assert capsys.readouterr().err.count("\n") == 1
    assert "Traceback" in (tmp_path / "log").read_text()
    assert last_error(tmp_path / "log").startswith("KeyError: 'nonsense'; see")


def test_a_job_that_was_killed_is_noticed(tmp_path, pytestconfig):
    scripts = pytestconfig.rootpath / "workflow" / "scripts"
    subprocess.run([sys.executable, "-c", KILLED, scripts, tmp_path / "log"], check=False)
    assert last_error(tmp_path / "log").startswith("ended without a message")


def test_a_job_that_was_stopped_by_hand_says_so_in_its_log_alone(tmp_path, capsys):
    log = tmp_path / "job.log"
    with pytest.raises(SystemExit, match="130"), reporting(log):
        raise KeyboardInterrupt
    assert last_error(log) == "stopped by hand (Ctrl-C)"
    assert capsys.readouterr().err == ""


def test_a_job_that_has_not_run_has_no_error(tmp_path):
    assert last_error(tmp_path / "log") == ""


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (InputError("a.nii", "is broken", "mend it"), True),
        (ZeroDivisionError("a defect"), True),
        (MachineError("out.nii", "cannot be written", "make room"), False),
        (OSError("Stale file handle"), False),
        (MemoryError(), False),
        (ImportError("no module"), False),
    ],
)
def test_log_tells_whether_the_same_would_fail_again(tmp_path, error, again):
    with pytest.raises(SystemExit):
        fail_in(tmp_path / "log", error)
    line, found = end_of(tmp_path / "log")
    assert line
    assert found is again


def test_terminal_is_left_to_who_reads_the_log(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(TOLD, "1")
    with pytest.raises(SystemExit):
        fail_in(tmp_path / "log", InputError("a.nii", "is broken", "mend it"))
    assert capsys.readouterr().err == ""
    assert last_error(tmp_path / "log") == "a.nii: is broken; mend it"


def test_an_input_error_survives_the_way_between_processes():
    error = InputError("a.nii", "is broken", "mend it")
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again)) == (InputError, "a.nii: is broken; mend it")


def test_the_line_reaches_the_terminal_in_one_piece(tmp_path, monkeypatch):
    """Jobs that fail at the same time write to one terminal: what comes in pieces gets mixed."""
    pieces = []
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(write=pieces.append, flush=lambda: None))
    with pytest.raises(SystemExit):
        fail_in(tmp_path / "log", InputError("image.nii", "is broken", "copy it again"))
    assert [piece for piece in pieces if piece] == ["n4flow: image.nii: is broken; copy it again\n"]
