"""The sample sheet, checked before anything runs; every problem is one line."""

from __future__ import annotations

import contextlib
import csv
import io
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from n4flow.errors import InputError
from n4flow.images.files import atomic_text, header_file, locked, missing_file, of_other_format, shortened
from n4flow.images.ngff import file_of, is_store
from n4flow.images.remote import is_remote
from n4flow.study.bids import Scan
from n4flow.study.config import schema_problems

#: The columns that hold paths.
PATHS = ("image", "mask", "mask_image", "weights")

#: How the names of columns begin that only group scans in the report: ``group_site``.
GROUP = "group_"

#: Columns that every sheet is written with; others are where a scan has something in them.
COLUMNS = ("subject", "session", "image", "mask", "modality")

#: Said of a row that `ragged` finds.
RAGGED = "has another number of columns than the header; separate them by tabs"


def ragged(row: Mapping[Any, Any]) -> bool:
    """Whether a row of csv.DictReader has more or fewer cells than the header."""
    return None in row or None in row.values()


def _is_given(cell: Any) -> bool:
    return any(map(_is_given, cell)) if isinstance(cell, list) else bool(cell and cell.strip())


def _without_empty_end(row: dict[Any, Any]) -> dict[Any, Any]:
    """A row of csv.DictReader without what is empty beyond the last column: spreadsheets write tabs there."""
    return row if _is_given(row.get(None)) else {key: cell for key, cell in row.items() if key is not None}


