"""Scans that failed: which, why (their logs say it), and which of them would fail again."""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from n4flow.console import end_of
from n4flow.errors import InputError
from n4flow.images.files import atomic_text, locked
from n4flow.images.ngff import files_of
from n4flow.study.bids import Scan, counted_beside, sidecars_of
from n4flow.study.config import page_settings
from n4flow.study.outputs import output_of
from n4flow.study.provenance import package_digest
from n4flow.study.stores import entities_of_store, metadata_digest, rows_of_stores

#: The steps of a scan, in their order, with the modules that they stand on.
STEPS = {
    "coarse": "steps.pyramid",
    "given_mask": "steps.pyramid",
    "mask": "steps.mask",
    "n4": "steps.correct",
    "apply": "steps.apply",
    "reference": "steps.reference",
    "qc": "qc.pages",
    "crops": "qc.crops",
}

#: The steps of an OME-Zarr image as a whole, in their order, for which the fields of its channels are there.
STORE_STEPS = ("plan", "divide", "describe", "finish")

#: In place of a step, of a scan whose field is that of another one, which failed.
NO_FIELD = "field"

#: In place of a step, of a channel of an OME-Zarr image that is not written, since another channel has no field.
NO_STORE = "store"

COLUMNS = ["scan", "step", "error", "fingerprint"]


class Failure(NamedTuple):
    """A scan that failed."""

    scan: str
    step: str  # the first one that failed, NO_FIELD or NO_STORE
    error: str  # the line
    log: str  # path of the log that ends with it, if there is one
    again: bool  # whether the same input, settings and code would fail again


def log_of(scan: Scan, step: str, logs: str | Path) -> Path:
    """Path of the log of a scan's step, in the folder of logs."""
    return Path(logs) / step / ("" if step in ("qc", "crops") else scan.folder) / f"{scan.name}.log"


def _logs_of_store(scans: Sequence[Scan], step: str, logs: str | Path) -> list[Path]:
    """Logs of a step of `STORE_STEPS`, of the image whose rows these are: one, or that of each part."""
    stem = Path(logs) / step / scans[0].folder / f"{entities_of_store(scans)}_{scans[0].suffix}"
    if step == "divide":
        return sorted(stem.glob("*.log"))
    return sorted(stem.parent.glob(f"{stem.name}{'_*' if step == 'finish' else ''}.log"))


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
        The first step that failed; of a scan whose field is that of another one, which scan failed; of a channel of an
        OME-Zarr image that could not be written, the step of the image that failed, or the channel.
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
    for rows in rows_of_stores(scans):
        ends = ((step, log) for step in STORE_STEPS for log in _logs_of_store(rows, step, logs))
        found = ((step, log, *end_of(log)) for step, log in ends if made_since(log, since))
        if first := next((end for end in found if end[2]), None):
            step, log, error, again = first
            failed |= {
                scan.name: Failure(scan.name, step, error, str(log), again)
                for scan in rows
                if _is_complete(scan, failed)
            }
    return failed | without_store(scans, failed)


def _is_complete(scan: Scan, failed: Mapping[str, Failure]) -> bool:
    """Whether everything of a scan is there but for SimpleITK's reference."""
    return scan.name not in failed or failed[scan.name].step == "reference"


def made_since(path: Path, since: float) -> bool:
    """Whether a file is there, and not older than that, by the clock of a file system, which goes in steps of 4 ms."""
    return path.is_file() and path.stat().st_mtime >= since - 0.01


def without_field(scans: Iterable[Scan], failed: Mapping[str, Failure]) -> dict[str, Failure]:
    """Scans, not among those that failed themselves, whose field is that of one that has none, by their names."""
    found = {}
    for scan in scans:
        source = failed.get(scan.field_source) if scan.field_from else None
        if source and source.step in ("coarse", "given_mask", "mask", "n4") and scan.name not in failed:
            error = f"its field is that of {source.scan}, which failed"
            found[scan.name] = source._replace(scan=scan.name, step=NO_FIELD, error=error)
    return found


def without_store(scans: Iterable[Scan], failed: Mapping[str, Failure]) -> dict[str, Failure]:
    """Channels, not among those that failed themselves, of images another channel of which has no field, by name."""
    found = {}
    for rows in rows_of_stores(scans):
        sources = (failed[scan.name] for scan in rows if scan.name in failed)
        before = (*list(STEPS)[: list(STEPS).index("apply") + 1], NO_FIELD)
        if source := next((each for each in sources if each.step in before), None):
            error = f"its image is not written, as {source.scan} failed"
            for scan in rows:
                if _is_complete(scan, failed):
                    found[scan.name] = source._replace(scan=scan.name, step=NO_STORE, error=error)
    return found


