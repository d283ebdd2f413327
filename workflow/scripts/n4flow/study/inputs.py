"""Config and sample sheet, checked before anything runs; every problem is one line."""

from __future__ import annotations

import csv
import difflib
import gzip
import itertools
import math
import os
import struct
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from n4flow.errors import InputError
from n4flow.images.files import missing_file, of_other_format, shortened
from n4flow.parameters import N4Parameters
from n4flow.study.bids import Scan

#: One page shows so many corrections: more, nobody compares by eye.
TUNE_CORRECTIONS = 100

#: Keys of earlier configs, and what took their place.
REPLACED = {
    "reference.fraction": "give reference.scans, a number of scans, or all",
    "qc.flags.reference_r": "give reference_rms, the rms difference from SimpleITK at its defaults",
}

#: Said of a row that `ragged` finds.
RAGGED = "has another number of columns than the header; separate them by tabs"


def ragged(row: Mapping[Any, Any]) -> bool:
    """Whether a row of csv.DictReader has more or fewer cells than the header."""
    return None in row or None in row.values()


def load_schema(path: str | Path) -> dict[str, Any]:
    """Read a JSON schema that is written as YAML."""
    import yaml

    return yaml.safe_load(Path(path).read_text(encoding="utf-8"))


def voxels_of_frame(path: str | Path) -> int:
    """Voxels of a NIfTI image, of one frame of a series, as its header has them; 0 if it cannot be read (yet).

    In plain Python: Snakemake's own environment may hold no more.
    """
    opener: Any = gzip.open if str(path).endswith(".gz") else open
    try:
        with opener(path, "rb") as file:
            header = file.read(80)
        for size, place in ((348, "40x8h"), (540, "16x8q")):
            for order in "<>":
                if struct.unpack_from(f"{order}i", header)[0] == size:
                    axes, *shape = struct.unpack_from(order + place, header)
                    return math.prod(max(0, n) for n in shape[: min(axes, 3)])
    except (OSError, EOFError, zlib.error, struct.error):
        pass  # its job tells what is wrong
    return 0


def with_defaults(config: Mapping[str, Any], schema: Mapping[str, Any]) -> dict[str, Any]:
    """The config with the schema's defaults for every key that it does not give, in the schema's order.

    Snakemake compares the parameters of a job as text: the order of the keys in a file must not count.
    """
    filled = dict(config)
    for key, part in schema["properties"].items():
        if part.get("type") == "object" and "properties" in part:
            given = filled.get(key, {})
            value = with_defaults(given, part) if isinstance(given, Mapping) else given
            if value or key in filled:
                filled[key] = value
        elif "default" in part:
            filled.setdefault(key, part["default"])
    return {key: filled[key] for key in schema["properties"] if key in filled} | filled


def schema_problems(content: Any, schema: Mapping[str, Any]) -> Iterator[str]:
    """What in a config or a row breaks its schema, in words."""
    from jsonschema import Draft202012Validator

    for error in sorted(Draft202012Validator(schema).iter_errors(content), key=lambda e: str(e.path)):
        place = ".".join(str(part) for part in error.path)
        if error.validator == "additionalProperties":
            known = error.schema["properties"]
            for key in sorted(set(error.instance) - set(known), key=str):
                near = difflib.get_close_matches(str(key), known, n=1)
                whole = ".".join(filter(None, [place, str(key)]))
                hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
                yield f"{whole}: there is no such key; {REPLACED.get(whole, hint)}"
        else:
            told = f"{error.instance!r} does not fit" if error.validator == "pattern" else error.message
            message = told.replace("\n", " ")
            remedy = error.schema.get("description", "see config/README.md")
            if isinstance(error.instance, str) and _is_number(error.instance):
                remedy += f" (it is text here: write {_yaml_number(error.instance)} without quotes; "
                remedy += "what --config has in braces is always text, so put it into a config file)"
            yield f"{place + ': ' if place else ''}{message}; {remedy}"


