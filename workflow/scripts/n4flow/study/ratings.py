"""What reviewers said of the scans: a table that the report exports, and the workflow takes back."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
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
        ``report_hash`` of the scan's metrics when it was rated; in the table ``sha256:`` stands before it, so that no
        spreadsheet takes it for a number.
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
    "report_hash": (r"(sha256:)?[0-9a-f]{12}", "give what the report exports, or n/a"),
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
        rating = rating._replace(report_hash=rating.report_hash.removeprefix("sha256:"))
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


class Agreement(NamedTuple):
    """How two raters agree on the scans that both have rated, as a row of agreement.tsv.

    Parameters
    ----------
    rater, other : str
    scans, alike : int
        Scans that both have rated in the same state, and those that both rated alike.
    kappa, weighted_kappa : float
        Cohen's kappa ``1 - sum(w o) / sum(w e)`` of the ratings that were found, o, and those that chance alone would
        pair, e: with w = 1 for any two that differ, and with w = 1 for neighbours and 2 for pass and fail. 1 is full
        agreement, 0 that of chance; NaN where chance would agree on all.
    """

    rater: str
    other: str
    scans: int
    alike: int
    kappa: float
    weighted_kappa: float


def agreement(ratings: Sequence[Rating]) -> list[Agreement]:
    """How each two raters agree. Ratings of one scan that was made anew in between are not compared.

    References
    ----------
    Cohen 1960, doi:10.1177/001316446002000104; Cohen 1968, doi:10.1037/h0026256 (weighted).
    """
    of_rater: dict[str, dict[str, Rating]] = {}
    for rating in ratings:
        of_rater.setdefault(rating.rater, {})[rating.scan] = rating
    rows = []
    for rater, other in combinations(sorted(of_rater), 2):
        mine, theirs = of_rater[rater], of_rater[other]
        both = [s for s in mine if s in theirs and not stale(mine[s], theirs[s].report_hash)]
        if not both:
            continue
        pairs = [(RATINGS.index(mine[s].rating), RATINGS.index(theirs[s].rating)) for s in both]
        found = _kappa(pairs, lambda a, b: a != b), _kappa(pairs, lambda a, b: abs(a - b))
        rows.append(Agreement(rater, other, len(both), sum(a == b for a, b in pairs), *found))
    return rows


def _kappa(pairs: Sequence[tuple[int, int]], disagreement: Callable[[int, int], float]) -> float:
    found = sum(disagreement(a, b) for a, b in pairs)
    chance = sum(disagreement(a, b) for a, _ in pairs for _, b in pairs) / len(pairs)
    return 1 - found / chance if chance else math.nan


def write_exclusions(
    ratings_file: str | Path, hashes: Mapping[str, str | None], table: str | Path, raters: str | Path
) -> None:
    """Write what a table of ratings comes to.

    Parameters
    ----------
    ratings_file : path-like
        See `read_ratings`.
    hashes : mapping
        ``report_hash`` by scan.
    table : path-like
        Gets the `exclusions` (participant_id, session, modality, reason).
    raters : path-like
        Gets the `agreement` of the raters.
    """
    ratings = read_ratings(ratings_file)
    rows = [tuple(_cell(value) for value in row) for row in agreement(ratings)]
    excluded = exclusions(ratings, hashes)
    for path, header, lines in (
        (table, ("participant_id", "session", "modality", "reason"), excluded),
        (raters, Agreement._fields, rows),
    ):
        with atomic_text(path) as file:
            file.writelines("\t".join(line) + "\n" for line in (header, *lines))


def _cell(value: str | float) -> str:
    if isinstance(value, float):
        return f"{value:.4f}" if math.isfinite(value) else "n/a"
    return str(value)
