"""The columns of the tables and what each metric is, for people: for the guide and for MultiQC."""

from __future__ import annotations

from typing import NamedTuple


class Definition(NamedTuple):
    """A metric, or the same one before and after."""

    keys: tuple[str, ...]
    name: str
    formula: str
    reading: str
    source: str = ""


#: v: intensities in the mask, b: the multiplicative field there, P: percentile. In full: n4flow/qc/metrics.py.
DEFINITIONS: tuple[Definition, ...] = (
    Definition(
        ("cjv_before", "cjv_after"),
        "CJV, coefficient of joint variation",
        "(sd_mid + sd_bright) / |mean_mid - mean_bright|",
        "Lower is better; over the two upper of three intensity classes of each image, not over segmented tissue. "
        "Compare before with after, and scans of one sequence with each other. Once the field is off, the classes may "
        "be other tissues, and of a strong field they are cut off at their limits: alone it is no proof.",
        "Ganzetti et al. 2016, doi:10.3389/fninf.2016.00010; the formula of MRIQC's cjv, whose classes are a "
        "segmentation and whose numbers are medians and MADs",
    ),
    Definition(
        ("cv_bright_before", "cv_bright_after"),
        "CV of the bright class",
        "sd / mean",
        "Lower is better if the CJV does not rise: it falls too when contrast is flattened.",
    ),
    Definition(
        ("foreground_cv_before", "foreground_cv_after"),
        "CV of the foreground (microscopy)",
        "sd / mean",
        "Lower is better if structures keep their contrast.",
    ),
    Definition(
        ("section_spread_before", "section_spread_after"),
        "spread of the section means (microscopy)",
        "(max - min) / mean, over the planes of the third axis",
        "Lower is better, unless the object itself differs from section to section.",
    ),
    Definition(
        ("seam_ratio_before", "seam_ratio_after"),
        "tile-seam ratio (microscopy)",
        "largest / median step of log v between neighbouring planes, beyond the steps on either side",
        "1 is seamless. A smooth field mends no seam, and must make none. A flat border of a layer counts like a seam.",
    ),
    Definition(
        ("seam_both_before", "seam_both_after"),
        "tile-seam ratio along both axes (microscopy)",
        "the smaller of the ratios of the first two axes",
        "Near 1 without seams, and where layers or a slab have flat borders along one axis alone.",
    ),
    Definition(
        ("saturated_fraction",),
        "saturated voxels",
        "|{v = ceiling}| / n; ceiling: largest storable or camera value, or a largest value that repeats",
        "Near 0. Where the detector was full, shading is lost for good.",
    ),
    Definition(
        ("mask_dark_fraction",),
        "dark voxels in the mask",
        "|{v < 0.05 P99(v)}| / n",
        "Small. Air in the mask has no field, and its noise outweighs the tissue.",
    ),
    Definition(
        ("bright_outside_fraction",),
        "bright outside of the mask",
        "|{outside: v ≥ P25(v)}| / n, of the corrected image",
        "Near 0 for a mask that was found by a threshold; 0.3 to 0.8 for that of a brain in a head. More among alike "
        "scans: the mask leaves something out.",
    ),
    Definition(
        ("mask_speckle_fraction",),
        "speckle of the mask",
        "|{voxels of the mask with at most one neighbour in it}| / n",
        "Below 0.03. A mask that went through noise is full of holes and grains.",
    ),
    Definition(
        ("wrapped_fraction",),
        "wrapped integers",
        "of voxels in the upper tenth of 8, 10, … 16 bits, those beside one lower by 0.6 of the range",
        "Only of integers that use up their bits. Near 0; near 1 where values beyond the largest began again at the "
        "smallest; n/a where these cannot be told from sharp borders.",
    ),
    Definition(
        ("log_entropy_before_bits", "log_entropy_after_bits"),
        "entropy of the log histogram",
        "-Σ p log2 p, bins of 5 % of intensity",
        "Lower is better if the CJV does not rise. It has no classes: it rises where the CJV is deceived.",
        "Likar et al. 2001, doi:10.1109/42.974934",
    ),
    Definition(
        ("inu_range",),
        "inu_range",
        "|P95(b) - P5(b)|",
        "The strength of the field: 0 is none. Compare scans of one scanner.",
        "Esteban et al. 2017, doi:10.1371/journal.pone.0184661 (MRIQC; over the mask here, over the brain there)",
    ),
    Definition(("inu_med",), "inu_med", "P50(b)", "About 1, since the mean intensity is kept.", "as inu_range"),
    Definition(
        ("field_min", "field_max"),
        "smallest and largest field",
        "min(b), max(b)",
        "Some tenths around ×1 at 3 T; far more at 7 T and near surface coils.",
    ),
    Definition(
        ("field_steepness",),
        "field steepness",
        "P99(|grad log b|) · edge of a cube as large as the mask",
        "0 to 2.5 for the field of a coil. Anatomy makes it steep, where little keeps the fit from bending.",
    ),
    Definition(
        ("repeatability_log",),
        "repeatability",
        "rms of log b1 - log b2, each less its mean: the fields of two halves of the samples, planes in turn",
        "Below 0.01. How much a field depends on which voxels were taken: how sure it is, not how right.",
    ),
    Definition(
        ("reference_r",),
        "r to the reference",
        "Pearson's correlation of our log field and the reference, SimpleITK's at its defaults",
        "Near 1 where there is a field to find, and lower without meaning where there is hardly one. The reference is "
        "another estimate, not the truth.",
    ),
    Definition(
        ("reference_slope",),
        "slope to the reference",
        "regression of our log field on the reference",
        "About 1; below 1, ours is the weaker field: it has left some of the shading, or SimpleITK's has absorbed "
        "contrast.",
    ),
    Definition(
        ("reference_rms_log", "reference_p99_log"),
        "rms and p99 of |Δlog|",
        "of |log b - log reference|, each less its mean",
        "A few hundredths (0.01 is 1 %) between two estimates; which of them is right it does not tell.",
    ),
    Definition(
        ("agreement_r", "agreement_rms_log", "agreement_max_log"),
        "check of our arithmetic",
        "r, rms and largest |Δlog| of our field and SimpleITK's, each less its mean: same settings, samples, mesh and "
        "number of iterations",
        "r 1.0000, rms below 5e-5: what SimpleITK's single precision leaves. Ours is made with preset itk for this "
        "check alone; the corrected image is that of your settings.",
    ),
    Definition(
        ("iterations_used", "iterations_max"),
        "iterations",
        "used, and the most allowed, over all stages",
        "Fewer used than allowed: it ended because it had converged.",
    ),
    Definition(
        ("mask_volume_ml",),
        "mask volume",
        "voxels of the mask × volume of a voxel",
        "Alike among subjects: 1000 to 1800 ml for a human brain, 2000 to 4500 ml for a head, 0.4 to 0.6 ml for the "
        "brain of a mouse. Far less or far more than in the other scans: look at the mask.",
    ),
    Definition(
        ("dropped_voxels",),
        "dropped voxels",
        "|{v ≤ 0 or not finite}| in the mask",
        "Few: they have no logarithm, and had no part in the estimate.",
    ),
    Definition(
        ("self_check_max",),
        "self-check",
        "max |corrected × b - original| / original, over the whole image as written",
        "About 1e-7: the rounding of float32, in which both are written.",
    ),
    Definition(
        ("mean_ratio",),
        "mean after / before",
        "mean(corrected) / mean(original)",
        "1: a constant factor may drift between image and field, and this workflow fixes it so that the mean stays.",
    ),
    Definition(
        ("field_from",),
        "field from",
        "name of the scan that the field was estimated on",
        "Only where the sheet says so. The field is applied as it is: the mean may change, and no reference is made.",
    ),
    Definition(
        ("outside_fraction",),
        "image outside of the field's",
        "voxels beyond the image that the field was estimated on / voxels",
        "Only with field_from. There the field is extrapolated: look for shading at those ends.",
    ),
    Definition(("wall_time_s",), "time", "seconds from reading to writing", "As usual for the size of the scan."),
)