def read_table(
    path: str | Path,
    known: Collection[str],
    required: Collection[str],
    quoting: Any = csv.QUOTE_MINIMAL,
    prefix: str | None = None,
) -> tuple[list[tuple[int, dict[Any, Any]]], list[str]]:
    """Rows of a tab-separated table with their line numbers, and what is wrong with its columns, a line each.

    Columns that begin with a prefix, if one is given, are known too. Rows and columns of nothing but tabs, which
    spreadsheets leave where something was deleted, are none.

    Raises
    ------
    InputError
        The file cannot be read.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, delimiter="\t", strict=True, quoting=quoting)
            columns = list(reader.fieldnames or [])
            while columns and not columns[-1].strip():
                columns.pop()
            reader.fieldnames = columns
            rows = [
                (reader.line_num, row) for row in map(_without_empty_end, reader) if any(map(_is_given, row.values()))
            ]
    except UnicodeDecodeError:
        raise InputError(path, "is no text in UTF-8", "save it as tab-separated text in UTF-8") from None
    except (OSError, csv.Error) as error:
        raise InputError(path, f"cannot be read ({error})", "give a tab-separated sheet") from None
    others = f", and {prefix}… ({prefix}{{}}) to group scans by in the report" if prefix else ""
    problems = [
        f"{path}: unknown column {column!r}; known are {', '.join(known)}{others.format(column)}"
        for column in columns
        if column not in known and not (prefix and column.startswith(prefix) and column != prefix)
    ]
    problems += [
        f"{path}: there is no column {column!r}; add it (columns are separated by tabs)"
        for column in required
        if column not in columns
    ]
    problems += [
        f"{path}: column {column!r} stands there twice; remove one"
        for column in dict.fromkeys(columns)
        if columns.count(column) > 1
    ]
    return rows, problems


def read_sheet(path: str | Path, schema: Mapping[str, Any], to_be_made: Collection[str] = ()) -> list[Scan]:
    """Read and check the sample sheet.

    Parameters
    ----------
    path : path-like
        Tab-separated, with a header line.
    schema : mapping
        JSON schema of a row.
    to_be_made : collection of str
        Paths that need not be there yet, because the workflow makes them.

    Returns
    -------
    list of Scan

    Raises
    ------
    InputError
        The file cannot be read, or lines of it are wrong: the message has a line for each.
    """
    rows, problems = read_table(path, schema["properties"], schema["required"], prefix=GROUP)
    if not rows and not problems:
        problems.append(f"{path}: the sheet has no rows; add a line per scan")
    scans: dict[str, tuple[int, Scan]] = {}
    for line, row in [] if problems else rows:
        found, scan = _read_row(row, schema, to_be_made)
        if scan and scan.name in scans:
            found.append(
                f"{scan.name} stands in line {scans[scan.name][0]} already; remove one, or tell them apart "
                "by session or modality (run-1_T1w, run-2_T1w)"
            )
        elif scan:
            scans[scan.name] = (line, scan)
        problems += [f"{path}, line {line}: {problem}" for problem in found]
    named = {name: scan for name, (_, scan) in scans.items()}
    problems += [
        f"{path}, line {line}: field_from {scan.field_from} {problem}"
        for line, scan in scans.values()
        if (problem := _field_source_problem(scan, named))
    ]
    if problems:
        raise InputError.of_lines(problems)
    return [scan for _, scan in scans.values()]


def sheet_of(scans: Sequence[Scan]) -> str:
    """The sheet of some scans, as text."""
    groups = dict.fromkeys(f"{GROUP}{name}" for scan in scans for name, _ in scan.groups)
    further = [field.name for field in fields(Scan) if field.name not in (*COLUMNS, "groups")]
    columns = [*COLUMNS, *(name for name in further if any(getattr(scan, name) for scan in scans)), *groups]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", extrasaction="ignore", delimiter="\t", lineterminator="\n")
    writer.writeheader()
    for scan in scans:
        writer.writerow({**vars(scan), **{f"{GROUP}{name}": value for name, value in scan.groups}})
    return text.getvalue()


class Addition(NamedTuple):
    """A sheet after found scans were added to it."""

    rows: list[Scan]  # all that it has now
    of_found: list[Scan]  # those of them that are of the found scans
    added: list[Scan]  # those of them that are new
    removed: list[Scan]  # found scans that are left out, since somebody has removed their rows
    taken: list[tuple[Scan, Scan]]  # found scans that are left out, with the row of another image that has their name


def found_file(sheet: Path) -> Path:
    """The list beside a sheet of all that was ever added to it: what is there and not in the sheet was removed."""
    return sheet.with_name("found.tsv")


def add_to_sheet(path: Path, found: Sequence[Scan], schema: Mapping[str, Any]) -> Addition:
    """Write a sheet, or add what is new to one that is there; its own rows stay as somebody left them.

    A row is that of a found scan if it names its image, whatever the scan is called there, or if it has its name and
    was added for that image. A scan whose row was removed stays out until it is removed from `found_file`, too; where
    there is no sheet, it is begun anew and so is that list. Of several processes, one does this at a time.

    Parameters
    ----------
    path : Path
    found : sequence of Scan
    schema : mapping
        JSON schema of a row.

    Returns
    -------
    Addition

    Raises
    ------
    InputError
        The sheet that is there is wrong, as `read_sheet` has it, or it cannot be written.
    """
    record = found_file(path)
    resolved = cache(os.path.realpath)  # the lists share most of their paths

    def image_of(scan: Scan) -> tuple[str, str]:  # found scans are of all time points, rows may be of single ones
        return resolved(scan.image), scan.channel

    added, removed, unlisted, taken = [], [], [], []
    with locked(path):
        there = read_sheet(path, schema) if path.exists() else []
        ever = _read_found(record) if path.exists() and record.exists() else []
        in_sheet, by_name = set(map(image_of, there)), {scan.name: scan for scan in there}
        listed = set(map(image_of, ever))
        # the row of another image may have been renamed, to make room for a scan
        names_removed = {scan.name for scan in ever if image_of(scan) not in in_sheet}
        for scan in found:
            image = image_of(scan)
            if image in in_sheet:
                if image not in listed:
                    unlisted.append(scan)
            elif scan.name in by_name:
                if image not in listed:  # else somebody has given its row another image
                    taken.append((scan, by_name[scan.name]))
            elif image in listed or scan.name in names_removed:
                removed.append(scan)
            else:
                added.append(scan)
        # the sheet first: what is in the list alone counts as removed
        if added:
            with atomic_text(path) as file:
                file.write(sheet_of([*there, *added]))
        if added or unlisted:
            with atomic_text(record) as file:
                file.write(sheet_of([*ever, *unlisted, *added]))
    images, names = set(map(image_of, found)), {scan.name for scan in found} - {scan.name for scan, _ in taken}
    rows = [*there, *added]
    of_found = [row for row in rows if row.name in names or image_of(row) in images]
    return Addition(rows, of_found, added, removed, taken)


def _read_found(path: Path) -> list[Scan]:
    columns = [field.name for field in fields(Scan) if field.name != "groups"]
    rows, problems = read_table(path, columns, COLUMNS)
    if problems or any(ragged(row) for _, row in rows):
        raise InputError(path, "is no list of found scans", "remove it: rows that were removed then come back")
    return [Scan(**row) for _, row in rows]


def _wildcard_problem(path: str) -> str:
    """What is wrong with a path that Snakemake would read as a pattern; empty if nothing is."""
    bad = sorted(set(path) & set("{}<>"))
    return f"holds {' '.join(bad)}, which Snakemake takes for wildcards; rename it" if bad else ""


def place_problem(name: str, place: str) -> str:
    """What is wrong with a folder that pathvars names for what is written; empty if nothing is."""
    if problem := _wildcard_problem(place):
        return f"config: pathvars.{name}: {place} {problem}"
    # no shell has seen it: the folder would be called ~
    if (meant := os.path.expandvars(os.path.expanduser(place))) != place:
        return f"config: pathvars.{name}: {place} is taken as it stands; write it out: {meant}"
    return ""


def results_problem(results: str | Path, scans: Sequence[Scan]) -> str:
    """What is wrong with the folder of the results beside the sheet: it may hold no image that goes in."""
    root = os.path.realpath(results) + os.sep
    folders = {os.path.dirname(scan.image): scan.image for scan in scans if not is_remote(scan.image)}
    for folder, image in folders.items():
        if f"{os.path.realpath(folder)}{os.sep}".startswith(root):
            return (
                f"config: pathvars: the results would be written to {results}, where {shortened(image)} lies; "
                "give them a folder of their own"
            )
    return ""


def zeros_problem(sheet: str | Path, scans: Sequence[Scan], results: str | Path) -> str:
    """What is wrong with labels that spreadsheets made numbers of, 01 to 1; empty if nothing is.

    A label is taken for one of these where another one differs from it by nothing but zeros at the front: in the path
    of the row's own image, in another row, or in a folder of the results.
    """
    there: list[str] = []
    with contextlib.suppress(OSError):
        there = [name.removeprefix("sub-") for name in os.listdir(results) if name.startswith("sub-")]
    by_number = {label.lstrip("0"): label for label in sorted((*there, *(scan.subject for scan in scans)), key=len)}
    found = {}
    for scan in scans:
        for key, label in (("sub", scan.subject), ("ses", scan.session)):
            own = re.findall(rf"(?:^|[/_]){key}-([A-Za-z0-9+]+)(?=[/_]|$)", scan.image) if label else []
            others = [*own, by_number[label.lstrip("0")]] if key == "sub" else own
            longer = [other for other in others if len(other) > len(label) and other.endswith(label)]
            if other := next((other for other in longer if other.lstrip("0") == label.lstrip("0")), ""):
                found[f"{key}-{label}"] = f"{key}-{other}"
    if not found:
        return ""
    label, other = next(iter(found.items()))
    more = f" (and {len(found) - 1} more of this kind)" if len(found) > 1 else ""
    return (
        f"{sheet}: {label} is taken for another one than {other}{more}; if a spreadsheet has removed the zeros, write "
        "them again, with the column as text"
    )


def _field_source_problem(scan: Scan, scans: Mapping[str, Scan]) -> str:
    """What is wrong with the row that a scan takes its field from; empty if nothing is."""
    if not scan.field_from:
        return ""
    if scan.field_source == scan.name:
        return "is the row itself; leave it empty for a scan that has a field of its own"
    if scan.field_source not in scans:
        return f"leads to {scan.field_source}, which has no row; add one, or name the modality of another row"
    if scans[scan.field_source].field_from:
        return (
            f"leads to {scan.field_source}, which has no field of its own; name the row that the field is estimated on"
        )
    return ""


def _read_row(
    row: dict[Any, Any], schema: Mapping[str, Any], to_be_made: Collection[str]
) -> tuple[list[str], Scan | None]:
    if ragged(row):
        return [RAGGED], None
    given = {key: value.strip() for key, value in row.items() if value.strip()}
    cells = {key: value for key, value in given.items() if not key.startswith(GROUP)}
    groups = tuple((key.removeprefix(GROUP), value) for key, value in given.items() if key.startswith(GROUP))
    found = list(schema_problems(cells, schema))
    if found:
        others = {role: other for role in PATHS if (other := of_other_format(cells.get(role, "")))}
        for role, (_, command) in others.items():
            found = [f"{line}; convert it: {command}" if line.startswith(f"{role}: ") else line for line in found]
        return found, None
    if is_store(cells.get("image", "")):
        cells.setdefault("modality", "SPIM")
        cells["image"] = cells["image"].rstrip("/")
    values = {key: part["default"] for key, part in schema["properties"].items() if "default" in part} | cells
    scan = Scan(**values, groups=groups)
    found = [f"{problem}" for problem in scan.problems()]
    for column in ("channel", "t"):
        if (cell := getattr(scan, column)) and not scan.is_store:
            found.append(f"{column} {cell}: {shortened(scan.image)} is no OME-Zarr image; leave it empty")
    for role in PATHS:
        path = getattr(scan, role)
        if problem := _wildcard_problem(path):
            found.append(f"{role} {shortened(path)} {problem}")
        elif role == "mask" and is_store(path) and not scan.is_store:
            found.append(f"mask {shortened(path)} is OME-Zarr, and the image is not; give a .nii or .nii.gz file")
        elif role in ("mask_image", "weights") and path and scan.is_store:
            found.append(f"{role} {shortened(path)}: an OME-Zarr image takes none; give a mask, or leave it empty")
        elif is_remote(path) and not is_store(path):
            found.append(f"{role} {shortened(path)} does not lie on this machine; copy it here (OME-Zarr can stay)")
        elif (role == "image" or is_remote(path)) and is_store(path):
            continue  # read with the others of its kind, see stores.py
        elif path and path not in to_be_made:
            found += [
                f"{role} {shortened(file)} {'; '.join(missing)}"
                for file in dict.fromkeys((file_of(path), str(header_file(path))))
                if not is_store(file) and (missing := missing_file(file))
            ]
    return found, scan


def with_least_hash(names: Collection[str], count: int | str) -> set[str]:
    """So many of the names, or ``all``: those of the least SHA-256 hash.

    The same names give the same choice in any order, and more of them a larger count that holds the smaller one's. A
    further name can take the place of one alone.
    """
    import hashlib

    ordered = sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())
    return set(ordered if isinstance(count, str) else ordered[: int(count)])
