import math

import numpy as np
import pytest

from n4flow.metrics import (
    coefficient_of_joint_variation,
    coefficient_of_variation,
    correction_metrics,
    field_agreement,
    find_flags,
    inhomogeneity,
    intensity_classes,
    log_entropy_bits,
    mask_volume_ml,
    robust_z,
)


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


FINE = {
    "field_min": 0.8, "field_max": 1.2, "inu_range": 0.2, "cjv_before": 0.6, "cjv_after": 0.5, "mean_ratio": 1.0,
    "dropped_fraction": 0.0, "converged": True,
    "log_entropy_before_bits": 4.1, "log_entropy_after_bits": 4.0, "reference_r": 0.99, "self_check_max": 1e-7,
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
        ({"cjv_after": 0.7}, "cjv_worse"),
        ({"log_entropy_after_bits": 4.2}, "entropy_worse"),
        ({"mean_ratio": 0.9}, "mean_drift"),
        ({"dropped_fraction": 0.1}, "dropped_voxels"),
        ({"converged": False}, "iterations_exhausted"),
        ({"reference_r": 0.5}, "reference_r"),
        ({"self_check_max": 0.1}, "self_check"),
    ],
)
def test_each_flag_fires_alone_and_gives_its_reason(change, flag):
    (found,) = find_flags(FINE | change)
    name, reason = found.split(": ", 1)
    assert name == flag
    assert len(reason) > 10
