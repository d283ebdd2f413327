"""The report as people use it: keys, ratings, viewer, thousands of scans."""

import csv
import json
import os
import re
import shutil
import time
from urllib.parse import quote, unquote

import nibabel as nib
import numpy as np
import pytest

from n4flow.core.field import BiasField, Mesh
from n4flow.errors import InputError
from n4flow.images.fields import load_field
from n4flow.qc.dataset import make_index
from n4flow.qc.pages import make_subject
from n4flow.study.ratings import Rating, read_ratings
from tests.report.reviewing import (
    ONE,
    SCANS,
    give_name,
    index_of,
    order_of,
    rate_here,
    rating_of,
    show_others,
    shown_page,
    table,
    write_ratings,
)
from tests.unit.test_qc import HOSTILE, make_files, make_microscopy_files, write_metrics


def test_keys_on_the_table_rate_the_selected_scan(qc, visit):
    page = visit(qc / "index.html").page
    first, second, *_ = order_of(page)
    page.keyboard.press("3")
    page.keyboard.press("j")
    page.keyboard.press("1")
    assert (rating_of(page, first), rating_of(page, second)) == ("✕ fail", "● pass")
    assert "2 of 4 rated by you: ● 1 pass, ▲ 0 warn, ✕ 1 fail" in page.inner_text("#rated")


def test_keys_in_the_review_reach_the_table_and_reload_keeps_them(qc, visit):
    page = visit(qc / "index.html").page
    names = order_of(page)
    page.keyboard.press("Enter")
    shown_page(page).locator("h1", has_text=names[0]).wait_for()
    page.keyboard.press("2")  # the frame has the focus
    page.locator("#said", has_text="▲ warn").wait_for()
    page.get_by_label("mask wrong").check()
    page.keyboard.press("c")
    page.keyboard.type("ring at the\tneck 1 2 3 jk")  # keys in a field are text
    page.keyboard.press("Enter")
    page.keyboard.press("j")
    page.locator("#position", has_text="2 of 4").wait_for()
    shown_page(page).locator("h1", has_text=names[1]).wait_for()
    page.keyboard.press("3")
    page.locator("#said", has_text="✕ fail").wait_for()
    page.keyboard.press("k")
    page.locator("#position", has_text="1 of 4").wait_for()
    assert page.input_value("#comment").startswith("ring at the")
    page.keyboard.press("Escape")
    page.locator("#review").wait_for(state="hidden")
    for _ in range(2):
        assert (rating_of(page, names[0]), rating_of(page, names[1])) == ("▲ warn", "✕ fail")
        page.reload()


def test_ratings_belong_to_their_folder(qc, visit, tmp_path):
    """Chromium has one storage for all files."""
    shutil.copytree(qc, tmp_path / "copy")
    page = visit(qc / "index.html").page
    first = order_of(page)[0]
    page.keyboard.press("1")
    assert rating_of(page, first) == "● pass"
    page.goto((tmp_path / "copy" / "index.html").as_uri())
    assert rating_of(page, first) == "○ not rated"


def test_a_scan_can_be_rated_from_its_viewer(qc, visit):
    page = visit(qc / "index.html").page
    page.keyboard.press("Enter")
    shown_page(page).locator("h1").wait_for()
    page.keyboard.press("v")
    shown_page(page).locator("#viewer canvas").first.wait_for()
    page.keyboard.press("3")
    page.locator("#said", has_text="✕ fail").wait_for()
    page.keyboard.press("j")
    page.locator("#position", has_text="2 of 4").wait_for()


def test_a_key_on_a_page_of_its_own_reaches_the_table(qc, visit):
    page = visit(qc / f"{SCANS[0]}.html").page
    page.keyboard.press("3")
    page.wait_for_url("**/index.html#*")
    page.locator("#said", has_text="✕ fail").wait_for()
    page.goto((qc / "index.html").as_uri())
    assert rating_of(page, SCANS[0]) == "✕ fail"


def test_a_page_has_the_flags_of_the_table(qc, visit, tmp_path):
    """An outlier is known to the dataset alone; a page that was taken elsewhere knows its own flags."""
    folder = tmp_path / "qc"
    shutil.copytree(qc, folder)
    values = json.loads((folder / "data" / f"{SCANS[0]}.json").read_text())
    (folder / "data" / "0.json").write_text(json.dumps(values | {"inu_range": 9.0}))
    others = [values | {"name": f"sub-{n:02d}_T1w", "page": "../sub-01_T1w.html"} for n in range(11, 16)]
    paths = [folder / "data" / "0.json", *write_metrics(tmp_path, others)]
    make_index(paths, folder / "index.html", folder / "metrics.tsv")
    page = visit(folder / "index.html").page
    flags = page.evaluate(f"rows[rowOf.get({SCANS[0]!r})][2]")
    said = [flag.partition(":")[0].replace("_", " ") for flag in flags]
    assert said[-1] == "outlier"
    page.goto(f"{page.url}#{SCANS[0]}")
    assert page.locator("#raised .flag").all_inner_texts() == [f"▲ {name}" for name in said]
    shown_page(page).locator(".flags li", has_text="outlier").wait_for()
    assert shown_page(page).locator(".flags b").all_inner_texts() == said
    page.goto((folder / f"{SCANS[0]}.html").as_uri())
    page.locator(".flags li", has_text="outlier: inu_range 9.000").wait_for()
    assert page.inner_text("#flagged") == f"▲ {len(said)} flag{'s' if len(said) > 1 else ''}"
    (folder / "outliers.js").unlink()
    page.reload()
    assert page.locator(".flags", has_text="outlier").count() == 0


def test_space_swaps_and_b_shows_the_field_there(qc, visit):
    page = visit(qc / f"{SCANS[0]}.html").page

    def shown():
        return [
            label for label in ("original", "corrected", "field")
            if page.evaluate(f"getComputedStyle(document.querySelector('.is-{label}')).visibility") == "visible"
        ]  # fmt: skip

    seen = [shown()]
    for key in (" ", "b", " ", " ", "b", "b"):
        page.keyboard.press(key)
        seen.append(shown())
        page.wait_for_timeout(200)
    assert seen == [["corrected"], ["original"], ["field"], ["original"], ["corrected"], ["field"], ["corrected"]]
    # too fast: above 3 Hz, whatever else the machine does
    press = "document.body.dispatchEvent(new KeyboardEvent('keydown', {key: ' ', bubbles: true}))"
    page.evaluate(f"() => {{ {press}; {press}; }}")
    assert shown() == ["original"]


