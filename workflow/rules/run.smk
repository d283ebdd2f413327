# What happens at the start and at the end of a run, and what the terminal shows meanwhile. No rules.
import csv
import json
import logging
import os
import shutil
import subprocess
import time

from snakemake_interface_logger_plugins.common import LogEvent

from n4flow.console import TOLD, last_error
from n4flow.images.files import remove_abandoned, why_not_writable
from n4flow.study.failures import NO_STORE, STORE_STEPS, failed_scans, made_since, write_failed
from n4flow.study.progress import Progress
from n4flow.study.sheet import zeros_problem
from n4flow.worker import begin_run

RUN_START = time.time()

# The jobs of this run have this copy of the package, and a worker that ends with this process.
begin_run()

# How many names a line bears.
NAMED = 5

# An event of our own among those of Snakemake's log: a line that the terminal shows.
SHOWN = "n4flow"


def place_of(path):
    """Where a path with pathvars leads."""
    return Path(workflow.pathvars.apply(path))


def names_of(names):
    """A few names in a line."""
    names = sorted(names)
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


FAILED_NOW = {name: failure for name, failure in FAILED.items() if chosen(SCAN_OF[name])}
if FAILED_NOW and workflow.is_main_process:
    # a warning, so that those see it, too, who want few words
    logger.warning(
        f"{len(FAILED_NOW)} left out that failed before: {names_of(FAILED_NOW)}. To try one again, mend it or remove its "
        f"row from {shown(FAILED_FILE)}"
    )


if workflow.is_main_process and (problem := zeros_problem(SHEET_FILE, CHOSEN, place_of("<results>"))):
    logger.warning(problem)


class ScanLines(logging.Handler):
    """Hears what Snakemake says of jobs, and says a line for each scan."""

    def __init__(self):
        super().__init__()
        self.jobs = {job.jobid: job for job in workflow.dag.needrun_jobs()}
        self.progress = Progress({number: scans_of_job(job) for number, job in self.jobs.items()}, self.say)

    def emit(self, record):
        try:
            self.follow(record)
        except Exception:
            self.handleError(record)

    def follow(self, record):
        event = getattr(record, "event", None)
        if event == LogEvent.JOB_INFO:
            self.progress.begin(record.jobid)
        elif event == LogEvent.JOB_FINISHED:
            self.progress.end(record.job_id)
        elif event == LogEvent.GROUP_ERROR:
            self.fail(record.job_error_info, "", record.aux_logs)
        elif event == LogEvent.JOB_ERROR and not record.indent:  # those of a group are indented
            self.fail([vars(record)], record.rule_msg, record.log)

    def fail(self, errors, message, logs):
        """One job has failed, or some job of a group."""
        jobs = [self.jobs[error["jobid"]] for error in errors]
        if any(job.attempt <= job.restart_times for job in jobs):
            return  # it is tried again
        logs_now = [[shown(path) for path in job.log if made_since(Path(path), RUN_START)] for job in jobs]
        said = [(job, line) for job, paths in zip(jobs, logs_now) for line in map(last_error, paths) if line]
        if not said:  # the node was lost, or the log could not be written
            where = ", ".join(str(shown(path)) for path in logs) or "Snakemake's log"
            problem = " ".join((message or "ended without a message").split()).rstrip(".") + f"; see {where}"
            said = [(job, problem) for job in jobs]
        for job, problem in said:
            self.tell(job, problem)

    def tell(self, job, problem):
        if scans_of_job(job):
            self.progress.fail(job.jobid, f"{job.rule.name} failed: {problem}")
        else:
            self.say(f"{job.rule.name} failed: {problem}", True)

    def say(self, line, failed):
        logger.log(logging.ERROR if failed else logging.INFO, line, extra={"event": SHOWN})


def scans_of_job(job):
    """Names of the scans that a job works on: one, those of an OME-Zarr image, or none."""
    name = f"{job.wildcards.get('entities')}_{job.wildcards.get('suffix')}"
    store = STORE_OF.get((job.wildcards.get("folder"), name))
    return [scan.name for scan in store.scans] if store else [name] if name in SCAN_OF else []


