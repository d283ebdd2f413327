"""The estimate against the truth, and against itself."""

from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from n4flow import InputError, N4Parameters, correct, estimate, kernels
from n4flow.core.field import Mesh
from n4flow.core.phantom import make_phantom
from n4flow.core.quadrature import MaskIntensity
from n4flow.core.samples import sample_positions
from n4flow.estimate import SPLIT_SAMPLES, Estimate, Iteration, estimate_field, estimate_twice
from n4flow.images.sampling import read_samples
from n4flow.kernels import plain
from n4flow.parameters import PRESETS
from n4flow.steps.correct import estimate_facts
from n4flow.steps.mask import otsu_threshold
from tests.anatomies import REAL_SCANS, real_scan
from tests.conftest import demeaned_error, lee_wolberg_shin, rms, samples_of
from tests.phantoms import family, light_sheet, make_scan
from tests.unit.references import direct_log_field, simpleitk_log_field


@pytest.fixture(scope="module")
def small_head(head):
    """Every fourth voxel of the phantom, with its Otsu mask."""
    image = head.image[::3, ::3, ::3]
    return image, image > otsu_threshold(image.ravel())


@pytest.mark.parametrize(("inu_percent", "where"), [(20, "head"), (40, "head"), (20, "brain"), (40, "brain")])
def test_defaults_come_closer_to_the_truth_than_simpleitk_at_its_defaults(tissues, inu_percent, where):
    head = make_phantom(tissues, 2.0, inu_percent=inu_percent, noise_percent=3, seed=100 + inu_percent)
    mask = head.brain if where == "brain" else head.image > otsu_threshold(head.image.ravel())
    ours = correct(head.image, mask, voxel_size_mm=(2, 2, 2), device="cpu")
    grid = np.ix_(*sample_positions(mask.shape, 4))
    # SimpleITK's 4 levels of 50 iterations, spans doubling from 1, every 4th voxel
    reference = np.exp(simpleitk_log_field(head.image[grid], mask[grid], [50] * 4, (1, 1, 1), threshold=1e-3))
    error = rms(demeaned_error(ours.bias[grid], head.bias[grid], head.brain[grid]))
    reference_error = rms(demeaned_error(reference, head.bias[grid], head.brain[grid]))
    # the average brain alone has more anatomy that is as smooth as a field
    assert error <= (0.3 if where == "head" else 0.7) * reference_error


@pytest.mark.parametrize("parameters", [N4Parameters(), lee_wolberg_shin((3, 3), mesh="refined")])
def test_two_runs_and_blocks_of_any_size_give_the_same_bits(small_head, parameters, monkeypatch):
    samples = samples_of(*small_head, voxel_size_mm=(6.0, 6.0, 6.0))
    first = estimate_field(samples, parameters).field.lattice
    assert_array_equal(estimate_field(samples, parameters).field.lattice, first)
    # blocks are a constant of the code; another constant may change no more than rounding
    monkeypatch.setattr(plain, "BLOCK_VOXELS", 1000)
    assert_allclose(estimate_field(samples, parameters).field.lattice, first, atol=1e-10)


BOTH_FITS = [N4Parameters(iterations=(5, 5), twicing=0.9, fwhm=(0.15, 0.08)), lee_wolberg_shin((10,))]


@pytest.mark.parametrize("parameters", BOTH_FITS)
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_mirrored_image_has_the_mirrored_field(small_head, axis, parameters):
    image, mask = small_head
    field = estimate_field(samples_of(image, mask, (6, 6, 6)), parameters).field.lattice
    mirrored = estimate_field(
        samples_of(np.flip(image, axis), np.flip(mask, axis), (6, 6, 6)), parameters
    ).field.lattice
    assert_allclose(np.flip(mirrored, axis), field, atol=1e-6)