def test_keys_show_the_mask_steep_colours_and_a_window_of_its_own(qc, visit):
    page = visit(qc / f"{SCANS[0]}.html").page
    mask, image = page.locator(".swap .on-mask"), page.locator(".swap img.is-corrected")
    own, dataset = page.locator("img.on-own[alt^='Bias field:']"), page.locator("img.on-dataset[alt^='Bias field:']")

    def shown():
        return mask.is_visible(), "steep" in image.evaluate("(it) => getComputedStyle(it).filter"), own.is_visible()

    assert shown() == (False, False, False)
    for n, key in enumerate("msw"):
        page.keyboard.press(key)
        assert shown()[n]
        assert page.locator(f"[data-key={key}]").get_attribute("aria-pressed") == "true"
        page.wait_for_timeout(200)
    assert dataset.is_hidden()
    # what is drawn lies on the picture, also where the window is narrow
    for width in (1280, 390):
        page.set_viewport_size({"width": width, "height": 800})
        boxes = [page.locator(f".swap {it}").first.bounding_box() for it in ("img.is-corrected", "svg", ".on-mask")]
        assert boxes[1] == pytest.approx(boxes[0], abs=1.5)
        assert boxes[2] == pytest.approx(boxes[0], abs=1.5)
    for key in "msw":
        page.keyboard.press(key)
        page.wait_for_timeout(200)
    assert shown() == (False, False, False)


def test_the_review_hands_keys_to_the_page(qc, visit):
    page = visit(qc / "index.html").page
    page.goto(f"{page.url}#{SCANS[0]}")
    frame = shown_page(page)
    frame.locator("h1").wait_for()
    page.locator("#position").click()  # the bar has the focus now
    page.keyboard.press("b")
    frame.locator("#show-field:checked").wait_for(state="attached")
    assert frame.locator("nav.alone").is_hidden()


def test_export_and_import_round_trip(qc, visit, export, tmp_path):
    page = visit(qc / "index.html").page
    names = order_of(page)
    page.keyboard.press("1")
    page.click("#export")
    assert "Give your name first" in page.inner_text("#told")
    give_name(page, "Ann B")
    page.locator("#rated", has_text="1 of 4 rated by Ann B").wait_for()
    page.goto(f"{page.url.partition('#')[0]}#{SCANS[1]}")
    shown_page(page).locator("h1").wait_for()
    page.keyboard.press("2")
    page.get_by_label("shading left").check()
    page.get_by_label("image itself").check()
    page.click("#comment")
    page.keyboard.type('say "no" to <script>alert(1)</script>')
    page.keyboard.press("Enter")
    page.keyboard.press("Escape")
    page.locator("#review").wait_for(state="hidden")
    first = export(page, tmp_path / "first.tsv")
    assert list(table(first)[0]) == list(Rating._fields)
    ratings = [Rating(**row) for row in table(first)]
    rows = {rating.scan: rating for rating in ratings}
    assert rows[SCANS[1]].participant_id == "sub-02"
    assert (rows[SCANS[1]].session, rows[SCANS[1]].modality) == ("ses-a", "run-1_T1w")
    assert (rows[SCANS[1]].rater, rows[SCANS[1]].rating) == ("Ann B", "warn")
    assert rows[SCANS[1]].reasons == "shading left; image itself"
    assert rows[SCANS[1]].comment == 'say "no" to <script>alert(1)</script>'
    assert 0 < float(rows[SCANS[1]].time_sec) < 60
    metrics = json.loads((qc / "data" / f"{SCANS[1]}.json").read_text())
    assert rows[SCANS[1]].report_hash == f"sha256:{metrics['report_hash']}"

    other = visit(qc / "index.html").page
    assert rating_of(other, names[0]) == "○ not rated"
    other.set_input_files("#import", first)
    other.locator("#told", has_text="2 ratings by Ann B: 2 taken over").wait_for()
    show_others(other)
    assert rating_of(other, SCANS[1]) == "Ann B: ▲ warn"
    give_name(other, "Ann B")
    assert rating_of(other, SCANS[1]) == "▲ warn"
    assert export(other, tmp_path / "second.tsv").read_bytes() == first.read_bytes()


def test_two_raters_are_merged_and_their_disagreement_is_shown(qc, visit, tmp_path):
    page = visit(qc / "index.html").page
    ann = ONE | {"rater": "ann", "rating": "pass", "timestamp": "2026-01-01T00:00:00Z"}
    bo = ONE | {"rater": "bo", "rating": "fail", "timestamp": "2026-01-02T00:00:00Z"}
    unknown = bo | {"participant_id": "sub-99"}
    both = [write_ratings(tmp_path / "ann.tsv", ann), write_ratings(tmp_path / "bo.tsv", bo, unknown)]
    page.set_input_files("#import", both)
    page.locator("#told", has_text="Left out 1: line 3: sub-99_T1w is not in this dataset").wait_for()
    show_others(page)
    assert rating_of(page, SCANS[0]).split("\n") == ["ann: ● pass", "bo: ✕ fail", "≠ raters disagree"]
    page.select_option("#only", "disagree")
    assert order_of(page) == [SCANS[0]]
    # the newer of one rater's counts, whichever comes first
    page.set_input_files("#import", write_ratings(tmp_path / "old.tsv", bo | ann | {"rater": "bo"}))
    page.locator("#told", has_text="1 were here as new or newer").wait_for()
    assert "bo: ✕ fail" in rating_of(page, SCANS[0])


