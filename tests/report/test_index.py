"""The table and its plots: what is in view, how it is narrowed down, and that a link shows the same again."""

import re

import pytest

from n4flow.qc.dataset import make_index
from tests.report.reviewing import order_of, shown_page
from tests.unit.test_qc import write_metrics

FLAGS = {
    3: ["field_steep: the field is steep for the size of the mask, steepness 3.2 (limit 3); look for anatomy"],
    7: ["cjv_worse: the CJV rose from 0.4 to 0.5 (limit 1.02-fold); look", "field_steep: steep; look"],
}
COUNT = 30


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    """Scans of two sessions and two contrasts, two of them flagged, one an outlier."""
    folder = tmp_path_factory.mktemp("index")
    scans = [
        {
            "name": f"sub-{n:02d}_ses-{'ab'[n % 2]}_{'T1w' if n % 3 else 'FLAIR'}",
            "cjv_before": 0.6 + (n * 7 % COUNT) / 100,
            "cjv_after": 0.5 + (n * 11 % COUNT) / 100,
            "inu_range": 0.2 + (n * 13 % COUNT) / 200 + (n == 20),
            "field_steepness": 1 + n / 10,
            "mask_volume_ml": 1500.0 + n,
            "self_check_max": 1e-7 * (n + 1),
            "flags": FLAGS.get(n, []),
        }
        for n in range(COUNT)
    ]
    make_index(write_metrics(folder, scans), folder / "index.html", folder / "metrics.tsv")
    return folder / "index.html"


def test_ten_rows_are_in_view_of_a_small_screen(index, visit):
    page = visit(index, viewport={"width": 1280, "height": 800}).page
    rows = page.locator("#scans tbody tr")
    assert page.evaluate("innerHeight") == 800
    assert rows.nth(9).bounding_box()["y"] + rows.nth(9).bounding_box()["height"] <= 800
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.locator("#table").evaluate("(it) => it.scrollWidth <= it.clientWidth")


@pytest.mark.parametrize(("height", "folded"), [(700, True), (800, True), (1100, False)])
def test_plots_are_folded_where_they_leave_no_room_for_ten_rows(index, visit, height, folded):
    page = visit(index, viewport={"width": 1280, "height": height}).page
    assert page.locator("#plots").is_hidden() == folded
    tenth = page.locator("#scans tbody tr").nth(9).bounding_box()
    assert tenth["y"] + tenth["height"] <= max(height, 800), "folded or not, ten rows are in view from 800 on"
    page.locator("#distributions > summary").click()
    page.locator("#plots canvas").first.wait_for(state="hidden" if not folded else "visible")


def test_the_name_stays_when_the_numbers_are_scrolled(index, visit):
    page = visit(index, viewport={"width": 390, "height": 844}).page
    cell = page.locator("#scans tbody th").first
    left = cell.bounding_box()["x"]
    page.locator("#table").evaluate("(it) => { it.scrollLeft = 300; }")
    assert page.locator("#table").evaluate("(it) => it.scrollLeft") == 300
    assert cell.bounding_box()["x"] == left


def test_flags_are_chips_with_counts_that_filter(index, visit):
    page = visit(index).page
    chips = page.locator("#flags button")
    assert chips.all_inner_texts() == ["▲ field steep 2", "▲ cjv worse 1", "▲ outlier 1"]
    chips.nth(0).click()
    assert {name[:6] for name in order_of(page)} == {"sub-03", "sub-07"}
    chips.nth(1).click()
    assert [name[:6] for name in order_of(page)] == ["sub-07"]
    why = page.locator("td.why")
    assert why.inner_text() == "▲ cjv worse▲ field steep"
    page.locator("td.why button").click()
    assert "the CJV rose from 0.4 to 0.5" in why.inner_text()
    page.locator("td.why button").click()
    assert why.inner_text() == "▲ cjv worse▲ field steep"
    page.click("#all")
    assert len(order_of(page)) == COUNT
    assert page.locator("#all").is_hidden()


def test_columns_are_chosen(index, visit):
    page = visit(index).page
    heads = page.locator("#scans thead th")
    assert "field steepness" not in heads.all_inner_texts()
    page.get_by_text("Columns", exact=True).click()
    page.get_by_role("checkbox", name="field steepness").check()
    page.get_by_role("checkbox", name="CJV before").uncheck()
    assert heads.all_inner_texts()[4:] == ["CJV after", "inu_range", "field steepness", "mask (ml)"]
    assert page.locator("#scans tbody tr").first.locator("td").count() == heads.count() - 1
    assert "field steepness" in page.locator("#plots figcaption b").all_inner_texts()


