"""What a run says while it goes on: a line for each scan, when the last of its jobs is done or one has failed."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence


class Progress:
    """Counts the jobs of each scan of a run.

    Parameters
    ----------
    jobs : mapping of int to sequence of str
        The scans of each job that this run is to do, by a number of the job: those of one of an OME-Zarr image are all
        of its channels.
    say : callable
        Gets each line, and whether it is of a failure.
    clock : callable
        Seconds.
    """

    def __init__(
        self,
        jobs: Mapping[int, Sequence[str]],
        say: Callable[[str, bool], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._jobs = jobs
        self._say = say
        self._clock = clock
        self._left = Counter(scan for scans in jobs.values() for scan in scans)
        self._total = len(self._left)
        #: Scans that have had their line.
        self.over: set[str] = set()
        self._running: dict[str, set[int]] = {scan: set() for scan in self._left}
        self._since: dict[str, float] = {}
        self._seconds: Counter[str] = Counter()
        self._lock = threading.Lock()  # jobs end in several threads

    def begin(self, job: int) -> None:
        """A job begins."""
        with self._lock:
            for scan in self._jobs.get(job, ()):
                if not self._running[scan]:
                    self._since[scan] = self._clock()
                self._running[scan].add(job)

    def end(self, job: int) -> None:
        """A job is done."""
        with self._lock:
            for scan in self._jobs.get(job, ()):
                self._stop(scan, job)
                self._left[scan] -= 1
                if not self._left[scan]:
                    self._tell(scan, f"done in {_duration(self._seconds[scan])}", failed=False)

    def fail(self, job: int, problem: str) -> None:
        """A job has failed: its scans will not be done."""
        with self._lock:
            for scan in self._jobs.get(job, ()):
                self._stop(scan, job)
                self._tell(scan, problem, failed=True)

    def _stop(self, scan: str, job: int) -> None:
        """Time while no job of a scan runs does not count."""
        self._running[scan].discard(job)
        if not self._running[scan] and scan in self._since:
            self._seconds[scan] += self._clock() - self._since.pop(scan)  # type: ignore[assignment]

    def _tell(self, scan: str, what: str, *, failed: bool) -> None:
        if scan not in self.over:
            self.over.add(scan)
            self._say(f"[{len(self.over)}/{self._total}] {scan}: {what}", failed)


def _duration(seconds: float) -> str:
    """``2.3 s``, ``41 s``, ``3 min 12 s``."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