def test_stored_ratings_are_shown_and_stale_ones_are_marked(qc, visit, export, tmp_path):
    folder = tmp_path / "qc"
    shutil.copytree(qc, folder)
    now = json.loads((folder / "data" / f"{SCANS[2]}.json").read_text())["report_hash"]
    stored = write_ratings(
        tmp_path / "r.tsv",
        ONE | {"rater": "ann", "rating": "pass", "report_hash": "0" * 12},
        ONE | {"participant_id": "sub-03", "rater": "ann", "rating": "warn", "report_hash": now},
    )
    paths = [folder / "data" / f"{scan}.json" for scan in SCANS]
    make_index(paths, folder / "index.html", folder / "metrics.tsv", ratings=stored)
    page = visit(folder / "index.html").page
    show_others(page)
    assert rating_of(page, SCANS[0]) == "ann: ● pass (stale)"
    assert rating_of(page, SCANS[2]) == "ann: ▲ warn"
    give_name(page, "ann")
    page.locator("#rated", has_text="1 of 3 rated by ann: ● 0 pass, ▲ 1 warn, ✕ 0 fail; 1 stale").wait_for()
    page.click("#start")  # goes to what is not rated, or stale
    page.locator("#position").wait_for()
    assert page.inner_text("#scan") != SCANS[2]
    # rated again, it is fresh; what comes out, the workflow takes
    page.goto(f"{page.url.partition('#')[0]}#{SCANS[0]}")
    shown_page(page).locator("h1", has_text=SCANS[0]).wait_for()
    page.keyboard.press("1")
    page.locator("#said", has_text="● pass").wait_for()
    page.keyboard.press("Escape")
    row = page.locator("#scans tbody tr", has=page.get_by_text(SCANS[0], exact=True))
    row.locator(".rating", has_text=re.compile(r"^● pass$")).wait_for()  # no longer stale
    ratings = read_ratings(export(page, tmp_path / "out.tsv"), known=SCANS.__contains__)
    assert [(r.scan, r.rating) for r in ratings] == [(SCANS[0], "pass"), (SCANS[2], "warn")]


def test_the_ratings_of_a_scan_that_is_not_there_for_a_while_are_kept(visit, tmp_path):
    page = visit(index_of(tmp_path, *SCANS)).page
    rate_here(page, SCANS[0], rating="fail", comment="neck")
    index_of(tmp_path, *SCANS[1:])  # in this run the first one failed
    page.reload()
    rate_here(page, SCANS[1], rating="pass")
    assert SCANS[0].partition("_")[0] not in page.evaluate("ratings.toTsv()")  # the sheet may hold it no more
    index_of(tmp_path, *SCANS)
    page.reload()
    assert [rating_of(page, scan) for scan in SCANS] == ["✕ fail", "● pass", "○ not rated"]


@pytest.mark.parametrize("ahead", ["2099-01-01T00:00:00Z", "2099-01-01T00:00:00.500Z"])
def test_the_last_word_counts_though_another_clock_was_ahead(visit, tmp_path, ahead):
    page = visit(index_of(tmp_path, *SCANS)).page
    give_name(page, "ann")
    row = ONE | {"rater": "ann", "rating": "fail", "timestamp": ahead}
    page.set_input_files("#import", write_ratings(tmp_path / "r.tsv", row))
    page.locator("#told", has_text="1 taken over").wait_for()
    for rating, shown in (("pass", "● pass"), ("", "○ not rated"), ("warn", "▲ warn")):
        rate_here(page, SCANS[0], rating=rating)
        page.reload()
        assert rating_of(page, SCANS[0]) == shown


def test_fractions_of_a_second_count(visit, tmp_path):
    page = visit(index_of(tmp_path, *SCANS)).page
    rows = [
        ONE | {"rater": "ann", "rating": rating, "timestamp": f"2026-01-01T00:00:00{fraction}Z"}
        for rating, fraction in (("fail", ""), ("pass", ".5"))
    ]
    for number, row in enumerate(rows):
        page.set_input_files("#import", write_ratings(tmp_path / f"{number}.tsv", row))
        page.locator("#told", has_text=f"{number}.tsv: 1 ratings by ann").wait_for()
    show_others(page)
    assert rating_of(page, SCANS[0]) == "ann: ● pass"


def test_lines_that_the_workflow_would_refuse_are_left_out_and_named(visit, tmp_path):
    page = visit(index_of(tmp_path, *SCANS)).page
    good = ONE | {"rater": "ann", "rating": "pass"}
    rows = {
        "rating constructor is none of pass, warn, fail": good | {"rating": "constructor"},
        "rating Pass is none of pass, warn, fail": good | {"rating": "Pass"},
        "no rating": good | {"rating": "n/a"},
        "no rater": good | {"rater": " "},
        "timestamp yesterday is not valid": good | {"timestamp": "yesterday"},
        "report_hash 1.2E+11 is not valid": good | {"report_hash": "1.2E+11"},
        "time_sec 4,5 is not valid": good | {"time_sec": "4,5"},
        "another number of columns than the header": good | {"timestamp": "n/a\tmore"},
    }
    for number, (problem, row) in enumerate(rows.items()):
        path = write_ratings(tmp_path / f"{number}.tsv", row)
        with pytest.raises(InputError):
            read_ratings(path)
        page.set_input_files("#import", path)
        page.locator("#told", has_text=f"{number}.tsv: 0 ratings").wait_for()
        assert f"Left out 1: line 2: {problem}." in page.inner_text("#told")
    page.set_input_files("#import", write_ratings(tmp_path / "good.tsv", good | {"session": " n/a "}))
    page.locator("#told", has_text="1 ratings by ann: 1 taken over").wait_for()


def test_a_table_by_hand_of_few_columns_can_be_looked_at(qc, visit, tmp_path):
    page = visit(qc / "index.html").page
    (tmp_path / "r.tsv").write_text("participant_id\tmodality\trater\trating\nsub-01\tT1w\tann\tfail\n")
    page.set_input_files("#import", tmp_path / "r.tsv")
    page.locator("#told", has_text="1 taken over").wait_for()
    give_name(page, "ann")
    page.goto(f"{page.url.partition('#')[0]}#{SCANS[0]}")
    page.locator("#said", has_text="✕ fail").wait_for()
    assert page.input_value("#comment") == ""


def test_reasons_by_hand_are_kept_and_a_pass_has_none(qc, visit, tmp_path):
    page = visit(qc / "index.html").page
    row = ONE | {"rater": "ann", "rating": "fail", "reasons": "motion;mask wrong"}
    page.set_input_files("#import", write_ratings(tmp_path / "r.tsv", row))
    page.locator("#told", has_text="1 taken over").wait_for()
    give_name(page, "ann")
    page.goto(f"{page.url.partition('#')[0]}#{SCANS[0]}")
    page.locator("#said", has_text="✕ fail").wait_for()
    assert page.get_by_label("mask wrong").is_checked()
    page.get_by_label("shading left").check()

    def reasons():
        (exported,) = csv.DictReader(page.evaluate("ratings.toTsv()").splitlines(), delimiter="\t")
        return exported["reasons"]

    assert reasons() == "shading left; mask wrong; motion"
    page.locator("#position").click()
    page.keyboard.press("1")
    page.locator("#said", has_text="● pass").wait_for()
    assert reasons() == "n/a"
    assert not page.get_by_label("mask wrong").is_checked()
    page.keyboard.press("3")  # the wrong key was pressed: nothing is lost
    page.locator("#said", has_text="✕ fail").wait_for()
    assert reasons() == "shading left; mask wrong; motion"


