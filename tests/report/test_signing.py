"""Ratings are safe: no key does what was not meant, nothing is lost in silence, nobody is led by others."""

from urllib.parse import quote

import pytest

from n4flow.study.ratings import agreement, read_ratings
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

#: Every word of it is a command where it is no text.
COMMENT = "just 3 slices dark, back u?"


def open_scan(page, scan):
    page.goto(f"{page.url.partition('#')[0]}#{quote(scan, safe='')}")
    shown_page(page).locator("h1", has_text=scan).wait_for()
    page.wait_for_function("review.ready.has(scanShown())")


def ratings_on(page):
    found = page.evaluate("[...ratings.entries.values()]")
    return {entry["scan"]: [entry["rating"], entry["comment"]] for entry in found}


def from_table(page, scan):
    while page.evaluate("rows[state.kept[state.selected]][0]") != scan:
        page.keyboard.press("j")


def from_page(page, scan):
    open_scan(page, scan)


def from_bar(page, scan):
    open_scan(page, scan)
    page.locator("#position").click()


def from_viewer(page, scan):
    open_scan(page, scan)
    page.keyboard.press("v")
    shown_page(page).locator("#viewer canvas").first.wait_for()


@pytest.mark.parametrize("start", [from_table, from_page, from_bar, from_viewer])
def test_what_is_typed_after_c_is_a_comment(qc, visit, start):
    """At any speed (ms a key), rated or not; then the keys are commands again."""
    page = visit(qc / "index.html").page
    expected = {}
    for scan, delay, text in zip(SCANS, (0, 20, 100), (COMMENT, COMMENT, COMMENT[:8]), strict=True):
        start(page, scan)
        page.keyboard.type(f"c{text}", delay=delay)
        page.keyboard.press("Enter")
        page.wait_for_function("(scan) => ratings.note(scan).comment", arg=scan)
        expected[scan] = ["", text]
        assert ratings_on(page) == expected
        assert page.inner_text("#scan") == scan
        page.keyboard.press("2")
        page.locator("#said", has_text="▲ warn").wait_for()
        page.keyboard.type("c2", delay=delay)
        page.keyboard.press("Escape")
        page.wait_for_function("(scan) => ratings.note(scan).comment.endsWith('2')", arg=scan)
        expected[scan] = ["warn", f"{text}2"]
        assert ratings_on(page) == expected
        assert page.inner_text("#scan") == scan
        page.keyboard.press("Escape")
        page.keyboard.press("Escape")  # out of the viewer, and out of the review
        page.locator("#review").wait_for(state="hidden")


def test_a_comment_goes_on_where_it_ended(qc, visit):
    """However fast the key comes again."""
    page = visit(qc / "index.html").page
    open_scan(page, SCANS[0])
    for keys in ("ca\n", "cb\n", "cc\n"):
        page.keyboard.type(keys, delay=0)
    page.wait_for_function("(scan) => ratings.note(scan).comment === 'abc'", arg=SCANS[0])


def press(*keys):
    """JavaScript that presses keys before the browser does anything else, as it may on a busy machine."""
    event = "new KeyboardEvent('keydown', {{ key: {!r}, bubbles: true, cancelable: true }})"
    return "".join(f"document.activeElement.dispatchEvent({event.format(key)});" for key in keys)


def write(letter):
    return f"noteInput.value += '{letter}'; noteInput.dispatchEvent(new Event('input'));"


@pytest.mark.parametrize("key", ["Enter", "Escape"])
def test_a_comment_is_kept_before_the_browser_says_that_its_box_has_closed(qc, visit, key):
    page = visit(qc / "index.html").page
    open_scan(page, SCANS[0])
    again = "".join(press("c") + write(letter) + press(key) for letter in "abc")
    shown_page(page).locator("body").evaluate(f"() => {{ {again} }}")
    page.wait_for_function("(scan) => ratings.note(scan).comment === 'abc'", arg=SCANS[0])
    assert page.input_value("#comment") == "abc"


def test_a_comment_that_the_page_does_not_know_yet_is_not_lost(qc, visit):
    """It was written in the bar, and the other way round."""
    page = visit(qc / "index.html").page
    open_scan(page, SCANS[0])
    page.fill("#comment", "ring ")
    page.keyboard.press("Enter")
    shown_page(page).locator("body").evaluate(f"() => {{ comment = ''; {press('c') + write('b') + press('Enter')} }}")
    page.wait_for_function("(scan) => ratings.note(scan).comment === 'ringb'", arg=SCANS[0])
    page.locator("#comment").focus()
    body = shown_page(page).locator("body")
    body.evaluate("() => tellReview({ comment: 'ringb c', before: 'ringb', done: true })")
    page.wait_for_function("(scan) => ratings.note(scan).comment === 'ringb c'", arg=SCANS[0])
    page.keyboard.press("End")
    page.keyboard.type(", d")
    page.keyboard.press("Enter")
    page.wait_for_function("(scan) => ratings.note(scan).comment === 'ringb c, d'", arg=SCANS[0])


