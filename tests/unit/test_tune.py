"""The page that compares settings."""

import html
import json
import math
import re

import nibabel as nib
import numpy as np
import pytest

from n4flow.qc.tune import TunedScan, make_comparison
from n4flow.steps.correct import correct_scan
from n4flow.steps.derivatives import CorrectionFiles
from tests.conftest import lee_wolberg_shin

GRID = [{"spline_distance_mm": 80.0}, {"spline_distance_mm": 12.0}]
HOSTILE = "sub-<script>alert(1)</script>_T1w"


@pytest.fixture(scope="module")
def corrected(head, tmp_path_factory):
    """A head at 4 mm, corrected with each combination; image and mask too."""
    folder = tmp_path_factory.mktemp("tune")
    affine = np.diag([4.0, 4.0, 4.0, 1.0])
    image, mask = head.image[::2, ::2, ::2], head.brain[::2, ::2, ::2]
    for name, values in (("image", image), ("mask", mask.astype(np.uint8))):
        nib.save(nib.Nifti1Image(values, affine), folder / f"{name}.nii")
    made = []
    for number, combination in enumerate(GRID):
        names = ("corrected.nii", "corrected.json", "field.json")
        made.append(CorrectionFiles(*(folder / f"{number}_{name}" for name in names)))
        parameters = lee_wolberg_shin(shrink_factor=2, **combination)
        correct_scan(folder / "image.nii", folder / "mask.nii", made[-1], parameters=parameters, device="cpu")
    return folder, made


def compare(corrected, page, *, name="sub-01_T1w", with_reference=True, **more):
    folder, made = corrected
    reference = made[0].field if with_reference else None
    scan = TunedScan(name, folder / "image.nii", folder / "mask.nii", reference, made)
    make_comparison([scan], GRID, page, settings={"shrink_factor": 2}, field_window_log=math.log(1.5), **more)
    return page.read_text(encoding="utf-8")


def rows_of(page):
    """Cells of the table by the setting, and by heading."""
    headings = re.findall(r'<th scope="col">(.*?)</th>', page)
    return {
        setting: dict(zip(headings[1:], re.findall(r"<td>(.*?)</td>", cells), strict=True))
        for setting, cells in re.findall(r'<th scope="row">(.*?)</th>(.*?)</tr>', page)
    }


def test_each_setting_has_a_row_and_a_card_with_its_numbers(corrected, tmp_path):
    page = compare(corrected, tmp_path / "index.html")
    rows = rows_of(page)
    assert list(rows) == ["spline_distance_mm\u00a080.0", "spline_distance_mm\u00a012.0"]
    coarse, fine = rows.values()
    # the first is its own reference
    assert (coarse["r to reference"], coarse["rms Δlog"]) == ("1.0000", "0.0000")
    assert float(fine["r to reference"]) < 0.9
    assert float(fine["field steepness"]) > float(coarse["field steepness"])
    assert "field steep" in fine["flags"]
    sidecar = json.loads(corrected[1][0].sidecar.read_text())
    assert float(coarse["time (s)"]) == pytest.approx(sidecar["N4"]["WallTimeSeconds"], abs=0.051)
    assert int(coarse["iterations"]) == len(sidecar["N4"]["History"])
    alts = [html.unescape(alt) for alt in re.findall(r'<img [^>]*alt="([^"]*)"', page)]
    assert len(alts) == 2 + 2 * len(GRID)  # original and reference, then a pair for each
    assert [alt for alt in alts if not re.search(r"\d", alt)] == []
    assert f"CJV {coarse['CJV after']}" in alts[2]


def test_all_images_share_one_window_that_is_told(corrected, tmp_path):
    page = compare(corrected, tmp_path / "index.html")
    assert len(set(re.findall(r"window 0 to ([\d.e+]+?)\.?\"", page))) == 1


def test_without_a_reference_nothing_is_said_of_one(corrected, tmp_path):
    page = compare(corrected, tmp_path / "index.html", with_reference=False)
    assert "reference" not in re.sub(r"<style>.*?</style>", "", page, flags=re.S).lower()


def test_the_page_ranks_nothing_and_needs_no_other_file(corrected, tmp_path):
    page = compare(corrected, tmp_path / "index.html")
    assert not re.search(r"\b(best|better|winner|recommended)\b", page, re.I)
    assert not re.search(r"https?://|@import|\burl\((?!#)|<script", re.sub(r'"data:image[^"]*"', "", page))
    assert set(re.findall(r' (?:src|href)="(data:)?', page)) == {"data:"}


def test_a_hostile_name_is_harmless(corrected, tmp_path):
    page = compare(corrected, tmp_path / "index.html", name=HOSTILE)
    assert "<script" not in page
    assert html.escape(HOSTILE) in page
