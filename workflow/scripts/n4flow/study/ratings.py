"""What reviewers said of the scans: a table that the report exports, and the workflow takes back."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from n4flow.errors import InputError
from n4flow.images.files import atomic_text
from n4flow.study.sheet import RAGGED, ragged, read_table

RATINGS = ("pass", "warn", "fail")


class Rating(NamedTuple):
    """What one rater said of one scan, as a row of ratings.tsv; what is not known is empty.

    Parameters
    ----------
    participant_id, session : str
        As in BIDS: ``sub-01``, ``ses-1``.
    modality : str
        As in the sample sheet: ``T1w``, ``run-1_T1w``. With the two above it is the scan's name.
    rater : str
    rating : {"pass", "warn", "fail"}
    reasons, comment : str
        Reasons are separated by semicolons.
    time_sec : str
        For how long the scan was on show until it was rated.
    report_hash : str
        ``report_hash`` of the scan's metrics when it was rated.
    timestamp : str
        UTC, ISO 8601.
    """

    participant_id: str
    session: str
    modality: str
    rater: str
    rating: str
    reasons: str
    comment: str
    time_sec: str
    report_hash: str
    timestamp: str

    @property
    def scan(self) -> str:
        """Name of the scan: ``sub-01_ses-1_run-1_T1w``."""
        return "_".join(filter(None, self[:3]))


#: What a cell must be, where it is not empty: a pattern, and in words.
CELLS: Mapping[str, tuple[str, str]] = {
    "participant_id": (r"sub-[A-Za-z0-9]+", "give it as in sub-01"),
    "session": (r"ses-[A-Za-z0-9]+", "give it as in ses-1"),
    "rating": ("|".join(RATINGS), f"use one of {' '.join(RATINGS)}"),
    "time_sec": (r"\d+(\.\d*)?", "give seconds, or n/a"),
    "report_hash": (r"[0-9a-f]{12}", "give the 12 characters that the report exports, or n/a"),
    "timestamp": (r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z", "give it as in 2026-01-31T12:00:00Z, or n/a"),
}
NEEDED = ("participant_id", "modality", "rater", "rating")


def read_ratings(path: str | Path, known: Callable[[str], bool] = lambda scan: True) -> list[Rating]:
    """Read and check a table of ratings.

    Parameters
    ----------
    path : path-like
        Tab-separated, with a header line; ``n/a`` and an empty cell are the same, and quotes are plain characters.
    known : callable
        Whether there is a scan of this name.

    Raises
    ------
    InputError
        The file cannot be read, or lines of it are wrong: the message has a line for each.
    """
    if not Path(path).is_file():
        raise InputError(path, "there is no such file", "export it from index.html, or set qc.ratings to ''")
    rows, problems = read_table(path, Rating._fields, NEEDED, csv.QUOTE_NONE)
    ratings: dict[tuple[str, str], tuple[int, Rating]] = {}
    for line, row in [] if problems else rows:
        if ragged(row):
            problems.append(f"{path}, line {line}: {RAGGED}")
            continue
        cells = {key: "" if text.strip() == "n/a" else text.strip() for key, text in row.items()}
        rating = Rating(**{**dict.fromkeys(Rating._fields, ""), **cells})
        found = [f"{key} is empty; fill it in" for key in NEEDED if not cells[key]]
        found += [
            f"{key} {cells[key]!r} is not valid; {remedy}"
            for key, (pattern, remedy) in CELLS.items()
            if cells.get(key) and not re.fullmatch(pattern, cells[key])
        ]
        if not found and not known(rating.scan):
            found.append(f"{rating.scan} is not in the sample sheet; remove the line, or add the scan")
        key = (rating.scan, rating.rater)
        if not found and key in ratings:
            found.append(f"{rating.rater} rated {rating.scan} in line {ratings[key][0]} already; keep the later one")
        ratings.setdefault(key, (line, rating))
        problems += [f"{path}, line {line}: {problem}" for problem in found]
    if problems:
        raise InputError.of_lines(problems)
    return [rating for _, rating in ratings.values()]


def stale(rating: Rating, report_hash: str | None) -> bool:
    """Whether the scan has changed since it was rated; not if either hash is unknown."""
    return bool(rating.report_hash and report_hash) and rating.report_hash != report_hash


def exclusions(ratings: Sequence[Rating], hashes: Mapping[str, str | None]) -> list[tuple[str, str, str, str]]:
    """The scans that somebody failed, with every rater's word on them.

    A stale fail excludes too, since nobody has said yet that the new result is better.

    Parameters
    ----------
    ratings : sequence of Rating
    hashes : mapping
        ``report_hash`` by scan.

    Returns
    -------
    list of (participant_id, session, modality, reason)
    """
    of_scan: dict[str, list[Rating]] = {}
    for rating in ratings:
        of_scan.setdefault(rating.scan, []).append(rating)
    rows = []
    for scan, its_ratings in of_scan.items():
        if all(rating.rating != "fail" for rating in its_ratings):
            continue
        words = []
        for rating in sorted(its_ratings, key=lambda r: (-RATINGS.index(r.rating), r.rater)):
            remarks = "; ".join(filter(None, [rating.reasons, rating.comment]))
            again = " (stale: the scan has changed since, look again)" if stale(rating, hashes.get(scan)) else ""
            words.append(f"{rating.rater}: {rating.rating}{again}{f', {remarks}' if remarks else ''}")
        first = its_ratings[0]
        rows.append((first.participant_id, first.session or "n/a", first.modality, " | ".join(words)))
    return sorted(rows)


def write_exclusions(ratings_file: str | Path, hashes: Mapping[str, str | None], output: str | Path) -> None:
    """Write `exclusions` of a table of ratings as a table (participant_id, session, modality, reason)."""
    rows = exclusions(read_ratings(ratings_file), hashes)
    with atomic_text(output) as file:
        for row in [("participant_id", "session", "modality", "reason"), *rows]:
            file.write("\t".join(row) + "\n")
