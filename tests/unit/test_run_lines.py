"""What the terminal shows of Snakemake's messages: words.smk and run.smk in workflow/rules, which are plain Python."""

import errno
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from snakemake.cli import get_argument_parser
from snakemake.scheduling.job_scheduler import JobRateLimiter
from snakemake.settings.enums import Quietness
from snakemake.settings.types import MaxJobsPerTimespan
from snakemake_interface_logger_plugins.common import LogEvent

from n4flow.console import TOLD
from n4flow.images.files import REMEDIES
from n4flow.worker import RUN

SCAN, OTHER = "sub-1_T1w", "sub-2_T1w"


def job(number, rule, log, entities=None, retries=0):
    wildcards = {"entities": entities, "suffix": "T1w"} if entities else {}
    rule = SimpleNamespace(name=rule)
    return SimpleNamespace(
        jobid=number, rule=rule, log=[str(log)], wildcards=wildcards, attempt=1, restart_times=retries
    )


@pytest.fixture
def run(tmp_path, pytestconfig, monkeypatch):
    """The files' names, with jobs of two scans and one over all scans, a log for each, and what is said."""
    jobs = [
        job(1, "mask", tmp_path / "mask1.log", "sub-1"),
        job(2, "n4", tmp_path / "n4_1.log", "sub-1"),
        job(3, "n4", tmp_path / "n4_2.log", "sub-2"),
        job(4, "index", tmp_path / "index.log"),
    ]
    said = []
    logger = SimpleNamespace(log=lambda level, line, extra: said.append(line), handlers=[])
    workflow = SimpleNamespace(
        dag=SimpleNamespace(needrun_jobs=lambda: jobs),
        is_main_process=True,
        pathvars=SimpleNamespace(apply=lambda text: str(tmp_path / text.strip("<>"))),
        output_settings=SimpleNamespace(verbose=False, quiet={Quietness.HOST}, dryrun=False),
    )
    scans = {SCAN: None, OTHER: None}
    names = {"Path": Path, "workflow": workflow, "logger": logger, "FAILED": {}, "SCAN_OF": scans}
    names["CHOSEN"] = [SimpleNamespace(name=name, subject=name, session="", image="image.nii") for name in scans]
    names["SHEET_FILE"] = tmp_path / "samples.tsv"
    names["chosen"] = lambda scan: True
    names["shown"] = Path
    names["STORE_OF"] = {("sub-3/micr", "sub-3_SPIM"): SimpleNamespace(scans=[SimpleNamespace(name=n) for n in "ab"])}
    rules = pytestconfig.rootpath / "workflow" / "rules"
    workflow.source_path = lambda path: rules / path
    monkeypatch.setattr(sys, "path", list(sys.path))
    for variable in ("PYTHONPATH", RUN, TOLD):  # which these files set for the jobs of a run
        monkeypatch.setenv(variable, os.environ.get(variable, ""))
    for name in ("words.smk", "run.smk"):
        exec(compile((rules / name).read_text(encoding="utf-8"), name, "exec"), names)
    lines = names["ScanLines"]()
    lines.handleError = lambda record: pytest.fail("an exception in the handler")
    return SimpleNamespace(**names, jobs=jobs, said=said, lines=lines, folder=tmp_path)


def record(event, level=logging.INFO, message="", **values):
    made = logging.LogRecord("snakemake", level, "", 0, message, None, None)
    vars(made).update(event=event, **values)
    return made


def job_error(number, message="", indent=False, log=()):
    return record(LogEvent.JOB_ERROR, logging.ERROR, jobid=number, rule_msg=message, indent=indent, log=list(log))


def group_error(*numbers, logs=("slurm.log",)):
    return record(
        LogEvent.GROUP_ERROR, logging.ERROR, job_error_info=[{"jobid": n} for n in numbers], aux_logs=list(logs)
    )


def test_scan_is_said_to_be_done_with_its_last_job(run):
    for number in (1, 2):
        run.lines.emit(record(LogEvent.JOB_INFO, jobid=number))
        run.lines.emit(record(LogEvent.JOB_FINISHED, job_id=number))
    (line,) = run.said
    assert line.startswith(f"[1/2] {SCAN}: done in ")


