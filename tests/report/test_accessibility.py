"""axe-core finds nothing in the report that hinders people, in light or in dark; by the same rules in any browser."""

import pytest

from tests.report.reviewing import SCANS, shown_page

pytestmark = pytest.mark.parametrize("browser", ["chromium"], indirect=True)


def test_what_is_planted_is_found(qc, visit, violations):
    page = visit(qc / "index.html").page
    page.evaluate(
        """() => document.querySelector("main").insertAdjacentHTML("afterbegin", `
          <img src="data:,"><button></button><p class="planted">pale</p>
          <style>
            .planted { color: #999; background: #fff }
            @media (prefers-color-scheme: dark) { .planted { color: #eee; background: #111 } }
          </style>`)"""
    )
    found = [(rule, scheme) for rule, scheme, _ in violations(page)]
    both = [(rule, scheme) for scheme in ("light", "dark") for rule in ("button-name", "image-alt")]
    assert sorted(found) == sorted([*both, ("color-contrast", "light")])


def test_the_index_is_accessible(qc, visit, violations):
    page = visit(qc / "index.html").page
    page.keyboard.press("2")
    page.get_by_text("Columns", exact=True).click()
    page.locator("#methods summary").click()
    page.get_by_text("Two metrics").click()
    assert violations(page) == []
    page.get_by_label("pictures").check(force=True)
    assert violations(page) == []


def test_the_review_is_accessible(qc, visit, violations):
    page = visit(qc / "index.html").page
    page.goto(f"{page.url}#{SCANS[0]}")
    shown_page(page).locator("h1").wait_for()
    page.locator("#review [data-help]").click()
    assert violations(page) == []


def test_a_page_and_its_viewer_are_accessible(qc, visit, violations):
    page = visit(qc / f"{SCANS[0]}.html").page
    page.locator("summary").click()
    assert violations(page) == []
    page.keyboard.press("v")
    page.locator("#viewer canvas").first.wait_for()
    assert violations(page) == []
