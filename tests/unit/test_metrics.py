import json
import math
import re

import nibabel as nib
import numpy as np
import pytest

from n4flow.core.phantom import make_phantom
from n4flow.qc.dataset import OUTLIER_Z
from n4flow.qc.flags import FLAG_LIMITS, FLAGS, find_flags
from n4flow.qc.metrics import (
    bright_outside_fraction,
    coefficient_of_joint_variation,
    coefficient_of_variation,
    correction_metrics,
    dark_fraction,
    field_agreement,
    inhomogeneity,
    intensity_classes,
    log_entropy_bits,
    mask_volume_ml,
    microscopy_metrics,
    robust_z,
    run_metrics,
    saturated_fraction,
    section_profile,
    section_spread,
    speckle_fraction,
    steepness,
    tile_seam,
    wrapped_fraction,
)
from n4flow.qc.pages import make_subject
from tests.unit.test_qc import make_files, make_microscopy_files


def test_cjv_by_hand():
    # sd 1 and 2, means 2 and 12
    assert coefficient_of_joint_variation(np.array([1.0, 3.0]), np.array([10.0, 14.0])) == pytest.approx(3 / 10)


def test_cjv_does_not_depend_on_the_order_or_the_scale():
    a, b = np.array([1.0, 3.0, 4.0]), np.array([10.0, 14.0])
    assert coefficient_of_joint_variation(7 * b, 7 * a) == pytest.approx(coefficient_of_joint_variation(a, b))


@pytest.mark.parametrize("classes", [([], [1.0]), ([2.0], [2.0])])
def test_cjv_without_two_classes_is_nan(classes):
    assert math.isnan(coefficient_of_joint_variation(*map(np.array, classes)))


def test_cv_by_hand():
    assert coefficient_of_variation(np.array([8.0, 12.0])) == pytest.approx(0.2)
    assert math.isnan(coefficient_of_variation(np.array([])))


def test_cv_of_many_float32_values_does_not_lose_digits():
    values = np.full(2**21, 1000.0, dtype=np.float32)
    values[::2] += 1
    assert coefficient_of_variation(values) == pytest.approx(0.5 / 1000.5, rel=1e-9)


def test_classes_are_those_of_the_best_pair_of_thresholds_tried_one_by_one():
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(m, s, n) for m, s, n in ((20, 4, 300), (60, 5, 900), (100, 5, 600))])
    bins = 24
    low, high = np.percentile(values, [0.5, 99.5])
    counts, edges = np.histogram(values, bins=bins, range=(low, high))
    centres = (edges[1:] + edges[:-1]) / 2
    mean = (counts * centres).sum() / counts.sum()

    def between(parts):
        parts = [(counts[p].sum(), (counts[p] * centres[p]).sum()) for p in parts]
        return sum(n * (s / n - mean) ** 2 for n, s in parts) if all(n for n, _ in parts) else -1

    best = max(
        ((i, j) for i in range(1, bins) for j in range(i + 1, bins)),
        key=lambda cut: between((slice(0, cut[0]), slice(*cut), slice(cut[1], None))),
    )
    found = intensity_classes(values, bins=bins)
    assert (found.lower, found.upper, found.top) == pytest.approx((edges[best[0]], edges[best[1]], high))
    assert 20 < found.lower < 60 < found.upper < 100


def test_every_intensity_between_the_limits_belongs_to_one_class():
    classes = intensity_classes(np.repeat([10.0, 50.0, 90.0], 100))
    values = np.array([10.0, 50.0, 90.0, 1000.0])
    assert classes.middle(values).tolist() == [False, True, False, False]
    assert classes.bright(values).tolist() == [False, False, True, False]


@pytest.mark.parametrize("values", [[], [5.0] * 50, [1.0] * 50 + [2.0] * 50])
def test_fewer_than_three_intensities_have_no_classes(values):
    assert all(math.isnan(limit) for limit in intensity_classes(np.array(values)))


def test_entropy_of_equal_bins_counts_them():
    # log intensities on bin centres, 8 of them alike: log2(8) bits
    values = np.exp(0.05 * np.repeat([0, 3, 6, 9, 12, 15, 18, 21], 5))
    assert log_entropy_bits(values) == pytest.approx(3, abs=1e-5)
    assert log_entropy_bits(np.full(10, 7.0)) <= 1  # between two bins


def test_entropy_of_rounded_values_is_that_of_the_values():
    values = np.random.default_rng(1).normal(110, 15, 100_000).clip(60)
    assert log_entropy_bits(np.rint(values)) == pytest.approx(log_entropy_bits(values), abs=0.01)