def test_jobs_of_a_store_are_those_of_its_channels(run):
    of_store = SimpleNamespace(wildcards={"folder": "sub-3/micr", "entities": "sub-3", "suffix": "SPIM", "level": "0"})
    assert run.scans_of_job(of_store) == ["a", "b"]
    of_store.wildcards["folder"] = "sub-3/anat"
    assert run.scans_of_job(of_store) == []


def test_line_of_a_job_that_failed_is_that_of_its_log(run):
    (run.folder / "n4_2.log").write_text("n4flow: raw.nii: is broken; mend it\n")
    run.lines.emit(job_error(3, "SLURM status is FAILED"))
    assert run.said == [f"[1/2] {OTHER}: n4 failed: raw.nii: is broken; mend it"]


def test_of_a_group_the_job_that_failed_is_named_once(run):
    (run.folder / "mask1.log").write_text("done\n")
    (run.folder / "n4_1.log").write_text("n4flow: raw.nii: is broken; mend it\n")
    run.lines.emit(group_error(1, 2, 3))
    for number in (1, 2, 3):
        run.lines.emit(job_error(number, indent=True))
    assert run.said == [f"[1/2] {SCAN}: n4 failed: raw.nii: is broken; mend it"]


def test_lost_node_is_named_with_the_log_of_the_cluster(run):
    (run.folder / "mask1.log").write_text("done\n")
    run.lines.emit(
        job_error(1, "SLURM-job '7' failed, SLURM status is: 'NODE_FAIL'.\n", log=["mask1.log", "slurm.log"])
    )
    run.lines.emit(group_error(3))
    assert run.said == [
        f"[1/2] {SCAN}: mask failed: SLURM-job '7' failed, SLURM status is: 'NODE_FAIL'; see mask1.log, slurm.log",
        f"[2/2] {OTHER}: n4 failed: ended without a message; see slurm.log",
    ]


def test_job_that_is_tried_again_has_no_line_yet(run):
    for one in run.jobs:
        one.restart_times = 1
    (run.folder / "n4_2.log").write_text("n4flow: raw.nii: is broken; mend it\n")
    run.lines.emit(job_error(3))
    run.lines.emit(group_error(1, 2))
    assert run.said == []
    run.jobs[2].attempt = 2
    run.lines.emit(job_error(3))
    assert len(run.said) == 1


def test_log_of_an_earlier_run_does_not_count(run):
    (run.folder / "n4_2.log").write_text("n4flow: of yesterday\n")
    run.lines.follow.__globals__["RUN_START"] += 10
    run.lines.emit(job_error(3, log=["n4_2.log"]))
    assert run.said == [f"[1/2] {OTHER}: n4 failed: ended without a message; see n4_2.log"]


def test_job_over_all_scans_has_a_line_when_it_fails(run):
    (run.folder / "index.log").write_text("n4flow: disk full\n")
    run.lines.emit(job_error(4))
    assert run.said == ["index failed: disk full"]


SCRIPT_ENDED = "RuleException:\nCalledProcessError in file mask.smk, line 26:\nCommand 'python mask.py' returned 1."


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        (record(LogEvent.JOB_INFO), False),
        (record(None, message="Select jobs to execute..."), False),
        (job_error(1), False),
        (group_error(1), False),
        (record(LogEvent.ERROR, logging.ERROR, SCRIPT_ENDED, exception="RuleException"), False),
        (record("n4flow"), True),
        (record(None, logging.WARNING, "File system is slow"), True),
        (record(LogEvent.ERROR, logging.ERROR, "Missing output", exception="MissingOutputException"), True),
        (record(LogEvent.ERROR, logging.ERROR, "the file is bad", exception="RuleException"), True),
    ],
)
def test_what_goes_wrong_beside_jobs_is_shown(run, message, shown):
    assert run.is_shown(message) is shown


def error(name, message):
    return record(LogEvent.ERROR, logging.ERROR, message, exception=name)


WHERE = (
    '  File "/clone/workflow/Snakefile", line 60, in <module>\n  File "/clone/workflow/rules/run.smk", line 9, in check'
)

TRACE = f"Traceback (most recent call last):\n{WHERE}"


