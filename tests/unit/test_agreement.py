"""The estimate against SimpleITK and against ANTs, at threshold 0 and equal iteration counts.

Both run the same ITK filter in single precision, ours runs in double: what is left is their rounding. It grows over the
iterations, where the intensities are few and the voxels too, so that one that changes bin counts for more.
"""

from dataclasses import replace
from functools import cache
from typing import NamedTuple

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from n4flow import N4Parameters, correct
from n4flow.core.field import Mesh
from n4flow.core.samples import sample_positions
from n4flow.errors import InputError
from n4flow.estimate import estimate_field
from n4flow.steps.mask import otsu_threshold
from tests.conftest import lee_wolberg_shin, rms, samples_of
from tests.unit.references import (
    DEFAULT_HISTOGRAM,
    ants_log_field,
    ants_padding,
    import_ants,
    itk_image,
    itk_positions,
    shrink_positions,
    simpleitk_log_field,
)

pytestmark = pytest.mark.usefixtures("kernel_set")


class Schedule(NamedTuple):
    """Levels of the estimate, and how near the reference it must come."""

    mesh: str
    iterations: tuple[int, ...]
    spans: tuple[int, ...]
    bar_rms: float
    bar_max: float


ONE_ITERATION = Schedule("fixed", (1,), (1, 1, 1), 1e-7, 1e-6)
ANISOTROPIC_ITERATION = Schedule("fixed", (1,), (4, 2, 3), 1e-7, 1e-6)
FIXED = Schedule("fixed", (50,), (4, 5, 4), 1e-5, 3e-4)
REFINED = Schedule("refined", (20, 20, 20, 20), (1, 1, 1), 1e-5, 3e-4)
ANISOTROPIC = Schedule("refined", (20, 20, 20), (2, 1, 3), 1e-5, 3e-4)
# part of the T1w, shrunk, is 15 000 voxels of 120 intensities, and there SimpleITK moves by more than the bar with its
# number of threads alone, as a test below shows; the whole T1w keeps the bar
REFINED_PART_OF_T1W = REFINED._replace(bar_rms=5e-5, bar_max=1e-3)

SCHEDULES = [
    pytest.param(ONE_ITERATION, id="one iteration"),
    pytest.param(ANISOTROPIC_ITERATION, id="one iteration, 4x2x3 spans"),
    pytest.param(FIXED, id="fixed 4x5x4 spans, 50 iterations"),
    pytest.param(REFINED, id="refined, 4x20 iterations"),
    pytest.param(ANISOTROPIC, id="refined from 2x1x3 spans, 3x20 iterations"),
]
AS_ITK_HAS_IT = "FWHM 0.15, as ITK has it"
HISTOGRAMS = {
    "100 bins": {"histogram_bins": 100},
    "300 bins": {"histogram_bins": 300},
    AS_ITK_HAS_IT: {"fwhm": 0.15},
    "FWHM 0.3": {"fwhm": 0.3},
    "Wiener noise 0.1": {"wiener_noise": 0.1},
    "all three": {"histogram_bins": 150, "fwhm": 0.1, "wiener_noise": 0.003},
}
#: Scans and shrink factors, and with which of the two, that have the same filter, one is compared over 4x20 iterations.
#: Shrunk by 4, too little is left of the perfusion series.
SCANS = {
    ("phantom", 1): "SimpleITK",
    ("phantom", 2): "ANTs",
    ("phantom", 4): "ANTs",
    ("T1w", 1): "ANTs",
    ("T1w", 2): "SimpleITK",
    ("T1w", 4): "ANTs",
    ("4-D mean", 1): "SimpleITK",
    ("4-D mean", 2): "ANTs",
    ("MNI head", 1): "ANTs",
    ("MNI head", 2): "ANTs",
    ("MNI head", 4): "SimpleITK",
}


def scans_for(program):
    """Each scan over one iteration, and over more those that this program is to be compared on."""
    return [
        pytest.param(
            *scan,
            schedule,
            marks=[] if scan[0] == "phantom" else pytest.mark.data,
            id=f"{scan[0]}-{scan[1]}-{'one iteration' if schedule is ONE_ITERATION else '4x20 iterations'}",
        )
        for scan, over_many in SCANS.items()
        for schedule in (ONE_ITERATION, REFINED)
        if schedule is ONE_ITERATION or over_many == program
    ]


@pytest.fixture(scope="session")
def ants():
    return import_ants()


@pytest.fixture(scope="module")
def small_head(head):
    """Every fourth voxel of the phantom, with its Otsu mask."""
    image = head.image[::4, ::4, ::4]
    return image, image > otsu_threshold(image.ravel())