def test_an_address_shows_the_same_again(index, visit):
    page = visit(index).page
    first = order_of(page)
    page.select_option("#group", "session")
    page.get_by_role("button", name="inu_range").click()
    page.locator("#flags button").first.click()
    page.fill("#filter", "sub 0")
    page.get_by_text("Columns", exact=True).click()
    page.get_by_role("checkbox", name="CJV before").uncheck()
    page.wait_for_url(re.compile(r"#\?.*columns="))
    address, order = page.url, order_of(page)
    heads = page.locator("#scans thead th").all_inner_texts()
    other = visit().page
    other.goto(address)
    assert order_of(other) == order
    assert other.locator("#scans thead th").all_inner_texts() == heads
    assert other.locator("#flags [aria-pressed=true]").count() == 1
    other.keyboard.press("Enter")
    shown_page(other)
    assert other.evaluate("review.order.length") == len(order)
    other.reload()
    assert other.evaluate("review.order.length") == len(order)
    other.locator("#close").click()
    assert order_of(other) == order
    other.click("#worst")
    other.click("#all")
    assert order_of(other) == first
    other.wait_for_url(re.compile(r"#\?columns=[^&]*&group=session$"))


def test_nonsense_in_an_address_changes_nothing(index, visit):
    page = visit().page
    page.goto(f"{index.as_uri()}#?sort=-constructor&only=toString&flags=x&columns=y&group=z&view=w")
    assert len(order_of(page)) == COUNT
    assert page.locator("#scans thead th").all_inner_texts() == ["Scan", "Rating", "Flags", "Worst z"]


def test_groups_split_the_plots_and_the_table(index, visit):
    page = visit(index).page
    options = page.locator("#group option").all_inner_texts()
    assert options == ["none", "suffix", "session"]
    height = page.locator("#plots canvas").first.bounding_box()["height"]
    page.select_option("#group", "suffix")
    assert page.locator("#plots canvas").first.bounding_box()["height"] > height
    page.get_by_role("button", name="suffix").click()
    page.wait_for_function("document.querySelector('#scans tbody th').innerText.endsWith('FLAIR')")
    assert [name.rpartition("_")[2] for name in order_of(page)] == ["FLAIR"] * 10 + ["T1w"] * 20


def test_a_scan_that_is_pointed_at_is_lit_in_all_plots(index, visit):
    page = visit(index).page
    page.get_by_text("Two metrics").click()
    page.select_option("#up", "field_steepness")
    strip = page.locator("#plots canvas").first
    strip.focus()
    page.keyboard.press("ArrowRight")
    captions = page.locator("#distributions figcaption").all_inner_texts()
    (name,) = {re.search(r"sub-\d\d_ses-\w_\w+", caption)[0] for caption in captions}
    assert len(captions) == 5
    row = page.evaluate(f"rows[rowOf.get({name!r})]")
    steepness = page.evaluate("columnOf.get('field_steepness').place")
    assert captions[-1].endswith(f"{row[7]:.3f}, {row[steepness]:.2f}")
    page.keyboard.press("Enter")
    assert page.inner_text("#scan") == name


def test_methods_are_copied_as_the_file_has_them(index, visit):
    made = visit(index)
    page = made.page
    text = (index.parent / "methods.md").read_text(encoding="utf-8")
    page.click("#show-methods")
    assert page.input_value("#methods-text") == text
    page.click("#copy")
    page.locator("#copied", has_text="copied").wait_for()
    page.click("#filter")
    page.keyboard.press("ControlOrMeta+V")
    assert page.input_value("#filter") == " ".join(text.split("\n")) or "# Methods" in page.input_value("#filter")
    assert "a Snakemake workflow" in text
    page.click("#methods-text")
    page.keyboard.type("123j")  # no command there
    assert page.evaluate("ratings.entries.size") == 0


def test_axes_do_not_fill_themselves_with_noise(index, visit):
    page = visit(index).page
    ends = "(lines, values) => axisOf({ floor: 0.01, floorShare: 0, lines }, values)"

    def axis(values, lines=()):
        return page.evaluate(f"([lines, values]) => ({ends})(lines, values)", [list(lines), values])

    low, high = axis([0.5, 0.5001, 0.5002])
    assert high - low == pytest.approx(0.104)
    assert axis([1, 2, 3]) == [1, 3]
    assert axis([0.001, 0.002])[0] == 0  # nothing is below 0
    assert axis([1, 2, 3], [3.5, 100]) == [1, 3.5]  # a limit that is near is on show
    assert [label for _, label in page.evaluate("ticks(0, 1, 5)")] == ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]
    caption = page.locator("#plots figcaption").all_inner_texts()[2]
    assert caption.startswith("inu_range median")
    assert "limit 0.005" in caption


def test_hundreds_of_scans_are_a_histogram_with_the_flagged_as_dots(visit, tmp_path):
    scans = [
        {"name": f"sub-{n}_T1w", "cjv_after": 0.5 + n / 1000, "flags": ["x: y"] if n in (5, 50) else []}
        for n in range(301)
    ]
    make_index(write_metrics(tmp_path, scans), tmp_path / "index.html", tmp_path / "metrics.tsv")
    page = visit(tmp_path / "index.html").page
    strip = page.locator("#plots canvas").first
    strip.focus()
    seen = []
    for _ in range(3):
        page.keyboard.press("ArrowRight")
        seen.append(page.locator("#plots figcaption span").first.inner_text())
    assert seen == ["sub-5_T1w: 0.505", "sub-50_T1w: 0.550", "sub-50_T1w: 0.550"]