def test_a_comment_that_is_being_written_stays_with_its_scan(qc, visit):
    page = visit(qc / "index.html").page
    first, second = SCANS[:2]
    address = page.url.partition("#")[0]
    for scan in (second, first):
        page.goto(f"{address}#{scan}")
        shown_page(page).locator("h1", has_text=scan).wait_for()
        page.keyboard.press("2")
        page.locator("#said", has_text="▲ warn").wait_for()
    page.click("#comment")
    page.keyboard.type("ring")
    page.evaluate("drawReview()")  # as when another tab has rated
    assert page.input_value("#comment") == "ring"
    page.go_back()
    page.locator("#scan", has_text=second).wait_for()
    assert page.input_value("#comment") == ""
    assert page.evaluate("scan => ratings.mine(scan).comment", first) == "ring"


def test_a_name_that_is_given_in_another_tab_is_that_of_all_ratings(visit, tmp_path):
    made = visit(index_of(tmp_path, *SCANS))
    other = made.open(tmp_path / "index.html")
    rate_here(made.page, SCANS[0], rating="pass")
    other.locator("#rated", has_text="1 of 3 rated").wait_for()
    give_name(other, "ann")
    made.page.locator("#rated", has_text="1 of 3 rated by ann").wait_for()
    assert made.page.input_value("#rater") == "ann"
    for page in (made.page, other):
        rate_here(page, SCANS[1], rating="pass")
        assert page.evaluate("[...ratings.entries.values()].map(({ rater }) => rater)") == ["ann"] * 2


def test_a_folder_whose_name_is_no_unicode_has_its_table(visit, tmp_path):
    folder = os.fsencode(index_of(tmp_path / "a", *SCANS).parent)
    turned = os.fsdecode(folder[:-1] + b"\xe9")
    os.rename(folder, turned)
    page = visit().page
    page.goto(f"file://{quote(os.fsencode(turned))}/index.html")
    assert order_of(page) == sorted(SCANS)


def test_an_address_of_no_key_rates_nothing(qc, visit):
    page = visit(qc / "index.html").page
    page.goto(f"{page.url}#{SCANS[0]}/constructor")
    shown_page(page).locator("h1").wait_for()
    assert page.evaluate("ratings.entries.size") == 0


def test_a_held_key_runs_through_the_table_but_not_through_pages(qc, visit):
    page = visit(qc / "index.html").page

    def hold(key):
        for _ in range(3):
            page.keyboard.down(key)
        page.keyboard.up(key)

    hold("j")
    assert page.evaluate("state.selected") == 3
    page.keyboard.press("Enter")
    shown_page(page).locator("h1").wait_for()
    for focus in (lambda: None, page.locator("#position").click):  # on the page, and on the bar
        before = page.evaluate("review.at")
        focus()
        hold("k")
        page.wait_for_function(f"review.at < {before}")
        page.wait_for_timeout(200)
        assert page.evaluate("review.at") == before - 1


def test_a_hostile_name_stays_a_name(qc, visit):
    page = visit(qc / "index.html").page
    assert HOSTILE in order_of(page)
    assert page.locator(".failed").inner_text().count(HOSTILE) == 1
    page.get_by_role("link", name=HOSTILE).click()
    shown_page(page).locator("h1").wait_for()
    assert (page.inner_text("#scan"), shown_page(page).locator("h1").inner_text()) == (HOSTILE, HOSTILE)
    page.keyboard.press("1")
    page.locator("#said", has_text="● pass").wait_for()
    page.keyboard.press("v")
    shown_page(page).locator("#viewer canvas").first.wait_for()
    page.keyboard.press("Escape")
    page.goto((qc / "index.html").as_uri())
    assert rating_of(page, HOSTILE) == "● pass"
    page.get_by_label("pictures").check(force=True)
    assert page.locator("#pictures figure").count() == 4
    page.wait_for_function("[...document.querySelectorAll('#pictures img')].every((i) => i.naturalWidth > 0)")


def test_the_grid_shows_one_panel_of_every_scan(qc, visit):
    page = visit(qc / "index.html").page
    page.get_by_label("pictures").check(force=True)
    name = page.locator("#pictures a:not(.crop)").first.inner_text()
    assert page.locator("#pictures img").first.get_attribute("alt").startswith(f"{name}, corrected; CJV")
    page.select_option("#panel", "bias field")
    places = page.evaluate("[...document.querySelectorAll('#pictures img')].map((i) => i.style.top)")
    assert places == ["-200%"] * 4
    page.keyboard.press("Tab")
    page.locator("#count").click()
    page.keyboard.press("j")
    page.keyboard.press("3")
    assert "✕ fail" in page.locator("#pictures figure").nth(1).inner_text()


# ---------------------------------------------------------------- the viewer


def open_viewer(page):
    page.keyboard.press("v")
    page.locator("#viewer canvas").first.wait_for()
    page.wait_for_function("view !== null")


def test_the_viewer_evaluates_the_field_as_python_does(qc, visit):
    page = visit(qc / f"{SCANS[1]}.html").page
    open_viewer(page)
    field = load_field(qc.parent / "scan1" / "field.json").log_tile((slice(None),) * 3)
    for at in ((0, 0, 0), (23, 27, 19), (5, 20, 11)):
        found = page.evaluate(f"logField(scan.fields[0], {list(at)})")
        assert found == pytest.approx(field[at], abs=1e-12)
    for plane in page.evaluate("scan.planes.map(({ normal, across, up }) => [normal, across, up])"):
        normal, across, up = plane
        page.evaluate("view.at = [5, 20, 11]")
        found = page.evaluate(
            f"Array.from(fieldSlice(scan.fields[0], {{ normal: {normal}, across: {across}, up: {up} }}))"
        )
        expected = np.take(field, (5, 20, 11)[normal], axis=normal)
        expected = expected if across < up else expected.T  # [across, up]
        assert np.reshape(found, expected.T.shape) == pytest.approx(expected.T, abs=1e-12)