def test_a_comment_is_kept_while_another_window_is_in_front_and_can_be_changed_then(qc, visit):
    page = visit(qc / "index.html").page
    open_scan(page, SCANS[0])
    page.fill("#comment", "foo")
    for keys, kept in ((["Backspace"], "fo"), (["x", "y"], "foxy"), (["Backspace"] * 4, "")):
        page.evaluate("$('comment').dispatchEvent(new FocusEvent('blur')); $('comment').focus()")
        page.keyboard.press("End")
        for key in keys:
            page.keyboard.press(key)
        page.evaluate("$('comment').dispatchEvent(new FocusEvent('blur'))")
        assert page.evaluate("(scan) => ratings.note(scan).comment", SCANS[0]) == kept


def test_a_comment_on_a_page_of_its_own_is_text_too(qc, visit):
    page = visit(qc / f"{SCANS[0]}.html").page
    page.keyboard.type(f"c{COMMENT}/&#")
    page.keyboard.press("Enter")
    page.wait_for_url("**/index.html#*")
    page.wait_for_function("ratings.entries.size")
    assert ratings_on(page) == {SCANS[0]: ["", f"{COMMENT}/&#"]}


def test_a_key_after_the_one_that_goes_on_never_rates_the_scan_before(qc, visit):
    page = visit(qc / "index.html").page
    first, second = order_of(page)[:2]
    for start in (from_page, from_bar):
        start(page, first)
        page.keyboard.type("j3", delay=0)
        page.locator("#position", has_text="2 of 4").wait_for()
        assert first not in ratings_on(page)
    page.keyboard.press("Escape")
    page.keyboard.press("1")
    page.locator("#review").wait_for(state="hidden")
    assert ratings_on(page)[second] == ["pass", ""] or second not in ratings_on(page)


def test_where_the_browser_goes_is_not_taken_back(qc, visit):
    """The address follows what is on show, a moment later: by then the browser may be about to say that it went on."""
    page = visit(qc / "index.html").page
    page.evaluate(
        """(scan) => {
          draw();
          for (const end = performance.now() + 400; performance.now() < end;); // a busy machine
          location.hash = scan;
        }""",
        SCANS[0],
    )
    page.locator("#scan", has_text=SCANS[0]).wait_for()
    page.wait_for_timeout(400)
    assert page.url.endswith(f"#{SCANS[0]}")


def test_a_viewer_opens_and_closes_only_by_its_key(qc, visit):
    """However fast the keys are: two that leave it and the review, and one as soon as the page is there."""
    page = visit(qc / "index.html").page
    from_viewer(page, SCANS[0])
    # the second key is heard before the page says what the first one did
    shown_page(page).locator("body").evaluate("() => { tellReview('Escape'); viewer.close(); }")
    page.locator("#review").wait_for(state="hidden")
    open_scan(page, SCANS[1])
    page.wait_for_timeout(300)
    assert shown_page(page).locator("#viewer").is_hidden()
    shown_page(page).locator("body").evaluate("() => { act('v'); tellReview('ready'); }")
    page.wait_for_timeout(300)
    assert shown_page(page).locator("#viewer").is_visible()


def test_a_comment_stays_when_the_mouse_goes_on(qc, visit):
    page = visit(qc / "index.html").page
    first = order_of(page)[0]
    open_scan(page, first)
    page.keyboard.type("cring at the neck")
    page.locator("#comment").evaluate("(it) => new Promise((done) => setTimeout(done, 100))")
    assert page.input_value("#comment") == "ring at the neck"  # the bar shows what is being written
    page.click("#following")
    page.locator("#position", has_text="2 of 4").wait_for()
    assert ratings_on(page) == {first: ["", "ring at the neck"]}
    page.keyboard.press("k")
    page.keyboard.press("k")
    page.locator("#position", has_text="1 of 4").wait_for()
    assert page.input_value("#comment") == "ring at the neck"


