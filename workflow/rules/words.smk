# What comes before anything is checked: the package, and how the terminal says what ends a run. No rules.
import logging
import os
import re
import sys
from pathlib import Path

from snakemake.common import NOTHING_TO_BE_DONE_MSG
from snakemake.settings.enums import Quietness
from snakemake_interface_logger_plugins.common import LogEvent

# Every file of the package, by name: Snakemake fetches what is named where the workflow is a module from elsewhere.
PACKAGE_FILES = Path(workflow.source_path("../scripts/n4flow/files.txt")).read_text(encoding="utf-8").split()
PACKAGE = [Path(workflow.source_path(f"../scripts/n4flow/{name}")) for name in PACKAGE_FILES]
sys.path.insert(0, str(PACKAGE[0].parent.parent))

from n4flow.console import TYPED
from n4flow.images.files import not_writable

# How this run was asked for, before what concerns Snakemake alone.
COMMAND = f"{os.environ[TYPED]} --" if TYPED in os.environ else "snakemake"


# How Snakemake begins, before it says how many jobs there are.
PREAMBLE = (
    "Building DAG",
    "Using shell",
    "Provided ",
    "Rules claiming",
    "Conda environments: ",
    "Singularity containers: ",
)


def is_no_preamble(record):
    """Whether the terminal shows one of the messages before the first job."""
    return record.levelno > logging.INFO or not record.getMessage().startswith(PREAMBLE)


def is_shown_of_dry_run(record):
    """Whether the terminal shows one of the messages of a dry run: how many jobs of each rule there would be, if any."""
    is_summary = getattr(record, "event", None) == LogEvent.RUN_INFO and any(workflow.dag.needrun_jobs())
    return is_summary or record.levelno > logging.INFO or record.getMessage() == NOTHING_TO_BE_DONE_MSG


class InWords(logging.Formatter):
    """What ends a run, in a line: what is wrong and what to do. Where in the code it was found, Snakemake's log has."""

    def __init__(self, usual):
        super().__init__()
        self.usual = usual

    def format(self, record):
        event, name = (getattr(record, key, None) for key in ("event", "exception"))
        if event == LogEvent.RUN_INFO and workflow.output_settings.dryrun:
            return f"{scans_to_do()}\n{self.usual.format(record)}"
        if event != LogEvent.ERROR:
            return self.usual.format(record)
        message = record.getMessage()
        if name == "LockException":
            return (
                f"{os.getcwd()}: another run is at work there on the same files; wait for it. If none is alive, such as "
                f"after a loss of power, remove its lock: {COMMAND} --unlock"
            )
        refused = re.search(r"^(?:PermissionError|OSError): \[Errno (\d+)\] [^:]*: '(.*)'$", message, re.MULTILINE)
        if refused and (problem := not_writable(refused[2], int(refused[1]))):
            return str(problem)
        if message.startswith("Traceback"):
            return message
        place = re.compile(r"^  File \".*\", line \d+, in .*$|^WorkflowError in file \".*\", line \d+:$")
        return "\n".join(line for line in message.splitlines() if not place.match(line))


def screen_of_lines():
    """What writes to the terminal, if quiet says host, as in profiles/default: then a line for each scan is enough."""
    settings = workflow.output_settings
    # there is none where a logger plugin writes to the terminal
    screen = next((handler for handler in logger.handlers if handler.name == "DefaultStreamHandler"), None)
    return screen if not settings.verbose and Quietness.HOST in (settings.quiet or ()) else None


def speak_in_words():
    """From here on the terminal shows in words what ends a run, and of a dry run that n4flow run makes a summary."""
    if screen := screen_of_lines():
        screen.setFormatter(InWords(screen.formatter))
        if not workflow.output_settings.dryrun:
            screen.addFilter(is_no_preamble)
        elif TYPED in os.environ:
            screen.addFilter(is_shown_of_dry_run)


if workflow.is_main_process:
    speak_in_words()