@pytest.fixture(scope="module")
def scan(head, request):
    """A function that gives the image and the mask of a scan by its name."""

    @cache
    def load(name):
        if name == "phantom":
            return head.image, head.image > otsu_threshold(head.image.ravel())
        bids = request.getfixturevalue("real_scans")
        paths = {
            "T1w": bids / "sub-01" / "anat" / "sub-01_T1w.nii.gz",
            "4-D mean": bids / "sub-02" / "perf" / "sub-02_asl.nii.gz",
            "MNI head": bids.parent / "mni152" / "t1.nii.gz",
        }
        if not paths[name].is_file():
            pytest.skip(f"the {name} is not there: no {paths[name].name} in {paths[name].parent.name}")
        image = np.asarray(nib.load(paths[name]).dataobj, dtype=np.float32)
        image = image.mean(axis=-1) if image.ndim == 4 else image
        return image, image > otsu_threshold(image[::2, ::2, ::2].ravel())

    return load


def central(arrays, shrink_factor):
    """The middle of arrays: about as many samples at each shrink factor, few enough to be quick."""
    sizes = [min(n, 26 * shrink_factor) for n in arrays[0].shape]
    part = tuple(slice((n - size) // 2, (n + size) // 2) for n, size in zip(arrays[0].shape, sizes, strict=True))
    return [np.ascontiguousarray(array[part]) for array in arrays]


def our_field(image, mask, schedule, *, weights=None, histogram=DEFAULT_HISTOGRAM):
    """Our estimate on all voxels of an array, with ITK's mesh and the place it gives the last voxel."""
    parameters = lee_wolberg_shin(
        schedule.iterations, mesh=schedule.mesh, shrink_factor=1, convergence_threshold=0, **histogram
    )
    positions = tuple(itk_positions(n, n) for n in image.shape)
    samples = replace(samples_of(image, mask), positions=positions, weights=weights)
    ours = estimate_field(samples, parameters, mesh=Mesh.of_grid(image.shape, schedule.spans))
    assert len(ours.history) == sum(schedule.iterations)
    return ours.field


def check(ours, reference, inside, schedule):
    """Compare two log fields inside a mask, up to their free constant."""
    difference = (ours - reference)[inside]
    difference -= difference.mean()
    assert np.std(reference[inside]) > 20 * schedule.bar_rms  # there was something to agree on
    assert rms(difference) <= schedule.bar_rms
    assert np.abs(difference).max() <= schedule.bar_max


def check_against_simpleitk(image, mask, schedule, **settings):
    field = our_field(image, mask, schedule, **settings)
    reference = simpleitk_log_field(image, mask, schedule.iterations, schedule.spans, **settings)
    check(field.log_at([itk_positions(n, n) for n in image.shape]), reference, mask, schedule)


def check_against_ants(ants, image, mask, schedule, *, shrink_factor=1, distance=None, weights=None, **settings):
    """Do to the arrays what ANTs does around the filter, and compare on the image's own grid."""
    options = {"shrink_factor": shrink_factor, "weights": weights, **settings}
    reference = ants_log_field(ants, image, mask, schedule.iterations, distance or schedule.spans, **options)
    settings.pop("voxel_size_mm", None)
    padding = [(0, 0)] * 3
    if distance:
        spans, padding = ants_padding(image.shape, options.get("voxel_size_mm", (1, 1, 1)), distance)
        schedule = schedule._replace(spans=spans)
    padded = [None if array is None else np.pad(array, padding) for array in (image, mask, weights)]
    whole = padded[0].shape
    grid = np.ix_(*shrink_positions(whole, shrink_factor, [before for before, _ in padding]))
    shrunk_image, shrunk_mask, shrunk_weights = (None if array is None else array[grid] for array in padded)
    field = our_field(shrunk_image, shrunk_mask, schedule, weights=shrunk_weights, **settings)
    ours = field.log_at(
        [
            itk_positions(m, n)[before : n - after]
            for m, n, (before, after) in zip(shrunk_image.shape, whole, padding, strict=True)
        ]
    )
    check(ours, reference, mask, schedule)


# Meshes and histogram settings, on a phantom


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_meshes_agree_with_simpleitk(small_head, schedule):
    check_against_simpleitk(*small_head, schedule)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_meshes_agree_with_ants(ants, small_head, schedule):
    check_against_ants(ants, *small_head, schedule)


@pytest.mark.parametrize(
    ("settings", "schedule"),
    [
        *(pytest.param(settings, ONE_ITERATION, id=name) for name, settings in HISTOGRAMS.items()),
        *(pytest.param(HISTOGRAMS[name], FIXED, id=f"{name}, 50 iterations") for name in (AS_ITK_HAS_IT, "all three")),
    ],
)
def test_histogram_settings_agree_with_simpleitk(small_head, settings, schedule):
    check_against_simpleitk(*small_head, schedule, histogram={**DEFAULT_HISTOGRAM, **settings})


def test_histogram_settings_agree_with_ants(ants, small_head):
    check_against_ants(ants, *small_head, FIXED, histogram={"histogram_bins": 150, "fwhm": 0.1, "wiener_noise": 0.003})


def test_two_dimensions_agree_with_simpleitk(head):
    image = head.image[:, :, 45]
    mask = image > otsu_threshold(image.ravel())
    parameters = lee_wolberg_shin((30,), shrink_factor=1, convergence_threshold=0)
    samples = samples_of(image[:, :, None], mask[:, :, None])
    ours = estimate_field(samples, parameters, mesh=Mesh.of_grid(samples.image_shape, (4, 4, 0))).field
    reference = simpleitk_log_field(image, mask, (30,), (4, 4))
    check(ours.log_at(samples.positions)[:, :, 0], reference, mask, FIXED)


# Scans, and the samples that a shrink factor leaves


def with_bar(schedule, name, shrink_factor):
    part_of_t1w = name == "T1w" and shrink_factor == 2
    return REFINED_PART_OF_T1W if part_of_t1w and schedule is REFINED else schedule


@pytest.mark.parametrize(("name", "shrink_factor", "schedule"), scans_for("SimpleITK"))
def test_scans_agree_with_simpleitk(scan, name, shrink_factor, schedule):
    image, mask = central(scan(name), shrink_factor)
    grid = np.ix_(*shrink_positions(image.shape, shrink_factor))
    check_against_simpleitk(image[grid], mask[grid], with_bar(schedule, name, shrink_factor))


@pytest.mark.parametrize(("name", "shrink_factor", "schedule"), scans_for("ANTs"))
def test_scans_agree_with_ants(ants, scan, name, shrink_factor, schedule):
    part = central(scan(name), shrink_factor)
    check_against_ants(ants, *part, with_bar(schedule, name, shrink_factor), shrink_factor=shrink_factor)


@pytest.mark.data
def test_a_whole_t1w_agrees_with_simpleitk(scan):
    image, mask = scan("T1w")
    grid = np.ix_(*shrink_positions(image.shape, 4))
    check_against_simpleitk(image[grid], mask[grid], REFINED)


@pytest.mark.data
def test_simpleitk_alone_moves_by_more_than_the_bar_on_part_of_a_t1w(scan):
    image, mask = central(scan("T1w"), 2)
    grid = np.ix_(*shrink_positions(image.shape, 2))
    image, mask = image[grid], mask[grid]
    given = image, mask, REFINED.iterations, REFINED.spans
    one, more = (simpleitk_log_field(*given, **threads)[mask] for threads in ({}, {"threads": 2}))
    assert rms(more - one - (more - one).mean()) > REFINED.bar_rms


@pytest.mark.parametrize("shrink_factor", [1, 2, 3, 4, 5])
def test_samples_are_those_of_itk(head, shrink_factor):
    shrunk = sitk.GetArrayFromImage(sitk.Shrink(itk_image(head.image), [shrink_factor] * 3)).T
    assert (head.image[np.ix_(*sample_positions(head.image.shape, shrink_factor))] == shrunk).all()
    assert (head.image[np.ix_(*shrink_positions(head.image.shape, shrink_factor))] == shrunk).all()


def border_differences(image, schedule):
    """Rms difference from SimpleITK where the mask is the whole image: voxels at their places, then at those of ITK."""
    mask = np.ones(image.shape, dtype=bool)
    assert (image > 0).all()
    reference = simpleitk_log_field(image, mask, schedule.iterations, schedule.spans)
    mesh = Mesh.of_grid(image.shape, schedule.spans)
    parameters = lee_wolberg_shin(schedule.iterations, mesh=schedule.mesh, shrink_factor=1, convergence_threshold=0)
    own = samples_of(image, mask)
    moved = replace(own, positions=tuple(itk_positions(n, n) for n in image.shape))
    differences = (
        (estimate_field(samples, parameters, mesh=mesh).field.log_at(samples.positions) - reference)[mask]
        for samples in (own, moved)
    )
    return [rms(difference - difference.mean()) for difference in differences]


@pytest.mark.parametrize(
    ("schedule", "own_bar", "moved_bar"),
    [
        pytest.param(ONE_ITERATION, 5e-7, ONE_ITERATION.bar_rms, id="one iteration"),
        pytest.param(REFINED, 2e-5, 5e-6, id="refined, 4x20 iterations"),
    ],
)
def test_where_a_mask_reaches_the_border_the_place_itk_gives_the_last_voxel_is_the_difference(
    head, schedule, own_bar, moved_bar
):
    """See `Mesh.of_grid`. Our voxels stay where they are, which a flip of the image does not change."""
    own, moved = border_differences(np.ascontiguousarray(head.image[30:70, 35:75, 40:50]), schedule)
    assert moved <= moved_bar
    assert 2 * moved < own <= own_bar


@pytest.mark.data
def test_the_place_itk_gives_the_last_voxel_matters_on_a_thin_stack(scan):
    """The 4-D mean has 10 planes when shrunk, and its mask reaches the last one."""
    image, mask = scan("4-D mean")
    grid = np.ix_(*shrink_positions(image.shape, 2))
    image, mask = image[grid], mask[grid]
    assert mask[:, :, -1].any()
    parameters = lee_wolberg_shin((20,) * 4, mesh="refined", shrink_factor=1, convergence_threshold=0)
    samples = samples_of(image, mask)
    ours = estimate_field(samples, parameters, mesh=Mesh.of_grid(image.shape, (1, 1, 1))).field
    reference = simpleitk_log_field(image, mask, REFINED.iterations, REFINED.spans)
    check(ours.log_at(samples.positions), reference, mask, REFINED._replace(bar_rms=5e-5, bar_max=2e-3))


# Confidence weights


@pytest.fixture(scope="module")
def confidence(small_head):
    """Weights from 0 to 3 that vary over the head, a tenth of them 0."""
    image, _ = small_head
    rng = np.random.default_rng(5)
    weights = rng.uniform(0, 3, image.shape) * np.linspace(0.2, 1, image.shape[0])[:, None, None]
    return np.where(rng.random(image.shape) < 0.1, 0, weights).astype(np.float32)


@pytest.mark.parametrize("shrink_factor", [1, 2])
@pytest.mark.parametrize("schedule", [ONE_ITERATION, REFINED], ids=["one iteration", "4x20 iterations"])
def test_weights_agree_with_ants(ants, small_head, confidence, schedule, shrink_factor):
    image, mask = small_head
    if shrink_factor == 2:
        image, mask, confidence = (
            np.kron(array, np.ones((2, 2, 2), array.dtype)) for array in (image, mask, confidence)
        )
        image += np.random.default_rng(6).normal(0, 10, image.shape).astype(np.float32).clip(-20, 20)
    check_against_ants(ants, image, mask, schedule, shrink_factor=shrink_factor, weights=confidence)


def test_weights_of_0_and_1_are_a_mask_to_simpleitk(small_head, confidence):
    image, mask = small_head
    weights = (confidence > 0).astype(np.float32)
    field = our_field(image, mask, FIXED, weights=weights)
    reference = simpleitk_log_field(image, mask & (confidence > 0), FIXED.iterations, FIXED.spans)
    check(field.log_at([itk_positions(n, n) for n in image.shape]), reference, mask, FIXED)


def test_weights_of_correct_agree_with_ants(ants, small_head, confidence):
    """From the arrays to the field, with an odd number of voxels per axis: ANTs then pads alike on both sides."""
    image, mask, weights = (array[:25, :29, :23] for array in (*small_head, confidence))
    parameters = lee_wolberg_shin(
        (20, 20), mesh="refined", spline_distance_mm=20, shrink_factor=1, convergence_threshold=0
    )
    ours = correct(image, mask, voxel_size_mm=(1, 1, 1), weights=weights, parameters=parameters, device="cpu")
    reference = ants_log_field(ants, image, mask, parameters.iterations, 20, weights=weights)
    check(np.log(ours.bias.astype(np.float64)), reference, mask, REFINED)


@pytest.mark.parametrize("parameters", [N4Parameters(shrink_factor=1), lee_wolberg_shin(shrink_factor=1)])
def test_weights_matter_and_their_scale_does_not(small_head, confidence, parameters):
    image, mask = small_head
    options = {"voxel_size_mm": (6, 6, 6), "device": "cpu", "parameters": parameters}
    plain, weighted, scaled = (
        np.log(correct(image, mask, weights=weights, **options).bias[mask])
        for weights in (None, confidence, 8 * confidence.astype(np.float64))
    )
    assert np.abs(scaled - weighted).max() <= 1e-6
    assert rms(weighted - plain - (weighted - plain).mean()) > 1e-4
    ones = correct(image, mask, weights=np.ones(image.shape, dtype=np.uint8), **options)
    assert np.abs(np.log(ones.bias[mask]) - plain).max() <= 1e-6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights[1:], "the weights have shape"),
        (lambda weights: -weights, "must be finite and not below 0"),
        (lambda weights: weights / 0, "must be finite and not below 0"),
    ],
    ids=["shape", "negative", "not finite"],
)
@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value")
def test_unfit_weights_are_refused(small_head, confidence, change, message):
    with pytest.raises(ValueError, match=message):
        correct(*small_head, voxel_size_mm=(6, 6, 6), weights=change(confidence))


