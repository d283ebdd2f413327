"""How to read the pages: a good correction of a simulated head, and six that were broken on purpose."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np

from n4flow.core.field import BiasField
from n4flow.core.phantom import make_phantom
from n4flow.core.quadrature import keep_mean_intensity
from n4flow.estimate import estimate_field
from n4flow.images.fields import load_field
from n4flow.images.files import atomic_text
from n4flow.images.nifti import Volume
from n4flow.images.sampling import read_samples
from n4flow.parameters import N4Parameters
from n4flow.qc.definitions import COLUMNS, DEFINITIONS
from n4flow.qc.flags import FLAG_LIMITS, FLAGS
from n4flow.qc.measuring import Subject, measure_subject
from n4flow.qc.pictures import data_uri, webp
from n4flow.qc.rendering import number, render
from n4flow.qc.subject_panels import field_panels, image_panel, plot_panels
from n4flow.steps.correct import correct_scan
from n4flow.steps.demo import load_tissues
from n4flow.steps.derivatives import CorrectionFiles, write_derivatives
from n4flow.steps.mask import mask_scan
from n4flow.steps.reference import mesh_of_samples, reference_parameters

#: The simulated head.
INU_PERCENT, NOISE_PERCENT, SEED = 60, 3, 7

#: Quality of the mosaics, so that all of them fit a page of 1.5 MB.
QUALITY = 60

#: The mesh that is too fine, and the strength of the drift and of the clipping.
FINE_MM, DRIFT, CLIP_PERCENT = 10.0, 1.3, 85


class _Made(NamedTuple):
    """What a correction was made from, and what came of it."""

    image: Path
    mask: Path
    files: CorrectionFiles


@dataclass(frozen=True)
class _Bench:
    """A folder with a scan, its mask and its good correction, in which others are made."""

    folder: Path
    scan: np.ndarray
    affine: np.ndarray

    @property
    def image(self) -> Path:
        return self.folder / "image.nii"

    @property
    def mask(self) -> Path:
        return self.folder / "mask.nii"

    def save(self, name: str, values: np.ndarray) -> Path:
        path = self.folder / name
        nib.save(nib.Nifti1Image(values, self.affine), path)
        return path

    def files(self, name: str) -> CorrectionFiles:
        kinds = ("corrected.nii", "corrected.json", "field.json")
        corrected, sidecar, field = (self.folder / f"{name}_{kind}" for kind in kinds)
        return CorrectionFiles(corrected, sidecar, field)

    def correct(self, name: str, image: Path, mask: Path, **parameters: Any) -> CorrectionFiles:
        correct_scan(image, mask, self.files(name), parameters=N4Parameters(**parameters), device="cpu")
        return self.files(name)

    def divide(self, name: str, field: BiasField) -> _Made:
        files, image, inputs = self.files(name), Volume(self.image), {"mask": self.mask}
        write_derivatives(image, inputs, files, field, {}, (), time.perf_counter(), keep_dtype=False, xp=np)
        return _Made(self.image, self.mask, files)

    def inside(self) -> np.ndarray:
        return np.asarray(nib.load(self.mask).dataobj) > 0  # type: ignore[attr-defined]

    def good_field(self) -> BiasField:
        return load_field(self.files("good").field)


def _too_fine(bench: _Bench) -> _Made:
    itk_fit = {"fit": "lee-wolberg-shin", "iterations": (200,), "fwhm": 0.12, "twicing": 0, "denoise": 0}
    files = bench.correct("fine", bench.image, bench.mask, **itk_fit, spline_distance_mm=FINE_MM)
    return _Made(bench.image, bench.mask, files)


def _leaking(bench: _Bench) -> _Made:
    inside = bench.inside()
    inside[:, : inside.shape[1] // 3] = True
    mask = bench.save("leaking_mask.nii", inside.astype(np.uint8))
    # it takes all iterations: on a part of the voxels, a page need not wait for them
    return _Made(bench.image, mask, bench.correct("leaking", bench.image, mask, shrink_factor=3))


def _inverted(bench: _Bench) -> _Made:
    good = bench.good_field()
    turned = replace(good, lattice=-good.lattice)
    _, intensity = read_samples(bench.image, bench.mask, N4Parameters())
    return bench.divide("inverted", keep_mean_intensity(turned, intensity, bench.image))


def _nothing(bench: _Bench) -> _Made:
    good = bench.good_field()
    return bench.divide("nothing", replace(good, lattice=0 * good.lattice))


def _drifted(bench: _Bench) -> _Made:
    return bench.divide("drifted", bench.good_field().shifted(np.log(DRIFT)))


def _clipped(bench: _Bench) -> _Made:
    ceiling = np.percentile(bench.scan[bench.inside()], CLIP_PERCENT)
    image = bench.save("clipped.nii", np.minimum(bench.scan, ceiling))
    return _Made(image, bench.mask, bench.correct("clipped", image, bench.mask))


class Case(NamedTuple):
    """A correction that is broken on purpose."""

    key: str
    title: str
    how: str
    look: str
    make: Callable[[_Bench], _Made]
    panels: tuple[str, ...]  # by title, those in which one sees it
    numbers: tuple[str, ...]  # keys of the metrics that show it


IMAGES = {"Original, with the mask": "original", "Corrected": "corrected"}

CASES = (
    Case(
        "fine",
        "Too fine a mesh",
        f"Corrected on a mesh of {FINE_MM:g} mm with the fit that ITK has, which does not resist bending.",
        "The field follows ventricles, skull and scalp, and takes their contrast out of the image: in the histogram "
        "the tissues move together, and the CJV rises.",
        _too_fine,
        ("Corrected", "Bias field", "Histogram in the mask"),
        ("field_steepness", "field_min", "field_max", "inu_range", "cjv_after"),
    ),
    Case(
        "leaking",
        "Leaking mask",
        "Corrected on a mask that also holds the air of the hindmost third of the image.",
        "The outline on the original leaves the head. Noise has no field, but its logarithm spreads far: the field "
        "goes its own way where the air is, and the head beside that is shaded anew. The CJV rises.",
        _leaking,
        ("Original, with the mask", "Bias field", "Histogram in the mask"),
        ("mask_dark_fraction", "mask_volume_ml", "log_entropy_after_bits", "inu_range", "cjv_after"),
    ),
    Case(
        "inverted",
        "Inverted field",
        "The good field with its sign turned: the image was multiplied by what it should have been divided by.",
        "What was bright is brighter: the profile of the corrected image leaves 1 further than that of the original. "
        "CJV and entropy rise. Where the reference is on, r is near -1.",
        _inverted,
        ("Corrected", "Bias field", "Profile along the field"),
        ("log_entropy_after_bits", "log_entropy_before_bits", "cv_bright_before", "cv_bright_after", "cjv_after"),
    ),
    Case(
        "nothing",
        "No correction",
        "A field of 1 everywhere: the output is the input.",
        "The field map is blank, original and corrected are alike, and the profile keeps its slope. A scan without a "
        "field gives the same numbers and is fine: only the eye tells these two apart, by the shading in the image.",
        _nothing,
        ("Corrected", "Bias field", "Profile along the field"),
        ("inu_range", "field_min", "field_max", "cjv_before", "cjv_after"),
    ),
    Case(
        "drifted",
        "Scale drift",
        f"The good field times {DRIFT:g}: the corrected image is darker by a constant factor.",
        "The image looks right, since its window follows it, and the CJV is that of the good correction. The field is "
        "red as a whole, and the histogram moves as a whole. Intensities of different subjects compare no longer.",
        _drifted,
        ("Corrected", "Bias field", "Histogram in the mask"),
        ("mean_ratio", "inu_med", "field_min", "field_max", "cjv_after"),
    ),
    Case(
        "clipped",
        "Clipped input",
        f"The brightest {100 - CLIP_PERCENT} % of the original in the mask were cut off before the correction.",
        "The original has flat, white regions, and a wall at the right end of its histogram. There the field is no "
        "longer in the image: the estimate is too weak, and dividing by it brings out a false shading. Do not be "
        "pleased by the CJV.",
        _clipped,
        ("Original, with the mask", "Bias field", "Histogram in the mask"),
        ("saturated_fraction", "inu_range", "field_min", "field_max", "cjv_after"),
    ),
)

#: What each panel shows, by its title, in the order of the guide: a wide one and a narrow one fill a row.
MAPS = {
    "Original, with the mask": "Slices through the mask, which is outlined. The scan as it came.",
    "Bias field": "What the original was divided by: red where it was too bright, blue where it was too dark.",
    "Corrected": "The same slices in the same window; on the page of a scan, the two swap in place.",
    "Reference field": "The field that SimpleITK finds at its own defaults in the same mask, on every 3rd or 4th voxel "
    "of a head: another estimate, not the truth. Here our arithmetic finds it, with SimpleITK's settings.",
    "Difference": "Log of ours over the reference, each less its mean, in a window a quarter as wide. SimpleITK's last "
    "mesh has 8 spans an axis and takes some anatomy with it: blobs here. That our arithmetic is right, numbers check, "
    "with its settings and iterations.",
}
PLOTS = {
    "Histogram in the mask": "Intensities before and after.",
    "Profile along the field": "Mean of the bright class, plane by plane along the axis in which the field varies "
    "most.",
    "Convergence": "How much each iteration still changed the field: a line per stage.",
    "Ours against the reference": "A point per voxel of the mask, log fields less their means.",
}


def make_guide(
    tissues: str | Path, page: str | Path, *, field_window_log: float, flags: Mapping[str, float] = FLAG_LIMITS
) -> None:
    """Simulate a head, correct it well and badly, and write the page that explains the panels with it.

    Parameters
    ----------
    tissues : path-like
        4-D image of grey matter, white matter and fluid, 0 to 255.
    page : path-like
        One HTML file that needs no other.
    field_window_log, flags
        As in `measuring.measure_subject`, so that the guide shows what the pages of the dataset show.
    """
    limits: dict[str, Any] = {"field_window_log": field_window_log, "flags": flags}
    with TemporaryDirectory() as folder:
        bench = _set_up(Path(folder), Path(tissues))
        files, reference = bench.files("good"), bench.files("reference")
        good = measure_subject(
            name="sub-good_T1w",
            image=bench.image,
            mask=bench.mask,
            corrected=files.corrected,
            field=files.field,
            sidecar=files.sidecar,
            mask_sidecar=bench.folder / "mask.json",
            reference_field=reference.field,
            reference_sidecar=reference.sidecar,
            **limits,
        )
        cases = [_broken(case, bench, good, limits) for case in CASES]
        drawn = _panels(good, {*MAPS, *PLOTS})
        html = render(
            "guide.html",
            maps=[{**drawn[title], "what": what} for title, what in MAPS.items()],
            plots=[{**drawn[title], "what": what} for title, what in PLOTS.items()],
            good_flags=_worded(good),
            cases=cases,
            metrics=DEFINITIONS,
            flags=[(name, flag, flags.get(name)) for name, flag in FLAGS.items()],
            inu_percent=INU_PERCENT,
        )
    with atomic_text(page) as file:
        file.write(html)


def _set_up(folder: Path, tissues: Path) -> _Bench:
    template = load_tissues(tissues)
    shares, size_mm = np.asarray(template.dataobj), float(template.header.get_zooms()[0])
    phantom = make_phantom(shares, size_mm, inu_percent=INU_PERCENT, noise_percent=NOISE_PERCENT, seed=SEED)
    bench = _Bench(folder, phantom.image, template.affine)
    bench.save(bench.image.name, phantom.image)
    mask_scan(bench.image, None, bench.mask, folder / "mask.json", method="otsu", percentile=50)
    bench.correct("good", bench.image, bench.mask)
    _reference(bench)
    return bench


def _reference(bench: _Bench) -> _Made:
    """What SimpleITK finds: by our passes, which come to the same in a thirtieth of the time."""
    mask_voxels = int(np.count_nonzero(bench.inside()))
    parameters = reference_parameters(bench.scan.shape, mask_voxels)
    samples, intensity = read_samples(bench.image, bench.mask, parameters)
    field = estimate_field(samples, parameters, mesh=mesh_of_samples(samples)).field
    return bench.divide("reference", keep_mean_intensity(field, intensity, bench.image))


def _broken(case: Case, bench: _Bench, good: Subject, limits: Mapping[str, Any]) -> dict[str, Any]:
    """A case with its panels, its numbers beside the good ones, and its flags."""
    image, mask, files = case.make(bench)
    subject = measure_subject(
        name=f"sub-{case.key}_T1w",
        image=image,
        mask=mask,
        corrected=files.corrected,
        field=files.field,
        sidecar=files.sidecar,
        **limits,
    )
    drawn = _panels(subject, case.panels)
    columns = {key: (heading, digits) for key, heading, digits, _ in COLUMNS}
    rows = []
    for key in case.numbers:
        heading, digits = columns[key]
        rows.append((heading, number(good.values[key], digits), number(subject.values[key], digits)))
    return {
        "key": case.key,
        "title": case.title,
        "how": case.how,
        "look": case.look,
        "panels": [drawn[title] for title in case.panels],
        "numbers": rows,
        "flags": _worded(subject),
    }


def _panels(subject: Subject, titles: Collection[str]) -> dict[str, dict[str, Any]]:
    """Panels of a scan by title."""
    found = {}
    for title, image in IMAGES.items():
        if title in titles:
            panel = image_panel(subject, (image,))
            for layer in panel["layers"]:
                layer["source"] = data_uri(webp(layer.pop("picture"), QUALITY))
            found[title] = panel | {"title": title}
    return found | {panel["title"]: panel for panel in [*field_panels(subject, titles), *plot_panels(subject, titles)]}


def _worded(subject: Subject) -> list[list[str]]:
    return [flag.split(": ", 1) for flag in subject.values["flags"]]