@pytest.mark.parametrize("turned", [False, True])
def test_the_viewer_stands_upright(visit, tmp_path, turned):
    """One bright corner, at right, anterior, superior; where it is drawn, whatever the order of the axes."""
    shape, affine = ((16, 20, 12), np.diag([2.0, 2, 3, 1]))
    if turned:  # axes to inferior, left and posterior
        shape, affine = (12, 16, 20), np.array([[0, -2.0, 0, 30], [0, 0, -2, 38], [-3, 0, 0, 33], [0, 0, 0, 1]])
    files = make_files(tmp_path, shape=shape, size_mm=(2, 2, 3), affine=affine)
    original = np.full(shape, 10, np.float32)
    corner = np.argwhere(np.ones(shape, bool)) @ affine[:3, :3].T
    corner = corner - corner.mean(axis=0)
    original[(corner > 0).all(axis=1).reshape(shape)] = 60
    for role in ("image", "corrected"):
        nib.save(nib.Nifti1Image(original, affine), tmp_path / f"{role}.nii")
        files[role] = tmp_path / f"{role}.nii"
    mesh = Mesh.of_grid(shape, (1, 1, 1))
    files["field"].write_text(json.dumps(BiasField(np.zeros((4, 4, 4)), mesh, shape, affine).to_mapping()))
    make_subject(name="sub-01_T1w", **files, viewer=tmp_path / "v.js", viewer_mb=1)
    page = visit(files["page"]).page
    open_viewer(page)
    high = [2, 3, 4] if turned else [12, 15, 9]  # inside the corner
    bright = page.evaluate(
        """(at) => {
          view.at = at;
          drawPlanes();
          return scan.planes.map(({ canvas, labels }) => {
            const pen = canvas.getContext("2d");
            const lit = ([x, y]) => pen.getImageData(x * canvas.width, y * canvas.height, 1, 1).data[0] > 128;
            return [labels.join(""), [[0.1, 0.1], [0.9, 0.1], [0.1, 0.9], [0.9, 0.9]].map(lit)];
          });
        }""",
        high,
    )
    upper_right = [False, True, False, False]
    assert bright == [["LRPA", upper_right], ["LRIS", upper_right], ["PAIS", upper_right]]
    sizes = page.evaluate("scan.planes.map(({ canvas }) => canvas.clientWidth / canvas.clientHeight)")
    assert sizes == pytest.approx([32 / 40, 32 / 36, 40 / 36], rel=0.02)


def test_the_viewer_opens_with_keys_and_has_crosshair_window_overlay_and_swap(qc, visit):
    page = visit(qc / f"{SCANS[2]}.html").page
    open_viewer(page)

    def state(key):
        return page.evaluate(f"view.{key}")

    page.keyboard.press("ArrowUp")  # without a click
    assert state("at") == [12, 14, 11]
    page.keyboard.press("ArrowDown")
    canvas = page.locator("#viewer canvas").first  # axial: i across, j up
    box = canvas.bounding_box()
    canvas.click(position={"x": box["width"] * 0.27, "y": box["height"] * 0.27})
    assert state("at") == [6, 20, 10]
    world = nib.load(qc.parent / "scan2" / "image.nii.gz").affine @ [6, 20, 10, 1]
    told = page.locator("#viewer output").inner_text()
    assert told.startswith("i 6, j 20, k 10 · x {:.1f}, y {:.1f}, z {:.1f} mm · original ≈ ".format(*world))
    steps = (("Shift+ArrowRight", [7, 20, 10]), ("Shift+ArrowUp", [7, 21, 10]), ("ArrowRight", [7, 21, 11]),
             ("PageDown", [7, 21, 1]), ("PageUp", [7, 21, 11]))  # fmt: skip
    for key, at in steps:
        page.keyboard.press(key)
        assert state("at") == at
    canvas.hover()
    page.mouse.wheel(0, 100)
    assert state("at") == [7, 21, 10]
    low, high = state("low"), state("high")
    page.mouse.move(box["x"] + 100, box["y"] + 100)
    page.mouse.down(button="right")
    page.mouse.move(box["x"] + 60, box["y"] + 60)
    page.mouse.up(button="right")
    assert (state("low"), state("high")) == (0, pytest.approx(high - 40))
    page.keyboard.press("r")
    assert (state("low"), state("high")) == (low, pytest.approx(high))
    place = f"{0.3 * box['width']}, {0.5 * box['height']}"
    pixel = f"Array.from(scan.planes[0].canvas.getContext('2d').getImageData({place}, 1, 1).data)"
    red, green, blue, _ = page.evaluate(pixel)
    assert red == green == blue
    page.keyboard.press("b")
    red, _, blue, _ = page.evaluate(pixel)
    assert blue > red + 10  # the field is below 1 on the left
    page.wait_for_timeout(300)
    page.keyboard.press(" ")
    page.wait_for_function("view.image === 'original'")
    assert page.locator("#show-corrected").is_checked()  # behind the viewer nothing is swapped
    page.keyboard.press("Escape")
    page.locator("#viewer").wait_for(state="hidden")


def test_the_viewer_shows_full_resolution_and_makes_the_original_of_the_corrected_image(qc, visit):
    page = visit(qc / f"{SCANS[2]}.html").page
    open_viewer(page)
    folder = qc.parent / "scan2"
    corrected, original = (np.asarray(nib.load(folder / f"{n}.nii.gz").dataobj) for n in ("corrected", "image"))
    assert page.evaluate("scan.shape") == list(corrected.shape)
    top = page.evaluate("scan.top")
    volume = np.array(page.evaluate("Array.from(scan.volume)")).reshape(corrected.shape, order="F") / 255 * top
    assert np.sqrt(np.mean((volume - corrected.clip(0, top)) ** 2)) < 0.02 * top
    for at in ([12, 14, 10], [4, 14, 10], [20, 14, 10]):
        page.evaluate("(at) => { view.at = at; drawPlanes(); }", at)
        told = page.locator("#viewer output").inner_text()
        for name, image in (("original", original), ("corrected", corrected)):
            assert float(re.search(rf"{name} ≈ ([\d.]+)", told)[1]) == pytest.approx(image[tuple(at)], abs=0.06 * top)


