import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from n4flow.errors import InputError
from n4flow.study.ratings import RATINGS, Rating, agreement, exclusions, read_ratings, write_exclusions

HEADER = "\t".join(Rating._fields)


def line(participant_id="sub-01", session="n/a", modality="T1w", rater="ann", rating="pass", reasons="n/a",
         comment="n/a", time_sec="4.5", report_hash="0123456789ab", timestamp="2026-01-31T12:00:00.123Z"):  # fmt: skip
    return "\t".join(
        (participant_id, session, modality, rater, rating, reasons, comment, time_sec, report_hash, timestamp)
    )


def write(path, *lines):
    path.write_text("\n".join([HEADER, *lines]) + "\n", encoding="utf-8")
    return path


def test_a_table_is_read(tmp_path):
    prefixed = line(rater="bo", report_hash="sha256:0123456789ab")  # no number for a spreadsheet
    path = write(tmp_path / "r.tsv", line(session="ses-a", modality="run-1_T1w", comment='a "quote'), prefixed)
    first, second = read_ratings(path)
    assert (first.scan, first.comment, first.reasons) == ("sub-01_ses-a_run-1_T1w", 'a "quote', "")
    assert (second.scan, second.rater, second.report_hash) == ("sub-01_T1w", "bo", "0123456789ab")


def test_a_table_by_hand_needs_few_columns(tmp_path):
    (tmp_path / "r.tsv").write_text("participant_id\tmodality\trater\trating\nsub-01\tT1w\tann\tfail\n")
    (rating,) = read_ratings(tmp_path / "r.tsv")
    assert rating.scan == "sub-01_T1w"
    assert exclusions([rating], {"sub-01_T1w": "0" * 12}) == [("sub-01", "n/a", "T1w", "ann: fail")]


def test_no_rating_yet_is_no_problem(tmp_path):
    assert read_ratings(write(tmp_path / "r.tsv")) == []


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (line(rating="good"), "line 2: rating 'good' is not valid; use one of pass warn fail"),
        (line(rating="n/a"), "line 2: rating is empty; fill it in"),
        (line(rater=""), "line 2: rater is empty; fill it in"),
        (line(participant_id="01"), "line 2: participant_id '01' is not valid; give it as in sub-01"),
        (line(time_sec="long"), "line 2: time_sec 'long' is not valid; give seconds, or n/a"),
        (line(timestamp="yesterday"), "line 2: timestamp 'yesterday' is not valid; give it as in 2026-01-31T12:00:00Z"),
        (line(report_hash="x"), "line 2: report_hash 'x' is not valid; give what the report exports, or n/a"),
        (line(participant_id="sub-02"), "line 2: sub-02_T1w is not in the sample sheet; remove the line, or add the"),
        (line() + "\n" + line(rating="fail"), "line 3: ann rated sub-01_T1w in line 2 already; keep the later one"),
        (line() + "\tmore", "line 2: has another number of columns than the header; separate them by tabs"),
    ],
)
def test_each_problem_is_a_line(tmp_path, wrong, said):
    path = write(tmp_path / "r.tsv", wrong)
    with pytest.raises(InputError) as caught:
        read_ratings(path, known={"sub-01_T1w"}.__contains__)
    assert str(caught.value).startswith(f"{path}, {said}")
    assert "\n" not in str(caught.value)


def test_columns_are_checked_too(tmp_path):
    (tmp_path / "r.tsv").write_text("participant_id\tmodality\tratre\trating\n")
    with pytest.raises(InputError) as caught:
        read_ratings(tmp_path / "r.tsv")
    known = ", ".join(Rating._fields)
    assert str(caught.value).splitlines() == [
        f"{tmp_path}/r.tsv: unknown column 'ratre'; known are {known}",
        f"{tmp_path}/r.tsv: there is no column 'rater'; add it (columns are separated by tabs)",
    ]


def test_an_absent_file_is_said(tmp_path):
    with pytest.raises(InputError, match="there is no such file; export it from index"):
        read_ratings(tmp_path / "r.tsv")