def is_shown(record):
    """Whether the terminal shows one of Snakemake's messages: what goes wrong, other than with a job, which has its line."""
    event = getattr(record, "event", None)
    of_job = event in (LogEvent.JOB_ERROR, LogEvent.GROUP_ERROR)
    # Snakemake reports a script's non-zero exit status this way, too
    of_job |= getattr(record, "exception", None) == "RuleException" and "CalledProcessError" in record.getMessage()
    return event == SHOWN or record.levelno > logging.INFO and not of_job


def scans_to_do():
    """Of how many scans there are jobs to do."""
    to_do = {scan for job in workflow.dag.needrun_jobs() for scan in scans_of_job(job)}
    return f"{len(to_do)} of {len(CHOSEN)} scans would be done, with these jobs:"


def calm_down():
    """From here on the terminal shows a line for each scan."""
    if screen := screen_of_lines():
        os.environ[TOLD] = "1"
        logger.addHandler(ScanLines())
        screen.addFilter(is_shown)


def weigh_jobs_once():
    """Have Snakemake weigh the jobs that are ready only when one has ended, in a run on this machine.

    For its limit to the jobs that start in a second it weighs all of them again a second after each time it did, and
    each job that ends adds to that: with 200 scans Snakemake alone then takes a core. Here the cores are the limit.
    """
    limit = workflow.scheduler.job_rate_limiter
    if workflow.local_exec and limit and (limit.max_jobs, limit.timespan) == (100, 1):  # nobody asked for another
        workflow.scheduler.job_rate_limiter = None


def jobs_on_gpu():
    """Jobs of this run whose rule asks for a GPU (a job's own resources are not known before its input is)."""
    return [job for job in workflow.dag.needrun_jobs() if "gpu" in job.rule.resources]


def check_places():
    """Before the first job, and so before Snakemake removes what is to be made anew: can be written, is there a GPU?

    What a run that was killed left half-written is removed.
    """
    places = [*map(workflow.pathvars.apply, ("<results>", "<logs>", "<benchmarks>"))]
    for place in places:
        remove_abandoned(place)
    # a folder in them may be another user's, of a container say
    made = (os.path.dirname(path) for job in workflow.dag.needrun_jobs() for path in job.output)
    unwritable = {}
    for place in dict.fromkeys([*places, *made]):
        if problem := why_not_writable(place):
            unwritable.setdefault(problem, place)
    where = {place: " (pathvars in the config)" for place in places}
    problems = [
        f"{problem}: {shown(place)} is to be there{where.get(place, '')}" for problem, place in unwritable.items()
    ]
    # a cluster's login node has no GPU, nor has Snakemake's own environment CuPy where the rules have theirs
    may_ask = workflow.local_exec and not workflow.deployment_settings.deployment_method
    if config["device"] == "gpu" and workflow.global_resources["gpu"] != 0 and may_ask and jobs_on_gpu():
        # in a process of its own: who asks holds some of the GPU's memory until it ends
        ask = "from n4flow.device import select_device; select_device('gpu')"
        done = subprocess.run([sys.executable, "-c", ask], stderr=subprocess.PIPE, text=True)
        if done.returncode != 0:
            problems.append(done.stderr.strip().rpartition("MachineError: ")[2])
    if problems:
        raise WorkflowError("\n".join(problems))


def end_run(success):
    """What was done, what failed and why, where the report is, and what to run next; notes who would fail again."""
    lines = next((handler for handler in logger.handlers if isinstance(handler, ScanLines)), None)
    for handler in logger.handlers:
        handler.removeFilter(is_shown)
    new = {} if success else failed_scans(CHOSEN, place_of("<logs>"), place_of("<results>"), RUN_START)
    failed = {name: failure for name, failure in FAILED.items() if not is_done_now(failure)} | new
    try:
        if new or FAILED_FILE.is_file():
            FAILED_FILE.parent.mkdir(parents=True, exist_ok=True)
            of_run = {scan.name for scan in CHOSEN} | GONE
            write_failed(FAILED_FILE, list(failed.values()), SCAN_OF, config, RUN_START, of_run)
    except InputError as error:
        logger.error(f"Not noted which scans failed: {error}")
    if success:
        report_success({job.rule.name for job in workflow.dag.jobs})
    elif new:  # else of no scan: the rule's own line says all
        report_failures(failed, new, told=lines.progress.over if lines else ())