def _yaml_number(text: str) -> str:
    """A number as YAML 1.1 takes it for one."""
    number = float(text)
    whole = str(int(number)) if number.is_integer() and abs(number) < 1e15 else repr(number)
    return whole if "." in whole or "e" not in whole else whole.replace("e", ".0e")


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def config_problems(config: Mapping[str, Any], schema: Mapping[str, Any]) -> list[str]:
    """What is wrong with the config, a line each."""
    found = list(schema_problems(config, schema))
    # what a schema cannot say: JSON's integers hold 4.0, and its numbers NaN
    found += [f"{key}: is no finite number; give one" for key, value in _leaves(config) if _not_finite(value)]
    if not found:
        try:
            N4Parameters.from_mapping(config.get("n4", {}))
        except InputError as error:
            found.append(str(error))
        else:
            # the same problem of several combinations is told once
            found += dict.fromkeys(_grid_problems(config, schema))
    return [" ".join(f"config: {problem}".split()) for problem in found]


def grid_combinations(grid: Mapping[str, Sequence[Any]]) -> dict[str, dict[str, Any]]:
    """All combinations of a grid's values, by names that say them and are good in a path.

    Parameters
    ----------
    grid : mapping of str to sequence
        Values to try of each key of n4.

    Returns
    -------
    dict of str to dict
        Without a grid none.
    """

    def word(value: Any) -> str:
        return "x".join(map(str, value)) if isinstance(value, list) else str(value)

    every = itertools.product(*grid.values()) if grid else ()
    combinations = [dict(zip(grid, values, strict=True)) for values in every]
    return {"_".join(f"{key}-{word(value)}" for key, value in chosen.items()): chosen for chosen in combinations}


