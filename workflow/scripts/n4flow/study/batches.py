"""Many scans in one process: what comes of each lies in a folder of its own until the jobs of the scan take it.

Snakemake removes all outputs of a job that fails. So a batch owns nothing that counts and does not fail for a scan: the
rules of a scan put its files in place, or fail with the line with which it failed in the batch.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from n4flow.console import PREFIX, last_error, reporting, say
from n4flow.images.files import write_json

# loaded where a batch is worked on: three jobs of every scan take from one, and each would wait for it
if TYPE_CHECKING:
    from concurrent.futures import ProcessPoolExecutor

log = logging.getLogger(__name__)

#: What the files in a scan's folder were made with and from, and whether all went well: there when the batch has dealt
#: with the scan.
RECEIPT = "receipt.json"

#: A job that was killed at a scan so often leaves it out.
KILLS = 2


def place(folder: str | Path, output: str | Path) -> Path:
    """Where a batch puts what will be `output`: in the scan's folder (results/.batches/kind/scan), as in the results.

    Nothing that is written there, such as links from file to file, tells the difference.
    """
    return Path(folder, _within(folder, output))


def _within(folder: str | Path, output: str | Path) -> str:
    return os.path.relpath(output, Path(folder).parents[2])


class BatchScan(NamedTuple):
    """What a batch is to do for a scan."""

    folder: Path  # results/.batches/kind/scan
    settings: Mapping[str, Any]  # what the outcome hangs on, step by step; plain values
    inputs: Sequence[str]  # the scan's own files
    steps: Mapping[str, Callable[[], None]]
    between: Sequence[tuple[str | Path, Path]] = ()  # results of one step that the next reads: their places, and here

    def work(self) -> bool:
        """Take the steps, each with a log of its own; whether all went well."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        states = self.states()
        done = False
        with contextlib.suppress(SystemExit):
            for step, take_step in self.steps.items():
                with reporting(self.folder / f"{step}.log", quiet=True):
                    take_step()
            done = True
        self.write_receipt(states, done and bool(self.steps))
        return done

    def states(self) -> dict[str, list[Any]]:
        """The scan's own files as they are: to be asked before the work, since they may change meanwhile."""
        return {path: [*_size_and_time(path), _sha256_or_none(path)] for path in self.inputs}

    def write_receipt(self, states: Mapping[str, Any], done: bool) -> None:
        """Note what the files in the folder are made of."""
        read = {_within(self.folder, path): _sha256(here) for path, here in self.between if here.is_file()}
        write_json(self.folder / RECEIPT, {"Settings": self.settings, "Inputs": states, "Between": read, "Done": done})

    def give_up(self, problem: str) -> None:
        """Say why it is not done, in the log of the first step that is not, or of the last."""
        logs = [self.folder / f"{step}.log" for step in self.steps]
        not_done = [path for path in logs if last_error(path) or not path.is_file()]
        remedy = "give the job more memory or time, or leave the scan out"
        with open((not_done or logs[::-1])[0], "a", encoding="utf-8") as file:
            file.write(f"{PREFIX}{self.folder.name}: {problem}; {remedy}\n")
        self.write_receipt(self.states(), False)


def is_current(
    folder: str | Path, settings: Mapping[str, Any], inputs: Iterable[str] = (), hashed_bytes: int = 1_000_000
) -> bool:
    """Whether a batch has made of a scan as it is now what it was to make; other parameters are those of `BatchScan`.

    Parameters
    ----------
    hashed_bytes : int
        Up to this size an input that was touched is compared by its content.
    """
    receipt = _read_receipt(folder)
    made_with = receipt.get("Settings", {})
    if not receipt.get("Done") or any(made_with.get(key) != part for key, part in _plain(settings).items()):
        return False
    if set(receipt["Inputs"]) != set(inputs):
        return False
    for path, (size, time_ns, sha256) in receipt["Inputs"].items():
        now = _size_and_time(path)
        same = now == [size, time_ns] or (now[0] == size <= hashed_bytes and _sha256_or_none(path) == sha256)
        if not (same and sha256):
            return False
    return True


def _read_receipt(folder: str | Path) -> dict[str, Any]:
    try:
        return json.loads(Path(folder, RECEIPT).read_bytes())
    except (OSError, ValueError):
        return {}


def _plain(settings: Any) -> Any:
    return json.loads(json.dumps(settings))


def _size_and_time(path: str) -> list[int]:
    try:
        found = os.stat(path)
    except OSError:
        return [0, 0]
    return [found.st_size, found.st_mtime_ns]


