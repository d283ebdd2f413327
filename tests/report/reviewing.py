"""What the tests of the report share: how a reviewer looks at it, and tables of ratings."""

import csv

from n4flow.qc.dataset import make_index
from n4flow.study.ratings import Rating
from tests.unit.test_qc import write_metrics

SCANS = ("sub-01_T1w", "sub-02_ses-a_run-1_T1w", "sub-03_T1w")


def rating_of(page, scan):
    return page.locator("#scans tbody tr", has=page.get_by_text(scan, exact=True)).locator(".rating").inner_text()


def order_of(page):
    return page.locator("#scans tbody th").all_inner_texts()


def shown_page(page):
    return page.frame_locator("#frames iframe:not(.away)")


def give_name(page, name):
    page.click("#rater")
    page.keyboard.type(name)
    page.keyboard.press("Tab")


def show_others(page):
    page.get_by_label("show others' ratings before mine").check()


def table(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def write_ratings(path, *rows):
    blank = dict.fromkeys(Rating._fields, "n/a")
    lines = ["\t".join(Rating._fields), *("\t".join((blank | row).values()) for row in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


ONE = {"participant_id": "sub-01", "modality": "T1w"}


def index_of(folder, *scans):
    """An index over scans that have only a name, as the workflow makes it anew over what is done."""
    metrics = [{"name": scan, "report_hash": "0" * 12, "cjv_after": 0.5} for scan in scans]
    make_index(write_metrics(folder, metrics), folder / "index.html", folder / "metrics.tsv")
    return folder / "index.html"


def rate_here(page, scan, **change):
    page.evaluate("([scan, change]) => rate(scan, change)", [scan, change])
