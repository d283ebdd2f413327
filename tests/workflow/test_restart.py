"""Jobs and Snakemake are killed at random moments: what is there is whole, and a rerun makes the same bytes.

The suite kills four times or more. 50, with a line each: `N4FLOW_KILLS=50 pytest -s tests/workflow/test_restart.py`.
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

import pytest
from study import (
    ROOT,
    describe_raw,
    give_guide,
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

#: What is killed, one after the other, before a run is left in peace: Snakemake alone, whose jobs go on without it;
#: everything at once, as at a loss of power; scripts of jobs, three in one run.
ROUNDS = (("snakemake", 1), ("everything", 1), ("job", 3))

#: What a run with failed jobs leaves beside them: the index, and what belongs to it.
INDEX = {"index.html", "metrics.tsv", "metrics_mqc.tsv", "methods.md", "outliers.js"}

TARGETS = [results_of(scan)["page"] for scan in SCANS]


def make_study(folder):
    """Six small heads, without SimpleITK's correction of them: more jobs in the same time."""
    describe_raw(folder)
    for seed, scan in enumerate(SCANS):
        save(folder / scan.image, head(SHAPE, seed))
    write_sheet(folder / "config" / "samples.tsv", SCANS)
    changes = {"n4": {"shrink_factor": 1}, "reference": {"scans": 0}, "qc": {"viewer_mb": 0.1}}
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


def finished(folder):
    """Every file of the results under its final name."""
    files = []
    for place, folders, names in os.walk(folder / "results"):
        folders.sort()
        files += [Path(place, name) for name in sorted(names) if not name.endswith((".partial", ".lock"))]
    return files


def contents(folder):
    return {path.relative_to(folder).as_posix(): content_of(path) for path in finished(folder)}


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


def scripts_of(session):
    """The processes of a session that run the scripts of rules."""
    script = re.compile(r"\S*python\S* /\S*/\.snakemake/scripts/")
    return sorted(pid for pid, command in members(session).items() if script.match(command))


def run_and_kill(folder, what, shares, wanted, dice):
    """Start a run and kill at some shares of what is left to be made, unless it has ended; gives how often it did."""
    there, kills = len(finished(folder)), 0
    run = start(folder, "--rerun-incomplete")
    for share in sorted(shares):
        while run.poll() is None and len(finished(folder)) < there + share * (wanted - there):
            time.sleep(0.02)
        time.sleep(dice.uniform(0, 0.7))
        while what == "job" and run.poll() is None and not scripts_of(run.pid):
            time.sleep(0.02)  # between two jobs
        if run.poll() is not None:
            break
        scripts = scripts_of(run.pid)
        victims = {
            "job": [dice.choice(scripts)] if scripts else [],
            "snakemake": [run.pid],
            "everything": sorted(members(run.pid)),
        }[what]
        for pid in victims:
            kill(pid)
        kills += bool(victims)
    run.wait()
    return kills


def unlock(folder):
    """Lift the lock of a Snakemake that was killed, as the manual says."""
    if any((folder / ".snakemake/locks").glob("*")):
        done = snakemake(folder, *TARGETS, "--unlock")
        assert done.returncode == 0, done.stdout


def begin_anew(folder):
    for name in ("results", "logs", "benchmarks", ".snakemake"):
        shutil.rmtree(folder / name, ignore_errors=True)
    give_guide(folder)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A working directory, what a run in peace makes of it, and how long that takes."""
    folder = make_study(tmp_path_factory.mktemp("restart"))
    begun = time.monotonic()
    assert start(folder).wait() == 0, (folder / "terminal.txt").read_text()
    return folder, contents(folder), time.monotonic() - begun


def workers_of(pid):
    """Processes that do the steps of a Snakemake's jobs, in sessions of their own."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if re.search(rf"n4flow\.worker import .*\b{pid}\)", (process / "cmdline").read_bytes().decode()):
                found.append(int(process.name))
    return found


def test_no_process_stays_when_snakemake_is_killed(study):
    folder = study[0]
    begin_anew(folder)
    run = start(folder)
    while len(workers_of(run.pid)) < 2:  # one, and a child that does a step
        assert run.poll() is None
        time.sleep(0.01)
    kill(run.pid)
    run.wait()
    end = time.monotonic() + 20
    while members(run.pid) or workers_of(run.pid):
        assert time.monotonic() < end, (members(run.pid), workers_of(run.pid))
        time.sleep(0.05)
    unlock(folder)


def test_everything_is_whole_and_the_same_after_kills_at_random_moments(study):
    folder, reference, seconds = study
    killed, dice = 0, random.Random(SEED)
    print(f"in peace: {seconds:.1f} s, {len(reference)} files")
    while killed < int(os.environ.get("N4FLOW_KILLS", "4")):
        begin_anew(folder)
        for what, times in ROUNDS:
            kills = run_and_kill(folder, what, [dice.uniform(0, 0.7) for _ in range(times)], len(reference), dice)
            killed += kills
            there = finished(folder)
            cut = {path.name: why for path in there if (why := why_incomplete(path))}
            print(f"{killed}: {kills} x {what}: {len(there)} files, {len(cut)} cut off", flush=True)
            assert cut == {}
            unlock(folder)
        begun = time.monotonic()
        assert start(folder, "--rerun-incomplete").wait() == 0, (folder / "terminal.txt").read_text()
        made = contents(folder)
        differing = [name for name in reference if made.get(name) != reference[name]]
        print(f"   in peace {time.monotonic() - begun:.1f} s: {len(differing)} of {len(reference)} differ", flush=True)
        assert differing == []
        # the index that a run with failures leaves is of no scan, and that a job was killed is no fault of one
        more = {Path(name).name for name in made.keys() - reference.keys()}
        assert {name for name in more if not name.endswith(".log")} <= INDEX
        assert partial_files(folder / "results") == []