def _grid_problems(config: Mapping[str, Any], schema: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the values of tune.grid, alone and together."""
    grid = config.get("tune", {}).get("grid", {})
    wrong = [
        f"tune.grid.{problem}"
        for key, values in grid.items()
        for value in values
        for problem in schema_problems({key: value}, schema["properties"]["n4"])
    ]
    yield from wrong
    if wrong or math.prod(map(len, grid.values())) > TUNE_CORRECTIONS:  # `tune_problems` tells of these
        return
    for name, chosen in grid_combinations(grid).items():
        if len(name) > 200:  # it is the name of a folder
            yield "tune.grid: has too many keys; put those with one value under n4"
            continue
        try:
            N4Parameters.from_mapping({**config.get("n4", {}), **chosen})
        except InputError as error:
            yield f"tune.grid: {name}: {error}"


def tune_problems(tune: Mapping[str, Any], scans: Sequence[Scan]) -> list[str]:
    """What is wrong with the config's tune beside the sheet, a line each."""
    subjects, grid = tune["subjects"], tune["grid"]
    own_field = [scan.subject for scan in scans if not scan.field_from]
    unknown = [label for label in subjects if label not in own_field]
    found = [
        f"tune.subjects: no scan of {label!r} in the sheet has a field of its own; give other labels"
        for label in unknown
    ]
    if bool(subjects) != bool(grid):
        found.append(f"tune.{'grid' if subjects else 'subjects'}: is empty; give both subjects and grid, or neither")
    chosen = sum(subject in subjects for subject in own_field)
    corrections = math.prod(map(len, grid.values())) * chosen
    if grid and corrections > TUNE_CORRECTIONS:
        found.append(
            f"tune: {chosen} scans with every combination are {corrections} corrections, more than the "
            f"{TUNE_CORRECTIONS} of a page; take fewer subjects or values"
        )
    return [f"config: {problem}" for problem in found]


def _leaves(content: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Every single value of a config, with its dotted key."""
    if isinstance(content, Mapping):
        for key, value in content.items():
            yield from _leaves(value, f"{place}.{key}" if place else str(key))
    elif isinstance(content, list):
        for value in content:
            yield from _leaves(value, place)
    else:
        yield place, content


def _not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _is_given(cell: Any) -> bool:
    return any(map(_is_given, cell)) if isinstance(cell, list) else bool(cell and cell.strip())


def _without_empty_end(row: dict[Any, Any]) -> dict[Any, Any]:
    """A row of csv.DictReader without what is empty beyond the last column: spreadsheets write tabs there."""
    return row if _is_given(row.get(None)) else {key: cell for key, cell in row.items() if key is not None}


def read_table(
    path: str | Path, known: Collection[str], required: Collection[str], quoting: Any = csv.QUOTE_MINIMAL
) -> tuple[list[tuple[int, dict[Any, Any]]], list[str]]:
    """Rows of a tab-separated table with their line numbers, and what is wrong with its columns, a line each.

    Rows and columns of nothing but tabs, which spreadsheets leave where something was deleted, are none.

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
    problems = [
        f"{path}: unknown column {column!r}; known are {', '.join(known)}" for column in columns if column not in known
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


def read_sheet(path: str | Path, schema: Mapping[str, Any], made: Collection[str] = ()) -> list[Scan]:
    """Read and check the sample sheet.

    Parameters
    ----------
    path : path-like
        Tab-separated, with a header line.
    schema : mapping
        JSON schema of a row.
    made : collection of str
        Paths that need not be there yet, because the workflow makes them.

    Returns
    -------
    list of Scan

    Raises
    ------
    InputError
        The file cannot be read, or lines of it are wrong: the message has a line for each.
    """
    rows, problems = read_table(path, schema["properties"], schema["required"])
    if not rows and not problems:
        problems.append(f"{path}: the sheet has no rows; add a line per scan")
    scans: dict[str, tuple[int, Scan]] = {}
    for line, row in [] if problems else rows:
        found, scan = _read_row(row, schema, made)
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


def place_problem(name: str, place: str) -> str:
    """What is wrong with a folder that pathvars names for what is written; empty if nothing is."""
    if bad := sorted(set(place) & set("{}<>")):
        return f"config: pathvars.{name}: {place} holds {' '.join(bad)}, which Snakemake takes for wildcards; rename it"
    # no shell has seen it: the folder would be called ~
    if (meant := os.path.expandvars(os.path.expanduser(place))) != place:
        return f"config: pathvars.{name}: {place} is taken as it stands; write it out: {meant}"
    return ""


def results_problem(results: str | Path, scans: Sequence[Scan]) -> str:
    """What is wrong with the folder of the results beside the sheet: it may hold no image that goes in."""
    root = os.path.realpath(results) + os.sep
    folders = {os.path.dirname(scan.image): scan.image for scan in scans}
    for folder, image in folders.items():
        if f"{os.path.realpath(folder)}{os.sep}".startswith(root):
            return (
                f"config: pathvars: the results would be written to {results}, where {shortened(image)} lies; "
                "give them a folder of their own"
            )
    return ""


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


def _read_row(row: dict[Any, Any], schema: Mapping[str, Any], made: Collection[str]) -> tuple[list[str], Scan | None]:
    if ragged(row):
        return [RAGGED], None
    given = {key: value.strip() for key, value in row.items() if value.strip()}
    found = list(schema_problems(given, schema))
    if found:
        others = {role: other for role in ("image", "mask") if (other := of_other_format(given.get(role, "")))}
        for role, (_, command) in others.items():
            found = [f"{line}; convert it: {command}" if line.startswith(f"{role}: ") else line for line in found]
        return found, None
    values = {key: part["default"] for key, part in schema["properties"].items() if "default" in part} | given
    scan = Scan(**values)
    found = [f"{problem}" for problem in scan.problems()]
    for role in ("image", "mask"):
        path = getattr(scan, role)
        if bad := sorted(set(path) & set("{}<>")):
            found.append(
                f"{role} {shortened(path)} holds {' '.join(bad)}, which Snakemake takes for wildcards; rename it"
            )
            continue
        if path and path not in made and (missing := missing_file(path)):
            found.append(f"{role} {shortened(path)} {'; '.join(missing)}")
    return found, scan


def with_least_hash(names: Collection[str], count: int | str) -> set[str]:
    """So many of the names, or ``all``: those of the least SHA-256 hash.

    The same names give the same choice in any order, and more of them a larger count that holds the smaller one's. A
    further name can take the place of one alone.
    """
    import hashlib

    ordered = sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())
    return set(ordered if isinstance(count, str) else ordered[: int(count)])
