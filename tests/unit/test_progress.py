"""The lines of a run: one for each scan, whatever the order of its jobs."""

import pytest

from n4flow.study.progress import Progress, _duration


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def run():
    """Jobs 1 and 2 of a scan, 3 and 4 of another; what is said; a clock."""
    said, clock = [], Clock()
    return Progress({1: ["a"], 2: ["a"], 3: ["b"], 4: ["b"]}, lambda *line: said.append(line), clock), said, clock


def test_a_scan_is_done_with_the_last_of_its_jobs(run):
    progress, said, _ = run
    for job in (1, 3, 2):
        progress.begin(job)
        progress.end(job)
    assert said == [("[1/2] a: done in 0.0 s", False)]
    progress.begin(4)
    progress.end(4)
    assert said[1:] == [("[2/2] b: done in 0.0 s", False)]


def test_time_counts_while_any_job_of_the_scan_runs(run):
    progress, said, clock = run
    progress.begin(1)
    clock.now = 2
    progress.begin(2)
    clock.now = 3
    progress.end(1)
    clock.now = 5
    progress.end(2)
    progress.begin(3)
    clock.now = 6
    progress.end(3)
    clock.now = 100  # it waits
    progress.begin(4)
    clock.now = 102
    progress.end(4)
    assert [line for line, _ in said] == ["[1/2] a: done in 5.0 s", "[2/2] b: done in 3.0 s"]


def test_a_scan_that_fails_has_one_line_at_once(run):
    progress, said, _ = run
    progress.begin(1)
    progress.begin(2)
    progress.fail(1, "mask failed: x")
    assert said == [("[1/2] a: mask failed: x", True)]
    progress.fail(2, "n4 failed: x")
    progress.fail(1, "mask failed: x")
    assert len(said) == 1
    assert progress.over == {"a"}


def test_a_job_of_several_scans_counts_for_each():
    said = []
    progress = Progress({1: ["a"], 2: ["b"], 3: ["a", "b"], 4: ["b"]}, lambda *line: said.append(line), Clock())
    for job in (1, 2, 4):
        progress.end(job)
    assert said == []
    progress.end(3)
    assert said == [("[1/2] a: done in 0.0 s", False), ("[2/2] b: done in 0.0 s", False)]


def test_a_job_of_several_scans_that_fails_fails_them_all():
    said = []
    progress = Progress({1: ["a", "b"], 2: ["c"]}, lambda *line: said.append(line), Clock())
    progress.fail(1, "divide failed: x")
    assert said == [("[1/3] a: divide failed: x", True), ("[2/3] b: divide failed: x", True)]


def test_jobs_of_no_scan_are_passed_over(run):
    progress, said, _ = run
    progress.begin(9)
    progress.end(9)
    progress.fail(9, "x")
    assert said == []


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (9.94, "9.9 s"), (9.96, "10 s"), (59.7, "1 min 0 s"), (192.2, "3 min 12 s")]
)
def test_durations_read_well(seconds, text):
    assert _duration(seconds) == text
