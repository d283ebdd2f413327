"""The text for a paper: every sentence is of the run, and what is not there is not said."""

import re
from dataclasses import asdict

import pytest

from n4flow.parameters import PRESETS, N4Parameters
from n4flow.qc.methods import MASKS, REFERENCES, methods_text
from n4flow.steps import mask
from n4flow.study.ratings import Rating

VERSIONS = {"n4flow": "0.1.0", "numpy": "2.4.6", "simpleitk": "2.5.2"}


def scans(count=4, preset="default", **change):
    parameters = asdict(N4Parameters.from_mapping({"preset": preset}))
    return [
        {
            "name": f"sub-{n // 2:02d}_ses-{n % 2}_T1w",
            "flags": ["field_steep: steep", "outlier: far"] if n == 3 else [],
            "parameters": parameters,
            "versions": VERSIONS,
            "mask_method": "otsu",
            "field_min": 0.8 - n / 50,
            "field_max": 1.2 + n / 50,
            "inu_range": 0.2 + n / 100,
            "log_entropy_before_bits": 0.6,
            "log_entropy_after_bits": 0.5 + 0.04 * n,
            "repeatability_log": 0.001 * (n + 1),
            "converged": n > 0,
            **change,
        }
        for n in range(count)
    ]


def test_the_numbers_are_those_of_the_run():
    text = methods_text(scans(), failed=2)
    for said in (
        "4 scans of 2 participants (4 T1w) was corrected with n4flow 0.1.0",
        "Beside these, 2 scans could not be processed",
        "from ×0.77 to ×1.23 in the median over scans (all: ×0.74 to ×1.26)",
        "0.215 in the median (0.200 to 0.230)",
        "The entropy of the log histogram went from 0.600 to 0.560 bits in the median, and fell in 3 of 4 scans",
        "0.0025 in the median (0.0010 to 0.0040) (rms, over 4 scans)",
        "converged in 3 of 4 scans",
        "flagged 1 of 4 scans (field steep 1, outlier 1)",
        "Software: n4flow 0.1.0, numpy 2.4.6, simpleitk 2.5.2.",
        "(CC0)",
    ):
        assert said in text, said


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_every_preset_is_told_by_its_own_values(preset):
    p = N4Parameters.from_mapping({"preset": preset})
    text = methods_text(scans(preset=preset))
    assert f"The histogram had {p.histogram_bins} bins" in text
    assert f"fell to {p.convergence_threshold:g}, or after {p.iterations[0]}" in text
    assert ("(stiffness 2e-06)" in text) == (p.fit == "penalised" and p.stiffness == 2e-6)
    assert ("the approximation of Lee et al. 1997" in text) == (p.fit != "penalised")
    assert ("doubled from stage to stage" in text) == (p.mesh == "refined")
    assert ("Tukey 1977" in text) == any(stage.twicing for stage in p.stages)
    assert ("A stage of 0.45 came first where" in text) == (p.strong_stage is not None)
    assert ("Lee 1983" in text) == (p.denoise > 0)
    mesh = f"spans of {p.spline_distance_mm:g} mm" if p.spline_distance_mm else f"spans over the {p.domain}"
    assert mesh in text


def test_what_is_not_there_is_not_said():
    bare = [{"name": "sub-01_SPIM", "flags": [], "foreground_cv_before": 0.4, "foreground_cv_after": 0.3}]
    text = methods_text(bare)
    assert "of the foreground went from 0.400 to 0.300" in text
    assert "The parameters of each scan stand in the sidecar" in text
    for absent in ("SimpleITK", "entropy", "reviewer", "another scan", "converged", "Software", "nan", "None"):
        assert absent not in text
    assert methods_text([], failed=3).startswith("# Methods")


def test_only_what_is_cited_is_listed():
    text = methods_text(scans(reference_rms_log=0.03, agreement_rms_log=2e-6))
    body, references = text.split("## References")
    listed = re.findall(r"^- ([^:]+):", references, re.M)
    assert listed == [name for name in REFERENCES if name in body]
    assert "Lowekamp et al. 2013" in listed
    assert "Cohen 1960" not in listed
    assert "the fields of 4 scans were also estimated with SimpleITK 2.5.2" in body
    assert "to 2.0e-06 (rms in log, the largest of 4 scans)" in body


def test_settings_that_differ_are_not_told_as_one():
    text = methods_text([*scans(2), *scans(2, preset="itk")])
    assert "The parameters of each scan stand in the sidecar" in text
    assert "bins" not in text


def test_masks_and_fields_of_others_are_counted():
    some = scans(6)
    some[0]["mask_method"] = "given"
    some[1] |= {"mask_method": None, "field_from": "sub-00_ses-0_T1w"}
    some[2]["weights"] = "confidence.nii.gz"
    some[3] |= {"frames": 60, "averaged_frames": 60}
    some[4] |= {"frames": 60, "averaged_frames": 6}
    text = methods_text(some)
    assert (
        "a series (2 scans) was that of the mean of its frames; of 1, diffusion, the mean of the frames of low" in text
    )
    assert "Of 1 scan, voxels were weighted" in text
    assert f"The mask of 4 scans was {MASKS['otsu']}." in text
    assert "The mask of 1 scan was given with the images." in text
    assert "Of these, 1 scan took the field of another scan" in text
    assert {*mask.MaskMethod.__args__, "given"} == set(MASKS)


def test_ratings_are_counted_with_kappa():
    blank = dict.fromkeys(Rating._fields, "")
    ratings = [
        Rating(**blank | {"participant_id": f"sub-{n}", "modality": "T1w", "rater": rater, "rating": rating})
        for rater, letters in (("ann", ("pass", "fail")), ("bo", ("pass", "warn")))
        for n, rating in enumerate(letters)
    ]
    text = methods_text(scans(), ratings=ratings)
    assert "A reviewer (ann) rated 2 scans: 1 pass, 0 warn, 1 fail." in text
    assert "ann and bo agreed on 1 of 2 scans (Cohen's kappa 0.33; Cohen 1960)." in text
    assert "- Cohen 1960:" in text