def _sha256_or_none(path: str) -> str | None:
    """None for a file that cannot be read: the steps say so, and end with a line."""
    try:
        return _sha256(Path(path))
    except OSError:
        return None


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def take(
    folder: str | Path | None,
    step: str,
    settings: Mapping[str, Any],
    outputs: Iterable[str | Path],
    log_path: str | Path,
    given: Iterable[str | Path] = (),
    attempt: int = 1,
) -> bool:
    """Put in place what a batch made of a scan.

    Where the scan failed in the batch, its log is put in place, and the process ends with its line and status 1.

    Parameters
    ----------
    folder : path-like or None
        Of the scan; None if it is of no batch.
    step : str
    settings : mapping
        What the outputs hang on.
    outputs : iterable of path-like
    log_path : path-like
    given : iterable of path-like
        Outputs of the steps before, which must be those that the batch used.
    attempt : int
        From 1. The later ones end as the first did: the batch has tried twice, where there is memory (and a GPU).

    Returns
    -------
    bool
        False if the batch has nothing (any longer), or what it has was made with or from something else.
    """
    if not folder:
        return False
    receipt = _read_receipt(folder)
    said = Path(folder, f"{step}.log")
    if not said.is_file() or (receipt and receipt.get("Settings", {}).get(step) != _plain(settings)):
        return False
    if (receipt or attempt > 1) and (error := last_error(said)):
        _link(said, log_path)
        # so that another run tries again
        Path(folder, RECEIPT).unlink(missing_ok=True)
        say(f"{PREFIX}{error}\n", sys.stderr)
        sys.exit(1)
    if not receipt:
        return False
    for path in given:
        if receipt["Between"].get(_within(folder, path)) != _sha256(Path(path)):
            return False
    made = {place(folder, output): output for output in outputs}
    if not all(path.is_file() for path in made):
        return False
    for path, output in made.items():
        _link(path, output)
    _link(said, log_path)
    return True


def _link(source: Path, target: str | Path) -> None:
    """A second name for a file, dated now; a copy where the file system has no links."""
    partial = Path(target).with_name(f".{Path(target).name}.{os.getpid()}.partial")
    try:
        os.link(source, partial)
    except OSError:
        shutil.copyfile(source, partial)
    os.utime(partial)
    os.replace(partial, target)


def clear(folder: str | Path | None) -> None:
    """Remove the files in a scan's folder, when its jobs have what they need of them; the receipt stays."""
    if folder and Path(folder, RECEIPT).is_file():
        for path in Path(folder).iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != RECEIPT and not path.name.startswith("."):  # not Snakemake's own
                path.unlink()


def run_batch(scans: Sequence[BatchScan], attempt: int = 1) -> None:
    """Work on scans one after the other in one process, and once more on each that fails, in a process of its own.

    These processes are children of this one: whatever happens to them, the other scans are worked on.

    Parameters
    ----------
    scans : sequence of BatchScan
    attempt : int
        From 1. What an earlier attempt was killed at comes last, and is left out when that has happened twice.
    """
    kills = {scan.folder: _size_and_time(str(_mark(scan)))[0] if attempt > 1 else 0 for scan in scans}
    if attempt == 1:  # of an older run
        for scan in scans:
            _mark(scan).unlink(missing_ok=True)
    failed = []
    with contextlib.ExitStack() as stack:
        worker = None
        for scan in sorted(scans, key=lambda scan: kills[scan.folder]):
            if kills[scan.folder] >= KILLS:
                shutil.rmtree(scan.folder, ignore_errors=True)
                scan.folder.mkdir(parents=True)
                scan.give_up("the job was killed whenever it came to this scan")
                _mark(scan).unlink()
                continue
            worker = worker or stack.enter_context(_worker(scans))
            done = _try(scan, scans, worker)
            log.info("%s: %s", scan.folder.name, "done" if done else "failed; will be tried alone")
            if not done:
                failed.append(scan)
            if done is None:
                worker = None
    for scan in failed:
        with _worker(scans) as worker:
            done = _try(scan, scans, worker)
        if done is None:
            scan.give_up("was killed twice, for want of memory perhaps")
        log.info("%s: %s, alone", scan.folder.name, "done" if done else "failed again")


def _try(scan: BatchScan, scans: Sequence[BatchScan], worker: ProcessPoolExecutor) -> bool | None:
    """Whether it went well; None if the process came to an end."""
    from concurrent.futures.process import BrokenProcessPool

    _mark(scan).parent.mkdir(parents=True, exist_ok=True)
    with open(_mark(scan), "ab") as mark:
        mark.write(b"x")
    try:
        return worker.submit(_work, scans.index(scan)).result()
    except BrokenProcessPool:
        return None
    finally:
        _mark(scan).unlink()


def _mark(scan: BatchScan) -> Path:
    """There as long as the scan is worked on, and afterwards a byte for each time that the whole job was killed."""
    return scan.folder.with_name(f".{scan.folder.name}.working")


def _worker(scans: Sequence[BatchScan]) -> ProcessPoolExecutor:
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    # forked: there is little to fork yet, neither a numeric library nor a GPU
    return ProcessPoolExecutor(1, multiprocessing.get_context("fork"), _begin, (scans,))


_scans: Sequence[BatchScan] = ()  # of the worker's process


def _begin(scans: Sequence[BatchScan]) -> None:
    import multiprocessing
    import threading

    global _scans
    _scans = scans
    logging.getLogger("n4flow").handlers.clear()  # the log of the batch; each step has its own
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _work(number: int) -> bool:
    return _scans[number].work()