def is_done_now(failure):
    """Whether this run made what failed before."""
    if failure.step in (*STORE_STEPS, NO_STORE):
        if failure.scan not in STORE_FILES:  # its metadata are damaged now
            return False
        made = STORE_FILES[failure.scan]["store"]
    else:
        made = made_of(SCAN_OF[failure.scan], failure.step if failure.step in ("reference", "crops") else "metrics")
    return made_since(place_of(made), RUN_START)


def report_success(rule_names):
    """Where the reports of a run are that asked for these rules."""
    if SUBJECTS and rule_names & {"all", "default"}:
        done = [scan for scan in SCANS if chosen(scan)]
        logger.info(f"{outcome(done, FAILED_NOW)}. The report over all scans: the same without --participant-label")
    elif "index" in rule_names:
        page = place_of("<results>/qc/index.html")
        logger.info(f"{outcome(SCANS, FAILED_NOW)}. The report: {shown(page)}")
        logger.info(
            f"Next: look through it in a browser; {COMMAND} --report {shown('report.zip')} packs it for a colleague"
        )
    if "tune" in rule_names:
        logger.info(f"The settings side by side: {shown(place_of('<results>/tune/index.html'))}")


def outcome(done, failed):
    """How many scans of this run are done, failed (before), and flagged."""
    before = f" before (see {shown(FAILED_FILE)})" if failed and failed.keys() <= FAILED.keys() else ""
    words = [f"{len(done)} of {len(CHOSEN)} scans are done"]
    words += [f"{len(failed)} failed{before}"] if failed else []
    return ", ".join([*words, f"{flagged({scan.name: scan for scan in done}) or 'none'} flagged"])


def flagged(scans):
    """How many scans, by name, have a flag: by the table over all, which knows the outliers too, or each by its own."""
    if SUBJECTS:
        metrics = [place_of(made_of(scan, "metrics")).read_text(encoding="utf-8") for scan in scans.values()]
        return sum(bool(json.loads(text)["flags"]) for text in metrics)
    with open(place_of("<results>/qc/metrics.tsv"), newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        return sum(row["name"] in scans and row["flags"] != "n/a" for row in rows)


def report_failures(failed, new, told):
    """After a run that failed: the index over the scans that are done, with the failed ones named."""
    not_done = new.keys() | {name for name, failure in failed.items() if failure.step != "reference"}
    done = [
        scan
        for scan in CHOSEN
        if scan.name not in not_done
        and all(place_of(made_of(scan, role)).is_file() for role in ("metrics", "corrected"))
    ]
    failed = {name: failure for name, failure in failed.items() if chosen(SCAN_OF[name])}
    page = place_of("<results>/qc/index.html")
    if SUBJECTS or write_index(done, failed.values(), page):
        logger.error(outcome(done, failed) + ("" if SUBJECTS else f": see {shown(page)}"))
    else:
        logger.error(f"{len(done)} of {len(CHOSEN)} scans are done, {len(failed)} failed")
    for name, failure in new.items():
        if name not in told:
            logger.error(f"{name}: {failure.error}")
    again = sum(failure.again for failure in failed.values())
    if again:
        goal = "does the others" if SUBJECTS else "completes the report"
        logger.error(f"Next: mend them, or run the same command again: it leaves out {again} and {goal}")
    if again < len(failed):
        logger.error(f"{len(failed) - again} failed by no fault of the scan: the same command tries again")


def write_index(done, failed, page):
    """Write the index over the scans that are done; False, and why, if that does not go."""
    try:
        from n4flow.qc.dataset import make_index

        make_index(
            [place_of(made_of(scan, "metrics")) for scan in done],
            page,
            page.with_name("metrics.tsv"),
            failed=list(failed),
            ratings=RATINGS_FILE or None,
            outlier_z=config["qc"]["flags"]["outlier_z"],
            limits=page_settings(config["qc"])["flags"],
            groups={scan.name: dict(scan.groups) for scan in SHEET},
        )
    # the workflow's own environment need not hold the QC's packages; a disk may be full
    except (ImportError, InputError) as error:
        logger.error(f"No index over the scans that are done: {error}")
        return False
    finally:
        # without it the rule index is not done, and makes the index anew when all scans are
        shutil.rmtree(place_of(BUNDLE), ignore_errors=True)
    return True