def test_the_viewer_zooms_at_the_pointer_and_moves(qc, visit):
    page = visit(qc / f"{SCANS[0]}.html").page
    open_viewer(page)
    canvas = page.locator("#viewer canvas").first
    box = canvas.bounding_box()
    spot = {"offsetX": 0.3 * box["width"], "offsetY": 0.4 * box["height"]}
    under = "(spot) => voxelAt(scan.planes[0], spot)"
    before = page.evaluate(under, spot)
    page.mouse.move(box["x"] + spot["offsetX"], box["y"] + spot["offsetY"])
    page.keyboard.down("Control")
    page.mouse.wheel(0, -300)
    page.keyboard.up("Control")
    page.wait_for_function("view.zoom > 1.5")
    assert page.evaluate(under, spot) == pytest.approx(before, abs=0.05)
    page.mouse.down(button="middle")
    page.mouse.move(box["x"] + spot["offsetX"] + 40, box["y"] + spot["offsetY"] + 20)
    page.mouse.up(button="middle")
    moved = {"offsetX": spot["offsetX"] + 40, "offsetY": spot["offsetY"] + 20}
    assert page.evaluate(under, moved) == pytest.approx(before, abs=0.05)
    # a click there sets the crosshair on what is seen there
    canvas.click(position={"x": moved["offsetX"], "y": moved["offsetY"]})
    assert page.evaluate("view.at.slice(0, 2)") == [round(n) for n in before]
    page.keyboard.press("0")
    assert page.evaluate("view.zoom") == 1


def test_the_planes_lie_side_by_side_in_two_rows_or_alone(qc, visit):
    page = visit(qc / f"{SCANS[0]}.html", viewport={"width": 1600, "height": 800}).page
    open_viewer(page)

    def boxes():
        return [c.bounding_box() for c in page.locator("#viewer canvas").all() if c.is_visible()]

    axial, coronal, sagittal = boxes()
    assert axial["y"] == coronal["y"] == sagittal["y"]
    page.keyboard.press("l")
    axial, coronal, sagittal = boxes()
    assert axial["x"] == coronal["x"]
    assert coronal["y"] == sagittal["y"] < axial["y"]
    assert axial["width"] == pytest.approx(coronal["width"], abs=1)  # one scale: i runs across both
    for box in boxes():
        assert box["x"] >= 0
        assert box["y"] + box["height"] <= 800
    page.locator("#viewer canvas").nth(1).dispatch_event("dblclick")
    (alone,) = boxes()
    assert alone["height"] > coronal["height"]
    page.locator("#viewer canvas").nth(1).dispatch_event("dblclick")
    assert len(boxes()) == 3
    page.set_viewport_size({"width": 700, "height": 1100})  # higher than wide: two rows are larger
    axial, coronal, sagittal = boxes()
    assert axial["x"] == coronal["x"]


def test_the_viewer_stays_as_it_was_left_from_scan_to_scan(qc, visit):
    page = visit(qc / "index.html").page
    page.keyboard.press("Enter")
    shown_page(page).locator("h1").wait_for()
    page.keyboard.press("v")
    shown_page(page).locator("#viewer canvas").first.wait_for()
    frame = page.locator("#frames iframe:not(.away)")

    def state():
        return (
            frame.element_handle().content_frame().evaluate("view && [view.at, view.zoom, view.overlay, viewer.open]")
        )

    page.keyboard.press("ArrowUp")
    page.keyboard.press("+")
    page.keyboard.press("b")
    left = state()
    assert left[1:] == [1.5, True, True]
    page.keyboard.press("j")
    page.locator("#position", has_text="2 of 4").wait_for()
    shown_page(page).locator("#viewer canvas").first.wait_for()
    assert state() == left
    page.keyboard.press("ArrowUp")
    page.keyboard.press("k")
    page.locator("#position", has_text="1 of 4").wait_for()
    page.wait_for_timeout(300)
    assert state()[0][2] == left[0][2] + 1
    page.keyboard.press("Escape")  # closed, it stays closed
    page.keyboard.press("j")
    page.locator("#position", has_text="2 of 4").wait_for()
    page.wait_for_timeout(300)
    assert state()[3] is False


def test_who_uses_the_viewer_finds_the_data_of_neighbours_loaded(qc, visit):
    page = visit(qc / "index.html").page
    names = order_of(page)
    page.keyboard.press("Enter")

    def wait_for(known, *scans):
        page.wait_for_function(f"(scans) => scans.every((scan) => review.{known}.has(scan))", arg=scans)

    def asked():
        """Pages that have asked for their data."""
        frames = [iframe.content_frame() for iframe in page.query_selector_all("#frames iframe")]
        return sum(frame.evaluate("viewer.querySelector('script') !== null || scan !== null") for frame in frames)

    wait_for("ready", *names[:2])
    page.keyboard.press("j")
    wait_for("ready", *names[:3])
    page.wait_for_timeout(300)
    assert asked() == 0  # who never opens the viewer loads nothing
    page.keyboard.press("v")
    shown_page(page).locator("#viewer canvas").first.wait_for()
    wait_for("loaded", *names[:3])
    assert asked() == 3
    page.keyboard.press("v")
    page.keyboard.press("j")
    page.locator("#position", has_text="3 of 4").wait_for()
    page.keyboard.press("v")
    shown_page(page).locator("#viewer canvas").first.wait_for()
    wait_for("loaded", *names[1:])
    assert not page.evaluate("(scan) => review.loaded.has(scan)", names[0])  # gone with its frame
    assert page.locator("#frames iframe").count() == 3


def test_what_cannot_be_loaded_ahead_keeps_nothing_waiting(qc, visit, tmp_path):
    shutil.copytree(qc, tmp_path / "qc")
    page = visit(tmp_path / "qc" / "index.html").page
    first, second, third, _ = order_of(page)
    source = unquote(page.evaluate("(name) => rows[rowOf.get(name)][1]", second))
    (tmp_path / "qc" / "data" / source.replace(".html", ".js")).unlink()
    page.keyboard.press("Enter")
    shown_page(page).locator("h1", has_text=first).wait_for()
    page.wait_for_function("review.ready.has(scanShown())")
    page.keyboard.press("v")
    page.wait_for_function("(scan) => review.loaded.has(scan)", arg=second)
    page.keyboard.press("j")
    page.keyboard.press("j")
    page.wait_for_function("(scan) => review.loaded.has(scan)", arg=third)
    page.keyboard.press("k")
    shown_page(page).locator("#viewer", has_text="are not beside this page").wait_for()