def test_entropy_rises_with_a_bias_field():
    values = np.repeat([50.0, 100.0], 5000)
    biased = values * np.linspace(0.7, 1.3, len(values))
    assert log_entropy_bits(biased) > log_entropy_bits(values) + 1


def test_inhomogeneity_is_the_spread_of_the_percentiles_of_mriqc():
    ratio = np.linspace(0.5, 1.5, 101)
    assert inhomogeneity(ratio) == pytest.approx((0.9, 1.0))


def test_field_agreement_by_hand():
    reference = np.array([-0.2, 0.0, 0.2, 0.0])
    ours = 1.5 * reference + 3  # the constant is free
    r, slope, rms, p99 = field_agreement(ours, reference)
    assert (r, slope) == pytest.approx((1, 1.5))
    assert rms == pytest.approx(math.sqrt(2 * 0.1**2 / 4))
    assert p99 == pytest.approx(0.1)


def test_field_agreement_is_pearson_and_least_squares():
    rng = np.random.default_rng(2)
    reference = rng.normal(size=500)
    ours = 0.5 * reference + rng.normal(size=500)
    agreement = field_agreement(ours.astype(np.float32), reference.astype(np.float32))
    assert agreement.r == pytest.approx(np.corrcoef(ours, reference)[0, 1], rel=1e-5)
    assert agreement.slope == pytest.approx(np.polyfit(reference, ours, 1)[0], rel=1e-5)


def test_a_constant_field_has_no_correlation():
    assert math.isnan(field_agreement(np.ones(4), np.arange(4.0)).r)


def test_mask_volume():
    assert mask_volume_ml(1000, (1, 2, 3)) == pytest.approx(6)


def test_robust_z_by_hand():
    # median 3, deviations 2 1 0 1 97: MAD 1
    z = robust_z([1, 2, 3, 4, 100, math.nan])
    assert z[:5] == pytest.approx([-2 * 0.6745, -0.6745, 0, 0.6745, 97 * 0.6745])
    assert math.isnan(z[5])


def test_robust_z_of_equal_values_is_zero():
    assert robust_z([2, 2, 2, 5]).tolist() == [0, 0, 0, 0]


def test_the_mad_has_a_floor():
    """Of 0.1 here: what is alike to a size that matters has no outlier."""
    assert robust_z([2, 2, 2, 5], floor=0.1) == pytest.approx([0, 0, 0, 0.6745 * 3 / 0.1])
    assert robust_z([2, 2, 2, 5], floor_share=0.05) == pytest.approx([0, 0, 0, 0.6745 * 3 / 0.1])
    assert robust_z([2, 2, 2, 5], floor=0.2, floor_share=0.05) == pytest.approx([0, 0, 0, 0.6745 * 3 / 0.2])
    wide = [1, 2, 3, 4, 100]
    assert (robust_z(wide, floor=0.5) == robust_z(wide)).all()


def phantom_voxels():
    rng = np.random.default_rng(3)
    tissue = np.concatenate([rng.normal(m, 3, 4000) for m in (30, 60, 100)])
    log_field = np.tile(np.linspace(-0.4, 0.4, 4000), 3)
    return tissue, log_field


def test_a_right_correction_lowers_cjv_entropy_and_cv():
    tissue, log_field = phantom_voxels()
    result = correction_metrics(tissue * np.exp(log_field), tissue, log_field, log_field)
    assert result["cjv_after"] == pytest.approx(6 / 40, rel=0.1)
    assert result["cjv_before"] > 3 * result["cjv_after"]
    assert result["cv_bright_before"] > 3 * result["cv_bright_after"]
    assert result["log_entropy_before_bits"] > result["log_entropy_after_bits"]
    assert (result["field_min"], result["field_max"]) == pytest.approx((math.exp(-0.4), math.exp(0.4)))
    assert result["reference_r"] == pytest.approx(1)
    assert result["reference_rms_log"] == 0


def test_voxels_without_a_logarithm_change_nothing():
    tissue, log_field = phantom_voxels()
    clean = correction_metrics(tissue, tissue, log_field)
    bad = [np.concatenate([tissue, [np.nan, 0, -5, np.inf]])] * 2
    spoilt = correction_metrics(*bad, np.concatenate([log_field, np.zeros(4)]))
    assert spoilt["cjv_after"] == clean["cjv_after"]
    assert spoilt["mean_ratio"] == 1


def test_no_reference_gives_no_reference_metrics():
    tissue, log_field = phantom_voxels()
    assert not [key for key in correction_metrics(tissue, tissue, log_field) if key.startswith("reference")]