def test_weights_that_are_all_0_are_called_so(small_head):
    image, mask = small_head
    with pytest.raises(InputError, match="all weights in the mask are 0"):
        correct(image, mask, voxel_size_mm=(6, 6, 6), weights=np.zeros(image.shape))
    with pytest.raises(InputError, match="all weights in the mask are 0"):
        correct(image, mask, voxel_size_mm=(6, 6, 6), weights=~mask)
    with pytest.raises(InputError, match="the mask is empty"):
        correct(image, np.zeros(mask.shape), voxel_size_mm=(6, 6, 6), weights=np.ones(image.shape))


# Spline distance


DISTANCES = {
    "2 mm, 70 mm": ((2, 2, 2), 70, 4),
    "2 mm, 93.7 mm": ((2, 2, 2), 93.7, 3),
    "1.1 mm, 50 mm": ((1.1, 1.1, 1.1), 50, 4),
    "1.1x0.9x2.3 mm, 70 mm": ((1.1, 0.9, 2.3), 70, 3),
}


@pytest.mark.parametrize(
    ("schedule", "name"),
    [*((ONE_ITERATION, name) for name in DISTANCES), (REFINED, "1.1 mm, 50 mm"), (REFINED, "1.1x0.9x2.3 mm, 70 mm")],
    ids=lambda value: value if isinstance(value, str) else f"{sum(value.iterations)} iterations",
)
def test_spline_distance_agrees_with_ants(ants, scan, name, schedule):
    """With the array padded, shrunk and stretched as ANTs does it."""
    voxel_size_mm, distance, shrink_factor = DISTANCES[name]
    options = {"voxel_size_mm": voxel_size_mm, "distance": distance, "shrink_factor": shrink_factor}
    check_against_ants(ants, *scan("phantom"), schedule, **options)


