"""What was done, in words for a paper: with the numbers, versions and references of this run."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from n4flow.errors import InputError
from n4flow.parameters import N4Parameters
from n4flow.qc.rendering import number
from n4flow.study.ratings import RATINGS, Rating, agreement

Metrics = Mapping[str, Any]

#: In full, by how the text cites them.
REFERENCES = {
    "Beaton & Tukey 1974": "The fitting of power series, meaning polynomials, illustrated on band-spectroscopic data. "
    "doi:10.1080/00401706.1974.10489171",
    "Cohen 1960": "A coefficient of agreement for nominal scales. doi:10.1177/001316446002000104",
    "Esteban et al. 2017": "MRIQC: advancing the automatic prediction of image quality in MRI from unseen sites. "
    "doi:10.1371/journal.pone.0184661",
    "Lee 1983": "Digital image smoothing and the sigma filter. doi:10.1016/0734-189X(83)90047-6",
    "Lee et al. 1997": "Scattered data interpolation with multilevel B-splines. doi:10.1109/2945.620490",
    "Lowekamp et al. 2013": "The design of SimpleITK. doi:10.3389/fninf.2013.00045",
    "Mölder et al. 2021": "Sustainable data analysis with Snakemake. doi:10.12688/f1000research.29032.2",
    "Otsu 1979": "A threshold selection method from gray-level histograms. doi:10.1109/TSMC.1979.4310076",
    "Sled et al. 1998": "A nonparametric method for automatic correction of intensity nonuniformity in MRI data. "
    "doi:10.1109/42.668698",
    "Tukey 1977": "Exploratory data analysis. Addison-Wesley",
    "Tustison et al. 2010": "N4ITK: improved N3 bias correction. doi:10.1109/TMI.2010.2046908",
}

#: By mask.method, with a place for the number of scans; ``given`` is a mask of the sheet.
MASKS = {
    "otsu": "what is brighter than a threshold between two classes of intensity (Otsu 1979) and no noise",
    "head": "what is brighter than a threshold between two classes of intensity (Otsu 1979) and no noise, closed",
    "percentile": "what is brighter than a percentile of the intensities",
    "given": "given with the images",
}


def methods_text(subjects: Sequence[Metrics], failed: int = 0, ratings: Sequence[Rating] = ()) -> str:
    """A section on methods, in Markdown.

    Parameters
    ----------
    subjects : sequence of mappings
        The metrics of all scans, with their ``flags``.
    failed : int
        Scans that could not be corrected.
    ratings : sequence of Rating
        What reviewers said, if they have.

    Returns
    -------
    str
        Every sentence is of this run; the references are those that it cites.
    """
    paragraphs = [" ".join(filter(None, part)) for part in (_correction(subjects, failed), _quality(subjects, ratings))]
    cited = [name for name in REFERENCES if any(name in paragraph for paragraph in paragraphs)]
    references = [f"- {name}: {REFERENCES[name]}" for name in cited]
    lines = ["# Methods", *paragraphs, "## References", "\n".join(references), _software(subjects)]
    lines.append("This text is in the public domain (CC0): take it as it is, or change it.")
    return "\n\n".join(filter(None, lines)) + "\n"


def _correction(subjects: Sequence[Metrics], failed: int) -> Iterator[str]:
    names = [str(s.get("name")) for s in subjects]
    suffixes = Counter(name.rpartition("_")[2] for name in names)
    people = len({name.partition("_")[0] for name in names})
    kinds = ", ".join(f"{count} {suffix}" for suffix, count in suffixes.most_common())
    version = _one([(s.get("versions") or {}).get("n4flow") for s in subjects]) or ""
    yield (
        f"The intensity non-uniformity (bias field) of {_scans(len(subjects))} of {people} "
        f"participant{'s' if people != 1 else ''} ({kinds}) was corrected with n4flow {version}, a Snakemake workflow "
        "(Mölder et al. 2021) that estimates the field as N4 does (Tustison et al. 2010): the histogram of log "
        "intensities in a mask is sharpened by deconvolution with a Gaussian (Sled et al. 1998), and a cubic B-spline "
        "is fitted to what that takes away, again and again."
    )
    own = [s for s in subjects if not s.get("field_from")]
    masks = Counter(str(s["mask_method"]) for s in own if s.get("mask_method") in MASKS)
    for method, count in masks.most_common():
        yield f"The mask {_of(count, len(own))}was {MASKS[method]}."
    series = [s for s in own if (s.get("frames") or 1) > 1]
    if series:
        part = sum((s.get("averaged_frames") or s["frames"]) < s["frames"] for s in series)
        low = f"; of {part}, diffusion, the mean of the frames of low b values" if part else ""
        yield f"The field of a series ({_scans(len(series))}) was that of the mean of its frames{low}."
    if weighted := sum(bool(s.get("weights")) for s in own):
        yield f"Of {_scans(weighted)}, voxels were weighted by given maps of confidence."
    levelled = [s["plane_gains"] for s in own if (s.get("plane_gains") or {}).get("Levelled")]
    if levelled:
        axes = " or ".join(sorted({str(gains["Axis"]) for gains in levelled}))
        yield (
            f"Before, planes along {axes} {_of(len(levelled), len(own))}were levelled: their gains, found from the "
            "most frequent change of the log intensity from plane to plane (biweight, Beaton & Tukey 1974) less a "
            "parabola along the axis, are part of the field."
        )
    yield from _settings(own)
    yield (
        "Images were divided by their field, which was scaled so that the mean intensity in the mask stays; nothing "
        "was resampled."
    )
    if len(own) < len(subjects):
        yield (
            f"Of these, {_scans(len(subjects) - len(own))} took the field of another scan of the same participant and "
            "session, as it is."
        )
    if failed:
        yield f"Beside these, {_scans(failed)} could not be processed."


def _settings(subjects: Sequence[Metrics]) -> Iterator[str]:
    """What the parameters of the estimate mean, if all scans have the same."""
    found = {json.dumps(s.get("parameters"), sort_keys=True) for s in subjects}
    try:
        known = json.loads(found.pop()) if len(found) == 1 else None
        p = N4Parameters.from_mapping(known) if known else None
    except InputError:
        p = None
    if p is None:
        yield "The parameters of each scan stand in the sidecar of its corrected image."
        return
    stages = p.stages
    several = len(stages) > 1
    most = _span([stage.most_iterations for stage in stages])
    width = _span([stage.fwhm for stage in stages])
    yield (
        f"The histogram had {p.histogram_bins} bins, the Gaussian a full width at half maximum of {width} in log "
        f"intensity{', narrowing' if several and stages[0].fwhm > stages[-1].fwhm else ''}"
        f"{f' over {len(stages)} stages' if several else ''}, and the Wiener filter a noise term of "
        f"{p.wiener_noise:g}; "
        f"{'a stage' if several else 'the estimate'} ended when the coefficient of variation of the update fell to "
        f"{p.convergence_threshold:g}, or after {most} iterations."
    )
    if p.strong_stage:
        yield (
            f"A stage of {p.strong_stage.fwhm:g} came first where the next was slow, and the histogram ended "
            "sharper with it."
        )
    shares = [stage.twicing for stage in stages]
    if any(shares):
        yield (
            f"Of what the expected intensity still lacked, {_span(shares)} was added to it, two times over (twicing, "
            "Tukey 1977)."
        )
    if p.spline_distance_mm:
        mesh = f"spans of {p.spline_distance_mm:g} mm"
    else:
        mesh = f"{' × '.join(map(str, p.spans or ()))} spans over the {p.domain}"
    refined = ", doubled from stage to stage" if p.refinements else ""
    if p.fit == "penalised":
        yield (
            f"The spline had {mesh} and was fitted by least squares with a penalty on bending (stiffness "
            f"{p.stiffness:g})."
        )
    else:
        yield f"The spline had {mesh}{refined} and was fitted by the approximation of Lee et al. 1997, as ITK does."
    yield (
        f"Samples were every {_ordinal(p.shrink_factor)} voxel of the mask along each axis."
        if p.shrink_factor and p.shrink_factor > 1
        else "Samples were the voxels of the mask, up to 1 million of its box."
    )
    if p.denoise:
        yield (
            f"Each was the mean of itself and those neighbours that differed by up to {p.denoise:g} standard "
            "deviations of the noise (sigma filter, Lee 1983), but where few grey levels were twice as wide; the "
            "corrected images were not filtered."
        )


def _quality(subjects: Sequence[Metrics], ratings: Sequence[Rating]) -> Iterator[str]:
    if not subjects:
        return
    low, high = _values(subjects, "field_min"), _values(subjects, "field_max")
    if low.size and high.size:
        yield (
            f"In the mask the fields ran from ×{np.median(low):.2f} to ×{np.median(high):.2f} in the median over scans "
            f"(all: ×{low.min():.2f} to ×{high.max():.2f})."
        )
    inu = _values(subjects, "inu_range")
    if inu.size:
        yield (
            "Their range from the 5th to the 95th percentile, MRIQC's inu_range (Esteban et al. 2017) over the mask, "
            f"was {_median_range(inu)}."
        )
    # no CJV: its classes are no tissues, and where a mask holds two of these, a class is half of one
    for first, last, what, unit in (
        (
            "log_entropy_before_bits",
            "log_entropy_after_bits",
            "The entropy of the log histogram",
            " bits",
        ),
        ("foreground_cv_before", "foreground_cv_after", "The coefficient of variation of the foreground", ""),
    ):
        both = [s for s in subjects if _known(s.get(first)) and _known(s.get(last))]
        if both:
            before, after = _values(both, first), _values(both, last)
            yield (
                f"{what} went from {np.median(before):.3f} to {np.median(after):.3f}{unit} in the median, and fell in "
                f"{int((after < before).sum())} of {_scans(len(both))}."
            )
    if (repeated := _values(subjects, "repeatability_log")).size:
        yield (
            "Two halves of the samples gave log fields that differ by "
            f"{_median_range(repeated, 4)} (rms, over {_scans(repeated.size)})."
        )
    halves = sum(bool(s.get("halves")) for s in subjects)
    if halves:
        yield f"Of {_scans(halves)}, with many samples, the field is the mean of those of both halves."
    ended = [s["converged"] for s in subjects if s.get("converged") is not None]
    if ended:
        yield f"The estimate converged in {sum(map(bool, ended))} of {_scans(len(ended))}."
    yield from _reference(subjects)
    flags = Counter(flag.partition(":")[0].replace("_", " ") for s in subjects for flag in s["flags"])
    flagged = sum(bool(s["flags"]) for s in subjects)
    named = f" ({', '.join(f'{name} {count}' for name, count in flags.most_common())})" if flags else ""
    yield f"Automatic checks flagged {flagged} of {_scans(len(subjects))}{named}."
    yield from _review(ratings)


def _reference(subjects: Sequence[Metrics]) -> Iterator[str]:
    rms = _values(subjects, "reference_rms_log")
    if not rms.size:
        return
    version = _one([(s.get("versions") or {}).get("simpleitk") for s in subjects if s.get("versions")]) or ""
    yield (
        f"For comparison, the fields of {_scans(rms.size)} were also estimated with SimpleITK"
        f"{f' {version}' if version else ''} (Lowekamp et al. 2013) at the defaults of its N4 filter; the log fields "
        f"differ by {_median_range(rms, 4)} (rms)."
    )
    same = _values(subjects, "agreement_rms_log")
    if same.size:
        yield (
            "With SimpleITK's settings, samples and number of iterations, the implementation gave its fields to "
            f"{same.max():.1e} (rms in log, the largest of {_scans(same.size)})."
        )


def _review(ratings: Sequence[Rating]) -> Iterator[str]:
    raters = sorted({rating.rater for rating in ratings})
    for rater in raters:
        given = Counter(rating.rating for rating in ratings if rating.rater == rater)
        counts = ", ".join(f"{given[rating]} {rating}" for rating in RATINGS)
        yield f"A reviewer ({rater}) rated {_scans(given.total())}: {counts}."
    for pair in agreement(ratings):
        kappa = f"kappa {pair.kappa:.2f}" if math.isfinite(pair.kappa) else "kappa undefined"
        yield (
            f"{pair.rater} and {pair.other} agreed on {pair.alike} of {_scans(pair.scans)} (Cohen's {kappa}; Cohen "
            "1960)."
        )


def _software(subjects: Sequence[Metrics]) -> str:
    """Versions of all that had a part, where all scans name the same; all of them where they differ."""
    found: dict[str, set[str]] = {}
    for subject in subjects:
        for name, version in (subject.get("versions") or {}).items():
            if version:
                found.setdefault(name, set()).add(str(version))
    named = ", ".join(f"{name} {' and '.join(sorted(versions))}" for name, versions in sorted(found.items()))
    return f"Software: {named}." if named else ""


def _known(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _values(subjects: Sequence[Metrics], key: str) -> np.ndarray:
    return np.array([s[key] for s in subjects if _known(s.get(key))], dtype=float)


def _median_range(values: np.ndarray, digits: int = 3) -> str:
    middle, low, high = (number(float(value), digits) for value in (np.median(values), values.min(), values.max()))
    return f"{middle} in the median ({low} to {high})"


def _one(values: Sequence[Any]) -> Any:
    """The value that all have that have one; None if they differ."""
    known = {value for value in values if value}
    return known.pop() if len(known) == 1 else None


def _span(values: Sequence[float]) -> str:
    return f"{values[0]:g}" if len(set(values)) == 1 else f"{values[0]:g} to {values[-1]:g}"


def _of(count: int, total: int) -> str:
    return "" if count == total else f"of {_scans(count)} "


def _scans(count: int) -> str:
    return f"{count} scan{'s' if count != 1 else ''}"


def _ordinal(n: int) -> str:
    return f"{n}{ {1: 'st', 2: 'nd', 3: 'rd'}.get(n % 10 if n % 100 not in (11, 12, 13) else 0, 'th') }"