def test_changes_are_undone_one_by_one(qc, visit):
    page = visit(qc / "index.html").page
    first, second = order_of(page)[:2]
    for key in "1j3j2":
        page.keyboard.press(key)
    page.keyboard.press("u")
    assert "not rated" in page.inner_text("#told")
    page.keyboard.press("Enter")
    open_scan(page, first)
    page.keyboard.press("3")
    page.locator("#said", has_text="✕ fail").wait_for()
    page.keyboard.press("6")
    page.wait_for_function("(scan) => ratings.mine(scan).reasons === 'anatomy in the field'", arg=first)
    page.keyboard.type("cneck\n")
    page.wait_for_function("(scan) => ratings.mine(scan).comment === 'neck'", arg=first)
    for what in ("comment", "reasons"):
        page.keyboard.press("u")
        page.wait_for_function("([scan, what]) => ratings.mine(scan)[what] === ''", arg=[first, what])
    page.keyboard.press("u")
    page.locator("#said", has_text="● pass").wait_for()
    page.keyboard.press("u")  # of another scan: it is shown
    page.locator("#scan", has_text=second).wait_for()
    page.locator("#said", has_text="not rated").wait_for()
    page.wait_for_function("review.ready.has(scanShown())")
    page.keyboard.press("u")
    page.locator("#scan", has_text=first).wait_for()
    page.locator("#said", has_text="not rated").wait_for()
    page.locator("#undo").click()
    page.locator("#heard", has_text="nothing to undo").wait_for()
    page.reload()
    assert page.evaluate("[...ratings.entries.values()].filter((e) => e.rating).length") == 0


def test_reasons_have_keys_and_a_pass_has_none(qc, visit):
    page = visit(qc / "index.html").page
    open_scan(page, SCANS[0])
    for rating in "", "1":
        page.keyboard.press(rating) if rating else None
        page.keyboard.press("4")
        page.locator("#heard", has_text="a reason goes with warn or fail").wait_for()
    page.keyboard.press("2")
    page.locator("#said", has_text="▲ warn").wait_for()
    for key in "4874":
        page.keyboard.press(key)
    page.wait_for_function("(scan) => ratings.mine(scan).reasons === 'mask wrong; image itself'", arg=SCANS[0])
    assert page.get_by_label("mask wrong").is_checked()


def test_a_pass_goes_on_by_choice_and_only_once(qc, visit):
    page = visit(qc / "index.html").page
    first = order_of(page)[0]
    from_bar(page, first)
    page.get_by_label("pass goes on").check()
    page.locator("#position").click()
    page.keyboard.press("3")  # reasons may follow
    assert page.inner_text("#scan") == first
    twice = "document.body.dispatchEvent(new KeyboardEvent('keydown', { key: '1', bubbles: true }));" * 2
    page.evaluate(twice)  # at once, however busy the machine is
    assert page.inner_text("#position") == "2 of 4"
    assert ratings_on(page) == {first: ["pass", ""]}
    page.reload()
    assert page.is_checked("#advance")


def test_all_keys_are_listed_and_do_nothing_meanwhile(qc, visit):
    page = visit(qc / "index.html").page
    for start in (from_table, from_page, from_bar):
        start(page, SCANS[0])
        page.keyboard.press("?")
        page.locator("#keys").wait_for()
        page.keyboard.type("123jkcu")
        page.keyboard.press("Escape")
        page.locator("#keys").wait_for(state="hidden")
        assert ratings_on(page) == {}


def test_the_rater_stands_in_the_bar(qc, visit):
    page = visit(qc / "index.html").page
    open_scan(page, SCANS[0])
    field = page.locator("#review .rater")
    field.click()
    page.keyboard.type("ann 123")
    page.keyboard.press("Enter")
    page.keyboard.press("1")
    page.locator("#said", has_text="● pass").wait_for()
    assert page.evaluate("ratings.mine(scanShown()).rater") == "ann 123"
    assert page.input_value("#rater") == "ann 123"


def test_others_are_hidden_until_one_has_rated(qc, visit, tmp_path):
    page = visit(qc / "index.html").page
    rows = [ONE | {"rater": rater, "rating": "fail", "comment": "ring"} for rater in ("bo", "cy")]
    page.set_input_files("#import", write_ratings(tmp_path / "r.tsv", *rows))
    page.locator("#told", has_text="2 taken over").wait_for()
    assert rating_of(page, SCANS[0]).split("\n") == ["○ not rated", "others hidden"]
    for what in ("fail", "disagree"):
        page.select_option("#only", what)
        assert order_of(page) == []
    page.select_option("#only", "all")
    assert page.locator("#agreement").is_hidden()
    open_scan(page, SCANS[0])
    assert "bo" not in page.inner_text("#said")
    page.keyboard.press("1")
    page.locator("#said", has_text="bo: ✕ fail").wait_for()
    page.keyboard.press("u")
    page.locator("#said", has_text="others hidden").wait_for()
    page.keyboard.press("Escape")
    show_others(page)
    assert rating_of(page, SCANS[0]).split("\n") == ["bo: ✕ fail", "cy: ✕ fail"]
    page.reload()
    assert page.is_checked("#open")


