"""Jobs and Snakemake are killed at random moments: what is there is whole, and a rerun makes the same bytes.

The suite takes three moments. All 50, with a line for each: `N4FLOW_KILLS=50 pytest -s tests/workflow/test_restart.py`.
"""

import contextlib
import gzip
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
from study import (
    ROOT,
    describe_raw,
    head,
    partial_files,
    raw_scan,
    results_of,
    save,
    snakemake,
    write_config,
    write_sheet,
)

#: The smallest head with enough samples: a second per job.
SHAPE = (24, 26, 22)
SCANS = [raw_scan(f"{number:02d}") for number in range(1, 7)]
SEED = 6

#: What ends: a job's script; Snakemake alone, whose jobs go on without it; everything at once, as at a loss of power.
KILLED = ("job", "snakemake", "everything")

TARGETS = [results_of(scan)["page"] for scan in SCANS]


def make_study(folder):
    """Six small heads, without SimpleITK's correction of them: more jobs in the same time."""
    describe_raw(folder)
    for seed, scan in enumerate(SCANS):
        save(folder / scan.image, head(SHAPE, seed))
    write_sheet(folder / "config" / "samples.tsv", SCANS)
    changes = {"n4": {"shrink_factor": 1}, "reference": {"fraction": 0}, "qc": {"viewer_mb": 0.1}}
    write_config(folder, changes)
    return folder


def content_of(path):
    """A file's bytes, without what the clock decides: the wall time in sidecar, metrics and page."""
    content = path.read_bytes()
    if path.suffix == ".json":
        return re.sub(rb'"(?:WallTimeSeconds|wall_time_s)": [0-9.]+', b"", content)
    if path.suffix == ".html":
        return re.sub(rb"WallTimeSeconds</dt><dd>[0-9.]+", b"", content)
    return content


def contents(folder):
    """Every file of the results under its final name."""
    return {
        path.relative_to(folder).as_posix(): content_of(path)
        for path in sorted((folder / "results").rglob("*"))
        if path.is_file() and not path.name.endswith(".partial")
    }


def why_incomplete(path):
    """What is missing of a file that stands under its final name; empty if it is whole."""
    content = path.read_bytes()
    try:
        if path.name.endswith(".gz"):
            gzip.decompress(content)  # checks length and sum at its end
        if path.suffix == ".json":
            json.loads(content)
    except (EOFError, ValueError, OSError) as error:
        return str(error)
    whole = {
        ".html": content.rstrip().endswith(b"</html>"),
        ".webp": int.from_bytes(content[4:8], "little") + 8 == len(content),
        ".js": content.rstrip().endswith((b";", b")")),
    }
    return "" if content and whole.get(path.suffix, True) else f"ends early, at {len(content)} bytes"


def start(folder, *arguments):
    """Snakemake in a session of its own, so that all of it can be killed."""
    command = [sys.executable, "-m", "snakemake", "-s", ROOT / "Snakefile", "--directory", folder, *TARGETS]
    with open(folder / "terminal.txt", "a") as terminal:
        return subprocess.Popen(
            [*map(str, command), "--cores", "2", *arguments],
            env={**os.environ, "NO_COLOR": "1", "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=terminal,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def members(session):
    """Processes of a session, with their commands."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError):
            fields = (process / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) == session and fields[0] != "Z":
                found[int(process.name)] = (process / "cmdline").read_bytes().decode().replace("\0", " ")
    return found


def kill(pid):
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


class Moment(NamedTuple):
    """A kill: what, when, how the rerun went."""

    what: str
    second: float
    done: int  # results that stood there
    incomplete: list
    code: int
    rerun_seconds: float
    differing: list


def kill_and_rerun(folder, what, second, dice, reference):
    """Run, kill after some seconds, look at what is there, run again as the manual says, and compare."""
    run = start(folder)
    time.sleep(second)
    script = re.compile(r"\S*python\S* /\S*/\.snakemake/scripts/")
    jobs = [pid for pid, command in members(run.pid).items() if script.match(command)]
    if what == "job" and jobs:
        kill(dice.choice(sorted(jobs)))
        run.wait()
    elif what == "everything":
        for pid in [run.pid, *members(run.pid)]:
            kill(pid)
    else:
        kill(run.pid)
    run.wait()
    there = [path for path in (folder / "results").rglob("*") if path.is_file() and not path.name.endswith(".partial")]
    incomplete = [(path.name, why) for path in there if (why := why_incomplete(path))]
    begun = time.monotonic()
    # Snakemake that was killed could not lift its lock; this is what the manual says
    if list((folder / ".snakemake/locks").glob("*")):
        assert snakemake(folder, *TARGETS, "--unlock").returncode == 0
    again = start(folder, "--rerun-incomplete")
    again.wait()
    for pid in members(run.pid):  # jobs that went on without Snakemake
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    made = contents(folder)
    differing = sorted(name for name in reference if made.get(name) != reference[name])
    differing += sorted(made.keys() - reference.keys())
    return Moment(what, second, len(there), incomplete, again.returncode, time.monotonic() - begun, differing)


def begin_anew(folder):
    for name in ("results", "logs", "benchmarks", ".snakemake"):
        shutil.rmtree(folder / name, ignore_errors=True)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A working directory, what a run in peace makes of it, and how long that takes."""
    folder = make_study(tmp_path_factory.mktemp("restart"))
    begun = time.monotonic()
    assert start(folder).wait() == 0, (folder / "terminal.txt").read_text()
    return folder, contents(folder), time.monotonic() - begun


def moments(count, seconds):
    """So many moments, spread over a run: what is killed, and when."""
    dice = random.Random(SEED)
    for number in range(count):
        yield KILLED[number % len(KILLED)], dice.uniform(0.15, 1) * seconds, dice


def test_everything_is_the_same_after_kills_at_random_moments(study):
    folder, reference, seconds = study
    assert len(reference) >= 9 * len(SCANS)
    print(f"in peace: {seconds:.1f} s, {len(reference)} files")
    for what, second, dice in moments(int(os.environ.get("N4FLOW_KILLS", "3")), seconds):
        begin_anew(folder)
        moment = kill_and_rerun(folder, what, second, dice, reference)
        print(moment, flush=True)
        assert moment.incomplete == [], moment
        assert moment.code == 0, (folder / "terminal.txt").read_text()
        assert moment.differing == [], moment
        assert partial_files(folder / "results") == []
