"""What accuracy is measured on: fair draws, tuning and reporting apart, and heads that are heads."""

from dataclasses import replace

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from n4flow.core.samples import sample_positions
from tests import phantoms
from tests.anatomies import DATA, REAL_SCANS, anatomy, largest_piece, real_scan
from tests.benchmarks import accuracy
from tests.phantoms import ANATOMIES, FIELDS, MASKS, NOISE, STRENGTHS, Case, family, light_sheet, make_scan

CASE = Case("mni_2mm", "T1", "legendre", 40, 3, "brain", False, 2)


def needs_data():
    if not (DATA / "individual").is_dir():
        pytest.skip(f"no real scans in {DATA}")


def test_each_half_of_each_anatomy_has_every_strength_with_every_noise_and_every_field():
    for name in ANATOMIES:
        for seeds in (range(0, 10, 2), range(1, 10, 2)):
            cases = family([name], seeds=seeds)
            assert {(c.inu_percent, c.noise_percent) for c in cases} == {(i, n) for i in STRENGTHS for n in NOISE}
            assert {(c.inu_percent, c.field) for c in cases} == {(i, f) for i in STRENGTHS for f in FIELDS}
            assert {c.anatomy for c in cases} == {name}
            assert [c.tuned_on for c in cases] == [name != "t1w" and c.seed % 2 == 0 for c in cases]


@pytest.mark.parametrize("seed", [2, 3])
def test_a_change_of_the_settings_draws_anew_what_is_reported_on_and_leaves_what_is_tuned_on(seed, monkeypatch):
    case = replace(CASE, seed=seed)
    before = make_scan(case)
    assert_array_equal(make_scan(case).image, before.image)
    monkeypatch.setattr(phantoms, "PRESETS", {**phantoms.PRESETS, "another": {"fwhm": 0.1}})
    assert np.array_equal(make_scan(case).image, before.image) == case.tuned_on


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_has_the_strength_that_is_asked_for_and_the_image_is_tissue_times_field(field):
    scan = make_scan(replace(CASE, field=field, noise_percent=0))
    inside = scan.log_bias[scan.brain]
    assert np.exp(np.ptp(inside)) == pytest.approx(1.2 / 0.8)
    assert inside.mean() == pytest.approx(0, abs=1e-9)
    corrected = scan.image / np.exp(scan.log_bias)
    assert corrected[scan.wm].std() / corrected[scan.wm].mean() < 0.02
    assert scan.image[scan.wm].std() / scan.image[scan.wm].mean() > 0.04


def test_masks_hold_as_much_as_their_names_say():
    scans = {mask: make_scan(replace(CASE, mask=mask)) for mask in MASKS}
    size = {mask: np.count_nonzero(scan.mask) for mask, scan in scans.items()}
    assert size["small"] < size["half"] < size["eroded"] < size["brain"] < size["dilated"] < size["leaking"]
    for mask, scan in scans.items():
        assert scan.log_bias[scan.brain].mean() == pytest.approx(0, abs=1e-9)
        assert not np.any(scan.brain & ~scan.mask) or mask not in ("half", "small", "dilated", "leaking")


@pytest.mark.data
@pytest.mark.parametrize("maps", ["individual", "t1w"])
def test_single_heads_are_of_one_piece_and_sharp(maps):
    needs_data()
    head = anatomy(maps)
    millilitres = np.count_nonzero(head.brain) * head.voxel_size_mm**3 / 1000
    assert 1000 < millilitres < 1500
    inside = sum(head.shares[name] for name in ("gm", "wm", "csf")) > 0.5
    if maps == "individual":  # without the balls beside it
        assert_array_equal(largest_piece(inside), inside)
    everything = sum(head.shares.values())
    assert_allclose(everything[head.brain], 1, atol=0.01)
    assert everything.max() < 1.01
    # most of the brain is one tissue; of the average head, less than half
    assert pure_share(head) > 0.6 > 0.5 > pure_share(anatomy("mni_2mm"))


def pure_share(head):
    return np.mean((head.shares["gm"] > 0.9)[head.brain] | (head.shares["wm"] > 0.9)[head.brain])


@pytest.mark.data
@pytest.mark.parametrize("name", REAL_SCANS)
def test_real_scans_have_a_mask_of_a_brain_or_a_head(name):
    needs_data()
    scan = real_scan(name)
    assert scan.image.shape == scan.mask.shape
    assert 1000 < np.count_nonzero(scan.mask) * np.prod(scan.voxel_size_mm) / 1000 < 3000
    image, log_added = phantoms.with_added_field(scan, "coil", 40, 1)
    assert np.exp(np.ptp(log_added[scan.mask])) == pytest.approx(1.2 / 0.8)
    there = scan.image > 0
    assert_allclose(np.log(image[there] / scan.image[there]), log_added[there], atol=1e-5)


def test_a_light_sheet_object_has_the_field_that_is_asked_for_and_few_levels_where_they_are():
    scan = light_sheet(0.5, 0.24, 2, levels=10)
    assert scan.log_bias[scan.brain].std() == pytest.approx(0.24)
    assert len(np.unique(scan.image)) == 10


def test_a_field_of_simpleitk_is_the_spline_that_is_taken_for_it():
    scan = make_scan(CASE)
    positions = sample_positions(scan.image.shape, 4)
    grid = np.ix_(*positions)
    used = (scan.mask & (scan.image > 0))[grid]
    field, iterations = accuracy.with_simpleitk(None, scan.image[grid], used, scan.voxel_size_mm)
    found = accuracy.METHODS[accuracy.REFERENCE](scan.image, scan.mask, scan.voxel_size_mm)
    assert found.iterations == iterations
    assert_allclose(found.log_at(positions), field, atol=1e-3 * np.ptp(field))


def test_an_estimate_is_cut_short_after_any_number_of_iterations():
    errors, last = accuracy.error_by_iteration(CASE)
    assert len(errors) == sum(n < last for n in accuracy.AFTER) + 1
    whole = accuracy.measure_scan(make_scan(CASE), {"default": accuracy.METHODS[accuracy.DEFAULT]})["default"]
    assert (errors[-1], last) == (pytest.approx(whole.error, rel=1e-9), whole.iterations)