def in_file_order(image, mask):
    return image.T[mask.T]


def test_sections_are_planes_of_the_third_axis_and_only_the_mask_counts():
    image = np.full((6, 8, 4), 7.0)
    mask = np.zeros(image.shape, dtype=bool)
    mask[1:5, :, :] = True
    for section, mean in enumerate((10.0, 20.0, 30.0, 40.0)):
        image[1:5, :4, section] = mean - 2
        image[1:5, 4:, section] = mean + 2
    mask[:, :, 3] = False
    mask[0, :3, 3] = True  # 3 voxels are too few
    profile = section_profile(in_file_order(image, mask), mask)
    assert profile[:3] == pytest.approx([10, 20, 30])
    assert math.isnan(profile[3])
    assert section_spread(profile) == pytest.approx((30 - 10) / 20)


def test_voxels_without_a_logarithm_are_in_no_section():
    image, mask = np.full((6, 8, 1), 5.0), np.ones((6, 8, 1), dtype=bool)
    image[0, :4, 0] = np.nan, np.inf, 0, -100
    assert section_profile(in_file_order(image, mask), mask) == pytest.approx([5])


def test_one_section_has_no_spread():
    assert math.isnan(section_spread(np.array([3.0, math.nan])))


@pytest.mark.parametrize(
    ("dtype", "slope", "inter", "stored", "held", "expected"),
    [
        ("uint8", 1, 0, 255, 1, 1),  # the largest storable value is a ceiling even once
        ("uint16", 1, 0, 65535, 7, 7),
        (">i2", 0.25, -100, 32767, 7, 7),
        ("uint16", 1, 0, 65534, 50, 0),  # one below it is none
        ("uint16", 1, 0, 4095, 30, 30),  # a camera of 12 bits
        ("uint16", 1, 0, 4095, 10, 0),  # as many by chance
        ("uint16", 1, 0, 4000, 30, 0),
        ("float32", 1, 0, 4000.5, 30, 30),
        ("float32", 1, 0, 4000.5, 10, 0),
    ],
)
def test_saturated_voxels_are_counted(dtype, slope, inter, stored, held, expected):
    raw = np.arange(1, 201, dtype=float)
    raw[:held] = stored
    values = np.append(slope * raw + inter, [np.nan] * 50).astype(np.float32)
    assert saturated_fraction(values, np.dtype(dtype), slope, inter) == pytest.approx(expected / 250)


def test_one_stored_step_below_the_ceiling_is_not_saturated():
    stored = np.array([65535] * 3 + [65534] * 5 + [1000] * 92)
    values = (0.013 * stored + 5).astype(np.float32)
    assert saturated_fraction(values, np.dtype("uint16"), 0.013, 5) == pytest.approx(0.03)


def test_nothing_measured_is_not_saturated():
    assert math.isnan(saturated_fraction(np.array([]), np.dtype("uint8")))
    assert saturated_fraction(np.full(20, np.nan), np.dtype("uint8")) == 0
    assert saturated_fraction(np.full(20, np.nan), np.dtype("float32")) == 0


def checkered(shape, log_step):
    """Neighbours differ by `log_step` in log intensity along every axis of a section."""
    return 100 * np.exp(log_step * (np.indices(shape)[:2].sum(axis=0) % 2))


def test_a_seam_is_found_where_it_is_and_is_as_large_as_it_is():
    image = checkered((12, 40, 9), 0.02)
    image[:, 26:] *= math.exp(0.1)
    mask = np.ones(image.shape, dtype=bool)
    # a step is 0.02 up beside two of 0.02 down, 0.04 in all; at the seam 0.1 + 0.04 and 0.1 - 0.04 in turns
    ratio, place, both = tile_seam(in_file_order(image, mask), mask)
    assert ratio == pytest.approx(0.1 / 0.04, rel=1e-4)
    assert place == "j 25 to 26"
    assert both == pytest.approx(1, rel=1e-4)


def test_the_axis_with_the_larger_seam_is_told():
    image = checkered((30, 24, 9), 0.02)
    image[:, 12:] *= math.exp(0.06)
    image[8:] *= math.exp(0.2)
    mask = np.ones(image.shape, dtype=bool)
    ratio, place, both = tile_seam(in_file_order(image, mask), mask)
    assert (ratio, place, both) == (pytest.approx(5, rel=1e-4), "i 7 to 8", pytest.approx(1.5, rel=1e-4))


