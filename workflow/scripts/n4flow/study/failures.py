"""Which scans of a run failed, and why: what their logs say."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from n4flow.console import last_error
from n4flow.study.bids import Scan
from n4flow.study.outputs import output_of

#: The steps of a scan, in their order.
STEPS = ("mask", "n4", "apply", "reference", "qc")


def failed_scans(scans: Sequence[Scan], logs: Path, results: Path, since: float) -> dict[str, str]:
    """Why scans failed, by their names.

    Parameters
    ----------
    scans : sequence of Scan
    logs, results : Path
        Folders.
    since : float
        When the run began: what is older is of an older run.

    Returns
    -------
    dict of str to str
        The line of the first step that failed; of a scan whose field is that of another one, which scan failed.
    """

    def made_now(path: Path) -> bool:
        return path.is_file() and path.stat().st_mtime >= since

    failed: dict[str, str] = {}
    without_field = set()
    for scan in scans:
        for step in STEPS:
            log = logs / step / ("" if step == "qc" else scan.folder) / f"{scan.name}.log"
            if made_now(log) and (error := last_error(log)):
                failed.setdefault(scan.name, error)
                if step in ("mask", "n4"):
                    without_field.add(scan.name)
    for scan in scans:
        lacks_field = scan.field_from and scan.field_source in without_field
        if lacks_field and not made_now(results / output_of(scan, "corrected")):
            failed.setdefault(scan.name, f"its field is that of {scan.field_source}, which failed")
    return failed