@pytest.mark.parametrize("parameters", BOTH_FITS)
def test_voxels_outside_the_mask_and_the_intensity_scale_do_not_matter(small_head, parameters):
    image, mask = small_head
    field = estimate_field(samples_of(image, mask, (6, 6, 6)), parameters).field.lattice
    other = np.where(mask, image * 1e6, 12345.0)
    assert_allclose(estimate_field(samples_of(other, mask, (6, 6, 6)), parameters).field.lattice, field, atol=1e-6)


def test_history_tells_when_the_threshold_was_reached(small_head):
    for parameters in (N4Parameters(convergence_threshold=5e-3), lee_wolberg_shin(convergence_threshold=5e-3)):
        history = estimate_field(samples_of(*small_head, (6, 6, 6)), parameters).history
        for number in range(1, len(parameters.stages) + 1):
            stage = [line for line in history if line.stage == number]
            assert [line.iteration for line in stage] == list(range(1, len(stage) + 1))
            assert all(line.cv > 5e-3 for line in stage[:-1])
            assert stage[-1].cv <= 5e-3


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", ["plain", "compiled"])
def test_the_estimate_is_the_direct_one(head, weighted, name, monkeypatch):
    """Voxel by voxel with dense matrices, of a mask with a hole that ends before the image does."""
    monkeypatch.setattr(kernels, "COMPILED_VOXELS", 0 if name == "compiled" else 2**62)
    image, mask = head.image[::5, ::5, ::5], head.brain[::5, ::5, ::5].copy()
    mask[8:10, 8:12, 9:11] = False
    samples, parameters = samples_of(image, mask, (10.0, 10.0, 12.0)), N4Parameters()
    if weighted:
        weights = np.random.default_rng(1).uniform(0.1, 1, mask.shape).astype(np.float32)
        samples = replace(samples, weights=weights)
    places = np.nonzero(samples.mask)
    firsts, lasts = [p.min() for p in places], [p.max() for p in places]
    side = (np.count_nonzero(samples.mask) * 10 * 10 * 12) ** (1 / 3)
    expected, iterations = direct_log_field(
        samples.log_image[samples.mask],
        [(p - first) / (last - first) * 4 for p, first, last in zip(places, firsts, lasts, strict=True)],
        (4, 4, 4),
        [(last - first) * mm / side / 4 for first, last, mm in zip(firsts, lasts, (10, 10, 12), strict=True)],
        [(0.20, 0.45), (0.16, 0.54), (0.13, 0.63), (0.105, 0.72), (0.085, 0.81), (0.07, 0.9)],
        samples.weights[samples.mask] if weighted else None,
    )
    field, history, _ = estimate_field(samples, parameters)
    assert len(history) == iterations
    assert np.std(expected) > 0.05
    assert_allclose(field.log_at(samples.positions)[samples.mask], expected, atol=1e-7 if name == "plain" else 2e-6)


@pytest.mark.parametrize(("contrast", "field_sd"), [(1, 0.24), (0.5, 0.24), (0.5, 0)])
def test_a_light_sheet_object_of_micrometres_keeps_its_contrast_and_loses_its_shading(contrast, field_sd):
    scan = light_sheet(contrast, field_sd, 2)
    found = correct(scan.image, scan.mask, voxel_size_mm=scan.voxel_size_mm, device="cpu").bias
    assert rms(demeaned_error(found, np.exp(scan.log_bias), scan.brain)) <= (0.05 * field_sd or 0.006)


@pytest.mark.parametrize("unit", [1e-4, 1 / 30, 1e4])
def test_the_default_knows_no_millimetres(small_head, unit):
    lattices = [
        estimate_field(samples_of(*small_head, (size,) * 3), N4Parameters()).field.lattice for size in (6, 6 * unit)
    ]
    assert_allclose(*lattices, atol=1e-6)