def fingerprint(scan: Scan, step: str, config: Mapping[str, Any], scans: Mapping[str, Scan]) -> str:
    """What a failed step depends on: while it is the same, the step fails again.

    The row counts as it stands, and that of the scan whose field it takes; of an OME-Zarr image that could not be
    written, all of its rows. Their files and what tells of them (headers, sidecars, b values; the metadata of OME-
    Zarr images) count by path, size and time, or by content if they do not lie on this machine; further the
    settings, and the code with that of the steps before.

    Parameters
    ----------
    scan : Scan
    step : str
        One of `STEPS` or `STORE_STEPS`.
    config : mapping
        The workflow's, with its defaults.
    scans : mapping of str to Scan
        Those of the sheet, by name.
    """
    rows = [scan]
    if step in STORE_STEPS:
        rows = list(_rows_of_store(tuple(scans.values()))[scan])
    rows += [
        source for row in rows if row.field_from and (source := scans.get(row.field_source)) and source not in rows
    ]
    cells = [asdict(replace(row, groups=())) for row in rows]
    files: list[list[Any]] = [[path, *_size_and_time(path)] for row in rows for path in _inputs(row)]
    origin = config["zarr"]["pyramid_origin"] if scan.is_store else ""
    digests = ((path, metadata_digest(path, origin)) for row in rows for path in row.paths if scan.is_store)
    files += [[path, digest] for path, digest in digests if digest]
    settings = {key: config[key] for key in ("mask", "plane_gains", "n4", "output", "device")}
    if scan.is_store:
        settings["zarr"] = config["zarr"]
    if step == "qc":
        settings["qc"] = page_settings(config["qc"])
    content = json.dumps([cells, files, step, settings, _code_of(step)], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


@lru_cache(maxsize=2)
def _rows_of_store(scans: tuple[Scan, ...]) -> dict[Scan, tuple[Scan, ...]]:
    """For each channel of a sheet the rows of its OME-Zarr image, found once for all of them."""
    return {scan: rows for rows in rows_of_stores(scans) for scan in rows}


@cache
def _code_of(step: str) -> str:
    """Digest of what a step and those before it stand on; of thousands of scans it is the same."""
    last = "apply" if step in STORE_STEPS else step
    return package_digest(*list(STEPS.values())[: list(STEPS).index(last) + 1])


def _inputs(scan: Scan) -> list[str]:
    """The files that a row names, with headers apart from their voxels, and what tells of the image."""
    named = [file for path in scan.paths for file in files_of(path)]
    return [*named, *counted_beside(scan), *map(str, sidecars_of(scan.image))]


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
    failed = {}
    for row in rows_of_failed(path):
        scan, step = scans.get(row["scan"]), row["step"]
        if not scan or step in (NO_FIELD, NO_STORE):
            continue
        if row["fingerprint"] == fingerprint(scan, step, config, scans):
            failed[scan.name] = Failure(
                scan.name, step, row["error"], _log_with(row["error"], scan, step, scans, logs), True
            )
    # these follow from the others, so that they are tried again with them
    failed |= without_field(scans.values(), failed)
    return failed | without_store(scans.values(), failed)


def rows_of_failed(path: Path) -> list[dict[str, str]]:
    """Rows of the table of `write_failed`, as they stand; none if it is not there.

    Raises
    ------
    InputError
        It is no such table.
    """
    if not path.is_file():
        return []
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file, delimiter="\t"))
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(path, f"cannot be read ({error})", "remove it: its scans are tried again") from None
    steps = (*STEPS, *STORE_STEPS, NO_FIELD, NO_STORE)
    if any(row.get(column) is None for row in rows for column in COLUMNS) or any(
        row["step"] not in steps for row in rows
    ):
        raise InputError(path, "is no table of failed scans", "remove it: its scans are tried again")
    return rows


def _log_with(error: str, scan: Scan, step: str, scans: Mapping[str, Scan], logs: str | Path) -> str:
    """Path of the log of a step that failed; of a step of an OME-Zarr image, that of the part with this line."""
    if step not in STORE_STEPS:
        return str(log_of(scan, step, logs))
    rows = _rows_of_store(tuple(scans.values()))[scan]
    found = (log for log in _logs_of_store(rows, step, logs) if end_of(log)[0] == error)
    return str(next(found, ""))


def write_failed(
    path: Path,
    failed: Sequence[Failure],
    scans: Mapping[str, Scan],
    config: Mapping[str, Any],
    since: float,
    of_run: Collection[str],
) -> None:
    """Write down which scans would fail again: `read_failed` finds them.

    Parameters
    ----------
    path : Path
        Removed if no scan would fail again.
    failed : sequence of Failure
        Those that are not of the run do not count.
    scans, config : mapping
        See `read_failed`.
    since : float
        When the run began. A scan one of whose files has changed meanwhile is left out: who knows which one failed.
    of_run : collection of str
        The scans that the run was for, by name, and those whose rows are to go. The rows of others stay: they are
        other runs', of this moment perhaps.

    Raises
    ------
    InputError
        The file cannot be read or written.
    """
    rows = []
    for failure in sorted(each for each in failed if each.scan in of_run):
        scan = scans[failure.scan]
        changed = [time for name in _inputs(scan) for time in _size_and_time(name)[2:]]
        if failure.again and max(changed, default=0) < since * 1e9:
            print_of = "" if failure.step in (NO_FIELD, NO_STORE) else fingerprint(scan, failure.step, config, scans)
            rows.append([failure.scan, failure.step, failure.error, print_of])
    with locked(path):
        rows += [[row[column] for column in COLUMNS] for row in rows_of_failed(path) if row["scan"] not in of_run]
        if not rows:
            path.unlink(missing_ok=True)
            return
        with atomic_text(path) as file:
            writer = csv.writer(file, delimiter="\t", lineterminator="\n")
            writer.writerow(COLUMNS)
            writer.writerows(sorted(rows))