def test_without_a_seam_the_ratio_is_one_whatever_the_sections_do():
    image = checkered((12, 40, 9), 0.02) * np.linspace(1, 5, 9)
    mask = np.ones(image.shape, dtype=bool)
    assert tile_seam(in_file_order(image, mask), mask).ratio == pytest.approx(1, rel=1e-4)


def test_bright_structures_hide_no_seam():
    grid = np.indices((60, 80, 40)).astype(float)
    rng = np.random.default_rng(6)
    image = np.full(grid.shape[1:], 300.0)
    for centre in rng.uniform(0, 1, (70, 3)) * image.shape:
        image += 3000 * np.exp(-((grid - centre[:, None, None, None]) ** 2).sum(axis=0) / rng.uniform(9, 49))
    image *= np.exp(rng.normal(0, 0.03, image.shape))
    mask = image > np.median(image)
    seamless = tile_seam(in_file_order(image, mask), mask)
    image[:, 40:] *= 1.1
    seam = tile_seam(in_file_order(image, mask), mask)
    assert seam.place == "j 39 to 40"
    assert seam.ratio > 1.5 > seamless.ratio


def test_a_smooth_field_is_no_seam_and_mends_none():
    rng = np.random.default_rng(5)
    image = 100 * np.exp(rng.normal(0, 0.05, (40, 60, 10)))
    mask = np.ones(image.shape, dtype=bool)
    field = np.exp(0.4 * np.sin(np.linspace(0, 3, 60)))[None, :, None]
    assert tile_seam(in_file_order(image * field, mask), mask).ratio < 1.2
    image[:, 30:] *= 1.2
    seams = [tile_seam(in_file_order(i, mask), mask) for i in (image, image * field)]
    assert [seam.place for seam in seams] == ["j 29 to 30"] * 2
    assert seams[1].ratio == pytest.approx(seams[0].ratio, rel=0.1)
    assert seams[0].ratio > 2