@pytest.mark.parametrize("parameters", [N4Parameters(), N4Parameters.from_mapping({"preset": "fixed"})])
def test_background_around_the_image_does_not_matter(small_head, parameters):
    image, mask = small_head
    widths = [(1, 5), (0, 3), (7, 2)]
    inner = tuple(slice(before, before + n) for (before, _), n in zip(widths, image.shape, strict=True))
    fields = []
    for given in ((image, mask), (np.pad(image, widths), np.pad(mask, widths))):
        samples = samples_of(*given, (6, 6, 6))
        fields.append(estimate_field(samples, parameters).field.log_at(samples.positions))
    assert_allclose(fields[1][inner][mask], fields[0][mask], atol=1e-9)


@pytest.mark.parametrize("planes", [1, 2, 3, 4])
def test_a_mask_of_few_planes_gets_no_more_spans_than_they_can_tell(head, planes):
    image, mask = head.image[::2, ::2], head.brain[::2, ::2]
    thin = np.zeros_like(mask)
    thin[:, :, 46 : 46 + planes] = mask[:, :, 46 : 46 + planes]
    field = estimate_field(samples_of(image, thin, (4, 4, 2)), N4Parameters()).field
    assert field.mesh.spans == (4, 4, planes - 1)
    everywhere = field.log_at([np.arange(n) for n in image.shape])
    assert np.ptp(everywhere[thin]) < 1  # the phantom has 0.4
    assert np.ptp(everywhere) < 3  # nothing is made up between planes, or beyond


def test_samples_that_cannot_be_used_do_not_stretch_the_mesh(small_head, tmp_path):
    """As if the mask had left them out, also from files, where the mesh is laid before they are known."""
    image, mask = (np.pad(array, 4) for array in small_head)  # zeros around, in the mask or not
    nib.save(nib.Nifti1Image(image, np.eye(4)), tmp_path / "image.nii")
    fields = []
    for n, inside in enumerate((mask, mask | (image == 0) & (np.random.default_rng(0).random(mask.shape) < 0.1))):
        nib.save(nib.Nifti1Image(inside.astype(np.uint8), np.eye(4)), tmp_path / f"mask{n}.nii")
        samples, intensity = read_samples(tmp_path / "image.nii", tmp_path / f"mask{n}.nii", N4Parameters())
        field = estimate_field(samples, N4Parameters()).field
        assert_array_equal(intensity.nodes[0], MaskIntensity(image.shape, field.mesh).nodes[0])
        fields.append(field)
    assert fields[0].mesh == fields[1].mesh
    assert_array_equal(fields[1].lattice, fields[0].lattice)


def test_the_last_iteration_is_the_best_or_nearly(tissues):
    """One mesh, and a stage goes on from the last: the first stages alone are the same estimate, cut short."""
    whole = N4Parameters()
    for inu_percent, seed in ((20, 21), (40, 22)):
        head = make_phantom(tissues, 2.0, inu_percent=inu_percent, noise_percent=3, seed=seed)
        part = np.s_[::2, ::2, ::2]
        image, brain, bias = head.image[part], head.brain[part], head.bias[part]
        samples, errors = samples_of(image, image > otsu_threshold(image.ravel()), (4, 4, 4)), []
        for stages in range(1, len(whole.iterations) + 1):
            first = {name: getattr(whole, name)[:stages] for name in ("iterations", "fwhm", "twicing")}
            found = estimate_field(samples, replace(whole, **first)).field.log_at(samples.positions)
            errors.append(rms(demeaned_error(np.exp(found), bias, brain)))
        assert errors[-1] <= 1.1 * min(errors)


def test_a_mesh_of_too_many_control_points_for_the_penalised_fit_is_refused(small_head):
    with pytest.raises(InputError, match=r"3375 control points, more than the 2500 .* lower n4\.spans"):
        estimate_field(samples_of(*small_head), N4Parameters(spans=(12, 12, 12)))
    estimate_field(samples_of(*small_head), lee_wolberg_shin((1,), spans=(12, 12, 12)))