def test_one_fail_excludes_and_every_word_is_kept(tmp_path):
    path = write(
        tmp_path / "r.tsv",
        line(participant_id="sub-02", rating="warn"),
        line(participant_id="sub-03", rater="bo", rating="fail", reasons="mask wrong; image itself", comment="again"),
        line(participant_id="sub-03"),
        line(session="ses-b", rating="fail", report_hash="ffffffffffff"),
    )
    hashes = dict.fromkeys(["sub-01_ses-b_T1w", "sub-02_T1w", "sub-03_T1w"], "0123456789ab")
    write_exclusions(path, hashes, tmp_path / "e", tmp_path / "a")
    assert (tmp_path / "e").read_text().splitlines() == [
        "participant_id\tsession\tmodality\treason",
        "sub-01\tses-b\tT1w\tann: fail (stale: the scan has changed since, look again)",
        "sub-03\tn/a\tT1w\tbo: fail, mask wrong; image itself; again | ann: pass",
    ]


@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.sampled_from("xyz"), st.sampled_from(RATINGS)), unique_by=lambda r: r[:2]
    )
)
def test_exactly_the_failed_are_excluded(given_ratings):
    blank = dict.fromkeys(Rating._fields, "")
    ratings = [
        Rating(**blank | {"participant_id": f"sub-{scan}", "modality": "T1w", "rater": rater, "rating": rating})
        for scan, rater, rating in given_ratings
    ]
    assert [row[0] for row in exclusions(ratings, {})] == sorted(
        {f"sub-{scan}" for scan, _, rating in given_ratings if rating == "fail"}
    )


def ratings_by(rater, letters):
    words = {"p": "pass", "w": "warn", "f": "fail"}
    blank = dict.fromkeys(Rating._fields, "")
    return [
        Rating(**blank | {"participant_id": f"sub-{n}", "modality": "T1w", "rater": rater, "rating": words[letter]})
        for n, letter in enumerate(letters)
        if letter != "-"
    ]


def test_kappa_of_the_textbook():
    """20 and 15 of 50 alike: 0.4 (Cohen's kappa in Wikipedia, simple example)."""
    ours = "p" * 25 + "f" * 25
    theirs = "p" * 20 + "f" * 5 + "p" * 10 + "f" * 15
    ((rater, other, scans, alike, kappa, weighted),) = agreement(ratings_by("bo", theirs) + ratings_by("ann", ours))
    assert (rater, other, scans, alike) == ("ann", "bo", 50, 35)
    assert kappa == pytest.approx(0.4)
    assert weighted == pytest.approx(0.4)  # of two ratings there is one distance


def test_weighted_kappa_forgives_neighbours():
    """Of the 3 x 3 table of counts, as Cohen 1968 has it."""
    ours, theirs = "ppppwwwfff", "pppwwwfffp"
    ((*_, kappa, weighted),) = agreement(ratings_by("ann", ours) + ratings_by("bo", theirs))
    counts = np.zeros((3, 3))
    for a, b in zip(ours, theirs, strict=True):
        counts["pwf".index(a), "pwf".index(b)] += 1
    share = counts / counts.sum()
    chance = np.outer(share.sum(axis=1), share.sum(axis=0))
    assert kappa == pytest.approx((np.trace(share) - np.trace(chance)) / (1 - np.trace(chance)))
    distance = np.abs(np.subtract.outer(range(3), range(3)))
    assert weighted == pytest.approx(1 - (distance * share).sum() / (distance * chance).sum())


def test_only_scans_that_both_rated_as_they_are_count(tmp_path):
    stale = ratings_by("bo", "-p")[0]._replace(report_hash="a" * 12)
    fresh = ratings_by("ann", "pp")[1]._replace(report_hash="b" * 12)
    assert agreement([*ratings_by("ann", "p"), fresh, stale]) == []
    rows = agreement([*ratings_by("ann", "pp-"), *ratings_by("bo", "-pp")])
    assert [row[:4] for row in rows] == [("ann", "bo", 1, 1)]
    path = write(tmp_path / "r.tsv", line(), line(rater="bo"))
    write_exclusions(path, {}, tmp_path / "e", tmp_path / "a")
    assert (tmp_path / "a").read_text().splitlines() == [
        "rater\tother\tscans\talike\tkappa\tweighted_kappa",
        "ann\tbo\t1\t1\tn/a\tn/a",
    ]