@pytest.mark.parametrize("textured", [False, True])
@pytest.mark.parametrize("body", ["sphere", "cylinder"])
def test_tiles_are_flagged_and_a_layer_or_a_slab_is_not(body, textured):
    shape = (90, 80, 40)
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    mask = x**2 + y**2 + z**2 < 0.8 if body == "sphere" else (y**2 + z**2 < 0.6) & (np.abs(x) < 0.9)
    texture = np.sin(7 * x + 2 * y) * np.cos(6 * y - 3 * z) * np.sin(5 * z + x)
    tissue = np.select([texture < -0.2, texture < 0.3], [0.7, 0.45], 1.0) if textured else 1.0
    image = 300 * tissue * np.exp(np.random.default_rng(0).normal(0, 0.03, shape))
    tiles = np.add.outer(*(3 * np.arange(n) // n for n in shape[:2]))[:, :, None] % 2
    flagged = {}
    for name, factor in {
        "none": 1, "tiles": np.where(tiles, 1.25, 1), "layer": np.where(x > 0.1, 1.4, 1),
        "slab": np.where(np.abs(x) < 0.2, 1.4, 1),
    }.items():  # fmt: skip
        values = in_file_order(image * factor, mask)
        found = microscopy_metrics(values, values, mask)
        assert (found["seam_ratio_after"] > FLAG_LIMITS["seams"]) == (name != "none")
        flagged[name] = [flag.split(":")[0] for flag in find_flags(found)]
    assert flagged == {"none": [], "tiles": ["seams"], "layer": [], "slab": []}


def test_steps_outside_the_mask_over_few_voxels_or_from_unusable_ones_make_no_seam():
    image = checkered((12, 40, 9), 0.02)
    mask = np.ones(image.shape, dtype=bool)
    image[:, 5] *= 9
    mask[:, 4:7] = False
    image[:, 38:] *= 9
    mask[:, 38:] = False
    mask[0, 38:, 0] = True  # a tip of two voxels
    image[3, 20, :4] = np.nan, np.inf, 0, -1
    assert tile_seam(in_file_order(image, mask), mask).ratio == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize(
    ("shape", "log_step"),
    [((12, 40, 9), 0.0), ((4, 5, 30), 0.02), ((1, 1, 50), 0.02)],
    ids=["flat", "few planes", "line"],
)
def test_no_typical_step_gives_no_seam_ratio(shape, log_step):
    image, mask = checkered(shape, log_step), np.ones(shape, dtype=bool)
    seam = tile_seam(in_file_order(image, mask), mask)
    assert math.isnan(seam.ratio)
    assert seam.place == ""


def test_microscopy_metrics_by_hand():
    truth = checkered((12, 40, 9), 0.02)
    mask = np.ones(truth.shape, dtype=bool)
    image = truth * np.linspace(0.5, 1.5, 9)
    result = microscopy_metrics(in_file_order(image, mask), in_file_order(truth, mask), mask)
    assert result["section_spread_after"] == pytest.approx(0, abs=1e-6)
    assert result["foreground_cv_after"] == pytest.approx(0.01, rel=1e-3)  # half of a step of 2 %
    assert result["foreground_cv_before"] > 0.25
    assert result["seam_ratio_after"] == pytest.approx(1, rel=1e-4)


def test_steepness_of_a_ramp_is_its_change_across_the_mask():
    # 0.02 per mm, over a cube of 50 mm
    assert steepness(np.full(100, 0.02), 50.0) == pytest.approx(1.0)
    assert math.isnan(steepness(np.array([]), 50.0))


def test_dark_voxels_are_counted_by_hand():
    # the 99th percentile is 100, so that 5 is dark no more
    values = np.array([4.9] * 20 + [5.0] * 10 + [100.0] * 69 + [math.nan])
    assert dark_fraction(values) == pytest.approx(21 / 100)
    assert math.isnan(dark_fraction(np.array([math.nan])))


def mriqc_inu(bias):
    """MRIQC's inu_range and inu_med as its documentation defines them, from order statistics alone."""
    ordered = sorted(bias)

    def percentile(share):
        place = share * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (place - low) * (ordered[high] - ordered[low])

    return abs(percentile(0.95) - percentile(0.05)), percentile(0.5)


def test_inhomogeneity_is_that_of_mriqc():
    bias = np.exp(np.random.default_rng(8).normal(0, 0.2, 999))
    assert inhomogeneity(bias) == pytest.approx(mriqc_inu(bias.tolist()))


def test_a_head_worked_out_by_hand():
    """Three tissues, each half darker by 8 % and half brighter by 8 % than it should be, which leaves them apart."""
    truth = np.concatenate([np.repeat([m - d, m + d], 500) for m, d in ((20.0, 1.0), (60.0, 2.0), (100.0, 4.0))])
    bias = np.tile(np.repeat([0.92, 1.08], 250), 6)
    result = correction_metrics(truth * bias, truth, np.log(bias))
    # corrected: sd 2 and 4, means 60 and 100
    assert result["cjv_after"] == pytest.approx((2 + 4) / (100 - 60))
    assert result["cv_bright_after"] == pytest.approx(4 / 100)
    # original: the means stay, and the variance of m (1 ± 0.08) (1 ± d/m) is m² (0.08² + (d/m)² (1 + 0.08²))
    spread = [m * math.sqrt(0.08**2 + (d / m) ** 2 * 1.0064) for m, d in ((60, 2), (100, 4))]
    assert result["cjv_before"] == pytest.approx(sum(spread) / 40)
    assert result["cv_bright_before"] == pytest.approx(spread[1] / 100)
    assert (result["inu_range"], result["inu_med"]) == pytest.approx((0.16, 1.0))
    assert (result["field_min"], result["field_max"]) == pytest.approx((0.92, 1.08))
    assert result["mean_ratio"] == pytest.approx(1)
    assert result["mask_dark_fraction"] == 0


@pytest.mark.parametrize("inu_percent", [0, 20])
def test_a_wrong_field_raises_the_cjv_and_the_right_one_lowers_it(tissues, inu_percent):
    """Classes of the corrected image alone would say that both lower it."""
    head, other = (make_phantom(tissues, 2.0, inu_percent=n, noise_percent=3, seed=n) for n in (inu_percent, 40))
    inside = head.truth > 200
    for field, worse in ((head.bias, False), (other.bias[::-1], True)):
        after = head.image[inside] / field[inside]
        metrics = correction_metrics(head.image[inside], after, np.log(field[inside]))
        assert (metrics["cjv_after"] > FLAG_LIMITS["cjv_worse"] * metrics["cjv_before"]) == worse
        assert worse or not inu_percent or metrics["cjv_after"] < metrics["cjv_before"]


def test_metrics_of_classes_can_be_left_out():
    tissue, log_field = phantom_voxels()
    kept = correction_metrics(tissue, tissue, log_field, by_class=False)
    left_out = correction_metrics(tissue, tissue, log_field).keys() - kept.keys()
    assert {key.partition("_")[0] for key in left_out} == {"cjv", "cv", "class"}
    assert "log_entropy_after_bits" in kept


FINE = {
    "datatype": "anat",
    "shape": [200, 180, 160],
    "voxel_size_mm": [1.0, 1.0, 1.0],
    "field_min": 0.8, "field_max": 1.2, "inu_range": 0.2, "cjv_before": 0.6, "cjv_after": 0.5, "mean_ratio": 1.0,
    "dropped_fraction": 0.0, "converged": True, "outside_fraction": 0.5,
    "log_entropy_before_bits": 4.1, "log_entropy_after_bits": 4.0, "self_check_max": 1e-7,
    "reference_rms_log": 0.04, "agreement_rms_log": 2e-6,
    "field_steepness": 1.0, "mask_dark_fraction": 0.03, "repeatability_log": 0.002,
    "bright_outside_fraction": 0.02, "mask_method": "otsu", "mask_speckle_fraction": 0.002, "wrapped_fraction": 0.2,
    "saturated_fraction": 0.002, "seam_ratio_before": 1.2, "seam_ratio_after": 1.21, "seam_place_after": "i 4 to 5",
    "seam_both_after": 1.1,
}  # fmt: skip


def test_a_fine_correction_raises_no_flag():
    assert find_flags(FINE) == []
    assert find_flags({}) == []
    assert find_flags(dict.fromkeys(FINE)) == []


@pytest.mark.parametrize(
    ("change", "flag"),
    [
        ({"field_min": 0.1}, "field_range"),
        ({"inu_range": 0.001}, "field_flat"),
        ({"field_steepness": 5.0}, "field_steep"),
        ({"repeatability_log": 0.03}, "repeatability"),
        ({"mask_dark_fraction": 0.3}, "dark_mask"),
        ({"bright_outside_fraction": 0.2}, "bright_outside"),
        ({"bright_outside_fraction": 1.1, "mask_method": "given"}, "bright_outside"),
        ({"mask_speckle_fraction": 0.3}, "speckle"),
        ({"wrapped_fraction": 0.8}, "wrapped"),
        ({"cjv_after": 0.7, "log_entropy_after_bits": 4.12}, "cjv_worse"),
        ({"log_entropy_after_bits": 4.2}, "entropy_worse"),
        ({"mean_ratio": 0.9}, "mean_drift"),
        ({"dropped_fraction": 0.1}, "dropped_voxels"),
        ({"converged": False}, "iterations_exhausted"),
        ({"reference_rms_log": 0.2}, "reference_rms"),
        ({"agreement_rms_log": 2e-4}, "agreement_rms"),
        ({"saturated_fraction": 0.03}, "saturation"),
        ({"seam_ratio_after": 1.5}, "seam_worse"),
        ({"seam_ratio_before": 2.5, "seam_ratio_after": 2.5, "seam_both_after": 1.5}, "seams"),
        ({"self_check_max": 0.1}, "self_check"),
        ({"outside_fraction": 0.51}, "field_outside"),
        ({"voxel_size_mm": [0.001, 0.001, 0.001]}, "size"),  # metres without a unit
        ({"voxel_size_mm": [1000.0, 1000.0, 1000.0]}, "size"),  # mm called metres
    ],
)
def test_each_flag_fires_alone_and_gives_its_reason(change, flag):
    (found,) = find_flags(FINE | change)
    name, reason = found.split(": ", 1)
    happened, look = reason.rsplit("; look ", 1)
    assert name == flag
    assert len(look) > 10
    # in words, and with the limit that fired; the convergence threshold is no limit of a flag
    assert re.search(r"\(limit [+±]?[\d.e-]+.*\)$", happened) or flag == "iterations_exhausted"


def test_microscopy_may_be_small():
    assert find_flags(FINE | {"datatype": "micr", "voxel_size_mm": [1e-5, 1e-5, 1e-5]}) == []
    assert find_flags(FINE | {"shape": [100, 90, 80], "voxel_size_mm": [0.1, 0.1, 0.1]}) == [], "a mouse"


@pytest.mark.parametrize("flag", FLAG_LIMITS)
def test_a_limit_that_is_moved_away_silences_its_flag_and_no_other(flag):
    bad = FINE | {
        "field_min": 0.1, "inu_range": 0.001, "field_steepness": 5.0, "cjv_after": 0.7, "log_entropy_after_bits": 4.2,
        "mean_ratio": 0.9, "mask_dark_fraction": 0.3, "dropped_fraction": 0.1, "reference_rms_log": 0.2,
        "agreement_rms_log": 1e-3, "saturated_fraction": 0.03, "seam_ratio_after": 2.5, "self_check_max": 0.1,
        "seam_both_after": 1.5, "outside_fraction": 0.9, "repeatability_log": 0.03, "bright_outside_fraction": 2.0,
        "mask_speckle_fraction": 0.5, "wrapped_fraction": 0.9,
    }  # fmt: skip
    away = -1 if flag == "field_flat" else 1e3
    names = [found.split(":")[0] for found in find_flags(bad)]
    left = [found.split(":")[0] for found in find_flags(bad, FLAG_LIMITS | {flag: away})]
    assert set(names) == set(FLAG_LIMITS)
    assert left == [name for name in names if name != flag]


def test_each_metric_that_a_flag_looks_at_is_one_that_the_page_of_a_scan_measures(tmp_path):
    measured = set()
    for name, (files, _) in {"T1w": (make_files(tmp_path), None), "SPIM": make_microscopy_files(tmp_path)}.items():
        make_subject(name=f"sub-01_{name}", **files)
        measured |= json.loads(files["metrics"].read_text()).keys()
    assert {key for flag in FLAGS.values() for key in (*flag.metrics, flag.unknown[0], flag.unless) if key} <= measured


def test_the_manual_names_every_flag_with_its_limit(pytestconfig):
    manual = (pytestconfig.rootpath / "config" / "README.md").read_text(encoding="utf-8")
    section = manual.partition("\n## Flags\n")[2].partition("\n## ")[0]
    shown = {name: float(limit) for name, limit in re.findall(r"^\| `(\w+)` \| ([\d.]+) \| ", section, re.MULTILINE)}
    assert shown == FLAG_LIMITS | {"outlier_z": OUTLIER_Z}
    assert [name for name in FLAGS if f"`{name}`" not in section] == []


def test_the_mask_of_a_brain_that_was_given_leaves_out_the_scalp():
    assert find_flags(FINE | {"bright_outside_fraction": 0.76, "mask_method": "given"}) == []


def test_bright_outside_by_hand():
    image = np.zeros((4, 10, 10), np.float32)
    image[:2] = np.arange(1, 201).reshape(2, 10, 10)
    image[2, 0] = 120
    image[2, 1] = 20
    mask = np.zeros(image.shape, bool)
    mask[:2] = True
    assert bright_outside_fraction(image, mask) == pytest.approx(10 / 200)  # P25 is 50.75
    image[0, 0, 0] = math.nan
    image[3] = math.nan
    assert bright_outside_fraction(image, mask) == pytest.approx(10 / 200)
    mask[:2, 5:] = False  # half of it is left out: 100 voxels, of which 50 are brighter than the rest
    assert bright_outside_fraction(image, mask) > 0.5
    assert math.isnan(bright_outside_fraction(np.zeros_like(image), mask))


def test_speckle_is_what_stands_alone_or_in_pairs():
    mask = np.zeros((20, 20, 20), bool)
    mask[5:15, 5:15, 5:15] = True
    assert speckle_fraction(mask) == 0
    mask[0, 0, 0] = mask[2, 2, 2] = mask[2, 2, 3] = True
    assert speckle_fraction(mask) == pytest.approx(3 / 1003)
    grains = np.random.default_rng(0).random((40, 40, 40)) < 0.25
    # none of six neighbours, or one of them; fewer at the border
    assert speckle_fraction(grains) == pytest.approx(0.75**6 + 6 * 0.25 * 0.75**5, abs=0.02)
    assert speckle_fraction(np.ones((30, 30, 1), bool)) == 0


def blob(top, shape=(40, 40, 40)):
    """A smooth object whose largest value is this."""
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    return np.rint(top * np.exp(-2 * (x**2 + y**2 + z**2)))


@pytest.mark.parametrize(
    ("dtype", "bits", "first"), [(np.uint8, 8, 0), (np.uint16, 12, 0), (np.uint16, 16, 0), (np.int16, 16, -32768)]
)
def test_integers_that_began_again_at_the_smallest_are_found(dtype, bits, first):
    ceiling = 2**bits + first
    wrapped = (blob(1.6 * ceiling) - first) % 2**bits + first
    assert wrapped_fraction(wrapped, np.dtype(dtype)) > FLAG_LIMITS["wrapped"]
    slope, inter = 0.013, 5.0
    assert wrapped_fraction(slope * wrapped + inter, np.dtype(dtype), slope, inter) > FLAG_LIMITS["wrapped"]
    for fine in (blob(0.98 * ceiling), np.minimum(blob(1.6 * ceiling), ceiling - 1)):
        assert not wrapped_fraction(fine, np.dtype(dtype)) > 0  # of signed integers above 0 it says nothing
    assert math.isnan(wrapped_fraction(wrapped, np.dtype(np.float32)))
    assert math.isnan(wrapped_fraction(blob(0.6 * ceiling), np.dtype(dtype)))


def thin_shell(shape, rng):
    """A head in a bright shell that fills the range of 12 bits, between air and tissue: of noise, and of few voxels."""
    radius = np.sqrt(sum(x**2 for x in np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")))
    tissue = np.select([radius < 0.78, radius < 0.86], [1500, 4000], 20)
    return np.rint(np.hypot(tissue + rng.normal(0, 60, shape), rng.normal(0, 60, shape))).clip(0, 4095)


@pytest.mark.parametrize("every", [1, 2, 4])
def test_a_sharp_head_has_not_wrapped_however_few_its_voxels(every):
    image = thin_shell((96, 104, 88), np.random.default_rng(0))
    part = image[::every, ::every, ::every]
    assert not wrapped_fraction(part, np.dtype(np.uint16)) > FLAG_LIMITS["wrapped"]
    flat = image[::every, ::every, 40:41]
    assert not wrapped_fraction(flat, np.dtype(np.uint16)) > FLAG_LIMITS["wrapped"]


@pytest.mark.parametrize("every", [1, 2, 4])
def test_a_real_head_has_wrapped_only_where_it_has(real_scans, every):
    image = np.asarray(nib.load(real_scans / "sub-01/anat/sub-01_T1w.nii.gz").dataobj).astype(np.float32)
    part = image[::every, ::every, ::every]
    assert not wrapped_fraction(part, np.dtype(np.uint8)) > FLAG_LIMITS["wrapped"]
    brightest = np.percentile(image[image > 25], 70)
    found = wrapped_fraction(np.rint(part / brightest * 256) % 256, np.dtype(np.uint8))
    assert found > FLAG_LIMITS["wrapped"] or (every == 4 and math.isnan(found)), "of so few voxels it cannot be told"


def test_of_sharp_borders_it_is_not_said_that_nothing_wrapped():
    radius = np.sqrt(sum(x**2 for x in np.meshgrid(*[np.linspace(-1, 1, 60)] * 3, indexing="ij")))
    tissue = np.select([radius < 0.6, radius < 0.75, radius < 0.9], [1300, 970, 600], 10)
    image = np.rint(tissue + np.random.default_rng(0).normal(0, 20, radius.shape)).clip(0)
    assert math.isnan(wrapped_fraction(image % 1024, np.dtype(np.uint16)))


@pytest.mark.parametrize("axis", range(3))
def test_values_that_began_again_are_found_along_any_axis(axis):
    ramp = np.moveaxis(np.broadcast_to(np.linspace(0, 12000, 80)[:, None, None], (80, 40, 30)), 0, axis)
    values = np.rint(ramp + np.random.default_rng(0).normal(0, 30, ramp.shape)).clip(0) % 4096
    assert wrapped_fraction(values, np.dtype(np.uint16)) > 0.1
    assert wrapped_fraction(values, np.dtype(np.uint16)) < FLAG_LIMITS["wrapped"], "a slow ramp has few steps"


def test_mean_may_change_under_the_field_of_another_scan():
    assert find_flags(FINE | {"mean_ratio": 0.9, "field_from": "sub-01_T1w"}) == []


def test_other_tissues_in_the_classes_raise_no_flag():
    """As of four tissues, two of them alike, which fall into other classes once the field is off: the entropy fell."""
    assert find_flags(FINE | {"cjv_before": 0.614, "cjv_after": 0.742}) == []


def test_the_flag_of_a_seam_says_where():
    (flag,) = find_flags(FINE | {"seam_ratio_after": 1.5})
    assert "i 4 to 5" in flag
    assert "1.20 to 1.50" in flag


def test_iterations_of_the_stage_for_strong_fields_count_too():
    cvs = {0: [0.5, 0.2, 0.0009], 1: [0.0008], 2: [0.0007]}
    history = [{"Stage": s, "Iteration": n, "CV": cv} for s in cvs for n, cv in enumerate(cvs[s], start=1)]
    run = {"Parameters": {"iterations": [40, 30]}, "History": history, "Converged": [True, True, True]}
    metrics = run_metrics({"N4": run}, {}, 1000)
    assert (metrics["iterations_used"], metrics["iterations_max"]) == (5, 110)
    metrics = run_metrics({"N4": run | {"History": history[3:]}}, {}, 1000)
    assert (metrics["iterations_used"], metrics["iterations_max"]) == (2, 70)
