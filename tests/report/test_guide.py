"""The page that explains the others: what it says of its broken corrections is so."""

import base64
import html
import io
import re

import pytest
from PIL import Image

from n4flow.qc.definitions import DEFINITIONS
from n4flow.qc.flags import FLAG_LIMITS, FLAGS
from n4flow.qc.guide import CASES, make_guide
from tests.conftest import TISSUES


@pytest.fixture(scope="module")
def guide_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("guide") / "guide.html"
    make_guide(TISSUES, path, field_window_log=0.4)
    return path


@pytest.fixture(scope="module")
def guide(guide_file):
    return guide_file.read_text(encoding="utf-8")


def section(page, key):
    return re.search(rf'<section[^>]* id="{key}">(.*?)(?=<section [^>]*id=|</main>)', page, re.S)[1]


def flags_of(page, key):
    return re.findall(r"<li><b>(.*?)</b>", section(page, key))


def numbers_of(page, key):
    """Good and broken value of each metric that a case shows, by heading."""
    rows = re.findall(r'<th scope="row">(.*?)</th><td>(.*?)</td><td>(.*?)</td>', section(page, key))
    return {name: [float(text.replace(",", "")) for text in values] for name, *values in rows}


def test_the_guide_is_one_file_of_at_most_1500_kb_that_needs_no_other(guide):
    assert len(guide.encode()) <= 1_500_000
    text = re.sub(r'"data:image[^"]*"', "", guide)
    assert not re.search(r"https?://|@import|\burl\((?!#)|<script|<link(?! rel=\"icon\")", text)
    assert set(re.findall(r' (?:src|href)="(?!data:)([^"#]+)', guide)) == {"index.html", "metrics.tsv"}


def test_every_picture_is_a_picture_with_numbers_in_its_alt_text(guide):
    images = re.findall(r'<img src="data:image/webp;base64,([^"]+)" alt="([^"]+)"', guide)
    assert len(images) == 9 + 3 * len(CASES)
    for source, alt in images:
        assert re.search(r"\d", alt), alt
        assert Image.open(io.BytesIO(base64.b64decode(source))).format == "WEBP"


def test_the_good_correction_raises_no_flag(guide):
    assert "no flag" in section(guide, "good")
    assert flags_of(guide, "good") == []


@pytest.mark.parametrize(
    ("case", "flags"),
    [
        ("fine", ["field steep", "repeatability"]),
        ("leaking", ["dark mask"]),
        ("inverted", ["cjv worse", "entropy worse"]),
        ("nothing", ["field flat"]),
        ("drifted", ["mean drift"]),
        ("clipped", ["saturation"]),
    ],
)
def test_each_broken_correction_is_caught_by_its_flags_and_the_numbers_show_it(guide, case, flags):
    # of air in the mask all goes wrong, with a flag each
    assert set(flags) <= set(flags_of(guide, case)) if case == "leaking" else flags_of(guide, case) == flags
    assert "only the eye finds this" not in section(guide, case)
    good, bad = next(iter(numbers_of(guide, case).values()))
    assert abs(bad - good) > 0.2 * abs(good)


def test_what_is_said_of_the_broken_corrections_is_so(guide):
    fine, leaking, inverted, drifted, clipped = (
        numbers_of(guide, case) for case in ("fine", "leaking", "inverted", "drifted", "clipped")
    )
    assert fine["CJV after"][1] > fine["CJV after"][0]
    assert leaking["mask (ml)"][1] > 1.5 * leaking["mask (ml)"][0]
    assert leaking["CJV after"][1] > 1.2 * leaking["CJV after"][0]
    assert inverted["log entropy after (bits)"][1] > inverted["log entropy before (bits)"][1]
    assert inverted["CV bright after"][1] > inverted["CV bright before"][1]
    assert drifted["CJV after"][0] == drifted["CJV after"][1]
    assert drifted["inu_med"][1] == pytest.approx(1.3 * drifted["inu_med"][0], abs=2e-3)
    assert clipped["inu_range"][1] < clipped["inu_range"][0]
    spread = re.search(r"spread (\d+) % → (\d+) %", section(guide, "inverted"))
    assert int(spread[2]) > int(spread[1])


def test_metrics_and_flags_are_explained_with_their_limits(guide):
    metrics, flags = html.unescape(section(guide, "metrics")), section(guide, "flags")
    assert [d.name for d in DEFINITIONS if d.formula not in metrics] == []
    shown = re.findall(r'<th scope="row">(.*?)</th><td>.*?</td>\s*<td>(.*?)</td>', flags)
    assert [name.replace(" ", "_") for name, _ in shown] == list(FLAGS)
    assert {n.replace(" ", "_"): float(limit) for n, limit in shown if limit != "none"} == FLAG_LIMITS


def test_a_case_that_no_flag_catches_says_so_and_a_good_one_that_is_flagged_too(tmp_path, monkeypatch):
    monkeypatch.setattr("n4flow.qc.guide.CASES", [case for case in CASES if case.key == "drifted"])
    limits = FLAG_LIMITS | {"mean_drift": 0.5, "field_flat": 0.5}
    make_guide(TISSUES, tmp_path / "guide.html", field_window_log=0.4, flags=limits)
    page = (tmp_path / "guide.html").read_text(encoding="utf-8")
    assert "only the eye finds this" in section(page, "drifted")
    assert flags_of(page, "good") == ["field flat"]
    assert "fires too early" in section(page, "good")


@pytest.mark.parametrize("browser", ["chromium"], indirect=True)
def test_the_guide_is_accessible(guide_file, visit, violations):
    assert violations(visit(guide_file).page) == []


#: Rows of figures that are not full, but for the last one of a section, and how far the page is wider than the window.
LAYOUT = """() => [[...document.querySelectorAll(".grid")].flatMap((grid) => {
  const isBox = (one) => getComputedStyle(one).display !== "contents";
  const figures = [...grid.children].flatMap((one) => (isBox(one) ? one : [...one.children]));
  const rows = Map.groupBy(figures, (figure) => figure.offsetTop);
  return [...rows.keys()].sort((a, b) => a - b).slice(0, -1).filter((top) => {
    const ends = rows.get(top).map((figure) => figure.getBoundingClientRect().right);
    return Math.max(...ends) < grid.getBoundingClientRect().right - 2;
  });
}), document.documentElement.scrollWidth - innerWidth]"""


def test_the_guide_fits_every_width_without_gaps(guide_file, visit):
    page = visit(guide_file).page
    for width in (360, 820, 1280, 1920, 2560):
        page.set_viewport_size({"width": width, "height": 900})
        gaps, over = page.evaluate(LAYOUT)
        assert (width, gaps, max(0, over)) == (width, [], 0)