def test_the_viewer_tells_what_a_coarse_voxel_is_of_and_what_is_cut_off(visit, tmp_path):
    files = make_files(tmp_path, shape=(40, 40, 40))
    values = np.asarray(nib.load(files["corrected"]).dataobj)
    values[20:24, 20:24, 20:24] = 1e4
    nib.save(nib.Nifti1Image(values, np.diag([4.0, 4, 4, 1])), files["corrected"])
    make_subject(name="sub-01_T1w", **files, viewer=tmp_path / "v.js", viewer_mb=0.02)
    page = visit(files["page"]).page
    open_viewer(page)
    shape, steps, most = page.evaluate("[scan.shape, scan.steps, Number(scan.top.toPrecision(3))]")
    assert max(steps) >= 2

    def told(at):
        page.evaluate("(at) => { view.at = at; drawPlanes(); }", at)
        return page.locator("#viewer output").inner_text().split(" · ")

    last = [n - 1 for n in shape]
    place = [(n * step + 39) // 2 for n, step in zip(last, steps, strict=True)]  # of the last voxels of the file
    assert told(last)[0] == "i {}, j {}, k {}".format(*place)
    assert told([22 // step for step in steps])[3] == f"corrected ≥ {most:g}"


def test_without_orientation_there_are_no_directions_but_a_scale_bar(visit, tmp_path):
    files, _ = make_microscopy_files(tmp_path)
    make_subject(name="sub-01_sample-a_SPIM", **files, viewer=tmp_path / "v.js", viewer_mb=1)
    page = visit(files["page"]).page
    drawn = page.locator(".over").first.text_content()
    assert "µm" in drawn
    assert not re.search("[LRPAS]", drawn)
    open_viewer(page)
    assert page.evaluate("scan.planes.map(({ labels }) => labels.join(''))") == ["", "", ""]
    assert "µm" in page.locator("#viewer output").inner_text()
    assert not re.search(" [LRPAS] is", page.locator("#viewer canvas").first.get_attribute("aria-label"))


@pytest.fixture(scope="session")
def head_of_1_mm(tmp_path_factory, head):
    """A head with noise, as large as a scan of 1 mm: the phantom of 2 mm, each voxel twice along each axis."""
    folder = tmp_path_factory.mktemp("large")
    files = make_files(folder)
    rng = np.random.default_rng(0)
    image = np.repeat(np.repeat(np.repeat(head.image, 2, 0), 2, 1), 2, 2)
    image = (image + rng.normal(0, 10, image.shape)).clip(0).astype(np.float32)
    shape, affine = image.shape, np.diag([1.0, 1, 1, 1])
    mesh = Mesh.of_grid(shape, (4, 4, 4))
    field = BiasField(rng.normal(0, 0.1, mesh.lattice_shape), mesh, shape, affine)
    files["field"].write_text(json.dumps(field.to_mapping()))
    for role, values in (("image", image), ("corrected", image), ("mask", (image > 200).astype(np.uint8))):
        files[role] = folder / f"{role}.nii"
        nib.save(nib.Nifti1Image(values, affine), files[role])
    files |= {"reference_field": None, "reference_sidecar": None, "viewer": folder / "v.js", "viewer_mb": 4}
    make_subject(name="sub-01_T1w", **files)
    return files


KEYS_TAKE = """() => {
  const best = {};
  const states = { plain: {}, original: { image: "original" }, field: { overlay: true, mask: true } };
  for (const [name, state] of Object.entries(states)) {
    Object.assign(view, state);
    for (let n = 0; n < 30; n += 1) {
      const start = performance.now();
      move(n % 3, 1);
      best[name] = Math.min(best[name] ?? Infinity, performance.now() - start);
    }
  }
  return best;
}"""


def test_a_scan_of_1_mm_fits_the_viewer_whole_and_a_key_takes_no_time(head_of_1_mm, visit):
    assert head_of_1_mm["viewer"].stat().st_size <= 2_500_000
    page = visit(head_of_1_mm["page"]).page
    open_viewer(page)
    assert page.evaluate("scan.steps") == [1, 1, 1]
    took = page.evaluate(KEYS_TAKE)  # the best of thirty: the machine may be busy with something else
    print(took)
    assert max(took.values()) <= 30


def test_without_its_data_the_viewer_says_so(qc, visit, tmp_path):
    shutil.copy(qc / f"{SCANS[0]}.html", tmp_path)
    page = visit(tmp_path / f"{SCANS[0]}.html").page
    page.keyboard.press("v")
    page.locator("#viewer", has_text="are not beside this page").wait_for()


# ---------------------------------------------------------------- how it looks and how fast it is


CONTRASTS = """() => {
  const parse = (text) => (text.match(/[\\d.]+/g) || []).map(Number);
  const linear = (c) => (c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4);
  const luminance = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const found = [];
  for (const element of document.querySelectorAll("body *")) {
    if (!element.checkVisibility({ visibilityProperty: true }) || element.closest(":disabled, .over")) continue;
    if (![...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim())) continue;
    let behind = element;
    let back = parse(getComputedStyle(behind).backgroundColor);
    while (back.length === 4 && back[3] === 0) {
      behind = behind.parentElement;
      back = behind ? parse(getComputedStyle(behind).backgroundColor) : [255, 255, 255];
    }
    const [a, b] = [luminance(parse(getComputedStyle(element).color)), luminance(back)].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) found.push([element.tagName, element.className, element.textContent.slice(0, 30), ratio]);
  }
  return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_the_contrast_of_aa(qc, visit, scheme):
    made = visit(color_scheme=scheme)
    for name in ("index.html", f"{SCANS[0]}.html"):
        made.page.goto((qc / name).as_uri())
        if name == "index.html":
            made.page.keyboard.press("2")
        else:
            made.page.locator("summary").click()
        assert made.page.evaluate(CONTRASTS) == []


def test_everything_has_a_name_and_nothing_moves(qc, visit):
    page = visit(qc / "index.html", reduced_motion="reduce").page
    for target in (qc / "index.html", qc / f"{SCANS[0]}.html"):
        page.goto(target.as_uri())
        nameless = page.evaluate(
            """[...document.querySelectorAll("button, a, input, select, canvas, iframe, img:not(dialog img)")]
            .filter((e) => e.checkVisibility())
            .filter((e) => !(e.getAttribute("aria-label") || e.textContent.trim() || e.title || e.alt))
            .filter((e) => !e.labels?.length)
            .map((e) => e.outerHTML.slice(0, 80))"""
        )
        assert nameless == []
        assert page.evaluate("document.getAnimations().length") == 0


def test_the_keyboard_alone_goes_everywhere(qc, visit):
    page = visit(qc / "index.html").page
    reached = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
    assert {"start", "rater", "export", "import", "filter", "only", "CANVAS", "A", "BUTTON"} <= reached
    plot = page.locator("canvas").first
    plot.focus()
    page.keyboard.press("ArrowRight")
    name = page.locator("figcaption").first.inner_text()
    page.keyboard.press("Enter")
    shown_page(page).locator("h1").wait_for()
    assert page.inner_text("#scan") in name


def test_a_panel_is_enlarged_by_the_keyboard(qc, visit):
    page = visit(qc / f"{SCANS[0]}.html").page
    panel = page.locator("figure img.on-dataset[alt^='Bias field:']")
    for _ in range(40):
        page.keyboard.press("Tab")
        if panel.evaluate("(it) => it === document.activeElement"):
            break
    page.keyboard.press("Enter")
    assert page.get_attribute("#zoom img.on-dataset", "alt") == panel.get_attribute("alt")
    assert page.locator("#zoom svg").is_visible()
    page.keyboard.press("w")  # its keys are those of the page
    assert page.locator("#zoom img.on-own").is_visible()
    assert page.locator("#zoom img.on-dataset").is_hidden()
    page.wait_for_timeout(200)
    page.keyboard.press("w")
    assert page.locator("#zoom").is_visible()
    page.keyboard.press("Escape")
    page.locator("#zoom").wait_for(state="hidden")
    assert panel.evaluate("(it) => it === document.activeElement")


def test_a_metric_of_one_value_gets_no_plot_and_pictures_say_what_their_scan_has(visit, tmp_path):
    scans = [{"name": f"sub-{n}_T1w", "cjv_before": 0.7, "cjv_after": 0.5 + n / 10} for n in range(2)]
    scans.append({"name": "sub-2_SPIM", "foreground_cv_before": 0.3, "foreground_cv_after": 0.2})
    make_index(write_metrics(tmp_path, scans), tmp_path / "index.html", tmp_path / "metrics.tsv")
    page = visit(tmp_path / "index.html").page
    assert page.locator("#plots figcaption b").all_inner_texts() == ["CJV after"]
    page.get_by_label("pictures").check(force=True)
    said = dict(
        zip(
            page.locator("#pictures a[href]:not(.crop)").all_inner_texts(),
            page.locator("#pictures .hint").all_inner_texts(),
            strict=True,
        )
    )
    assert said["sub-1_T1w"] == "CJV before 0.700, CJV after 0.600"
    assert said["sub-2_SPIM"] == "foreground CV before 0.300, foreground CV after 0.200"


THOUSANDS = 5000


@pytest.fixture(scope="session")
def thousands(qc, tmp_path_factory):
    folder = tmp_path_factory.mktemp("thousands")
    rng = np.random.default_rng(0)
    shutil.copy(qc / f"{SCANS[0]}.html", folder / "0.html")
    (folder / "data").mkdir()
    shutil.copy(qc / "data" / f"{SCANS[0]}.webp", folder / "data" / "0.webp")
    values = json.loads((qc / "data" / f"{SCANS[0]}.json").read_text())
    numbers = [key for key, value in values.items() if isinstance(value, float)]
    scans = [
        values
        | {key: values[key] * float(rng.lognormal(0, 0.1)) for key in numbers}
        | {"name": f"sub-{n:04d}_T1w", "page": "../0.html", "pictures": "0.webp"}
        | {"flags": ["cjv_worse: CJV rose from 0.4 to 0.5"] if n % 20 == 0 else []}
        for n in range(THOUSANDS)
    ]
    make_index(write_metrics(folder, scans), folder / "index.html", folder / "metrics.tsv")
    return folder


FIRST_PAINT = "performance.getEntriesByName('first-contentful-paint')[0]?.startTime"
ACTIONS = {
    "sort by number": "document.querySelectorAll('#scans thead button')[4].click()",
    "sort by name": "document.querySelector('#scans thead button').click()",
    "filter": "const f = $('filter'); f.value = f.value ? '' : '12'; f.dispatchEvent(new Event('input'))",
    "show": "const o = $('only'); o.value = 'unrated'; o.dispatchEvent(new Event('change'))",
    "rate": "rate(rows[state.kept[0]][0], { rating: 'pass' })",
    "pictures and table": "document.querySelector('[name=view]:not(:checked)').click()",
}


def test_thousands_of_scans_stay_fluid(thousands, visit):
    page = visit(thousands / "index.html").page
    assert page.locator("#scans tbody tr").count() == 200
    assert page.inner_text("#where") == f"page 1 of {THOUSANDS // 200}"
    seconds = {}
    # the best of three: the machine may be busy with something else
    for _ in range(3):
        page.reload()
        page.wait_for_function(FIRST_PAINT)
        took = {"first paint": page.evaluate(FIRST_PAINT) / 1000}
        for what, code in ACTIONS.items():
            layout = "document.body.offsetHeight"
            timed = f"() => {{ const t = performance.now(); {code}; {layout}; return performance.now() - t; }}"
            took[what] = page.evaluate(timed) / 1000
        seconds = {what: min(value, seconds.get(what, value)) for what, value in took.items()}
    print({what: round(value, 3) for what, value in seconds.items()})
    assert seconds.pop("first paint") <= 1
    assert {what: value for what, value in seconds.items() if value > 0.35} == {}


def test_pages_of_fifty_pictures(thousands, visit):
    page = visit(thousands / "index.html").page
    page.get_by_label("pictures").check(force=True)
    assert page.locator("#pictures figure").count() == 50
    page.click("#next")
    assert page.inner_text("#where") == f"page 2 of {THOUSANDS // 50}"
    assert page.locator("[aria-current]").count() == 1
    box = page.locator("#pictures .crop").first.bounding_box()
    assert box["width"] / box["height"] == pytest.approx(3, rel=0.02)


def test_the_index_over_thousands_is_made_from_the_metrics_in_time(thousands):
    metrics = sorted((thousands / "data").glob("*.json"))
    start = time.process_time()
    make_index(metrics, thousands / "again.html", thousands / "again.tsv")
    assert time.process_time() - start < 20
    assert (thousands / "again.html").stat().st_size < 2_500_000
