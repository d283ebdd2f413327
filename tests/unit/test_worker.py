"""The worker: steps of jobs are done elsewhere, and whatever happens to one is nothing to the others."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from n4flow.study.provenance import PACKAGE

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the worker is for Linux")

STEPS = """
import json, os, signal, sys, time
from n4flow.errors import InputError

loaded_in = os.getpid()

def note(path, **more):
    facts = {"pid": os.getpid(), "loaded in": loaded_in, "folder": os.getcwd(), "word": os.environ.get("WORD")}
    with open(path, "w") as file:
        json.dump(facts | more, file)

def slow(path, seconds):
    partial = path + ".partial"
    try:
        open(partial, "w").close()
        note(path + ".begun")
        time.sleep(seconds)
        os.rename(partial, path)
    except BaseException:
        os.unlink(partial)
        raise

def refuse(path):
    raise InputError(path, "is broken", "mend it")

def crash(path):
    raise ZeroDivisionError("by 0")

def die(path):
    os.kill(os.getpid(), signal.SIGKILL)

def shout(path):
    os.write(2, b"from a library\\n")
    print("from Python", file=sys.stderr)
"""

KILLED = "was killed (SIGKILL), perhaps because memory ran out; give the job more memory, or leave the scan out"

JOB = "import sys, json; from n4flow.worker import do_step; do_step(**json.loads(sys.argv[1]))"


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class Run:
    """Stands for a Snakemake: jobs are children of the test, but know this process for the one that they belong to."""

    def __init__(self, folder, package=PACKAGE.parent):
        self.folder, self.package, self.jobs = folder, package, []
        self.snakemake = subprocess.Popen(["sleep", "1000"])
        (folder / "faulty.py").write_text(STEPS)

    def start(self, step, name, *, run=None, code=JOB, environment=(), **arguments):
        request = {"step": f"faulty:{step}", "log_path": f"{name}.log", "path": str(self.folder / name), **arguments}
        process = subprocess.Popen(
            [sys.executable, "-c", code, json.dumps(request)],
            env={
                **os.environ,
                "PYTHONPATH": f"{self.package}{os.pathsep}{self.folder}",
                "N4FLOW_RUN": str(self.snakemake.pid if run is None else run),
                **dict(environment),
            },
            cwd=self.folder,
            # which a shell switches off for what it starts in the background, as tests may be
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            stderr=subprocess.PIPE,
            text=True,
        )
        self.jobs.append(process)
        return process

    def job(self, step, name, **options):
        """Exit status, what the terminal shows, and what the step noted."""
        process = self.start(step, name, **options)
        _, said = process.communicate(timeout=30)
        return process.returncode, said, self.facts(name)

    def facts(self, name):
        path = self.folder / name
        return json.loads(path.read_text()) if path.is_file() and path.stat().st_size else {}

    def log(self, name):
        return (self.folder / f"{name}.log").read_text()

    def end(self):
        for process in (*self.jobs, self.snakemake):
            process.kill()
            process.communicate()


@pytest.fixture
def run(tmp_path):
    run = Run(tmp_path)
    yield run
    run.end()


def test_jobs_find_what_another_one_has_loaded(run):
    first, second = (run.job("note", name, environment={"WORD": name}) for name in "ab")
    for (code, said, facts), name in ((first, "a"), (second, "b")):
        assert (code, said) == (0, "")
        assert (facts["folder"], facts["word"]) == (str(run.folder), name)
        assert run.log(name).splitlines()[-1] == "done"
    assert first[2]["loaded in"] == second[2]["loaded in"] not in (first[2]["pid"], second[2]["pid"])
    assert first[2]["pid"] != second[2]["pid"], "each step has a process of its own"


def test_jobs_that_begin_at_once_share_one_worker(run):
    jobs = [run.start("note", f"{n}") for n in range(12)]
    assert {job.wait(30) for job in jobs} == {0}
    assert len({run.facts(f"{n}")["loaded in"] for n in range(12)}) == 1


@pytest.mark.parametrize(
    ("fault", "line"),
    [
        ("refuse", r"n4flow: {path}: is broken; mend it"),
        ("crash", r"n4flow: ZeroDivisionError: by 0; see bad.log"),
        ("die", f"n4flow: die: {KILLED}"),
    ],
)
def test_a_step_that_fails_costs_the_others_nothing(run, fault, line):
    before = run.job("note", "before")[2]
    slow = run.start("slow", "slow", seconds=1)
    code, said, _ = run.job(fault, "bad")
    line = line.format(path=run.folder / "bad").replace("see bad.log", f"see {run.folder / 'bad.log'}")
    assert (code, said) == (1, f"{line}\n")
    assert run.log("bad").splitlines()[-1] == line
    assert slow.wait(30) == 0
    assert run.job("note", "after")[2]["loaded in"] == before["loaded in"]


def test_what_libraries_print_goes_into_the_log(run):
    code, said, _ = run.job("shout", "loud")
    assert (code, said) == (0, "")
    assert run.log("loud") == "from a library\nfrom Python\ndone\n"


def test_a_worker_that_dies_takes_its_jobs_with_it_and_the_next_job_starts_another(run):
    worker = run.job("note", "first")[2]["loaded in"]
    slow = run.start("slow", "slow", seconds=60)
    wait_for(lambda: run.facts("slow.begun"))
    os.kill(worker, signal.SIGKILL)
    _, said = slow.communicate(timeout=20)
    assert slow.returncode == 1
    assert "n4flow: slow: was killed" in said
    wait_for(lambda: not alive(run.facts("slow.begun")["pid"]))
    code, _, facts = run.job("note", "second")
    assert code == 0
    assert facts["loaded in"] not in (worker, facts["pid"])


def test_nothing_stays_when_snakemake_is_killed(run):
    slow = run.start("slow", "slow", seconds=60)
    wait_for(lambda: run.facts("slow.begun"))
    facts = run.facts("slow.begun")
    run.snakemake.kill()
    run.snakemake.wait()
    wait_for(lambda: not alive(facts["pid"]) and not alive(facts["loaded in"]))
    assert slow.wait(20) == 1


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_job_that_is_ended_ends_its_step_which_tidies_up(run, how):
    job = run.start("slow", "slow", seconds=60)
    wait_for(lambda: run.facts("slow.begun"))
    job.send_signal(how)
    assert job.wait(20) == (130 if how == signal.SIGINT else -how)
    wait_for(lambda: not alive(run.facts("slow.begun")["pid"]))
    assert not (run.folder / "slow.partial").exists()
    assert run.log("slow").endswith("n4flow: stopped by hand (Ctrl-C)\n")
    assert run.job("note", "next")[0] == 0


NO_SOCKETS = "import socket\ndef no(*_, **__): raise PermissionError\nsocket.socket = no\n"
ANOTHER_USERS = "import n4flow.worker\nn4flow.worker._user_of = lambda _: 12345\n"


@pytest.mark.parametrize(
    "options",
    [
        {"run": ""},
        {"run": 2**22 + 1},  # beyond all process IDs
        {"code": NO_SOCKETS + JOB},
        {"code": ANOTHER_USERS + JOB},
    ],
    ids=["not in a run", "a run that is not to be seen", "no sockets", "another user's"],
)
@pytest.mark.parametrize("step", ["note", "refuse"])
def test_where_there_is_no_worker_the_job_does_the_step(run, step, options):
    code, said, facts = run.job(step, "x", **options)
    if step == "note":
        assert (code, said) == (0, "")
        assert facts["loaded in"] == facts["pid"]
    else:
        assert (code, said) == (1, f"n4flow: {run.folder / 'x'}: is broken; mend it\n")
    assert run.log("x").splitlines()[-1] == (said.strip() or "done")


def test_two_runs_have_two_workers(run, tmp_path_factory):
    other = Run(tmp_path_factory.mktemp("other"))
    workers = {each.job("note", "x")[2]["loaded in"] for each in (run, other, run)}
    assert len(workers) == 2
    other.end()
    assert run.job("note", "y")[2]["loaded in"] in workers


def test_another_copy_of_the_package_has_another_worker(run, tmp_path):
    copy = Run(tmp_path, shutil.copytree(PACKAGE, tmp_path / "copy" / "n4flow").parent)
    copy.end()
    facts = [each.job("note", "x", run=run.snakemake.pid)[2] for each in (run, copy)]
    assert facts[0]["loaded in"] != facts[1]["loaded in"]


def test_steps_that_may_use_a_gpu_are_done_by_one_process(run):
    first = run.job("note", "a", on_gpu=True)[2]
    assert run.job("refuse", "b", on_gpu=True)[0] == 1
    on_cpu = run.job("note", "c")[2]
    again = run.job("note", "d", on_gpu=True)[2]
    assert first["pid"] == again["pid"] != on_cpu["pid"]
    assert run.job("die", "e", on_gpu=True)[0] == 1
    new = run.job("note", "f", on_gpu=True)[2]
    assert new["pid"] != again["pid"]
    jobs = [run.start("slow", f"{n}", on_gpu=True, seconds=1) for n in range(2)]
    assert {job.wait(20) for job in jobs} == {0}
    assert run.facts("0.begun")["pid"] != run.facts("1.begun")["pid"], "two at once, on two GPUs"