def test_what_is_in_no_file_is_counted_and_warned_of(qc, visit, export, tmp_path):
    made = visit(qc / "index.html")
    page = made.page
    give_name(page, "ann")
    page.reload()
    assert (page.locator(".unexported").first.inner_text(), made.warnings) == ("", 0)
    page.click("h1")
    for key in "1j3":
        page.keyboard.press(key)
    assert page.locator(".unexported").first.inner_text() == "▲ 2 not exported"
    page.reload()
    assert made.warnings == 1
    export(page, tmp_path / "r.tsv")
    page.reload()
    assert (page.locator(".unexported").first.inner_text(), made.warnings) == ("", 1)
    page.click("h1")
    page.keyboard.press("2")
    page.keyboard.press("u")
    page.locator(".unexported", has_text="1 not exported").first.wait_for()


SAVING = """() => {
  window.written = [];
  window.showSaveFilePicker = async () => ({
    createWritable: async () => {
      if (window.broken) throw new Error("disk full");
      let all = "";
      return { write: async (text) => { all += text; }, close: async () => { window.written.push(all); } };
    },
  });
}"""


def test_ratings_are_saved_into_a_file_where_the_browser_can(qc, visit, tmp_path):
    made = visit()
    page = made.page
    page.add_init_script(f"({SAVING})()")
    page.goto((qc / "index.html").as_uri())
    rate_here(page, SCANS[0], rating="pass")
    page.click("#autosave")
    assert "Give your name first" in page.inner_text("#told")
    give_name(page, "ann")
    page.click("#autosave")
    page.locator("#autosave", has_text="saving into a file").wait_for()
    page.evaluate(f"for (const r of ['fail', 'warn']) rate({SCANS[1]!r}, {{ rating: r }}); file.last")
    (tmp_path / "r.tsv").write_text(page.evaluate("written.at(-1)"), encoding="utf-8")
    assert [(r.scan, r.rater, r.rating) for r in read_ratings(tmp_path / "r.tsv")] == [
        (SCANS[0], "ann", "pass"),
        (SCANS[1], "ann", "warn"),
    ]
    page.reload()
    assert made.warnings == 0
    page.click("#autosave")
    page.evaluate(f"window.broken = true; rate({SCANS[2]!r}, {{ rating: 'pass' }}); file.last")
    page.locator("#told", has_text="Saving into the file failed (disk full): export instead").wait_for()
    assert page.locator(".unexported").first.inner_text() == "▲ 1 not exported"
    made.errors.clear()


def test_no_spreadsheet_takes_a_hash_for_a_number(visit, tmp_path):
    page = visit(index_of(tmp_path, *SCANS)).page
    give_name(page, "ann")
    rate_here(page, SCANS[0], rating="pass")
    (tmp_path / "r.tsv").write_text(page.evaluate("ratings.toTsv()"), encoding="utf-8")
    (row,) = table(tmp_path / "r.tsv")
    assert row["report_hash"] == f"sha256:{'0' * 12}"
    (rating,) = read_ratings(tmp_path / "r.tsv")
    assert rating.report_hash == "0" * 12
    page.set_input_files("#import", tmp_path / "r.tsv")
    page.locator("#told", has_text="1 were here").wait_for()
    assert page.evaluate("ratings.stale(ratings.mine(rows[0][0]))") is False


def test_a_comment_without_a_rating_is_said_where_one_exports(visit, tmp_path, export):
    page = visit(index_of(tmp_path, *SCANS)).page
    give_name(page, "ann")
    rate_here(page, SCANS[0], comment="look again")
    assert "1 with a comment and no rating" in page.inner_text("#rated")
    export(page, tmp_path / "r.tsv")
    assert "1 comments are not in it" in page.inner_text("#told")


def test_agreement_is_that_of_the_workflow(visit, tmp_path):
    scans = [f"sub-{n:02d}_T1w" for n in range(12)]
    page = visit(index_of(tmp_path, *scans)).page
    given = {"ann": "ppwfppwwffpp", "bo": "pwwfpppwfwpp", "cy": "pppppppppppp"}
    words = {"p": "pass", "w": "warn", "f": "fail"}
    rows = [
        ONE | {"participant_id": scan.partition("_")[0], "rater": rater, "rating": words[letter]}
        for rater, letters in given.items()
        for scan, letter in zip(scans, letters, strict=True)
    ]
    path = write_ratings(tmp_path / "r.tsv", *rows)
    page.set_input_files("#import", path)
    page.locator("#told", has_text="36 taken over").wait_for()
    show_others(page)
    found = page.evaluate("ratings.agreements().map((a) => [...a.raters, a.scans, a.alike, a.kappa, a.weighted])")
    for row, expected in zip(found, agreement(read_ratings(path)), strict=True):
        assert row[:4] == list(expected[:4])
        assert row[4:] == pytest.approx(expected[4:])
    assert "ann and bo: 9 of 12 alike, κ 0.60, weighted κ 0.70" in page.inner_text("#agreement")