@pytest.mark.parametrize(
    ("message", "line"),
    [
        (
            error("WorkflowError", f'WorkflowError in file "/clone/Snakefile", line 6:\na: bad; mend it\n{WHERE}'),
            "a: bad; mend it",
        ),
        (
            error("PermissionError", f"{TRACE}\nPermissionError: [Errno 13] Permission denied: '/out/.snakemake/x'"),
            f"/out/.snakemake/x: cannot be written (Permission denied); {REMEDIES[errno.EACCES]}",
        ),
        (error("ZeroDivisionError", f"{TRACE}\nZeroDivisionError: defect"), None),
        (record(None, logging.WARNING, f"a warning\n{WHERE}"), None),
    ],
)
def test_what_ends_a_run_is_said_in_words_without_places_in_the_code(run, message, line):
    """Of a defect, all that is known of it."""
    said = run.InWords(logging.Formatter("%(message)s")).format(message)
    assert said == (line or message.getMessage())


def test_a_lock_of_another_run_is_a_line_with_the_command_that_removes_it(run, monkeypatch):
    message = error("LockException", f"LockException:\nError: Directory cannot be locked.\n{WHERE}")
    words = run.InWords(logging.Formatter("%(message)s"))
    assert words.format(message).endswith("remove its lock: snakemake --unlock")
    monkeypatch.setitem(words.format.__func__.__globals__, "COMMAND", "n4flow run BIDS OUT participant --")
    said = words.format(message)
    assert said.startswith(f"{os.getcwd()}: another run is at work there on the same files; wait for it. ")
    assert said.endswith("remove its lock: n4flow run BIDS OUT participant -- --unlock")
    assert "\n" not in said


def test_of_how_snakemake_begins_the_terminal_shows_the_table_of_jobs(run):
    for message in ("Building DAG of jobs...", "Provided cores: 2", "Conda environments: ignored"):
        assert not run.is_no_preamble(record(None, message=message))
    assert run.is_no_preamble(record(LogEvent.RUN_INFO, message="Job stats:"))
    assert run.is_no_preamble(record(None, message="Unlocked working directory."))
    assert run.is_no_preamble(record(LogEvent.ERROR, logging.ERROR, message="Provided cores: none"))


def test_a_dry_run_is_a_table_of_jobs(run):
    table = record(LogEvent.RUN_INFO, message="Job stats:")
    assert run.is_shown_of_dry_run(table)
    assert not run.is_shown_of_dry_run(record(LogEvent.JOB_INFO))
    assert not run.is_shown_of_dry_run(record(None, message="Building DAG of jobs..."))
    assert run.is_shown_of_dry_run(
        record(None, message="Nothing to be done (all requested files are present and up to date).")
    )
    words = run.InWords(logging.Formatter("%(message)s"))
    assert words.format(table) == "Job stats:"
    run.workflow.output_settings.dryrun = True
    assert words.format(table) == "2 of 2 scans would be done, with these jobs:\nJob stats:"


def test_warning_at_the_start_names_a_few_of_many(run):
    assert run.names_of(["b", "a"]) == "a, b"
    assert run.names_of([f"s{n}" for n in range(9)]) == "s0, s1, s2, s3, s4 and 4 more"


@pytest.mark.parametrize(
    ("local", "asked", "left"), [(True, "100/1s", False), (False, "100/1s", True), (True, "1/1m", True)]
)
def test_jobs_of_this_machine_are_not_limited_by_the_second_unless_somebody_asks(run, local, asked, left):
    limit = JobRateLimiter(MaxJobsPerTimespan.parse_choice(asked))
    run.workflow.local_exec = local
    run.workflow.scheduler = SimpleNamespace(job_rate_limiter=limit)
    run.weigh_jobs_once()
    assert run.workflow.scheduler.job_rate_limiter == (limit if left else None)


def test_snakemakes_limit_is_the_one_that_is_lifted():
    default = get_argument_parser().get_default("max_jobs_per_timespan")
    assert default == "100/1s"


def test_snakemake_without_that_limit_weighs_jobs_only_when_one_has_ended(tmp_path):
    """Of the pinned Snakemake: the name is what it was, and with the limit jobs are weighed more often."""
    (tmp_path / "Snakefile").write_text(
        "onstart:\n    workflow.scheduler.job_rate_limiter = config.get('limit')\n"
        "rule all:\n    input: expand('{n}', n=range(4)),\n"
        "rule one:\n    output: '{n}',\n    shell: 'sleep 0.4; touch {output}'\n"
    )
    command = [sys.executable, "-m", "snakemake", "--cores", "1", "--verbose", "--scheduler", "greedy"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stderr.count("Ready jobs: ") == 5  # each job, and the last rule