#: A metric that is odd on either side.
EITHER = 2

#: Columns of metrics.tsv and of the dataset table: key, heading, digits, the direction that is worse (1, -1, `EITHER`;
#: 0 for none: nothing is an outlier by it).
COLUMNS: tuple[tuple[str, str, int, int], ...] = (
    ("cjv_before", "CJV before", 3, 0),
    ("cjv_after", "CJV after", 3, 1),
    ("cv_bright_before", "CV bright before", 3, 0),
    ("cv_bright_after", "CV bright after", 3, 0),
    ("foreground_cv_before", "foreground CV before", 3, 0),
    ("foreground_cv_after", "foreground CV after", 3, 1),
    ("section_spread_before", "section spread before", 3, 0),
    ("section_spread_after", "section spread after", 3, 1),
    ("seam_ratio_before", "seam ratio before", 2, 0),
    ("seam_ratio_after", "seam ratio after", 2, 1),
    ("seam_both_before", "seam ratio before, both axes", 2, 0),
    ("seam_both_after", "seam ratio after, both axes", 2, 0),
    ("saturated_fraction", "saturated", 4, 1),
    ("mask_dark_fraction", "dark in mask", 4, 1),
    ("bright_outside_fraction", "bright outside", 3, 1),
    ("mask_speckle_fraction", "speckle", 4, 1),
    ("wrapped_fraction", "wrapped", 3, 1),
    ("log_entropy_before_bits", "log entropy before (bits)", 2, 0),
    ("log_entropy_after_bits", "log entropy after (bits)", 2, 0),
    ("inu_range", "inu_range", 3, 1),
    ("inu_med", "inu_med", 3, 0),
    ("field_min", "field min (ratio)", 3, -1),
    ("field_max", "field max (ratio)", 3, 1),
    ("field_steepness", "field steepness", 2, 1),
    ("repeatability_log", "repeatability", 4, 1),
    ("reference_r", "r to reference", 4, 0),
    ("reference_slope", "slope to reference", 3, 0),
    ("reference_rms_log", "rms Δlog", 4, 1),
    ("reference_p99_log", "p99 |Δlog|", 4, 1),
    ("agreement_r", "r, same settings as SimpleITK", 6, 0),
    ("agreement_rms_log", "rms Δlog, same settings", 7, 0),
    ("agreement_max_log", "max |Δlog|, same settings", 7, 0),
    ("iterations_used", "iterations", 0, 0),
    ("iterations_max", "iterations max", 0, 0),
    ("mask_volume_ml", "mask (ml)", 0, EITHER),
    ("dropped_voxels", "dropped voxels", 0, 0),
    ("self_check_max", "self-check", 9, 0),
    ("mean_ratio", "mean after / before", 4, 0),
    ("wall_time_s", "time (s)", 1, 0),
    ("field_from", "field from", 0, 0),
    ("outside_fraction", "outside of the field's image", 3, 0),
)

