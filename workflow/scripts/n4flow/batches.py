"""Many scans in one process: what comes of each lies in a folder of its own until the jobs of the scan take it.

Snakemake removes all outputs of a job that fails. So a batch owns nothing that counts and does not fail for a scan: the
rules of a scan put its files in place, or fail with the line with which it failed in the batch.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import multiprocessing
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

from n4flow.console import PREFIX, last_error, reporting
from n4flow.files import write_json

log = logging.getLogger(__name__)

#: What the files in a scan's folder were made with and from.
RECEIPT = "receipt.json"

#: A job that was killed so often leaves the scan out at which it was.
ATTEMPTS = 3

#: Up to this size an input that was touched is compared by its content, as Snakemake does.
HASHED_BYTES = 1_000_000


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
        self.write_receipt()
        done = True
        with contextlib.suppress(SystemExit):
            done = False
            for step, take_step in self.steps.items():
                with reporting(self.folder / f"{step}.log", quiet=True):
                    take_step()
            done = True
        self.write_receipt()
        return done

    def write_receipt(self) -> None:
        """Note what the files in the folder are made of."""
        read = {_within(self.folder, path): _sha256(here) for path, here in self.between if here.is_file()}
        states = {path: _state(path, hashed=True) for path in self.inputs}
        write_json(self.folder / RECEIPT, {"Settings": self.settings, "Inputs": states, "Between": read})

    def give_up(self, problem: str) -> None:
        """Say why it is not done, in the log of the first step that is not."""
        logs = [self.folder / f"{step}.log" for step in self.steps]
        with open(next(path for path in logs if last_error(path) or not path.is_file()), "a", encoding="utf-8") as file:
            file.write(f"{PREFIX}{self.folder.name}: {problem}; give the job more memory, or leave the scan out\n")


def is_current(folder: str | Path, settings: Mapping[str, Any], inputs: Iterable[str] = ()) -> bool:
    """Whether a batch has dealt with a scan as it is now; the parameters are those of `BatchScan`."""
    receipt = _read_receipt(folder)
    made_with = receipt.get("Settings", {})
    if any(made_with.get(key) != part for key, part in _plain(settings).items()):
        return False
    if set(receipt.get("Inputs", ())) != set(inputs):
        return False
    return bool(receipt) and all(
        [size, time_ns] == _state(path)[:2] or (sha256 and sha256 == _state(path, hashed=True)[2])
        for path, (size, time_ns, sha256) in receipt["Inputs"].items()
    )


def _read_receipt(folder: str | Path) -> dict[str, Any]:
    try:
        return json.loads(Path(folder, RECEIPT).read_bytes())
    except (OSError, ValueError):
        return {}


def _plain(settings: Any) -> Any:
    return json.loads(json.dumps(settings))


def _state(path: str, hashed: bool = False) -> list[Any]:
    """Size and time of a file and, if it is asked for and the file is small, its hash: then the time does not count."""
    try:
        found = os.stat(path)
    except OSError:
        return [0, 0, ""]
    small = hashed and found.st_size <= HASHED_BYTES
    return [found.st_size, found.st_mtime_ns, _sha256(Path(path)) if small else ""]


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

    Returns
    -------
    bool
        False if the batch has nothing (any longer), or what it has was made with or from something else.
    """
    receipt = _read_receipt(folder) if folder else {}
    if not folder or receipt.get("Settings", {}).get(step) != _plain(settings):
        return False
    said = Path(folder, f"{step}.log")
    if not said.is_file():
        return False
    if error := last_error(said):
        _link(said, log_path)
        # so that it is tried again
        Path(folder, RECEIPT).unlink()
        sys.exit(f"{PREFIX}{error}")
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
        From 1. What an earlier attempt was killed at comes last, and is left out at the last attempt.
    """
    feared = {scan.folder for scan in scans if attempt > 1 and _mark(scan).exists()}
    failed = []
    with contextlib.ExitStack() as stack:
        worker = None
        for scan in sorted(scans, key=lambda scan: scan.folder in feared):
            if scan.folder in feared and attempt >= ATTEMPTS:
                scan.folder.mkdir(parents=True)
                scan.write_receipt()
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
    _mark(scan).parent.mkdir(parents=True, exist_ok=True)
    _mark(scan).touch()
    try:
        return worker.submit(_work, scans.index(scan)).result()
    except BrokenProcessPool:
        return None
    finally:
        _mark(scan).unlink()


def _mark(scan: BatchScan) -> Path:
    """There as long as the scan is worked on: and afterwards, if the whole job was killed."""
    return scan.folder.with_name(f".{scan.folder.name}.working")


def _worker(scans: Sequence[BatchScan]) -> ProcessPoolExecutor:
    # forked: there is little to fork yet, neither a numeric library nor a GPU
    return ProcessPoolExecutor(1, multiprocessing.get_context("fork"), _begin, (scans,))


_scans: Sequence[BatchScan] = ()  # of the worker's process


def _begin(scans: Sequence[BatchScan]) -> None:
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