def message_of(image, mask, voxel_size_mm=(1, 1, 1), **parameters):
    with pytest.raises(InputError) as error:
        correct(
            image,
            mask,
            voxel_size_mm=voxel_size_mm,
            parameters=N4Parameters.from_mapping(parameters),
            device="cpu",
        )
    return str(error.value)


def test_shrinking_is_told_of_where_there_was_any(small_head):
    image, mask = small_head
    few = np.zeros_like(mask)
    few[8:20, 8:16, 8:16] = True
    assert message_of(image, few).endswith("inside the mask, fewer than 1000; give a larger mask")
    told = message_of(
        np.kron(image, np.ones((2, 2, 2))), np.kron(few, np.ones((2, 2, 2))), preset="itk", shrink_factor=2
    )
    assert told.endswith(
        "inside the mask after shrinking, fewer than 1000; give a larger mask or an n4.shrink_factor below 2"
    )


@pytest.mark.parametrize(
    ("size_mm", "parameters", "advice"),
    [
        (12, {"preset": "linumpy", "shrink_factor": 1}, "raise n4.spline_distance_mm from 10"),
        (
            12,
            {"preset": "linumpy", "mesh": "refined", "shrink_factor": 1},
            "raise n4.spline_distance_mm from 10, or give n4.iterations for fewer than 3 stages",
        ),
        (
            1,
            {"preset": "itk", "spans": [9, 1, 1], "shrink_factor": 1},
            "lower n4.spans from [9, 1, 1], or give n4.iterations for fewer than 4 stages",
        ),
        (1, {"spans": [12, 12, 12]}, "lower n4.spans from [12, 12, 12], or set n4.fit to lee-wolberg-shin"),
        (1, {"spline_distance_mm": 2}, "raise n4.spline_distance_mm from 2, or set n4.fit to lee-wolberg-shin"),
    ],
)
def test_a_mesh_that_does_not_fit_is_told_by_what_is_in_force(small_head, size_mm, parameters, advice):
    image, mask = small_head
    assert message_of(image, mask, (size_mm,) * 3, **parameters).rpartition("; ")[2] == advice


def test_a_mesh_that_is_too_fine_for_the_shrunken_image_may_be_shrunken_less(small_head):
    image = np.kron(small_head[0], np.ones((2, 2, 2)))
    advice = message_of(image, None, (6, 6, 6), preset="linumpy").rpartition("; ")[2]
    assert advice == "raise n4.spline_distance_mm from 10, or set n4.shrink_factor below 4"


def test_too_few_samples_one_intensity_and_too_fine_a_mesh_are_refused(small_head):
    image, mask = small_head
    few = np.zeros_like(mask)
    few[10:15, 10:15, 10:15] = True
    with pytest.raises(InputError, match=r"only 125 usable samples .* fewer than 1000; give a larger mask"):
        estimate_field(samples_of(image, few), N4Parameters())
    with pytest.raises(InputError, match="fewer than 1000; leave it out: 9 x 8 x 7 voxels are too few for a field"):
        estimate_field(samples_of(image[:9, :8, :7], np.ones((9, 8, 7), dtype=bool)), N4Parameters())
    with pytest.raises(InputError, match="the same intensity"):
        estimate_field(samples_of(np.full_like(image, 7.0), np.ones_like(mask)), N4Parameters())
    with pytest.raises(InputError, match="spans along axis 0"):
        estimate_field(samples_of(image, mask), N4Parameters(spline_distance_mm=0.5))
    with pytest.raises(InputError, match="spans along axis 0"):
        estimate_field(samples_of(image, mask), N4Parameters(spans=(99, 2, 2), domain="image"))
    with pytest.raises(InputError, match="spans along axis 0"):
        estimate_field(samples_of(image, mask), N4Parameters(), mesh=Mesh.of_grid(image.shape, (99, 2, 2)))


