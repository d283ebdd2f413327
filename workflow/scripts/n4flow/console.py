"""What a job says: everything into its log, and the line that matters to the user's terminal."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import signal
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from n4flow.errors import InputError, MachineError

#: How the one line of a failed job begins.
PREFIX = "n4flow: "

#: Exit status of a job that was stopped by hand.
STOPPED = 128 + signal.SIGINT

#: The last line of the log of a job that was done.
DONE = "done"

#: The line before the last one in the log of a job that failed by no fault of its input.
PASSING = "the machine is at fault, not the input: the same may succeed another time"

#: Exceptions that are the machine's; so is all that CuPy raises.
OF_MACHINE = (MachineError, OSError, MemoryError, ImportError)

#: Environment variable that is set where somebody else tells the terminal what a job's log says.
TOLD = "N4FLOW_TOLD"

#: Environment variables by which n4flow run tells its workflow what was typed, and for which subjects of the sheet it
#: is, separated by spaces; for all if there are none, or no others in the sheet.
TYPED, PARTICIPANTS = "N4FLOW_TYPED", "N4FLOW_PARTICIPANTS"


class Terminal(logging.Handler):
    """The log of a command: warnings are lines; where there is a terminal, the rest is one line that changes."""

    def __init__(self) -> None:
        super().__init__()
        self.shown = False
        self.warned: set[str] = set()  # each step that reads an image says what is wrong with it

    def emit(self, record: logging.LogRecord) -> None:
        """Show a message."""
        if record.levelno >= logging.WARNING:
            message = record.getMessage()
            if message not in self.warned:
                self.warned.add(message)
                self.clear()
                say(f"{PREFIX}{message}\n", sys.stderr)
        elif sys.stderr.isatty():
            self.clear()
            # without the folders of the file that it begins with: what happens is to be seen
            message = re.sub(r"^\S*/", "", record.getMessage())
            say(message[: shutil.get_terminal_size().columns - 1], sys.stderr)
            self.shown = True

    def clear(self) -> None:
        """Remove the line that changes."""
        if self.shown:
            say("\r" + " " * (shutil.get_terminal_size().columns - 1) + "\r", sys.stderr)
            self.shown = False


@contextlib.contextmanager
def commanding() -> Iterator[None]:
    """Show a command's log on the terminal; end with exit status 1 and one line if the input is at fault."""
    handler = Terminal()
    logger = logging.getLogger("n4flow")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    except KeyboardInterrupt:
        handler.clear()
        sys.exit(STOPPED)
    except InputError as error:
        handler.clear()
        sys.exit(f"{PREFIX}{error}")
    finally:
        handler.clear()
        logger.removeHandler(handler)


@contextlib.contextmanager
def reporting(log_path: str | Path, *, quiet: bool = False) -> Iterator[None]:
    """Log to a file; end with exit status 1 and one line if the input is at fault.

    The one line goes to the log and, unless `quiet` or told otherwise (`TOLD`), to the terminal. Any other exception
    is a defect: its traceback goes to the log, its last line to the terminal.
    """
    terminals = [] if quiet or os.environ.get(TOLD) else [sys.stderr]
    open(log_path, "w").close()
    # what a library prints by itself may go there as well: everything at the end of what there is
    with open(log_path, "a", buffering=1, encoding="utf-8") as file, contextlib.redirect_stderr(file):
        handler = logging.StreamHandler(file)
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        logger = logging.getLogger("n4flow")
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        try:
            yield
            print(DONE, file=file)
        except KeyboardInterrupt:
            say(f"{PASSING}\n{PREFIX}stopped by hand (Ctrl-C)\n", file)
            sys.exit(STOPPED)
        except InputError as error:
            if isinstance(error, OF_MACHINE):
                print(PASSING, file=file)
            say(f"{PREFIX}{error}\n", file, *terminals)
            sys.exit(1)
        except Exception as error:
            traceback.print_exc(file=file)
            if isinstance(error, OF_MACHINE) or type(error).__module__.startswith("cupy"):
                print(PASSING, file=file)
            say(f"{PREFIX}{type(error).__name__}: {' '.join(str(error).split())}; see {log_path}\n", file, *terminals)
            sys.exit(1)
        finally:
            logger.removeHandler(handler)


def say(line: str, *files: TextIO) -> None:
    """Write a line, its end included, in one piece: other jobs may write to the terminal at the same time."""
    for file in files:
        file.write(line)
        file.flush()


def last_error(log_path: str | Path) -> str:
    """The line with which a job failed, or nothing if it did not (or has not run)."""
    return end_of(log_path)[0]


def end_of(log_path: str | Path) -> tuple[str, bool]:
    """The line with which a job failed, and whether the same input would fail again.

    Returns
    -------
    (str, bool)
        The line is empty if the job did not fail (or has not run).
    """
    try:
        lines = Path(log_path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return "", False
    if lines and lines[-1].startswith(PREFIX):
        return lines[-1].removeprefix(PREFIX), PASSING not in lines[-2:-1]
    killed = f"ended without a message: perhaps killed, by hand or because memory ran out; see {log_path}"
    return ("" if lines and lines[-1] == DONE else killed), False
