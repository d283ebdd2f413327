"""The dataset's table and index page, built from the metrics files alone."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any
from urllib.parse import quote

import numpy as np
from markupsafe import Markup

from n4flow.console import PREFIX
from n4flow.images.files import atomic_text
from n4flow.qc.definitions import COLUMNS, EITHER, FLOOR_SHARES, FLOORS, SHOWN
from n4flow.qc.flags import FLAG_LIMITS, limit_lines
from n4flow.qc.methods import methods_text
from n4flow.qc.metrics import robust_z
from n4flow.qc.multiqc import multiqc_path, write_multiqc
from n4flow.qc.rendering import number, plain, read_json, render
from n4flow.study.failures import Failure
from n4flow.study.ratings import read_ratings

#: A script beside the pages: which scans are outliers among the others, and by what.
OUTLIERS = "outliers.js"

#: What was done, for a paper.
METHODS = "methods.md"

#: Entities of names in full.
GROUP_NAMES = {"ses": "session", "acq": "acquisition", "rec": "reconstruction"}

#: Robust z beyond which a scan is called an outlier among those of its suffix, and from how many of them on.
OUTLIER_Z, OUTLIER_SCANS = 3.5, 5


def make_index(
    metrics_files: Iterable[str | Path],
    output_page: str | Path,
    output_table: str | Path,
    failed: Sequence[Failure] = (),
    ratings: str | Path | None = None,
    outlier_z: float = OUTLIER_Z,
    limits: Mapping[str, float] = FLAG_LIMITS,
    groups: Mapping[str, Mapping[str, str]] = MappingProxyType({}),
) -> None:
    """Write the dataset's index page and what lies beside it, from the metrics files alone.

    Parameters
    ----------
    metrics_files : paths
        As `pages.make_subject` wrote them.
    output_page, output_table : path-like
        Beside the table, the same for MultiQC: its name with ``_mqc`` before the extension. Beside the page, what
        only the dataset tells of a scan, for the scan's own page to show (`OUTLIERS`), and `METHODS`.
    failed : sequence of Failure
        Named in the page and the table. Their logs are copied beside the pictures, so that the page can link them.
    ratings : path-like, optional
        What reviewers said so far, see `read_ratings`.
    outlier_z : float
        Robust z beyond which a scan is flagged as an outlier.
    limits : mapping
        Those of the other flags, as lines in the plots.
    groups : mapping of str to mapping
        By scan, what the sheet says that it may be grouped by: ``{"sub-01_T1w": {"site": "A"}}``.
    """
    subjects = load_ranked(metrics_files, outlier_z)
    folder = Path(output_page).resolve().parent
    for values in subjects:
        for key in ("page", "pictures"):
            if values.get(key):
                values[f"{key}_href"] = quote(os.path.relpath(values["folder"] / str(values[key]), folder))
    logs = _copy_logs(failed, folder)
    _write_table(subjects, failed, logs, output_table)
    _write_outliers(subjects, folder / OUTLIERS)
    given = read_ratings(ratings) if ratings else []
    methods = methods_text(subjects, len(failed), given)
    with atomic_text(folder / METHODS) as file:
        file.write(methods)
    write_multiqc(subjects, [column[:3] for column in COLUMNS], multiqc_path(output_table))

    known = [column for column in COLUMNS if any(v.get(column[0]) is not None for v in subjects)]
    usual = [column for column in known if column[0] in SHOWN]
    same = [column for column in usual if _same_in_all(subjects, column[0], column[2])]
    lines = limit_lines(limits)
    panels = list(dict.fromkeys(tuple(v.get("panels") or ()) for v in subjects))
    rows = [
        [
            v.get("name"),
            v.get("page_href"),
            v["flags"],
            v["worst_z"],
            v.get("report_hash"),
            v.get("pictures_href"),
            panels.index(tuple(v.get("panels") or ())),
            *(_round(v.get(key), digits) for key, _, digits, _ in known),
        ]
        for v in subjects
    ]
    ranked = any(v["worst_z"] is not None for v in subjects)
    table = {
        "columns": [
            {
                "key": key,
                "heading": heading,
                "digits": digits,
                "shown": key in SHOWN and (key, heading, digits, worse) not in same,
                "lines": lines.get(key, []),
                "floor": FLOORS.get(key, 0),
                "floorShare": FLOOR_SHARES.get(key, 0),
            }
            for key, heading, digits, worse in known
        ],
        "groups": _groups([str(v.get("name")) for v in subjects], groups),
        "rows": rows,
        "panels": panels,
        "ratings": [r._asdict() | {"scan": r.scan} for r in given],
        "ranked": ranked,
    }
    # inside <script> only "<" can end the element
    data = Markup(json.dumps(plain(table), ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c"))
    html = render(
        "index.html",
        data=data,
        outlier_scans=OUTLIER_SCANS,
        count=len(subjects),
        flagged=sum(bool(v["flags"]) for v in subjects),
        failed=[(f.scan, f.step, f.error, quote(log)) for f, log in zip(failed, logs, strict=True)],
        ranked=ranked,
        methods=methods,
        known={key for key, *_ in usual},
        same=[f"{heading} {_printed(subjects[0][key], digits)}" for key, heading, digits, _ in same],
        table_href=quote(os.path.relpath(Path(output_table).resolve(), folder)),
    )
    with atomic_text(output_page) as file:
        file.write(html)


def _copy_logs(failed: Sequence[Failure], folder: Path) -> list[str]:
    """Paths of copies of the logs, in the folder of the page; those of earlier failures are removed.

    Where a log is no longer there, or its job was killed, the copy ends with the line that says so.
    """
    names = [f"data/{failure.scan}.log" if failure.log else "" for failure in failed]
    for old in (folder / "data").glob("*.log"):
        if f"data/{old.name}" not in names:
            old.unlink()
    for failure, name in zip(failed, names, strict=True):
        if name:
            log = Path(failure.log)
            text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            with atomic_text(folder / name) as file:
                file.write(text if failure.error in text else f"{text}{PREFIX}{failure.error}\n")
    return names


def load_ranked(metrics_files: Iterable[str | Path], outlier_z: float = OUTLIER_Z) -> list[dict[str, Any]]:
    """Metrics of all scans, with their ``folder``, their ``worst_z`` and, as ``outlier``, the flag that it raises.

    The worst come first: those with a flag of their own, which has a limit that means something, then by z.
    """
    subjects = [read_json(path) | {"folder": Path(path).resolve().parent} for path in metrics_files]
    worst = _worst_z(subjects, outlier_z)
    for values, (z, reason) in zip(subjects, worst, strict=True):
        values["worst_z"], values["outlier"] = z, reason
        values["flags"] = list(values.get("flags") or []) + ([reason] if reason else [])

    def rank(values: dict[str, Any]) -> tuple[Any, ...]:
        own = len(values["flags"]) - bool(values["outlier"])
        return not own, -(values["worst_z"] or 0.0), -own, str(values.get("name"))

    return sorted(subjects, key=rank)


def _groups(names: Sequence[str], given: Mapping[str, Mapping[str, str]]) -> list[dict[str, Any]]:
    """By what scans can be told apart, and how: what the sheet says, their suffix, and entities of their names.

    Each has its ``name``, its ``values`` and, as ``of``, which of these each scan has; what all have alike is left out.
    """
    found: dict[str, list[str]] = {}
    for place, name in enumerate(names):
        *entities, suffix = name.split("_")
        parts = {"suffix": suffix} | dict(entity.split("-", 1) for entity in entities[1:] if "-" in entity)
        named = {GROUP_NAMES.get(key, key): value for key, value in parts.items()}
        for key, value in (named | dict(given.get(name, {}))).items():
            found.setdefault(key, [""] * len(names))[place] = value
    groups = []
    for key, cells in found.items():
        values = sorted(set(cells))
        if len(values) > 1:
            groups.append({"name": key, "values": values, "of": [values.index(cell) for cell in cells]})
    return groups


def _same_in_all(subjects: Sequence[Mapping[str, Any]], key: str, digits: int) -> bool:
    """Whether a metric reads the same in all of several scans, so that neither a column nor a plot of it says more."""
    return len(subjects) > 1 and len({_printed(v.get(key), digits) for v in subjects}) == 1


def _printed(value: Any, digits: int) -> str:
    return value if isinstance(value, str) else number(value, digits)


def _round(value: Any, digits: int) -> Any:
    if not isinstance(value, float):
        return value
    # the mask of a microscope's image has millionths of a millilitre
    return float(f"{value:.1e}") if abs(value) < 0.5 * 10**-digits else round(value, digits)


def _worst_z(subjects: Sequence[Mapping[str, Any]], limit: float) -> list[tuple[float | None, str]]:
    """Per scan `_worst_z_of_suffix`: a T1w scan is no outlier because most others are of another contrast."""
    places: dict[str, list[int]] = {}
    for place, values in enumerate(subjects):
        places.setdefault(str(values.get("name")).rpartition("_")[2], []).append(place)
    found: dict[int, tuple[float | None, str]] = {}
    for suffix, alike in places.items():
        found |= zip(alike, _worst_z_of_suffix([subjects[place] for place in alike], suffix, limit), strict=True)
    return [found[place] for place in range(len(subjects))]


def _worst_z_of_suffix(
    subjects: Sequence[Mapping[str, Any]], suffix: str, limit: float
) -> list[tuple[float | None, str]]:
    """The largest robust z in the bad direction, and the flag that names all metrics beyond the limit."""
    if len(subjects) < OUTLIER_SCANS:
        return [(None, "")] * len(subjects)
    worst = [0.0] * len(subjects)
    beyond: list[list[tuple[float, str]]] = [[] for _ in subjects]
    for key, heading, digits, worse in COLUMNS:
        if not worse:
            continue
        column = np.array([math.nan if v.get(key) is None else float(v[key]) for v in subjects])
        signed = robust_z(column, FLOORS.get(key, 0.0), FLOOR_SHARES.get(key, 0.0))
        for n, z in enumerate(np.abs(signed) if worse == EITHER else worse * signed):
            if math.isfinite(z):
                worst[n] = max(worst[n], float(z))
            if z > limit:
                usual = number(float(np.nanmedian(column)), digits)
                beyond[n].append((z, f"{heading} {number(column[n], digits)} (median {usual}, robust z {z:.1f})"))
    return [
        (
            round(z, 2),
            f"outlier: {_listed(named)}; limit {limit:g}, look at it beside other {suffix} scans" if named else "",
        )
        for z, named in zip(worst, beyond, strict=True)
    ]


def _listed(named: list[tuple[float, str]]) -> str:
    return ", ".join(text for _, text in sorted(named, reverse=True))


def _write_outliers(subjects: Sequence[Mapping[str, Any]], path: Path) -> None:
    found = {str(values.get("name")): values["outlier"] for values in subjects if values["outlier"]}
    with atomic_text(path) as file:
        file.write(f"showOutliers({json.dumps(found, ensure_ascii=False, indent=0)});\n")


def _write_table(
    subjects: Sequence[Mapping[str, Any]], failed: Sequence[Failure], logs: Sequence[str], path: str | Path
) -> None:
    with atomic_text(path) as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n", quoting=csv.QUOTE_NONE, quotechar=None)
        writer.writerow(["name", *(key for key, *_ in COLUMNS), "worst_z", "flags"])
        for values in subjects:
            cells = [values.get("name"), *(values.get(key) for key, *_ in COLUMNS), values["worst_z"]]
            cells.append("; ".join(values["flags"]) or None)
            # neither tab nor line end inside a cell
            writer.writerow(["n/a" if c is None else " ".join(str(c).split()) for c in cells])
        there = {values.get("name") for values in subjects}  # all but its reference
        for failure, log in zip(failed, logs, strict=True):
            if failure.scan not in there:
                said = f"{failure.step} failed: {failure.error}" + (f"; log: {log}" if log else "")
                cells = [failure.scan, *["n/a"] * (len(COLUMNS) + 1), said]
                writer.writerow([" ".join(str(cell).split()) for cell in cells])