@pytest.mark.data
@pytest.mark.parametrize("name", REAL_SCANS)
def test_every_second_voxel_gives_the_field_of_the_defaults_samples(name):
    scan = real_scan(name)
    ours, second = (
        np.log(
            correct(scan.image, scan.mask, voxel_size_mm=scan.voxel_size_mm, parameters=parameters, device="cpu").bias
        )[scan.mask]
        for parameters in (N4Parameters(), N4Parameters(shrink_factor=2))
    )
    # of the perfusion scan, every 2nd voxel is one of 3,000
    assert np.std(ours - second) <= (0.03 if name == "ASL mean" else 5e-3)


def test_repeatability_is_the_difference_of_the_fields_of_blocks_of_planes(small_head):
    image, mask = small_head
    samples = samples_of(image, mask, (6, 6, 6))
    axis = int(np.argmax(image.shape))
    mesh, fields = estimate_field(samples, N4Parameters()).field.mesh, []
    middle = (image.shape[axis] - 1) / 2
    for turn in (0, 1):
        planes = [plane for plane in range(image.shape[axis]) if abs(plane - middle) // 4 % 2 == turn]
        half = tuple(planes if n == axis else slice(None) for n in range(3))
        positions = tuple(p[along] for p, along in zip(samples.positions, half, strict=True))
        part = replace(samples, log_image=samples.log_image[half], mask=samples.mask[half], positions=positions)
        fields.append(estimate_field(part, N4Parameters(), mesh=mesh).field.log_at(samples.positions)[samples.mask])
    found = estimate_twice(samples, N4Parameters()).repeatability
    assert found == pytest.approx(np.std(fields[0] - fields[1]), rel=0.01)
    assert found > 0


def test_repeatability_of_what_has_no_half_is_not_known(small_head):
    image, mask = small_head
    few = samples_of(image[10:22, 10:22, 10:20], np.ones((12, 12, 10), dtype=bool), (6, 6, 6))
    assert estimate_field(few, N4Parameters()).history
    alone = estimate_twice(few, N4Parameters())
    assert alone.repeatability is None
    np.testing.assert_array_equal(alone.field.lattice, estimate_field(few, N4Parameters()).field.lattice)
    # a mesh that fits all samples, and not every other one
    fine = lee_wolberg_shin((2,), spans=(30, 30, 30), domain="image")
    assert estimate_twice(samples_of(image, mask, (6, 6, 6)), fine).repeatability is None


def test_a_width_that_does_not_settle_is_left_out(small_head, caplog):
    caplog.set_level("INFO", logger="n4flow")
    samples = samples_of(*small_head, (6, 6, 6))
    kept = N4Parameters(fwhm=(0.2, 0.15), twicing=0.5, iterations=(50, 50))
    restless = N4Parameters(fwhm=(0.2, 0.15, 0.08), twicing=0.5, iterations=(50, 50, 1))
    one, other = (estimate_field(samples, parameters) for parameters in (kept, restless))
    assert "the field of stage 2 is kept, for the next does not settle" in caplog.text
    assert_array_equal(one.field.lattice, other.field.lattice)
    assert one.history == other.history
    # a first stage that is cut short is none that has settled
    first = N4Parameters(fwhm=(0.2, 0.15), twicing=0.5, iterations=(2, 2))
    assert {line.stage for line in estimate_field(samples, first).history} == {1, 2}


def strong_and_weak():
    """Heads under fields of 150 and 40 % INU, and a T2-like one whose scalp a wide stage takes for white matter."""
    found = family(["mni"], (40, 100, 150), range(10, 20, 2), ["head"])
    wanted = {("T1", 150, 10): True, ("T1", 100, 10): False, ("T2", 40, 10): False}
    return [
        pytest.param(case, wanted[key], id=f"{case.contrast}, {case.inu_percent} % INU")
        for case in found
        if (key := (case.contrast, case.inu_percent, case.seed)) in wanted
    ]


@pytest.mark.parametrize(("case", "wide"), strong_and_weak())
def test_a_wider_stage_counts_where_a_field_is_strong_and_where_it_is_not_it_would_do_no_good(case, wide, monkeypatch):
    scan = make_scan(case)
    positions = sample_positions(scan.image.shape, 2)
    grid = np.ix_(*positions)

    def corrected(**settings):
        parameters = N4Parameters(shrink_factor=2, **settings)
        found = correct(scan.image, scan.mask, voxel_size_mm=scan.voxel_size_mm, parameters=parameters, device="cpu")
        error = np.std((found.field.log_at(positions) - scan.log_bias[grid])[scan.brain[grid]])
        return {line.stage for line in found.history}, error

    stages, error = corrected()
    assert (0 in stages) == wide
    without, error_without = corrected(strong_fwhm=None)
    assert 0 not in without
    if wide:
        assert error < 0.1 * error_without
        return
    assert error == error_without
    monkeypatch.setattr(estimate, "SLOW_START", 0)
    monkeypatch.setattr(estimate, "SHARPER", -np.inf)
    always, error_with = corrected()
    assert 0 in always
    assert error < 1.05 * error_with


def test_no_stage_comes_before_the_first_of_itks_fit_or_of_one_as_wide():
    assert N4Parameters().strong_stage == N4Parameters().stages[0]._replace(fwhm=0.45)
    for parameters in (N4Parameters(**PRESETS["itk"]), N4Parameters(strong_fwhm=None), N4Parameters(strong_fwhm=0.2)):
        assert parameters.strong_stage is None


def test_of_a_very_strong_field_on_a_blurred_head_less_is_left_than_by_simpleitk(tissues):
    head = make_phantom(tissues, 2.0, inu_percent=180, noise_percent=1, seed=3)
    ours = correct(head.image, head.brain, voxel_size_mm=(2, 2, 2), device="cpu")
    grid = np.ix_(*sample_positions(head.brain.shape, 4))
    reference = np.exp(simpleitk_log_field(head.image[grid], head.brain[grid], [50] * 4, (1, 1, 1), threshold=1e-3))
    error = rms(demeaned_error(ours.bias[grid], head.bias[grid], head.brain[grid]))
    assert error < 0.7 * rms(demeaned_error(reference, head.bias[grid], head.brain[grid]))


@pytest.mark.data
@pytest.mark.parametrize("block", [(2, 2, 2), (3, 3, 3), (1, 1, 6)])
def test_a_head_of_large_voxels_has_much_the_field_that_it_has_of_small_ones(real_scans, block):
    scan = nib.load(real_scans / "sub-01/anat/sub-01_T1w.nii.gz")
    image = np.asarray(scan.dataobj, dtype=np.float32)
    image = image[tuple(slice(n // k * k) for n, k in zip(image.shape, block, strict=True))]
    averaged = image.reshape([size for n, k in zip(image.shape, block, strict=True) for size in (n // k, k)])
    fields = []
    mask = (averaged := averaged.mean(axis=(1, 3, 5))) > otsu_threshold(averaged.ravel())
    for array, size in ((image, (1, 1, 1)), (averaged, block)):
        sizes = tuple(k * float(mm) for k, mm in zip(size, scan.header.get_zooms(), strict=True))
        found = correct(array, array > otsu_threshold(array.ravel()), voxel_size_mm=sizes, device="cpu").bias
        part = tuple(slice(k // 2 if size == (1, 1, 1) else 0, None, k if size == (1, 1, 1) else 1) for k in block)
        fields.append(np.log(found[part][mask]))
    assert np.std(fields[0] - fields[1]) < 0.1


def finer(*arrays):
    """Each voxel as 4 x 4 x 4 of them."""
    return [np.kron(array, np.ones((4, 4, 4), dtype=array.dtype)) for array in arrays]


def test_field_is_the_mean_of_two_halves_where_there_are_many_samples(small_head):
    image, mask = small_head
    samples = samples_of(*finer(image, mask), (1.5, 1.5, 1.5))
    assert np.count_nonzero(samples.mask) >= SPLIT_SAMPLES
    found = estimate_twice(samples, N4Parameters())
    halves = [estimate_field(half, N4Parameters(), mesh=found.field.mesh) for half in samples.halves()]
    np.testing.assert_array_equal(found.field.lattice, np.mean([half.field.lattice for half in halves], axis=0))
    for number, half in enumerate(halves, start=1):
        assert [line._replace(half=0) for line in found.history if line.half == number] == half.history


@pytest.mark.parametrize("many", [False, True])
def test_field_is_of_all_samples_where_they_are_few_or_it_is_itks(small_head, many):
    image, mask = small_head
    if many:
        image, mask = finer(image, mask)
    samples = samples_of(image, mask, (3, 3, 3))
    assert (np.count_nonzero(samples.mask) >= SPLIT_SAMPLES) == many
    parameters = N4Parameters(**PRESETS["itk"]) if many else N4Parameters()
    found, whole = (f(samples, parameters) for f in (estimate_twice, estimate_field))
    np.testing.assert_array_equal(found.field.lattice, whole.field.lattice)
    assert found.history == whole.history
    assert found.repeatability > 0


@pytest.mark.parametrize(("levels", "left"), [(7, 0.5), (10, 0.4), (20, 0.4), (40, 0.4)])
def test_few_grey_levels_still_show_the_field(tissues, levels, left):
    head = make_phantom(tissues, 2.0, inu_percent=60, noise_percent=3, seed=5)
    image = np.rint(head.image / np.percentile(head.image[head.brain], 99) * levels)
    mask = head.brain & (image > 0)
    found = np.log(correct(image, mask, voxel_size_mm=(2, 2, 2), device="cpu").bias[mask])
    truth = np.log(head.bias[mask])
    # without spreading, a few spikes are as sharp as can be: nothing is found
    assert np.std(found - truth) < left * np.std(truth)
    samples = samples_of(image, mask)
    spread = samples.cropped().spread()
    steps = np.abs(spread.log_image - samples.cropped().log_image)[spread.mask]
    values = np.unique(samples.log_image[samples.mask])
    assert steps.max() <= np.diff(values).max() / 2 + 1e-12
    assert len(np.unique(spread.log_image[spread.mask])) > 100 * levels


def test_many_grey_levels_are_left_alone(small_head):
    samples = samples_of(*small_head)
    assert samples.spread() is samples


@pytest.mark.parametrize("odd", [8.0, 0.37])
def test_single_voxels_off_the_scale_do_not_keep_grey_levels_from_being_spread(small_head, odd):
    image, mask = small_head
    levels = np.rint(image / np.percentile(image[mask], 99) * 20)
    mask = mask & (levels > 0)
    expected = samples_of(levels, mask).spread().log_image
    place = tuple(np.argwhere(mask)[100])
    levels[place] += odd * 20
    found = samples_of(levels, mask).spread().log_image
    found[place] = expected[place] = 0
    assert_allclose(found, expected, atol=1e-9)


def test_the_sidecar_tells_whether_the_stage_for_strong_fields_converged(small_head):
    samples = samples_of(*small_head, (6, 6, 6))
    parameters = N4Parameters(iterations=(5, 5), fwhm=(0.2, 0.1), twicing=0)
    field = estimate_field(samples, parameters).field
    for cv, converged in ((0.5, [False, True, True]), (1e-4, [True, True, True])):
        history = [Iteration(0, 1, cv), Iteration(1, 1, 1e-4), Iteration(2, 1, 1e-4)]
        assert estimate_facts(Estimate(field, history), samples, parameters)["Converged"] == converged
    assert estimate_facts(Estimate(field, history[1:]), samples, parameters)["Converged"] == [True, True]
