"""Scans that failed: which, why (their logs say it), and which of them would fail again."""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from n4flow.console import end_of
from n4flow.errors import InputError
from n4flow.images.files import atomic_text
from n4flow.study.bids import Scan, counted_beside, sidecars_of
from n4flow.study.config import page_settings
from n4flow.study.outputs import output_of
from n4flow.study.provenance import package_digest

#: The steps of a scan, in their order, with the modules that they stand on.
STEPS = {
    "coarse": "steps.pyramid",
    "given_mask": "steps.pyramid",
    "mask": "steps.mask",
    "n4": "steps.correct",
    "apply": "steps.apply",
    "reference": "steps.reference",
    "qc": "qc.pages",
}

#: In place of a step, of a scan whose field is that of another one, which failed.
NO_FIELD = "field"

COLUMNS = ["scan", "step", "error", "fingerprint"]


class Failure(NamedTuple):
    """A scan that failed."""

    scan: str
    step: str  # the first one that failed, or NO_FIELD
    error: str  # the line
    log: str  # path of the log that ends with it, if there is one
    again: bool  # whether the same input, settings and code would fail again


def log_of(scan: Scan, step: str, logs: str | Path) -> Path:
    """Path of the log of a scan's step, in the folder of logs."""
    return Path(logs) / step / ("" if step == "qc" else scan.folder) / f"{scan.name}.log"


def failed_scans(scans: Iterable[Scan], logs: Path, results: Path, since: float) -> dict[str, Failure]:
    """Which scans failed in a run, by their names, and why.

    Parameters
    ----------
    scans : iterable of Scan
    logs, results : Path
        Folders.
    since : float
        When the run began: what is older is of an older run.

    Returns
    -------
    dict of str to Failure
        The first step that failed; of a scan whose field is that of another one, which scan failed.
    """
    scans = list(scans)
    failed: dict[str, Failure] = {}
    for scan in scans:
        for step in STEPS:
            log = log_of(scan, step, logs)
            if made_since(log, since):
                error, again = end_of(log)
                if error:
                    failed.setdefault(scan.name, Failure(scan.name, step, error, str(log), again))
    for scan in scans:
        if not made_since(results / output_of(scan, "corrected"), since):
            failed |= without_field([scan], failed)
    return failed


def made_since(path: Path, since: float) -> bool:
    """Whether a file is there, and not older than that."""
    return path.is_file() and path.stat().st_mtime >= since


def without_field(scans: Iterable[Scan], failed: Mapping[str, Failure]) -> dict[str, Failure]:
    """Scans, not among those that failed themselves, whose field is that of one that has none, by their names."""
    found = {}
    for scan in scans:
        source = failed.get(scan.field_source) if scan.field_from else None
        if source and source.step in ("coarse", "given_mask", "mask", "n4") and scan.name not in failed:
            error = f"its field is that of {source.scan}, which failed"
            found[scan.name] = source._replace(scan=scan.name, step=NO_FIELD, error=error)
    return found


def fingerprint(scan: Scan, step: str, config: Mapping[str, Any], scans: Mapping[str, Scan]) -> str:
    """What a failed step depends on: while it is the same, the step fails again.

    The row counts as it stands, and that of the scan whose field it takes; their files and what tells of them (headers,
    sidecars, b values) by path, size and time; the settings, and the code with that of the steps before.

    Parameters
    ----------
    scan : Scan
    step : str
        One of `STEPS`.
    config : mapping
        The workflow's, with its defaults.
    scans : mapping of str to Scan
        Those of the sheet, by name.
    """
    rows = [scan]
    if scan.field_from and (source := scans.get(scan.field_source)):
        rows.append(source)
    cells = [asdict(replace(row, groups=())) for row in rows]
    files = [[path, *_size_and_time(path)] for row in rows for path in _inputs(row)]
    settings = {key: config[key] for key in ("mask", "n4", "output", "device")}
    if step == "qc":
        settings["qc"] = page_settings(config["qc"])
    content = json.dumps([cells, files, step, settings, _code_of(step)], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _may_be_left_out(scan: Scan) -> bool:
    """Not a channel of an OME-Zarr image, which is written as a whole, and of whose voxels no fingerprint tells."""
    return not scan.is_store


@cache
def _code_of(step: str) -> str:
    """Digest of what a step and those before it stand on; of thousands of scans it is the same."""
    return package_digest(*list(STEPS.values())[: list(STEPS).index(step) + 1])


def _inputs(scan: Scan) -> list[str]:
    """The files that a row names, with headers apart from their voxels, and what tells of the image."""
    return [*scan.paths, *counted_beside(scan), *map(str, sidecars_of(Path(scan.image)))]


def _size_and_time(path: str) -> list[int]:
    try:
        found = os.stat(path)
    except OSError:
        return []
    # the time of the last change to permissions and the like, too: they may have been what was wrong
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def read_failed(
    path: Path, scans: Mapping[str, Scan], config: Mapping[str, Any], logs: str | Path
) -> dict[str, Failure]:
    """The scans that failed in earlier runs and would fail again, by their names.

    Parameters
    ----------
    path : Path
        As `write_failed` wrote it; need not be there.
    scans : mapping of str to Scan
        Those of the sheet, by name: others do not count.
    config : mapping
        See `fingerprint`.
    logs : path-like
        Folder of logs.

    Raises
    ------
    InputError
        It is no such table.
    """
    if not path.is_file():
        return {}
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file, delimiter="\t"))
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(path, f"cannot be read ({error})", "remove it: its scans are tried again") from None
    failed = {}
    for row in rows:
        if any(row.get(column) is None for column in COLUMNS) or row["step"] not in (*STEPS, NO_FIELD):
            raise InputError(path, "is no table of failed scans", "remove it: its scans are tried again")
        scan, step = scans.get(row["scan"]), row["step"]
        if not scan or step == NO_FIELD or not _may_be_left_out(scan):
            continue
        if row["fingerprint"] == fingerprint(scan, step, config, scans):
            failed[scan.name] = Failure(scan.name, step, row["error"], str(log_of(scan, step, logs)), True)
    # these follow from the others, so that they are tried again with them
    return failed | without_field(scans.values(), failed)


def write_failed(
    path: Path, failed: Sequence[Failure], scans: Mapping[str, Scan], config: Mapping[str, Any], since: float
) -> None:
    """Write down which scans would fail again: `read_failed` finds them.

    Parameters
    ----------
    path : Path
        Removed if no scan would fail again.
    failed : sequence of Failure
    scans, config : mapping
        See `read_failed`.
    since : float
        When the run began. A scan one of whose files has changed meanwhile is left out: who knows which one failed.

    Raises
    ------
    InputError
        The file cannot be written.
    """
    rows = []
    for failure in sorted(failed):
        scan = scans[failure.scan]
        changed = [time for name in _inputs(scan) for time in _size_and_time(name)[2:]]
        if failure.again and _may_be_left_out(scan) and max(changed, default=0) < since * 1e9:
            print_of = "" if failure.step == NO_FIELD else fingerprint(scan, failure.step, config, scans)
            rows.append([failure.scan, failure.step, failure.error, print_of])
    if not rows:
        path.unlink(missing_ok=True)
        return
    with atomic_text(path) as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(rows)