@pytest.mark.parametrize("distance", [20, 17.3])
def test_our_virtual_domain_differs_from_ants_by_whole_voxels_alone(ants, small_head, distance):
    """Moved to where ANTs' padding puts it, our domain gives ANTs' field, and no voxel was padded."""
    image, mask = small_head
    shape, voxel_size_mm = image.shape, (0.9, 1.0, 1.1)
    ours = Mesh.of_distance(shape, voxel_size_mm, distance)
    spans, padding = ants_padding(shape, voxel_size_mm, distance)
    assert ours.spans == tuple(spans)
    rounded = Mesh(
        ours.spans,
        tuple(-float(before) for before, _ in padding),
        tuple((n + sum(p) - 1) / s for n, p, s in zip(shape, padding, spans, strict=True)),
    )
    parameters = lee_wolberg_shin((20, 20), mesh="refined", shrink_factor=1, convergence_threshold=0)
    samples = samples_of(image, mask, voxel_size_mm)
    reference = ants_log_field(ants, image, mask, parameters.iterations, distance, voxel_size_mm=voxel_size_mm)
    on_rounded = estimate_field(samples, parameters, mesh=rounded).field.log_at(samples.positions)
    check(on_rounded, reference, mask, REFINED)
    # and unmoved, it differs by little
    on_ours = estimate_field(samples, parameters, mesh=ours).field.log_at(samples.positions)
    check(on_ours, reference, mask, REFINED._replace(bar_rms=0.05 * on_ours[mask].std(), bar_max=np.inf))


def test_our_virtual_domain_ends_within_a_voxel_of_ants():
    rng = np.random.default_rng(8)
    for _ in range(1000):
        shape = rng.integers(2, 400, 3)
        voxel_size_mm, distance = rng.uniform(0.3, 6, 3), rng.uniform(5, 250)
        ours = Mesh.of_distance(shape, voxel_size_mm, distance)
        spans, padding = ants_padding(shape, voxel_size_mm, distance)
        assert ours.spans == tuple(spans)
        for n, start, length, count, (before, after) in zip(
            shape, ours.start, ours.span_voxels, spans, padding, strict=True
        ):
            assert abs(start + before) <= 0.75 + 1e-3
            assert abs(start + count * length - (n - 1 + after)) <= 0.75 + 1e-3