#: The least MAD that outliers are measured by, in the unit of the metric, see `metrics.robust_z`: with a limit of 3.5,
#: 5.2 times as much is the least deviation from the median that makes an outlier.
FLOORS = {
    "cjv_after": 0.01, "foreground_cv_after": 0.01, "section_spread_after": 0.02, "seam_ratio_after": 0.05,
    "saturated_fraction": 0.001, "mask_dark_fraction": 0.01, "bright_outside_fraction": 0.02,
    "mask_speckle_fraction": 0.002, "wrapped_fraction": 0.02, "inu_range": 0.02, "field_min": 0.02, "field_max": 0.02,
    "field_steepness": 0.1, "repeatability_log": 0.001, "reference_rms_log": 0.005, "reference_p99_log": 0.01,
}  # fmt: skip

#: The same as a share of the median, for what has no scale of its own: 0.05 is 26 % off.
FLOOR_SHARES = {"mask_volume_ml": 0.05}

#: What the dataset table shows; metrics.tsv has every column.
SHOWN = (
    "cjv_before", "cjv_after", "foreground_cv_before", "foreground_cv_after", "section_spread_after",
    "seam_ratio_after", "saturated_fraction", "inu_range", "field_min", "field_max", "reference_r", "reference_rms_log",
    "iterations_used", "mask_volume_ml", "bright_outside_fraction", "field_from",
)  # fmt: skip
